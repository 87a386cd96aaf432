"""Write the batch size that was found into a script, a notebook, a shell launcher or a configuration file.

Entry point: `patch` in patcher.py.
"""

from .edit_plan import Change
from .patcher import PatchResult, check_patchable, patch
from .setting_names import parse_keys

__all__ = ["Change", "PatchResult", "check_patchable", "parse_keys", "patch"]
