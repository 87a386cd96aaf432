"""Silence the output of libraries while a command runs."""

from __future__ import annotations

import logging
import warnings

from .._utils.terminal import printable


class _Printable(logging.Formatter):
    """Formatter that does not pass control characters in names on to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def silence_libraries(verbose: bool) -> None:
    """Silence warnings of transformers while a model is built: they do not concern the batch size."""
    import transformers

    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_Printable("%(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        return
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
