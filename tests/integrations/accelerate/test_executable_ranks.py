"""The decorator and find_batch_size in two processes that train together."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from ranks import Answer, run
from torch import distributed, nn

from hf_bsopt.data import catalog
from hf_bsopt.errors import UsageError
from hf_bsopt.integrations.accelerate import executable_batch_size
from hf_bsopt.integrations.accelerate.accelerator import find_batch_size, find_executable_batch_size
from hf_bsopt.options import DeviceOptions, SearchOptions
from hf_bsopt.probing.host_memory import ProcessStatus, limit_this_process, why_no_limit
from hf_bsopt.records import GpuSpec
from hf_bsopt.search import pipeline
from hf_bsopt.search.device_choice import DeviceChoice
from hf_bsopt.workloads.trainable import Trainable

SLACK_SECONDS = 30.0
TIMEOUT_SECONDS = 1.0
LAYERS = 6
CAUSE = "CUDA out of memory. Tried to allocate 2.00 MiB"
OUT_ON_RANK_0 = f"64 sequences ran out of memory on rank 0 ({CAUSE})"


def synchronized_training(batch_size: int, largest: int) -> int:
    """Allocate on every rank before the collective of the step."""
    if batch_size > largest:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    distributed.all_reduce(torch.ones(1))
    return batch_size


# ---- functions that the ranks run


def train_where_both_run_out_of_memory(largest: int) -> list[Any]:
    """Run out of memory on both ranks; the smaller rank then proposes less."""
    proposals = iter([largest, 1])
    train = find_executable_batch_size(
        lambda batch_size: synchronized_training(batch_size, 40), 64, lambda: next(proposals)
    )
    return [train(), [attempt.batch_size for attempt in train.report.attempts]]


def start_with(size: int) -> int:
    return find_executable_batch_size(lambda batch_size: batch_size, size)()


def train_where_one_waits(largest: int) -> int:
    executable_batch_size.exchange = with_a_short_timeout(executable_batch_size.exchange)
    return find_executable_batch_size(lambda batch_size: synchronized_training(batch_size, largest), 64)()


def train_where_one_finishes(largest: int) -> int:
    def train(batch_size: int) -> int:
        if batch_size > largest:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return batch_size

    return find_executable_batch_size(train, 64)()


def train_out_of_step(collectives: int) -> int:
    def train(batch_size: int) -> int:
        for _ in range(collectives):
            distributed.all_reduce(torch.ones(1), async_op=True)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    return find_executable_batch_size(train, 64)()


def train_with_an_error(words: str) -> int:
    def train(batch_size: int) -> int:
        if words:
            raise ValueError(words)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    return find_executable_batch_size(train, 64)()


class WithLargeForward(nn.Module):
    """A model that needs more memory in its forward than in its backward pass, where an error on one rank would leave
    the other waiting in a collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(256, 256), nn.Tanh())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        torch.zeros(8, *x.shape)
        return out.mean()


def train_in_parallel_in(mebibytes: int) -> list[Any]:
    """Train with DistributedDataParallel in a process with limited memory."""
    torch.set_num_threads(1)
    limit_this_process(ProcessStatus.read().resident_bytes + mebibytes * 2**20)

    @find_executable_batch_size(starting_batch_size=512)
    def train(batch_size: int) -> int:
        model = nn.parallel.DistributedDataParallel(WithLargeForward())
        model(
            torch.zeros(batch_size, 128, 256)
        ).backward()  # one step: what malloc keeps of it would count against the limit in a second
        return batch_size

    return [train(), [attempt.batch_size for attempt in train.report.attempts]]


class Limited(nn.Module):
    """A model that runs out of memory in its forward pass above ``largest`` sequences."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.largest = largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.largest:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return self.layer(x)


def train_a_model_that_fits(largest: int) -> list[Any]:
    """Train a model that synchronizes with the other rank's in the collectives of its backward pass."""

    @find_executable_batch_size(starting_batch_size=64)
    def train(batch_size: int) -> int:
        model = nn.parallel.DistributedDataParallel(Limited(largest))
        model(torch.zeros(batch_size, 1)).sum().backward()
        return batch_size

    found = train()
    details = [attempt.detail for attempt in train.report.attempts if not attempt.fits]
    return [found, details, model_hooks_are_gone()]


