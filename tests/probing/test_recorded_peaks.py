"""A probe's peaks against those of the real Trainer, recorded on a virtual GPU in separate processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator

import pytest

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.probing import ProbeClient, VirtualCudaDevice
from hf_bsopt.virtual_gpu.library import torch_build
from hf_bsopt.workloads.workload import describe

RECORDED_WITH = {"torch": "2.11.0+cu130", "transformers": "5.23.0"}
INSTALLED = {
    "torch": getattr(torch_build(), "version", ""),
    "transformers": importlib.metadata.version("transformers"),
}

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
    pytest.mark.skipif(INSTALLED != RECORDED_WITH, reason=f"recorded with {RECORDED_WITH}, not {INSTALLED}"),
]

BIOBERT = "dmis-lab/biobert-v1.1"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
A100, T4, H200 = "A100-40GB", "T4", "H200"
LORA = {"lora_r": 16, "lora_targets": ("q_proj", "v_proj"), "lora_dropout": 0.0, "activation_checkpointing": True}
TOKENS = {"task": "token-classification", "precision": "fp16", "max_length": 512}

# gpu, model, options, accumulation, batch size, allocated bytes, reserved bytes
# Source: benchmarks/truth/rehearsed.csv (torch 2.11.0+cu130, transformers 5.23.0, without a context)
ROWS = [
    (T4, BIOBERT, TOKENS, 1, 48, 11_789_300_736, 12_048_138_240),
    (T4, BIOBERT, {**TOKENS, "attention": "eager"}, 1, 16, 9_285_641_216, 9_755_951_104),
    (T4, BIOBERT, {**TOKENS, "precision": "fp32", "max_length": 256}, 1, 32, 6_584_898_048, 6_765_412_352),
    (T4, BIOBERT, {**TOKENS, "optimizer": "adafactor"}, 1, 16, 4_080_579_584, 4_443_865_088),
    (T4, BIOBERT, TOKENS, 2, 16, 5_402_438_144, 5_666_504_704),
    (T4, BIOBERT, {**TOKENS, "activation_checkpointing": True}, 1, 64, 4_133_347_328, 4_427_087_872),
    (T4, BIOBERT, {**TOKENS, "task": "masked-lm"}, 1, 16, 7_806_663_168, 7_981_760_512),
    (T4, "microsoft/deberta-v3-base", {**TOKENS, "attention": "eager"}, 1, 16, 13_440_160_256, 13_683_916_800),
    (A100, "gpt2", {"precision": "fp16", "max_length": 1024}, 1, 8, 13_470_044_672, 15_177_089_024),
    (A100, "meta-llama/Llama-3.2-1B", {"precision": "bf16-weights"}, 1, 8, 21_396_661_760, 21_804_089_344),
    pytest.param(
        *(A100, "meta-llama/Llama-3.2-1B", {"precision": "bf16", **LORA}, 1, 16, 15_726_817_792, 18_375_245_824),
        marks=needs_peft,
    ),
    (H200, BIOBERT, {**TOKENS, "precision": "bf16"}, 1, 32, 8_425_467_904, 8_845_787_136),
]


@pytest.fixture(scope="module")
def client_of() -> Iterator[Callable[[str], ProbeClient]]:
    """Return a function that gives a client for each GPU."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def client(gpu: str) -> ProbeClient:
            spec = dataclasses.replace(catalog.gpu(gpu), context_bytes=0)
            return stack.enter_context(ProbeClient(VirtualCudaDevice(spec)))

        yield client


@pytest.mark.parametrize(
    ("gpu", "model", "options", "accumulation", "batch_size", "allocated_bytes", "reserved_bytes"), ROWS
)
def test_a_probe_has_the_peaks_of_the_trainer(
    client_of: Callable[[str], ProbeClient],
    gpu: str,
    model: str,
    options: dict[str, object],
    accumulation: int,
    batch_size: int,
    allocated_bytes: int,
    reserved_bytes: int,
) -> None:
    workload = describe(model, **options).accumulating(accumulation)  # type: ignore[arg-type]
    trial = client_of(gpu)(workload, batch_size)
    assert trial.peak is not None, trial.detail
    assert trial.peak.allocated_bytes == pytest.approx(allocated_bytes, rel=0.0005)
    assert trial.peak.reserved_bytes == pytest.approx(reserved_bytes, rel=0.0005)
    assert trial.used_bytes == trial.peak.reserved_bytes
