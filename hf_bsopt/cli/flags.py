"""The flags that only the command line has; the others are derived from :mod:`hf_bsopt.options`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def flag(default: Any = None, *aliases: str) -> Any:
    """Return the field of a flag that only the command line has."""
    metadata = {"aliases": aliases}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelFlags:
    """The model, and shorthands for its options."""

    model: str | None = flag(None, "model_name_or_path")
    """hub id, short name, or a folder with a config.json"""
    fp16: bool = flag(False)
    """the same as --precision fp16"""
    bf16: bool = flag(False)
    """the same as --precision bf16"""
    training_args: str | None = flag()
    """a saved TrainingArguments, JSON or YAML: its values are the defaults"""
    use_liger_kernel: bool = flag(False)
    """not supported: the message says what to do instead (docs/cli.md)"""
    torch_compile: bool = flag(False)
    """not supported: the message says what to do instead (docs/cli.md)"""


@dataclass(frozen=True)
class TableFlags:
    """A table of several models or GPUs."""

    models: list[str] = flag([])
    """several models: a table of batch sizes by model, length and GPU"""
    gpus: list[str] = flag([])
    """several GPUs, for the table"""
    format: str = flag("text")
    """format of the table: text, markdown or csv"""


@dataclass(frozen=True)
class DatasetFlags:
    """The dataset whose lengths are measured."""

    dataset: list[str] = flag([])
    """measure the lengths of its sequences: files, a saved dataset, or a hub name"""
    text_column: list[str] = flag(["text"])
    """text columns of the dataset: one, or two for pairs"""
    tokenizer: str | None = flag(None, "tokenizer_name")
    """a folder, a tokenizer.json or a hub id; default: the model's"""
    split: str = flag("train")
    """split of the dataset"""
    sample: int = flag(10_000)
    """number of rows that are tokenized at most"""
    packing: bool = flag(False)
    """sequences are packed to max_length"""


@dataclass(frozen=True)
class OutputFlags:
    """The output: files to write, and how much is printed."""

    json: str | None = flag()
    """write everything to this file"""
    plot: str | None = flag()
    """draw memory against batch size, and over the step, to this .png, .svg or .pdf"""
    html: str | None = flag()
    """write the report to this file as a page of its own, with pictures"""
    patch: str | None = flag()
    """change the batch size in this script, notebook, launcher or configuration: see docs/patching.md"""
    key: list[str] = flag([])
    """where in it, if it is not found by its name: NAME, or accumulation=NAME, NAME:LINE"""
    dry_run: bool = flag(False)
    """print what --patch would change, and change nothing"""
    advise: bool | None = flag()
    """predict what else would make room; False: never, even if nothing fits. See docs/advice.md"""
    verbose: bool = flag(False, "v")
    """print all of the report, and log each size that is run"""
    quiet: bool = flag(False, "q")
    """print only the CONFIG lines"""


FLAG_CLASSES: tuple[type, ...] = (ModelFlags, TableFlags, DatasetFlags, OutputFlags)
