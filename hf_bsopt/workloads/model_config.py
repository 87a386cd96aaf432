"""A model's configuration, from a folder, the catalog or the hub, and what follows from it. Weights are never read."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .._utils.files import is_folder
from ..data import catalog
from ..errors import UnknownModelError, UsageError
from .config_values import check_values, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model: from a folder, the catalog or the hub, in this order.

    Raises UsageError for a folder without a valid configuration, and for a model that needs ``trust_remote_code``;
    UnknownModelError if the name is not found.
    """
    from transformers import AutoConfig

    if is_folder(model) or model.endswith("config.json"):
        return _config_of_folder(Path(model))
    entry = catalog.model_entry(model)
    if entry is not None:
        return AutoConfig.for_model(**entry.config)
    try:
        offline = not is_hub_reachable()
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=offline)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(f"{model} comes with its own code: add --trust_remote_code if you trust it") from error
        nearest = ", ".join(catalog.nearest_models(model))
        raise UnknownModelError(
            f"{model!r} is not in the catalog, is not a folder with a config.json, and could not be loaded from the "
            f"hub. Nearest names: {nearest}"
        ) from error
    except Exception as error:  # of a configuration that is invalid, or of code that a repository brings
        raise UsageError(f"the configuration of {model} cannot be loaded: {in_one_line(error)}") from error


def is_hub_reachable() -> bool:
    """Return True if the hub can be reached. Tries once: without a network the hub's own client would retry for half a
    minute. Behind a proxy the hub counts as reachable.
    """
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def _config_of_folder(folder: Path) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"no config.json in {folder}; save one with config.save_pretrained({str(folder)!r})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        check_values(values, str(path))
        if not isinstance(values, dict) or "model_type" not in values:
            raise UsageError(f"{path} has no model_type, so the architecture is unknown")
        if values["model_type"] not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(values["model_type"]), list(CONFIG_MAPPING), n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UsageError(f"{path}: transformers has no model_type {values['model_type']!r}{hint}")
        if "auto_map" in values:
            values = {name: value for name, value in values.items() if name != "auto_map"}
        return AutoConfig.for_model(**values)
    except UsageError:
        raise
    except Exception as error:  # each architecture raises its own errors for invalid values
        raise UsageError(f"{path} is not a valid model configuration: {in_one_line(error)}") from error
