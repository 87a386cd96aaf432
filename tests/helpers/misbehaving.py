"""Workloads that a worker can import and that make its process fail in a given way."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_bsopt.errors import DeviceError
from hf_bsopt.probing import Preflight
from hf_bsopt.probing.devices import Schedule
from hf_bsopt.probing.memory import CudaMemory, DeviceMemory
from hf_bsopt.records import GpuSpec, Source
from hf_bsopt.workloads.step_settings import StepSettings


def wait() -> None:
    signal.pause()


def fail() -> None:
    raise ValueError("no such layer")


def fail_in_several_lines() -> None:
    raise ValueError("no such layer\nbut two others")


def exit_at_once() -> None:
    print("the last line", file=sys.stderr, flush=True)
    os._exit(3)


def crash() -> None:
    ctypes.string_at(0)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def print_something() -> None:
    print("this is not an answer")
    os.write(1, b"nor is this\n")


FAILURES: dict[str, Callable[[], None]] = {
    "error": fail,
    "long error": fail_in_several_lines,
    "exit": exit_at_once,
    "crash": crash,
    "killed": be_killed,
    "timeout": wait,
    "noise": print_something,
}


@dataclass(frozen=True)
class NoDevice:
    """A device that no process can use."""

    spec: GpuSpec
    source: Source = "rehearsed"
    schedule: Schedule = field(default_factory=Schedule)
    needs_fresh_process: bool = False

    def prepare(self) -> None:
        pass

    def memory(self) -> DeviceMemory:
        return CudaMemory()

    def preflight(self) -> Preflight:
        raise DeviceError("there is no such device")

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Workload:
    """A workload that fails when it is built, after writing its pid to ``folder``."""

    failure: str
    folder: str
    settings: StepSettings = field(default_factory=lambda: StepSettings("fp32"))
    length: int = 1
    accumulation: int = 1
    new_tokens: int = 0
    is_custom: bool = True

    def build(self) -> nn.Module:
        Path(self.folder, self.failure).write_text(str(os.getpid()))
        FAILURES[self.failure]()
        return nn.Linear(4, 4)

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        return {"input": torch.zeros(batch_size, 4, device=device)}

    def describe(self) -> list[tuple[str, str]]:
        return []

    def portable(self) -> Workload:
        return self


def raise_memory_error() -> None:
    raise MemoryError


class TooLargeToUnpickle(Workload):
    """A workload that runs out of memory while it is unpickled."""

    def __reduce__(self) -> Any:
        return raise_memory_error, ()


IMPORTED_BYTES = 128 * 2**20
KEPT: list[bytes] = []


def unpickle() -> Workload:
    KEPT.append(b"\1" * IMPORTED_BYTES)
    return Workload("error", "")


class AllocatesOnUnpickling(Workload):
    """A workload whose unpickling takes memory, as importing a user's classes does."""

    def __reduce__(self) -> Any:
        return unpickle, ()


class Classifier(nn.Module):
    """A classifier that fails in the given way, in its forward pass on the device."""

    def __init__(self, failure: str = "") -> None:
        super().__init__()
        self.failure = failure
        self.layers = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.failure and x.is_cuda:
            FAILURES[self.failure]()
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}
