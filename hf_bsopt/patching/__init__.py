"""The CONFIG patch: the batch size that was found, written into a script, a notebook, a YAML or JSON file."""

from .edit_plan import Change
from .patcher import PatchResult, patch
from .setting_names import parse_keys

__all__ = ["Change", "PatchResult", "parse_keys", "patch"]