def model_hooks_are_gone() -> bool:
    from torch.nn.modules import module

    return not module._global_forward_pre_hooks


def with_a_short_timeout(exchange: Any) -> Any:
    return lambda word, **_: exchange(word, timeout_seconds=TIMEOUT_SECONDS)


# ---- outcomes


def test_all_ranks_start_with_the_smallest_starting_size() -> None:
    first, second = run(start_with, 64, 48)
    assert (first.value, second.value) == (48, 48)


def test_all_ranks_continue_with_the_smallest_proposed_size() -> None:
    first, second = run(train_where_both_run_out_of_memory, 32, 24)
    assert first.value == second.value == [24, [64, 24]]


@pytest.fixture(scope="module")
def one_waits(once: Callable[..., Any]) -> list[Answer]:
    """Return the answers if rank 0 runs out of memory while rank 1 waits for it in a collective."""
    answers: list[Answer] = once("one_waits", lambda: run(train_where_one_waits, 32, 64))
    return answers


def test_rank_waiting_in_a_collective_is_named_with_the_size_to_restart_with(one_waits: list[Answer]) -> None:
    first, second = one_waits
    assert first.error == "AgreementError"
    assert first.message.startswith(f"{OUT_ON_RANK_0}; start again with 57, on all ranks: rank 1")
    assert max(first.seconds, second.seconds) < TIMEOUT_SECONDS + SLACK_SECONDS


def test_error_in_a_collective_is_attributed_to_the_rank_that_ended(one_waits: list[Answer]) -> None:
    _, second = one_waits
    assert (second.error, second.cause) == ("AgreementError", "RuntimeError")
    assert second.message == one_waits[0].message  # it names the rank, the cause and the size


def test_rank_that_finished_is_not_trained_again() -> None:
    first, second = run(train_where_one_finishes, 32, 64)
    assert second.value == 64
    assert first.error == "AgreementError"
    assert first.message.endswith("start again with 57: rank 1 finished, and all ranks must use the same size")


def test_ranks_that_failed_after_different_collectives_stop() -> None:
    for answer in run(train_out_of_step, 1, 2):
        assert answer.error == "AgreementError"
        assert answer.message.startswith(f"{OUT_ON_RANK_0}; start again with 57: the ranks did not stop")


def test_ranks_that_failed_after_the_same_collectives_continue() -> None:
    for answer in run(train_out_of_step, 1, 1):
        assert answer.error == "ReachedZeroError"


def test_other_error_is_raised_on_its_rank_and_reported_on_the_others() -> None:
    first, second = run(train_with_an_error, "", "no such layer")
    assert (second.error, second.message) == ("ValueError", "no such layer")
    assert first.error == "AgreementError"
    assert first.message.endswith("rank 1 failed: ValueError: no such layer")
    assert first.seconds < SLACK_SECONDS


@pytest.mark.slow
@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_ranks_with_different_memory_limits_end_with_one_size() -> None:
    first, second = run(train_in_parallel_in, 200, 120)
    assert first.value is not None, first.message
    assert second.value is not None, second.message
    assert first.value[0] == second.value[0] < 512
    assert first.value[1] == second.value[1]


def test_failed_forward_on_one_rank_stops_the_others_before_their_collectives() -> None:
    first, second = run(train_a_model_that_fits, 100, 20)
    sizes = (57, 51, 45, 40, 36, 32, 28, 25, 22, 19)
    assert first.value == [19, [f"another rank ran out of memory; trying {size} next" for size in sizes], True]
    assert second.value[0] == 19
    assert max(first.seconds, second.seconds) < SLACK_SECONDS


# ---- find_batch_size


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


EXAMPLE = {"x": torch.zeros(1, 64), "labels": torch.zeros(1, dtype=torch.long)}


def accelerator(processes: int = 1, precision: str = "no", accumulation: int = 1, device: str = "cpu") -> Any:
    return SimpleNamespace(
        distributed_type=DistributedType.NO,
        mixed_precision=precision,
        num_processes=processes,
        gradient_accumulation_steps=accumulation,
        device=torch.device(device),
    )


def predict_for(memory: str) -> list[Any]:
    report = find_batch_size(
        Classifier(), accelerator=accelerator(2), example_batch=EXAMPLE, gpu="T4", device="predict", memory=memory
    )
    return [report.plan.micro_batch, report.plan.effective_batch, report.decision.bound, list(report.notes)]


