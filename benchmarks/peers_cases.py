"""Cases and records of benchmarks/peers.py: what is trained, on which device, and the outcome of a search."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_bsopt.data import catalog
from hf_bsopt.probing import CpuDevice, CudaDevice, Device, VirtualCudaDevice
from hf_bsopt.records import GpuSpec
from hf_bsopt.search.device_choice import memory_bytes
from hf_bsopt.virtual_gpu.library import VARIABLE
from hf_bsopt.workloads.workload import Workload, describe

Kind = Literal["virtual", "cpu", "cuda"]

STEPS = 3
SEQUENCES = 65_536
MAX_GRAD_NORM = 1.0  # Trainer's default
OPTIMIZER = "adamw_torch_fused"
CPU_MEMORY = "6GiB"


@dataclass(frozen=True)
class Case:
    """One training job. ``gpu``: the virtual GPU; on a real device it is ignored. ``starts``: the first sizes of
    accelerate and Trainer; 128 is accelerate's default and the value in its documentation.
    """

    name: str
    model: str
    task: str
    max_length: int
    precision: str
    gpu: str = "T4"
    starts: tuple[int, ...] = (128,)

    def workload(self) -> Workload:
        return describe(self.model, task=self.task, max_length=self.max_length, precision=self.precision)

    def title(self) -> str:
        return f"{self.model}, {self.task}, {self.max_length} tokens, {self.precision}"


BERT, GPT2 = "dmis-lab/biobert-v1.1", "gpt2"
CASES: dict[Kind, tuple[Case, ...]] = {
    "virtual": (
        Case("BERT-base, T4", BERT, "token-classification", 512, "fp16", "T4"),
        Case("BERT-base, A100", BERT, "token-classification", 512, "bf16", "A100-40GB"),
        Case("GPT-2, A100", GPT2, "causal-lm", 1024, "bf16", "A100-40GB"),
    ),
    "cuda": (
        Case("BERT-base, fp16", BERT, "token-classification", 512, "fp16"),
        Case("BERT-base, bf16", BERT, "token-classification", 512, "bf16"),
        Case("GPT-2, bf16", GPT2, "causal-lm", 1024, "bf16"),
    ),
    "cpu": (
        Case("BERT-mini", "prajjwal1/bert-mini", "sequence-classification", 128, "fp32", starts=(128, 2048)),
        Case("BERT-tiny", "prajjwal1/bert-tiny", "sequence-classification", 64, "fp32"),
    ),
}


@dataclass(frozen=True)
class RunDevice:
    """The device that a case runs on. ``memory``: the limit of each process, such as "15GiB"; None: all of the device.
    ``timeout_seconds``: for one search, and for one training run that checks whether a size fits.
    """

    kind: Kind
    gpu: str
    memory: str | None
    timeout_seconds: float

    @property
    def computes(self) -> bool:
        return self.kind != "virtual"

    @property
    def is_emulated(self) -> bool:
        """True if the CUDA device that this process sees is virtual, so that times mean nothing."""
        return VARIABLE in os.environ

    @property
    def torch_device(self) -> str:
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def _limit(self) -> int | None:
        return None if self.memory is None else memory_bytes(self.memory)

    @property
    def _probing_device(self) -> Device:
        if self.kind == "cpu":
            return CpuDevice(GpuSpec("CPU", self._limit, 0, 0, 0, kind="cpu"))
        spec = catalog.gpu(self.gpu)
        return VirtualCudaDevice(spec) if self.kind == "virtual" else CudaDevice(spec, self._limit)

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that runs on this device."""
        return self._probing_device.environment(expandable_segments=False)

    def prepare(self) -> None:
        """Limit the memory of this process; allocations beyond it fail. Call this when everything is imported."""
        if self.computes:
            self._probing_device.prepare()

    def search_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments with which find_batch_size runs on this device."""
        if self.kind == "virtual":
            return {"device": "rehearse", "gpu": catalog.gpu(self.gpu)}
        return {"device": self.kind, "memory": self.memory}


@dataclass
class Attempt:
    """One size that was run."""

    size: int
    fits: bool = True

    def __str__(self) -> str:
        return f"{self.size}" if self.fits else f"{self.size}✗"


@dataclass
class Search:
    """The outcome of a contender's search. ``size`` is None if it found none; ``failure`` says why. ``wall_seconds``:
    from the start of its process to its answer.
    """

    contender: str
    attempts: list[Attempt] = field(default_factory=list)
    errors: int = 0
    size: int | None = None
    failure: str = ""
    wall_seconds: float = 0.0

    @property
    def was_run(self) -> bool:
        return any(attempt.size == self.size and attempt.fits for attempt in self.attempts)

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Search:
        """Build a Search from its JSON."""
        return cls(**{**answer, "attempts": [Attempt(**attempt) for attempt in answer["attempts"]]})
