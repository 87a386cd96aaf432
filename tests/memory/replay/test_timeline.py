"""Tests of `hf_bsopt.memory.replay.timeline`: two recordings give an exact timeline at any batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.errors import TraceError
from hf_bsopt.memory import Timeline, trace
from hf_bsopt.memory.replay.recording import CATEGORIES, Formula, Recording
from hf_bsopt.memory.tracing.recorder import Recorder
from hf_bsopt.memory.tracing.tracer import _record
from hf_bsopt.records import GpuSpec, Peak
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.training_step import TrainingStep

MIB = 1 << 20
T4 = catalog.gpu("T4")


def recording(*events: tuple[str, int | Formula] | str, category: str = "activations") -> Recording:
    """Record events: ("x", 512) allocates x with 512 bytes, "x" frees it."""
    made, blocks = Recording(), dict[str, int]()
    for event in events:
        if isinstance(event, str):
            made.free(blocks[event])
        else:
            blocks[event[0]] = made.allocate(event[1], event[0], category)
    return made


def affine(make: Callable[[int], Recording], batch_sizes: tuple[int, int] = (2, 3)) -> Timeline:
    return Timeline(make(batch_sizes[0]), make(batch_sizes[1]), batch_sizes)


def device(total_bytes: int | None, context_bytes: int = 0) -> GpuSpec:
    return dataclasses.replace(T4, total_bytes=total_bytes, context_bytes=context_bytes)


# ---- sizes


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=8),
    st.sampled_from([(2, 3), (2, 4), (1, 5)]),
    st.integers(1, 10**5),
)
def test_two_recordings_give_the_sizes_at_any_batch_size(
    lines: list[tuple[int, int]], recorded_at: tuple[int, int], batch_size: int
) -> None:
    timeline = affine(lambda b: recording(*[(str(i), f + s * b) for i, (f, s) in enumerate(lines)]), recorded_at)
    assert timeline.sizes(batch_size).tolist() == [fixed + slope * batch_size for fixed, slope in lines]


def test_a_formula_is_evaluated_for_the_batch_size_and_the_device() -> None:
    def staging(device: GpuSpec, rows: int, columns: int) -> int:
        return device.multiprocessors * (rows // 4) + columns

    timeline = affine(lambda b: recording(("sum", Formula(staging, (10 * b + 1, 7)))))
    assert timeline.sizes(5, T4).tolist() == [40 * (51 // 4) + 7]
    assert timeline.sizes(5).tolist() == [108 * (51 // 4) + 7]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    timeline = affine(lambda b: recording(("x", b)))
    with pytest.raises(ValueError, match="at least 1"):
        timeline.sizes(batch_size)


# ---- refused steps


@pytest.mark.parametrize(
    ("at_two", "at_three"),
    [
        (recording(("x", 4)), recording(("x", 4), "x")),
        (recording(("x", 4), ("y", 4), "x"), recording(("x", 4), ("y", 4), "y")),
        (recording(("add", 4)), recording(("mul", 4))),
    ],
    ids=["an extra event", "another block is freed", "another operation"],
)
def test_a_step_with_different_events_at_another_batch_size_is_refused(at_two: Recording, at_three: Recording) -> None:
    with pytest.raises(TraceError, match=r"at batch size 2 .*3"):
        Timeline(at_two, at_three, (2, 3))


def test_a_size_with_a_fractional_slope_is_refused() -> None:
    with pytest.raises(TraceError, match="scores does not grow linearly"):
        affine(lambda b: recording(("scores", b // 4)), (2, 4))


def test_a_formula_in_one_recording_and_a_size_in_the_other_is_refused() -> None:
    rule = Formula(lambda device: 4, ())
    with pytest.raises(TraceError, match="sort"):
        Timeline(recording(("sort", 4)), recording(("sort", rule)), (2, 3))


# ---- the peak


def two_peaks(b: int) -> Recording:
    """Record live bytes, rounded to 512, of 1,024 (w), 1,024 + 2,048·b (w, x) and 4,608 (w, y)."""
    return recording(("w", 1000), ("x", 2048 * b), "x", ("y", 3 * 1024 + 100), "y")


def test_live_bytes_are_the_peak_sum_of_rounded_blocks() -> None:
    timeline = affine(two_peaks)
    assert timeline.live_bytes(1) == 1024 + 3584
    assert timeline.live_bytes(4) == 1024 + 4 * 2048


def test_the_peak_origin_is_the_operation_that_reaches_the_peak() -> None:
    timeline = affine(two_peaks)
    assert timeline.peak_origin(1) == "y"
    assert timeline.peak_origin(4) == "x"


def test_the_composition_is_by_category_at_the_peak() -> None:
    def made(b: int) -> Recording:
        recorded = Recording()
        recorded.allocate(1000, "w", "weights")
        gone = recorded.allocate(700, "g", "gradients")
        recorded.allocate(512 * b, "h", "activations")
        recorded.free(gone)
        recorded.allocate(4096, "cublas", "workspace")
        return recorded

    timeline = affine(made)
    expected = {"weights": 1024, "activations": 5 * 512, "workspace": 4096}
    assert timeline.composition(5) == {**dict.fromkeys(CATEGORIES, 0), **expected}


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 900), st.booleans()), min_size=1), st.integers(1, 50))
def test_the_composition_sums_to_the_live_bytes(blocks: list[tuple[int, int, bool]], batch_size: int) -> None:
    def made(b: int) -> Recording:
        recorded = Recording()
        for index, (fixed, slope, is_freed) in enumerate(blocks):
            block = recorded.allocate(fixed + slope * b, str(index), CATEGORIES[index % len(CATEGORIES)])
            if is_freed:
                recorded.free(block)
        return recorded

    timeline = affine(made)
    assert sum(timeline.composition(batch_size).values()) == timeline.live_bytes(batch_size)


def test_the_peak_is_that_of_the_replayed_allocator() -> None:
    timeline = affine(lambda b: recording(("w", 19 * MIB), ("x", 512 * b), "x"))
    # 19 MiB use a segment of 20 MiB whose end is not split off; 1,024 bytes use a segment of 2 MiB
    assert timeline.peak(2) == Peak(20 * MIB + 1024, 22 * MIB)
    assert timeline.live_bytes(2) == 19 * MIB + 1024


def test_empty_blocks_are_not_requested() -> None:
    timeline = affine(lambda b: recording(("nothing", 0), ("x", 512 * b), "nothing", "x"))
    assert list(timeline.requests(3)) == [(2, 1536), (2, 0)]


def grows(b: int) -> Recording:
    return recording(("w", 20 * MIB), ("x", 20 * MIB * b), "x")


def test_without_a_device_there_is_no_limit() -> None:
    assert affine(grows).peak(1000) == Peak(20020 * MIB, 20020 * MIB)
    assert affine(grows).replay(1000).fits


def test_a_peak_above_the_capacity_does_not_fit() -> None:
    timeline = affine(grows)
    assert timeline.replay(4, device(100 * MIB)).fits
    result = timeline.replay(5, device(100 * MIB))
    assert not result.fits
    assert result.peak == Peak(20 * MIB, 20 * MIB)  # up to the allocation that failed
    assert timeline.peak(5, device(100 * MIB)) == result.peak


def test_the_context_is_not_available_to_tensors() -> None:
    assert affine(grows).replay(4, device(101 * MIB, context_bytes=MIB)).fits
    assert not affine(grows).replay(4, device(100 * MIB, context_bytes=1)).fits


def test_a_step_whose_reserved_peak_exceeds_the_device_can_fit_after_a_cache_release() -> None:
    timeline = affine(lambda b: recording(("x", 40 * MIB * b), "x", ("y", 60 * MIB * b), "y"))
    assert timeline.peak(1).reserved_bytes == 100 * MIB
    result = timeline.replay(1, device(60 * MIB))
    assert result.fits
    assert result.retries == 1


def test_expandable_segments_reserve_less_when_blocks_do_not_fit_the_gaps() -> None:
    timeline = affine(lambda b: recording(("x", 20 * MIB * b), "x", ("y", 40 * MIB * b), "y"))
    assert timeline.replay(1, expandable_segments=True).peak.reserved_bytes == 40 * MIB
    assert timeline.replay(1).peak.reserved_bytes == 60 * MIB


# ---- real models


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    return BertForTokenClassification(config)


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def trainer_step(settings: StepSettings, length: int = 48) -> Callable[[nn.Module, int], None]:
    steps: dict[nn.Module, TrainingStep] = {}

    def step(model: nn.Module, batch_size: int) -> None:
        if model not in steps:
            steps.clear()
            steps[model] = TrainingStep(model, settings)
        ids = torch.ones(batch_size, length, dtype=torch.int64)
        steps[model]([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.ones_like(ids)}])

    return step


@pytest.mark.parametrize("gpu", ["T4", "A100-40GB"])
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_traces_at_2_and_3_predict_the_trace_at_7_exactly(build: Callable[[], nn.Module], gpu: str) -> None:
    step, spec = trainer_step(StepSettings("fp16")), catalog.gpu(gpu)
    timeline = trace(build, step, device=spec)
    third = _record(build, step, 7, Recorder(spec), spec)
    assert third.events.tolist() == timeline._events.tolist()
    assert third.origins == timeline.origins
    assert third.categories == timeline.categories
    sizes = [size.rule(spec, *size.arguments) if isinstance(size, Formula) else size for size in third.sizes]
    assert len(sizes) > 500
    assert timeline.sizes(7, spec).tolist() == sizes


def test_a_step_with_one_pass_per_sample_is_refused() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        for _ in range(batch_size):
            model(torch.randn(4, 16)).sum().backward()

    with pytest.raises(TraceError, match=r"events at batch size 2 and \d+ at 3"):
        trace(lambda: nn.Linear(16, 16), step)


def test_a_step_with_another_operation_at_another_batch_size_is_refused() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        hidden = model(torch.randn(batch_size, 16))
        (hidden.tanh() if batch_size == 2 else hidden.sigmoid()).sum().backward()

    with pytest.raises(TraceError, match=r"tanh.*sigmoid.*same operations at every size"):
        trace(lambda: nn.Linear(16, 16), step)


def test_memory_that_grows_with_the_square_of_the_batch_is_refused() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        embedded = model(torch.randn(batch_size * 128, 16))
        (embedded @ embedded.T).logsumexp(1).sum().backward()  # every pair of samples, as in CLIP

    with pytest.raises(TraceError, match="linear"):
        trace(lambda: nn.Linear(16, 16), step)


def test_the_requested_device_decides_the_workspace() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        model(torch.randn(batch_size, 512)).sum().backward()

    h100 = catalog.gpu("H100-80GB")
    default, specific = trace(lambda: nn.Linear(512, 512), step), trace(lambda: nn.Linear(512, 512), step, device=h100)
    assert default.peak(4, h100) == specific.peak(4, h100)


def test_the_requested_device_decides_the_attention_kernel() -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        q, k, v = (torch.randn(batch_size, 4, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    default, specific = trace(nn.Module, step), trace(nn.Module, step, device=T4)
    assert default.peak(4, T4) == specific.peak(4, T4)
