"""In scripts and notebooks like those on Kaggle the values change in place, and no other byte."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pytest

from hf_bsopt.patching import patch

HERE = Path(__file__).parent
VALUES = {"batch_size": 48, "gradient_accumulation_steps": 3}
Replacements = list[tuple[str, str]]

SCRIPTS: dict[str, tuple[Mapping[str, float], Replacements]] = {
    "config_dict": (
        VALUES | {"learning_rate": 3e-5, "max_length": 256},
        [
            ("'batch_size' : 16,  ", "'batch_size' : 48,  "),
            ("'gradient_accumulation_steps' : 4,", "'gradient_accumulation_steps' : 3,"),
            ("'learning_rate' : 2e-5", "'learning_rate' : 3e-05"),
            ("'max_length' : 512", "'max_length' : 256"),
        ],
    ),
    "class_cfg": (
        VALUES,
        [
            ("\n    batch_size=8 # per step", "\n    batch_size=48 # per step"),
            ("gradient_accumulation_steps=1\n", "gradient_accumulation_steps=3\n"),
        ],
    ),
    "dataclass_arguments": (
        VALUES | {"warmup_steps": 0, "learning_rate": 1e-5, "max_length": 128},
        [
            ("train_batch_size: int = field(default=16", "train_batch_size: int = field(default=48"),
            ("warmup_steps: int = field(default=100)", "warmup_steps: int = field(default=0)"),
            ("lr: float = 3e-5", "lr: float = 1e-05"),
            ("default=256", "default=128"),
            (
                "per_device_train_batch_size=run_args.train_batch_size,\n",
                "per_device_train_batch_size=run_args.train_batch_size,\n        gradient_accumulation_steps=3,\n",
            ),
        ],
    ),
    "argparse_loop": (
        VALUES,
        [
            ("        default=16,\n", "        default=48,\n"),
            ('"--grad-accum-steps", type=int, default=2', '"--grad-accum-steps", type=int, default=3'),
        ],
    ),
    "training_arguments": (
        VALUES,
        [
            (
                "per_device_train_batch_size=8,",
                "gradient_accumulation_steps=3, per_device_train_batch_size=48,",
            )
        ],
    ),
    "constants": (VALUES, [("EPOCHS = 16, 3", "EPOCHS = 48, 3"), ("ACCUMULATE = 2", "ACCUMULATE = 3")]),
    "nested_config": (
        VALUES,
        [
            ("cfg.train.batch_size = 4 ", "cfg.train.batch_size = 48 "),
            ("gradient_accumulation_steps=8", "gradient_accumulation_steps=3"),
        ],
    ),
    "lora_constants": (
        VALUES,
        [("MICRO_BATCH_SIZE = 4", "MICRO_BATCH_SIZE = 48"), ("ACCUMULATION_STEPS = 32", "ACCUMULATION_STEPS = 3")],
    ),
    "lightning_module": (
        VALUES | {"learning_rate": 1e-4},
        [
            ("train_bs = 8", "train_bs = 48"),
            ("accumulate_grad_batches=4", "accumulate_grad_batches=3"),
            ("lr = 2e-5", "lr = 0.0001"),
        ],
    ),
    "sft_deepspeed": (
        VALUES | {"warmup_steps": 10},
        [
            ("            2  # fits", "            48  # fits"),
            ("gradient_accumulation_steps=16", "gradient_accumulation_steps=3"),
            ("warmup_steps=0", "warmup_steps=10"),
        ],
    ),
}

NOTEBOOKS: dict[str, tuple[Mapping[str, float], Replacements]] = {
    "config_dict": (
        VALUES,
        [
            (r"    \"batch_size\": 16,\n", r"    \"batch_size\": 48,\n"),
            (r"    \"gradient_accumulation_steps\": 2,\n", r"    \"gradient_accumulation_steps\": 3,\n"),
        ],
    ),
    "class_cfg": (
        VALUES,
        [("train_bs : int = 4 ", "train_bs : int = 48 "), ("accumulate : int = 8", "accumulate : int = 3")],
    ),
    "constants": (
        {"batch_size": 48, "max_length": 64},
        [("BATCH_SIZE = 32", "BATCH_SIZE = 48"), ("LEN = 128", "LEN = 64")],
    ),
    "writefile": (
        VALUES,
        [
            ("'--batch_size', type=int, default=8", "'--batch_size', type=int, default=48"),
            ("'--accumulation_steps', type=int, default=4", "'--accumulation_steps', type=int, default=3"),
        ],
    ),
    "trainer": (
        VALUES,
        [
            (
                '"    per_device_train_batch_size=16,\\n",\n',
                '"    per_device_train_batch_size=48,\\n",\n        "    gradient_accumulation_steps=3,\\n",\n',
            )
        ],
    ),
    "format_3": (
        {"batch_size": 48, "learning_rate": 0.05},
        [("size = 20", "size = 48"), ("rate = 0.1", "rate = 0.05")],
    ),
    "shell_flags": (
        VALUES | {"learning_rate": 1e-4},
        [
            ("size 16 \\\\\\n", "size 48 --gradient_accumulation_steps 3 \\\\\\n"),
            ("learning_rate 5e-5", "learning_rate 0.0001"),
        ],
    ),
    "parse_args": (
        VALUES | {"learning_rate": 1e-4},
        [
            (r"\"--batch_size\", \"16\"", r"\"--batch_size\", \"48\""),
            ("--accum_iter=4", "--accum_iter=3"),
            ("'--lr', '3e-5'", "'--lr', '0.0001'"),
        ],
    ),
    "deepspeed": (
        VALUES | {"learning_rate": 3e-6},
        [("dict(bs=2, accum=8, lr=1e-5)", "dict(bs=48, accum=3, lr=3e-06)")],
    ),
    "trl": (
        VALUES,
        [("train_batch_size = 2 ", "train_batch_size = 48 "), ("accumulation_steps=16", "accumulation_steps=3")],
    ),
}


def expected(content: bytes, replacements: Replacements, encoding: str) -> bytes:
    """Return the content with each replacement made; assert that each old text occurs exactly once."""
    for old, new in replacements:
        assert content.count(old.encode(encoding)) == 1, old
        content = content.replace(old.encode(encoding), new.encode(encoding))
    return content


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_the_given_values_change_in_a_sample_script_and_a_second_patch_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    values, replacements = SCRIPTS[name]
    path = tmp_path / f"{name}.py"
    shutil.copy(HERE / "scripts" / path.name, path)
    before = path.read_bytes()
    patched = patch(path, values)
    assert path.read_bytes() == expected(before, replacements, "latin-1" if name == "constants" else "utf-8")
    assert ast.parse(path.read_bytes())
    assert {change.new for change in patched.changes} == {str(value) for value in values.values()}
    again = patch(path, values)
    assert (again.diff, again.changes, again.is_written) == ("", (), False)
    assert "already up to date" in str(again)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_only_the_given_values_change_in_a_sample_notebook_and_a_second_patch_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    values, replacements = NOTEBOOKS[name]
    path = tmp_path / f"{name}.ipynb"
    shutil.copy(HERE / "notebooks" / path.name, path)
    before = path.read_bytes()
    patched = patch(path, values)
    assert path.read_bytes() == expected(before, replacements, "utf-8")
    nbformat.validate(nbformat.reads(path.read_text(encoding="utf-8"), as_version=json.loads(before)["nbformat"]))
    assert {change.new for change in patched.changes} == {str(value) for value in values.values()}
    again = patch(path, values)
    assert (again.diff, again.changes, again.is_written) == ("", (), False)


@pytest.mark.parametrize("path", sorted((HERE / "scripts").iterdir()) + sorted((HERE / "notebooks").iterdir()), ids=str)
def test_a_dry_run_gives_the_same_diff_and_writes_nothing(path: Path, tmp_path: Path) -> None:
    values = (SCRIPTS | {f"{name}.ipynb": row for name, row in NOTEBOOKS.items()})[
        path.stem if path.suffix == ".py" else path.name
    ][0]
    copy = Path(shutil.copy(path, tmp_path))
    before = copy.read_bytes()
    dry = patch(copy, values, dry_run=True)
    assert (copy.read_bytes(), dry.is_written) == (before, False)
    assert patch(copy, values).diff == dry.diff != ""
