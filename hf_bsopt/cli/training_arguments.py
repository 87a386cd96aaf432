"""Read the values of a saved TrainingArguments file that decide how much memory is used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .._utils.files import read_text
from ..errors import UsageError

SAME_NAME = (
    "fp16",
    "bf16",
    "gradient_accumulation_steps",
    "learning_rate",
    "torch_compile",
    "use_liger_kernel",
)
OTHER_NAME = {
    "per_device_eval_batch_size": "check_evaluation",
    "optim": "optimizer",
    "gradient_checkpointing": "activation_checkpointing",
    "activation_checkpointing": "activation_checkpointing",
}

FLAGS = ("fp16", "bf16", "torch_compile", "use_liger_kernel", "gradient_checkpointing", "activation_checkpointing")
SHARDING = ("deepspeed", "fsdp")
MICRO_BATCH = "per_device_train_batch_size"


def read_training_arguments(path: Path, accumulation: int | None = None) -> dict[str, Any]:
    """Read the options from a file: JSON as ``TrainingArguments.to_json_string`` writes it, or YAML.

    The effective batch of one GPU is kept. ``accumulation``: replaces that of the file. Raises UsageError for an
    invalid file or value.
    """
    values = {name: value for name, value in _read(path).items() if value is not None}
    for name in SHARDING:
        if values.get(name):
            raise UsageError(
                f"{path} sets {name}: training sharded over GPUs cannot be predicted yet; without it, the prediction "
                f"is for a whole model on each GPU"
            )
    for name in (*SAME_NAME, *OTHER_NAME, MICRO_BATCH):
        if name in values:
            _check(path, name, values[name])
    if accumulation is not None:
        values["gradient_accumulation_steps"] = accumulation
    found: dict[str, Any] = {name: values[name] for name in SAME_NAME if name in values}
    found |= {ours: values[theirs] for theirs, ours in OTHER_NAME.items() if theirs in values}
    if not found.get("fp16") and not found.get("bf16"):
        found["precision"] = "fp32"
    if MICRO_BATCH in values:
        found["effective_batch_size"] = values[MICRO_BATCH] * found.pop("gradient_accumulation_steps", 1)
    return found


def _problem(error: Exception) -> str:
    """Return what is wrong with the text in one line, without the lines of the file that PyYAML shows."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else problem


def _is_number_above_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check(path: Path, name: str, value: object) -> None:
    if name in FLAGS:
        wrong, wanted = not isinstance(value, bool), "true or false"
    elif name == "optim":
        wrong, wanted = not isinstance(value, str), "a name"
    elif name == "learning_rate":
        wrong, wanted = not _is_number_above_zero(value), "a number above 0"
    else:
        wrong, wanted = isinstance(value, bool) or not isinstance(value, int) or value < 1, "a whole number from 1 on"
    if wrong:
        raise UsageError(f"{path}: {name} is {wanted}, not {value!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UsageError(f"--training_args {path}: there is no such file") from None
    except OSError as error:
        raise UsageError(f"--training_args {path} cannot be read: {error.strerror}") from None
    except ValueError:  # not UTF-8
        raise UsageError(
            f"--training_args {path} is not JSON or YAML: in the script that makes the arguments, save them with "
            f"Path('args.json').write_text(args.to_json_string()) (a training_args.bin is a pickle, which can run any "
            f"code when it is loaded)"
        ) from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # the errors of yaml and json have no common class
        raise UsageError(f"--training_args {path}: {_problem(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--training_args {path} is not a mapping of names to values")
    return values
