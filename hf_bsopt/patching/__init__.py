"""The CONFIG patch: the batch size that was found, written into a script, a notebook, a YAML or JSON file."""

from .keys import parse_keys
from .patcher import Patched, patch
from .planning import Change

__all__ = ["Change", "Patched", "parse_keys", "patch"]
