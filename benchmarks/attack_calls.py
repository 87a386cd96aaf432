"""Hostile calls of the API: values of types and sizes that nobody should pass."""

from __future__ import annotations

import random
import typing
from pathlib import Path
from typing import Any

NOT_SPELLED = ("fill", "verify_evaluation", "eval")
BASE = {"gpu": "2GiB", "device": "predict", "evaluation": False, "max_length": 32, "batch_size": 16}


class Hostile:
    """An object whose methods raise."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("hostile")

    def __repr__(self) -> str:
        return "Hostile()"


def values() -> list[Any]:
    import numpy
    import torch

    plain = [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**400,
        -(10**30),
        float("nan"),
        float("inf"),
        "",
        " ",
        "False",
        "a\nb",
        "\x1b[2J",
    ]
    containers = [[], (), {}, set(), [1], ("a", "b"), (0.9, 0.8), (0.1, 0.2, 0.3), {"a": 1}, [[[]]], "x" * 100_000]
    objects = [
        object(),
        Hostile(),
        print,
        type,
        int,
        b"bytes",
        Path(),
        torch.float16,
        torch.optim.Adam,
        torch.tensor(3),
    ]
    numbers = [numpy.float64(0.5), numpy.int64(3), numpy.array([1, 2]), torch.tensor([0.8, 0.9]), 3 + 4j, range(3), ...]
    return [*plain, *containers, *objects, *numbers]


def module_of(random_: random.Random) -> tuple[Any, Any]:
    """Return a module and an example batch, at least one of which is wrong."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Any, labels: Any = None) -> Any:
            return {"loss": self.layer(x).sum()}

    class Broken(Model):
        def forward(self, x: Any, labels: Any = None) -> Any:
            return random_.choice([None, 3, {}, {"loss": None}, "loss", self.layer(x), [], {"loss": "x"}])

    class Raising(Model):
        def forward(self, x: Any, labels: Any = None) -> Any:
            raise random_.choice(
                [ValueError("bad"), ZeroDivisionError(), KeyError("x"), RuntimeError("a\nb"), AssertionError()]
            )

    models = [
        Model(),
        Broken(),
        Raising(),
        nn.Linear(4, 2),
        nn.Identity(),
        nn.Module(),
        Model,
        None,
        3,
        Hostile(),
        [Model()],
    ]
    x = torch.zeros(2, 4)
    batches = [{"x": x}, {"y": x}, {}, None, x, {"x": torch.zeros(0, 4)}, {"x": torch.zeros(())}, {"x": 3}, {3: x}]
    batches += [
        {"x": x, "labels": torch.zeros(3)},
        {"x": x.double()},
        {"x": torch.zeros(2, 5)},
        [x],
        "x",
        {"x": [x]},
        Hostile(),
    ]
    return random_.choice(models), random_.choice(batches)


def run_call(seed: int, folder: Path) -> tuple[str, str | None]:
    """Make one hostile call; return it, and what is wrong with its outcome."""
    from hf_bsopt import find_batch_size
    from hf_bsopt.errors import BatchSizeError
    from hf_bsopt.option_keywords import FindKeywords
    from hf_bsopt.patching import parse_keys, patch

    random_ = random.Random(f"call {seed}")
    keywords: dict[str, Any] = dict(BASE)
    names = [name for name in typing.get_type_hints(FindKeywords) if name not in NOT_SPELLED]
    kind = random_.random()
    target: Any = "bert-tiny"
    call: Any = find_batch_size
    if kind < 0.6:
        for name in random_.sample(names, random_.choice([1, 1, 2])):
            keywords[name] = random_.choice(values())
    elif kind < 0.7:
        target = random_.choice(values())
    elif kind < 0.85:
        target, keywords["example_batch"] = module_of(random_)
        keywords.pop("max_length")
    elif kind < 0.95:
        path = folder / random_.choice(["train.py", "train.yaml", "train.json"])
        path.write_text("batch_size = 8\n")
        given = random_.choice([{"batch_size": random_.choice(values())}, random_.choice(values()), {"bs": 8}])
        keys = random_.choice([None, {}, {"batch_size": random_.choice(values())}, {3: "x"}])
        target, keywords, call = (
            random_.choice([path, str(path), random_.choice(values())]),
            {"values": given, "keys": keys},
            patch,
        )
    else:
        target, keywords, call = random_.choice(values()), {}, parse_keys
    shown = (
        f"{call.__name__}({_shown(target)}, {', '.join(f'{name}={_shown(value)}' for name, value in keywords.items())})"
    )
    try:
        call(target, **keywords)
    except BatchSizeError as error:
        message = str(error)
        if not message.strip() or len(message) > 2000:
            return shown, f"a {type(error).__name__} of {len(message)} characters"
    except BaseException as error:
        return shown, f"{type(error).__name__} escaped: {str(error)[:200]}"
    return shown, None


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80].replace("\n", " ")
    except Exception:
        return f"<{type(value).__name__}>"
