"""An argument parser whose errors are UsageErrors, which the command line prints in one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import UsageError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, which raises UsageError instead of exiting."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
