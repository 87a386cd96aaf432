"""Silence the output of libraries while a command runs."""

from __future__ import annotations

import logging
import warnings


def silence_libraries(verbose: bool) -> None:
    """Silence warnings of transformers while a model is built: they do not concern the batch size."""
    import transformers

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
