"""Frozen records that the packages exchange. Memory is in bytes, time in seconds, batch size in sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["fits", "oom", "over limit", "retries", "spill", "no step", "timeout", "killed", "crash", "error"]
VERDICTS: dict[Outcome, str] = {
    "fits": "fits",
    "oom": "out of memory",
    "over limit": "runs, but over the limit",
    "retries": "runs but does not fit",
    "spill": "spills to host memory",
    "no step": "no optimizer step",
    "timeout": "timeout",
    "killed": "killed",
    "crash": "crash",
    "error": "error",
}
"""Outcomes as they are displayed."""
MEMORY_OUTCOMES: tuple[Outcome, ...] = ("fits", "oom", "over limit", "retries", "spill")
"""Outcomes that depend on the batch size. Any other outcome is expected at every size."""
Source = Literal["predicted", "rehearsed", "measured"]
Bound = Literal[
    "memory", "limit", "dataset size", "default maximum", "divisor of the effective batch", "throughput plateau"
]

THREADS_PER_MULTIPROCESSOR = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 110: 1536, 120: 1536, 121: 1536}
DEFAULT_THREADS_PER_MULTIPROCESSOR = 2048
"""For compute capabilities that are not listed above."""


@dataclass(frozen=True)
class GpuSpec:
    """A GPU, or another device to train on: the properties that determine memory use.

    name: the name that users and `catalog.gpu` use.
    total_bytes: total memory as the driver reports it, including the context; None for no limit.
    compute_capability: major × 10 + minor (75 is a T4, 80 an A100, 90 an H100); it decides which kernels run.
    multiprocessors: their number; PyTorch sizes some workspaces by it.
    context_bytes: memory in use before any tensor is allocated: the CUDA context and other processes; on a CPU the
    libraries.
    assumed: what is not known about this GPU, what is assumed instead and why; empty for a known GPU.
    kind: the type of the ``torch.device``: "cuda", "mps" or "cpu". Only "cuda" has compute capability and
    multiprocessors.
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
        """Size of the workspace that each cuBLAS handle allocates on its first matrix product.

        Source: PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper, elsewhere the workspace
        configuration ``:4096:2:16:8`` (2 blocks of 4096 KiB and 8 of 16 KiB).
        """
        return 32 * 2**20 if self.compute_capability == 90 else (2 * 4096 + 8 * 16) * 2**10

    @property
    def threads_per_multiprocessor(self) -> int:
        """Maximum number of resident threads.

        Source: CUDA C++ Programming Guide, technical specifications per compute capability.
        """
        return THREADS_PER_MULTIPROCESSOR.get(self.compute_capability, DEFAULT_THREADS_PER_MULTIPROCESSOR)

    @property
    def capability(self) -> str:
        """Compute capability as NVIDIA writes it: 7.5."""
        return f"{self.compute_capability // 10}.{self.compute_capability % 10}"

    @property
    def supports_bfloat16(self) -> bool:
        """True if the device computes in bfloat16: GPUs from compute capability 8.0 (Ampere) on, and all others."""
        return self.kind != "cuda" or self.compute_capability >= 80

    @property
    def prefers_cudnn_attention(self) -> bool:
        """True if SDPA chooses cuDNN's attention first.

        Source: PyTorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention.
        """
        return self.kind == "cuda" and self.compute_capability in (90, 100, 103)


@dataclass(frozen=True)
class Peak:
    """Peak memory of a training step.

    allocated_bytes: in live blocks of the caching allocator (`torch.cuda.max_memory_allocated`).
    reserved_bytes: held by the allocator (`torch.cuda.max_memory_reserved`); never less than allocated.
    """

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Trial:
    """One micro-batch size and its outcome.

    outcome: "over limit", "retries" and "spill" mean that the step ran but does not fit: it used more than the limit,
    or the allocator freed its cache in every step, or host memory was used for what the device lacked. "no step": the
    optimizer never stepped. "killed": the process was stopped by a signal from outside (the host may have run out of
    memory); "crash": it failed by itself.
    used_bytes: in use on the device as the driver reports it: reserved memory, the context and other processes.
    alloc_retries: how often the allocator had to return its cache to the device before it could serve a request.
    source: "predicted", "rehearsed" (run on a virtual device) or "measured" (run on a real device).
    step_seconds: the median duration of the timed optimizer steps; step_seconds_spread: (longest − shortest) ÷ median.
    samples_per_second, tokens_per_second: training throughput. All four are None if no arithmetic was done.
    detail: an explanation if the outcome needs one.
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
    def has_whole_peak(self) -> bool:
        """True if the step ran as it would with more memory: ``used_bytes`` is what the size needs."""
        return self.outcome in ("fits", "over limit")

    @property
    def is_about_memory(self) -> bool:
        """True if the outcome depends on the batch size: another size may have a different outcome."""
        return self.outcome in MEMORY_OUTCOMES


@dataclass(frozen=True)
class Decision:
    """The chosen micro-batch size, and the facts from which the report explains the choice.

    bound: what kept it from being larger. utilization: used ÷ total memory of the device at this size: predicted, or
    measured once the size has run. largest: the largest size that fits the whole device ("max, risky"). safe: the size
    to fall back to. limit: the upper limit that was reached, if one was.
    unconstrained: the size that would be chosen if it did not have to divide the effective batch, None if it is the
    same. predicted: the size that the prediction chose, if real steps led to a different one. attempts: the number of
    sizes that were run.
    is_settled: True if no larger size is expected to fit, False if the attempts were used up before.
    samples_per_second: at the chosen size, if throughput decided; slower_size: a larger size that is not faster.
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
        """True if memory or the user decided; False for a size limited by the dataset or by the default maximum."""
        return self.bound not in ("dataset size", "default maximum")


@dataclass(frozen=True)
class MemoryProfile:
    """Memory in live blocks over one training step, the one with the highest peak, broken down by what it holds.

    length: the number of allocations and frees in the step. moments: the number of them before each point; there are a
    few hundred points, each the highest of its interval. parts: bytes at each point in "weights", "optimizer",
    "gradients", "activations" (kept by the forward pass for the backward pass) and "temporary" (allocated and freed
    within one pass). peak_at: index of the point with the most live bytes. phases: (moment, name) in order; the name is
    "forward", "backward" or "optimizer_step".
    """

    length: int
    moments: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    peak_at: int
    phases: tuple[tuple[int, str], ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Total bytes at each point."""
        return tuple(sum(sizes) for sizes in zip(*self.parts.values(), strict=True))

    @property
    def peak_bytes(self) -> int:
        """Highest number of live bytes."""
        return self.totals[self.peak_at]
