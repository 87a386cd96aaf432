"""Every option once: claims about `hf_bsopt.options` and what is derived from it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_bsopt
from hf_bsopt import UsageError, find_batch_size
from hf_bsopt._utils.field_docs import field_docs
from hf_bsopt.cli import arguments
from hf_bsopt.integrations.trainer.callback import BatchSizeCallback
from hf_bsopt.options import (
    OPTION_CLASSES,
    DeviceOptions,
    ModelOptions,
    Options,
    SearchOptions,
    all_fields,
    keywords_source,
)

MOST_PARAMETERS = 10
PACKAGE = Path(hf_bsopt.__file__).parent


@pytest.mark.parametrize("kind", [*OPTION_CLASSES, *arguments.FLAG_CLASSES])
def test_every_field_has_a_docstring(kind: type) -> None:
    assert set(field_docs(kind)) == {entry.name for entry in dataclasses.fields(kind)}


def test_every_option_is_a_flag_with_underscores_and_dashes() -> None:
    flags = {flag for action in arguments.parser("x", "")._actions for flag in action.option_strings}
    for entry in all_fields():
        if entry.name != "fill":
            for name in (entry.name, *entry.metadata["aliases"]):
                assert {f"--{name}", f"--{name.replace('_', '-')}"} <= flags


def test_the_keywords_for_editors_are_those_of_the_options() -> None:
    written = (PACKAGE / "option_keywords.py").read_text(encoding="utf-8")
    assert "".join(written.split()) == "".join(keywords_source().split()), "run python -m hf_bsopt.options"


def test_an_alias_is_as_good_as_the_name() -> None:
    named = Options.of({"optimizer": "sgd", "activation_checkpointing": True, "batch_size": 4}, "name")
    assert named == Options.of(
        {"optim": "sgd", "gradient_checkpointing": True, "per_device_train_batch_size": 4}, "name"
    )
    with pytest.raises(UsageError, match="are the same option"):
        Options.of({"optim": "sgd", "optimizer": "sgd"}, "name")


def test_a_dtype_of_torch_is_taken_by_its_name() -> None:
    assert ModelOptions(weights_dtype=torch.bfloat16).weights_dtype == "bfloat16"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_length": 0}, "max_length is at least 1, not 0"),
        ({"max_length": 3.5}, "max_length is a whole number, not 3.5"),
        ({"multiple_of": True}, "multiple_of is a whole number, not True"),
        ({"load_in_4bit": "False"}, "load_in_4bit is True or False, not 'False'"),
        ({"learning_rate": float("nan")}, "learning_rate is above 0, not nan"),
        ({"probe_timeout": float("inf")}, "probe_timeout is above 0, not inf"),
        ({"target": 0.9}, "target is two fractions of the memory"),
        ({"target": ("a", "b")}, "target is two fractions of the memory"),
        ({"target": (0.9, 0.8)}, "did you mean 0.8 0.9"),
        ({"lr_scaling": "cubic"}, "lr_scaling is one of sqrt, linear, none, not 'cubic'"),
        ({"task": 3}, "task is a string, not 3"),
        ({"gpu": 24}, "gpu is a string or a GpuSpec, not 24"),
        ({"max_lenght": 12}, "max_lenght is not an option; did you mean max_length"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is at least 1"),
        ({"trust_cache": True, "cache": False}, "cached answers"),
        ({"effective_batch_size": 8, "gradient_accumulation_steps": 2}, "give one of them"),
        ({"fill": True}, "fill is an option for a Trainer"),
    ],
)
def test_an_invalid_option_is_named_as_it_was_spelled_with_what_is_valid(
    keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_batch_size("bert-tiny", **keywords)


def test_an_option_that_a_trainer_has_itself_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(UsageError, match="not for a Trainer"):
        BatchSizeCallback(precision="bf16")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"did you mean 0\.8 0\.9"):
        BatchSizeCallback(target=(0.9, 0.8))


def test_lists_become_tuples_so_that_options_can_be_compared() -> None:
    assert SearchOptions(target=[0.1, 0.2]).target == (0.1, 0.2)  # type: ignore[arg-type]
    assert ModelOptions(lora_targets=["q"]).lora_targets == ("q",)  # type: ignore[arg-type]
    assert DeviceOptions() == DeviceOptions(device=None)  # type: ignore[arg-type]


def test_no_function_has_more_than_ten_parameters() -> None:
    import ast

    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and len(node.args.args) + len(node.args.kwonlyargs) > MOST_PARAMETERS
    ]
    assert not found


def test_find_batch_size_shows_its_options_to_an_editor() -> None:
    assert "FindKeywords" in str(inspect.signature(find_batch_size))
