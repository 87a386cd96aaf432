"""Let Triton kernels be called on the virtual device and not compiled, tuned or launched, as no kernel computes there.

What a kernel writes into was allocated by its caller, so that memory is as on a GPU. Liger, trl and fla have such
kernels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

from .._utils.import_hooks import Action

launched: Counter[str] = Counter()
"""Calls by name of the kernel."""


def actions() -> dict[str, Action]:
    """Return what to do with Triton's modules when they are imported."""
    return {
        "triton.runtime.jit": lambda jit: _replace_launches(jit.JITFunction),
        "triton.runtime.autotuner": lambda autotuner: _replace_launches(autotuner.Autotuner),
    }


def _replace_launches(kind: Any) -> None:
    def run(kernel: Any, *args: Any, warmup: bool = False, **options: Any) -> None:
        if warmup:
            refuse_to_compile(kernel)
        from .._utils.known_values import make_unknown

        make_unknown((*args, *options.values()))  # what the kernel would have written
        launched[_name(kernel)] += 1

    def refuse_to_compile(kernel: Any, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"the Triton kernel {_name(kernel)} is to be compiled before its launch, which needs a real GPU: rehearse "
            "without it"
        )

    kind.run = run
    kind.warmup = refuse_to_compile


def _name(kernel: Any) -> str:
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):  # an autotuner or heuristics around a kernel
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", kernel))
