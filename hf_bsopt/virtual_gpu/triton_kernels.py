"""Accept launches of Triton kernels, as the virtual device accepts those of CUDA: nothing is compiled and nothing runs.

A kernel gets its memory from PyTorch, which allocates it before the launch, so that nothing is missing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

from .._utils.import_hooks import Action

launched: Counter[str] = Counter()
"""Launches by name of the kernel."""


def actions() -> dict[str, Action]:
    """Return what to do with Triton's modules when they are imported."""
    return {"triton.runtime.jit": _accept_launches, "triton.runtime.autotuner": _skip_timing}


def _accept_launches(jit: Any) -> None:
    def run(function: Any, *args: Any, warmup: bool = False, **options: Any) -> None:
        if warmup:
            _refuse(function)
        from .._utils.known_values import make_unknown

        make_unknown((*args, *options.values()))  # what the kernel would have written
        launched[_name(function)] += 1

    def refuse_to_compile(function: Any, *_: Any, **__: Any) -> NoReturn:
        _refuse(function)

    jit.JITFunction.run = run
    jit.JITFunction.warmup = refuse_to_compile


def _skip_timing(autotuner: Any) -> None:
    """Choose the first configuration, since the fastest is found by running them all."""
    autotuner.Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]


def _refuse(function: Any) -> NoReturn:
    raise RuntimeError(
        f"the Triton kernel {_name(function)} is to be compiled before its launch, which needs a real GPU: rehearse "
        "without it"
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))
