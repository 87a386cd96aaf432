"""What libraries print while a command runs."""

from __future__ import annotations

import logging
import warnings


def silence_libraries(verbose: bool) -> None:
    """Silence what transformers warns about while a model is built: it says nothing about its batch size."""
    import transformers

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
