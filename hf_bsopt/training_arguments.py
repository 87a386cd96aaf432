"""A saved TrainingArguments file, read for what decides about memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UsageError

SAME_NAME = (
    "fp16",
    "bf16",
    "gradient_accumulation_steps",
    "learning_rate",
    "per_device_eval_batch_size",
    "torch_compile",
    "use_liger_kernel",
)
OTHER_NAME = {
    "optim": "optimizer",
    "gradient_checkpointing": "activation_checkpointing",
    "activation_checkpointing": "activation_checkpointing",
}


def read_training_arguments(path: Path) -> dict[str, Any]:
    """The command line's values that this file means; the effective batch that it asks for is kept.

    JSON as ``TrainingArguments.to_json_string`` writes it, or YAML. Raises UsageError for anything else.
    """
    values = _read(path)
    found: dict[str, Any] = {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    for theirs, ours in OTHER_NAME.items():
        if values.get(theirs) is not None:
            found[ours] = values[theirs]
    if not found.get("fp16") and not found.get("bf16"):
        found["precision"] = "fp32"
    micro_batch = values.get("per_device_train_batch_size")
    if micro_batch is not None:
        accumulation = found.pop("gradient_accumulation_steps", 1)
        for name, value in (
            ("per_device_train_batch_size", micro_batch),
            ("gradient_accumulation_steps", accumulation),
        ):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{path}: {name} is a whole number from 1 on, not {value!r}")
        found["effective_batch_size"] = micro_batch * accumulation
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--training_args {path}: there is no such file") from None
    except (UnicodeDecodeError, OSError):
        raise UsageError(
            f"--training_args {path} is not JSON or YAML; a training_args.bin can be saved as JSON with "
            f"Path('args.json').write_text(torch.load(path, weights_only=False).to_json_string())"
        ) from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # yaml's and json's own errors share no class
        raise UsageError(f"--training_args {path}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--training_args {path} holds no names and values")
    return values
