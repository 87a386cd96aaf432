"""The folders in which this package caches files between runs."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder(name: str) -> Path:
    """Return the cache folder ``name``: under HF_BSOPT_CACHE if that is set, else in the user's cache folder.

    The folder is not created.
    """
    return Path(os.environ.get("HF_BSOPT_CACHE") or _default_parent()) / name


def _default_parent() -> str:
    try:
        import platformdirs
    except ImportError:
        return str(Path.home() / ".cache" / "hf_bsopt")  # not /tmp: other users must not be able to write there
    return platformdirs.user_cache_dir("hf_bsopt")
