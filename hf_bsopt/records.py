"""The frozen records that the rooms hand each other. Sizes are in bytes, times in seconds, batch sizes in sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["fits", "oom", "retries", "spill", "no step", "timeout", "killed", "crash", "error"]
VERDICTS: dict[Outcome, str] = {
    "fits": "fits",
    "oom": "out of memory",
    "retries": "runs, and does not fit",
    "spill": "spills to the host",
    "no step": "no optimizer step",
    "timeout": "timeout",
    "killed": "killed",
    "crash": "crash",
    "error": "error",
}
"""In words, as they are shown."""
MEMORY_OUTCOMES: tuple[Outcome, ...] = ("fits", "oom", "retries", "spill")
"""Those that say something about a size. What ended otherwise would end so at any size."""
Source = Literal["predicted", "rehearsed", "measured"]
Bound = Literal[
    "memory", "limit", "dataset size", "default maximum", "divisor of the effective batch", "throughput plateau"
]

THREADS_PER_MULTIPROCESSOR = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 110: 1536, 120: 1536, 121: 1536}
OTHERWISE_THREADS_PER_MULTIPROCESSOR = 2048


@dataclass(frozen=True)
class GpuSpec:
    """A GPU, or another device to train on, as far as its memory use goes.

    name: as users and `catalog.gpu` call it.
    total_bytes: total memory as the driver reports it, the context included; None is no limit.
    compute_capability: major × 10 + minor (75 is a T4, 80 an A100, 90 an H100); it decides which kernels run.
    multiprocessors: PyTorch sizes some workspaces by it.
    context_bytes: what is gone of the device before anything is on it: the CUDA context and other processes; on a CPU
    the libraries.
    assumed: what isn't known about this GPU, and what is taken instead and why; empty for a known card.
    kind: as ``torch.device`` calls it: "cuda", "mps" or "cpu". Only "cuda" has compute capability and multiprocessors.
    """

    name: str
    total_bytes: int | None
    compute_capability: int
    multiprocessors: int
    context_bytes: int
    assumed: str = ""
    kind: str = "cuda"

    @property
    def cublas_workspace_bytes(self) -> int:
        """What each cuBLAS handle takes for itself on its first matrix product.

        Source: PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper, elsewhere the workspace
        configuration ``:4096:2:16:8`` (2 blocks of 4096 KiB and 8 of 16 KiB).
        """
        return 32 * 2**20 if self.compute_capability == 90 else (2 * 4096 + 8 * 16) * 2**10

    @property
    def threads_per_multiprocessor(self) -> int:
        """Resident threads at most. Source: CUDA C++ Programming Guide, technical specifications per capability."""
        return THREADS_PER_MULTIPROCESSOR.get(self.compute_capability, OTHERWISE_THREADS_PER_MULTIPROCESSOR)

    @property
    def capability(self) -> str:
        """Compute capability as NVIDIA writes it: 7.5."""
        return f"{self.compute_capability // 10}.{self.compute_capability % 10}"

    @property
    def supports_bfloat16(self) -> bool:
        """Whether it computes in bfloat16: a card from compute capability 8.0 on (Ampere)."""
        return self.kind != "cuda" or self.compute_capability >= 80


@dataclass(frozen=True)
class Peak:
    """The most memory that a training step held at once.

    allocated_bytes: in live blocks of the caching allocator (`torch.cuda.max_memory_allocated`).
    reserved_bytes: taken from the device by it (`torch.cuda.max_memory_reserved`); never less than allocated.
    """

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Trial:
    """One micro-batch size, and what became of it.

    outcome: "retries" and "spill" ran and yet don't fit: the allocator gave its cache back in every step, or memory of
    the host was used in the device's stead. "no step": the optimizer never stepped. "killed" is by somebody's signal
    (the host's memory ran out?), "crash" by the process's own fault.
    used_bytes: gone from the device as the driver sees it: reserved, the context and other processes.
    alloc_retries: how often the allocator had to give its cache back to the device before a request could be met.
    source: whether it was predicted, ran on a virtual device or ran on a real one.
    step_seconds: of an optimizer step, the median of those that were timed; step_seconds_spread: (longest − shortest) ÷
    median. samples_per_second, tokens_per_second: of training. All of them only where something was computed.
    detail: why, where the outcome needs words.
    """

    batch_size: int
    outcome: Outcome
    peak: Peak | None
    used_bytes: int | None
    source: Source
    step_seconds: float | None = None
    step_seconds_spread: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    alloc_retries: int = 0
    detail: str = ""

    @property
    def fits(self) -> bool:
        return self.outcome == "fits"

    @property
    def is_about_memory(self) -> bool:
        """Whether the outcome is about memory: a smaller or larger size may end otherwise."""
        return self.outcome in MEMORY_OUTCOMES


@dataclass(frozen=True)
class Decision:
    """The micro-batch size that was chosen, and the facts from which the report words the reason.

    bound: what kept it from being larger. utilization: used ÷ total memory of the device at this size, as far as it is
    known: predicted, or measured once it ran. largest: the largest size that fits the whole device ("max, risky").
    safe: the size to fall back to. limit: the upper limit that was reached, if one was.
    unconstrained: the size that would be chosen if it did not have to divide the effective batch, else None.
    predicted: the size that the prediction chose, if the runs led to another one. attempts: sizes that were run.
    is_settled: no larger size is expected to fit; otherwise the attempts were used up.
    samples_per_second: at the chosen size, if throughput decided; slower_size: a larger size that trains no faster.
    """

    batch_size: int
    bound: Bound
    utilization: float
    largest: int
    safe: int
    limit: int | None = None
    unconstrained: int | None = None
    predicted: int | None = None
    attempts: int = 0
    is_settled: bool = True
    samples_per_second: float | None = None
    slower_size: int | None = None

    @property
    def is_optimal(self) -> bool:
        """Whether memory or the user decided: a size cut to the dataset or to the default maximum is not called so."""
        return self.bound not in ("dataset size", "default maximum")


@dataclass(frozen=True)
class MemoryProfile:
    """Memory in live blocks over one training step, by what it is for: the step in which most is live.

    length: allocations and frees in the step. moments: how many of them came before each point; there are some hundred
    points, the highest of each stretch. parts: bytes at each point in "weights", "optimizer", "gradients",
    "activations" (what the forward pass keeps for the backward pass) and "temporary" (born and freed within one pass).
    peak_at: index of the point at which most is live. phases: (moment, "forward", "backward" or "optimizer_step").
    """

    length: int
    moments: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    peak_at: int
    phases: tuple[tuple[int, str], ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes in all at each point."""
        return tuple(sum(together) for together in zip(*self.parts.values(), strict=True))

    @property
    def peak_bytes(self) -> int:
        """The most bytes at once."""
        return self.totals[self.peak_at]
