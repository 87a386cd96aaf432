"""Workloads that a worker can import, and that do to the process that runs them whatever their name says."""

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
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


def die() -> None:
    ctypes.string_at(0)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def print_something() -> None:
    print("this is not an answer")
    os.write(1, b"nor is this\n")


DEEDS: dict[str, Callable[[], None]] = {
    "error": fail,
    "long error": fail_in_several_lines,
    "exit": exit_at_once,
    "crash": die,
    "killed": be_killed,
    "timeout": wait,
    "noise": print_something,
}


@dataclass(frozen=True)
class NoDevice:
    """A card that no process ever sees."""

    spec: GpuSpec
    source: Source = "rehearsed"
    schedule: Schedule = field(default_factory=Schedule)
    needs_fresh_process: bool = False

    def prepare(self) -> None:
        pass

    def memory(self) -> DeviceMemory:
        return CudaMemory()

    def preflight(self) -> Preflight:
        raise DeviceError("there is no such card")

    def environment(self, *, expandable_segments: bool) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Workload:
    """Misbehaves where it is built; leaves the number of that process in ``folder``."""

    deed: str
    folder: str
    settings: StepSettings = field(default_factory=lambda: StepSettings("fp32"))
    length: int = 1
    accumulation: int = 1
    new_tokens: int = 0
    is_custom: bool = True

    def build(self) -> nn.Module:
        Path(self.folder, self.deed).write_text(str(os.getpid()))
        DEEDS[self.deed]()
        return nn.Linear(4, 4)

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        return {"input": torch.zeros(batch_size, 4, device=device)}

    def describe(self) -> list[tuple[str, str]]:
        return []

    def portable(self) -> Workload:
        return self


def no_room() -> None:
    raise MemoryError


class Heavy(Workload):
    """More than the process has room for, already when it is unpacked."""

    def __reduce__(self) -> Any:
        return no_room, ()


BROUGHT_BYTES = 128 * 2**20
KEPT: list[bytes] = []


def brought() -> Workload:
    KEPT.append(b"\1" * BROUGHT_BYTES)
    return Workload("error", "")


class Bringing(Workload):
    """Its unpacking takes memory, as the imports of a user's own classes do."""

    def __reduce__(self) -> Any:
        return brought, ()


class Classifier(nn.Module):
    """Behaves, but for its deed, which it does in its forward on the device."""

    def __init__(self, deed: str = "") -> None:
        super().__init__()
        self.deed = deed
        self.layers = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.deed and x.is_cuda:
            DEEDS[self.deed]()
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}