def predict_or_fail(memory: str) -> None:
    find_batch_size(
        Classifier(), accelerator=accelerator(2), example_batch=EXAMPLE, gpu="T4", device="predict", memory=memory
    )


def test_ranks_with_different_memory_agree_on_the_smaller_size() -> None:
    first, second = run(predict_for, "2GiB", "600MiB")
    assert first.value is not None, first.message
    assert first.value[:2] == second.value[:2]
    size = second.value[0]
    assert first.value[2] == "limit"
    assert second.value[2] == "memory"
    own = f"{size}: what all 2 processes can take; rank 1 can take no more, this one could take "
    assert [note for note in first.value[3] if note.startswith(own)]
    assert not [note for note in second.value[3] if note.startswith(own)]
    assert first.value[1] == 2 * size


def test_failed_search_on_one_rank_fails_on_all() -> None:
    first, second = run(predict_or_fail, "2GiB", "nonsense")
    assert first.error == second.error == "AgreementError"
    assert first.message == second.message
    assert first.message.startswith("rank 1 failed: UsageError: memory is a size such as 15GiB")
    assert second.cause == "UsageError"
    assert first.seconds < 3 * SLACK_SECONDS


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record the options of the search and the visible GPUs."""
    found: dict[str, Any] = {}

    def choose(options: DeviceOptions) -> DeviceChoice:
        found.update(device=options.device, visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return DeviceChoice(catalog.gpu("T4"), None, "nothing is run")

    def predict(workload: Trainable, device: GpuSpec, search: SearchOptions, **more: Any) -> Any:
        found.update(precision=workload.settings.precision, search=search)
        raise UsageError("enough")

    monkeypatch.setattr(pipeline, "choose_device", choose)
    monkeypatch.setattr(pipeline, "predict", predict)
    return found


def ask(accelerator: Any, model: nn.Module | None = None, **options: Any) -> None:
    with pytest.raises(UsageError, match="enough"):
        find_batch_size(model or Classifier(), accelerator=accelerator, example_batch=EXAMPLE, **options)


def test_settings_are_read_from_the_accelerator(asked: dict[str, Any]) -> None:
    ask(accelerator(4, "bf16", 8))
    assert (asked["precision"], asked["search"].num_processes, asked["search"].gradient_accumulation_steps) == (
        "bf16",
        4,
        8,
    )


def test_device_is_the_accelerators_unless_one_is_named(asked: dict[str, Any]) -> None:
    ask(accelerator(device="cuda:0"))
    assert asked["device"] == "cuda"
    ask(accelerator(), gpu="T4")
    assert asked["device"] == "auto"
    ask(accelerator(), gpu="T4", device="predict")
    assert asked["device"] == "predict"


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16-weights"), (torch.float16, "fp16-weights")],
)
def test_weights_decide_the_precision_without_mixed_precision(
    asked: dict[str, Any], dtype: torch.dtype, precision: str
) -> None:
    ask(accelerator(), Classifier().to(dtype))
    assert asked["precision"] == precision


@pytest.mark.parametrize(("visible", "visible_gpus"), [(None, "2"), ("4,5,6,7", "6"), ("0,GPU-1,GPU-2", "GPU-2")])
def test_each_rank_searches_on_its_own_gpu(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, visible: str | None, visible_gpus: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ask(accelerator(device="cuda:2"))
    assert asked["visible_gpus"] == visible_gpus
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_unsupported_precision_is_rejected(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="'fp8' is not supported; fp16 and bf16 are"):
        find_batch_size(Classifier(), accelerator=accelerator(precision="fp8"), example_batch=EXAMPLE)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_is_rejected(name: str) -> None:
    sharded = accelerator()
    sharded.distributed_type = DistributedType[name]
    with pytest.raises(UsageError, match=f"{name} does not hold a whole model"):
        find_batch_size(Classifier(), accelerator=sharded, example_batch=EXAMPLE)


def test_prepared_model_is_rejected() -> None:
    model = Classifier()
    model._original_forward = model.forward
    for prepared in (model, nn.DataParallel(Classifier())):
        with pytest.raises(UsageError, match=r"before accelerator\.prepare"):
            find_batch_size(prepared, accelerator=accelerator(), example_batch=EXAMPLE)
