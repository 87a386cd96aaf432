"""Values that are not what an option takes: each is understood, or refused with an error of this package."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_bsopt import find_batch_size
from hf_bsopt._utils.field_types import union_members
from hf_bsopt.cli.main import USAGE, main
from hf_bsopt.errors import UsageError
from hf_bsopt.options import DeviceOptions, ModelOptions, Options, SearchOptions, all_fields

KINDS = (ModelOptions, DeviceOptions, SearchOptions)
HINTS = {name: hint for kind in KINDS for name, hint in typing.get_type_hints(kind).items()}
NUMBERS = [entry.name for entry in all_fields() if {int, float} & {*union_members(HINTS[entry.name])}]
LONG = ["1" + "0" * 19, "9" * 400, "9" * 5000]
STRANGE = [
    "False",
    "",
    "a",
    3,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**400,
    -(10**5000),
    ("a", "b"),
    {},
    [[]],
    object(),
]
STRANGE += [torch.float16, torch.optim.Adam, torch.device("cpu"), np.int64(3), np.float32(0.5), nn.Linear, print]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, values: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(values).mean() * scale}


@pytest.mark.parametrize("name", [entry.name for entry in all_fields()])
def test_no_value_of_an_option_ends_in_another_error(name: str) -> None:
    entry = next(entry for entry in all_fields() if entry.name == name)
    for value in STRANGE:
        try:
            options = Options.of({name: value}, entry.metadata["for"][0])
        except UsageError as error:
            assert name in str(error)
            assert len(str(error)) < 300
        else:
            parts = (options.model, options.device, options.search)
            taken = next(getattr(part, name) for part in parts if name in {f.name for f in dataclasses.fields(part)})
            assert not isinstance(taken, (torch.dtype, np.generic, type))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("digits", LONG, ids=len)
def test_a_number_of_any_length_is_refused_in_a_sentence(
    name: str, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", "--model", "bert-tiny", "--device", "predict", f"--{name}", digits]) == USAGE
    message = capsys.readouterr().err
    assert name in message
    assert len(message) < 300
    with pytest.raises(UsageError, match=name):
        Options.of({name: 10 ** (len(digits) - 1)}, "name" if name != "fill" else "trainer")


@pytest.mark.parametrize("flag", ["--memory", "--gpu"])
@pytest.mark.parametrize("digits", LONG, ids=len)
def test_a_size_of_any_length_is_refused_in_a_sentence(
    flag: str, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", "--model", "bert-tiny", "--device", "predict", flag, f"{digits}GiB"]) == USAGE
    assert len(capsys.readouterr().err) < 300


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")]
)
def test_the_dtype_of_mixed_precision_is_a_precision(dtype: torch.dtype, precision: str) -> None:
    where = {"gpu": "T4", "device": "predict", "evaluation": False, "max_length": 16}
    named = find_batch_size("bert-tiny", precision=dtype, **where)  # type: ignore[arg-type]
    assert named.workload.settings.precision == precision
    example = {"values": torch.zeros(2, 4)}
    found = find_batch_size(
        Layer(),
        example_batch=example,
        precision=dtype,
        gpu="T4",
        device="predict",
        evaluation=False,  # type: ignore[arg-type]
    )
    assert found.workload.settings.precision == precision


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"value": torch.zeros(2, 4)}, "example_batch has 'value', which forward of Layer does not take; did you mean"),
        ({"values": torch.zeros(2, 4), "text": torch.zeros(2)}, "does not take: it takes values, scale"),
        ({"scale": 2.0}, "example_batch lacks values, which forward of Layer needs"),
        ({3: torch.zeros(2, 4)}, "names of arguments, not 3"),
    ],
)
def test_a_key_of_example_batch_that_forward_does_not_take_is_refused(example: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_batch_size(Layer(), example_batch=example, gpu="T4", device="predict")


@pytest.mark.parametrize("name", ["attention", "precision", "optimizer", "task", "weights_dtype", "device", "memory"])
def test_an_empty_name_is_not_a_default(name: str) -> None:
    with pytest.raises(UsageError, match=name.replace("_", " ")):
        find_batch_size("bert-tiny", **{"gpu": "T4", "device": "predict", name: ""})  # type: ignore[arg-type]


def test_an_array_of_several_numbers_is_not_a_number() -> None:
    with pytest.raises(UsageError, match="lora_r is a whole number, not array"):
        Options.of({"lora_r": np.array([1, 2])}, "name")
