"""The searches that benchmarks/peers.py compares, each as its own documentation shows it, and plain training."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers_cases import MAX_GRAD_NORM, OPTIMIZER, SEQUENCES, STEPS, Attempt, Case, RunDevice, Search
from peers_monitor import Monitor

OURS = {"virtual": "this project, rehearsed", "cpu": "this project", "cuda": "this project"}


class Sequences:
    """A dataset of identical sequences of full length."""

    def __init__(self, case: Case) -> None:
        batch = case.workload().batch(1, "cpu")
        self._sequence = {name: tensor[0] for name, tensor in batch.items()}

    def __len__(self) -> int:
        return SEQUENCES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sequence


def dataloader(case: Case, batch_size: int) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(Sequences(case), batch_size=batch_size, shuffle=True)


def trainer(case: Case, monitor: Monitor, batch_size: int, *, auto_find: bool) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "trainer",
        per_device_train_batch_size=batch_size,
        auto_find_batch_size=auto_find,
        max_steps=STEPS,
        fp16=case.precision == "fp16",
        bf16=case.precision == "bf16",
        use_cpu=monitor.device.kind == "cpu",
        optim=OPTIMIZER,
        max_grad_norm=MAX_GRAD_NORM,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model=monitor.model(case), args=arguments, train_dataset=Sequences(case))


# ---- the contenders --------------------------------------------------------------------------------------------------


def accelerate_search(case: Case, monitor: Monitor, start: int, *, built_inside: bool) -> int:
    """Run find_executable_batch_size in one of its two documented forms.

    ``built_inside``: the decorated function builds the model, as in
    https://huggingface.co/docs/accelerate/usage_guides/memory; otherwise it gets the model as an argument, as in the
    docstring of find_executable_batch_size.
    """
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size

    from hf_bsopt.workloads.optimizers import make_optimizer

    precision = "no" if case.precision == "fp32" else case.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=monitor.device.kind == "cpu")

    def prepared() -> Any:
        model = monitor.model(case)
        return accelerator.prepare(model, make_optimizer(model, OPTIMIZER))

    def train(batch_size: int, model: Any, optimizer: Any) -> int:
        model.train()
        batches = accelerator.prepare(dataloader(case, batch_size))
        for _, batch in zip(range(STEPS), batches, strict=False):
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        return batch_size

    def build_and_train(batch_size: int) -> int:
        accelerator.free_memory()
        return train(batch_size, *prepared())

    search = functools.partial(find_executable_batch_size, starting_batch_size=start)
    return int(search(build_and_train)() if built_inside else search(train)(*prepared()))


def trainer_search(case: Case, monitor: Monitor, start: int) -> int:
    training = trainer(case, monitor, start, auto_find=True)
    training.train()
    return int(training.state.train_batch_size)


def lightning_search(case: Case, monitor: Monitor, start: int, *, mode: str) -> int:
    """Run Lightning's batch size finder.

    Source: https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html#batch-size-finder
    """
    import lightning
    from lightning.pytorch.tuner import Tuner
    from torch.nn import utils

    from hf_bsopt.workloads.optimizers import make_optimizer

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = start
            self.model = monitor.model(case)

        def train_dataloader(self) -> Any:
            return dataloader(case, self.batch_size)

        def training_step(self, batch: dict[str, Any]) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.model, OPTIMIZER)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            """Clip the gradients here: Trainer(gradient_clip_val=1.0) refuses a fused optimizer under fp16."""
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer)
            utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    precision: Any = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}[case.precision]
    training = lightning.Trainer(
        accelerator="cpu" if monitor.device.kind == "cpu" else "gpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
    )
    return int(Tuner(training).scale_batch_size(Module(), mode=mode, init_val=start))


@dataclass(frozen=True)
class Peer:
    """A contender. ``start``: its first size; None takes the case's."""

    package: str
    search: Callable[[Case, Monitor, int], int]
    start: int | None = None


PEERS = {
    "accelerate, guide": Peer("accelerate", functools.partial(accelerate_search, built_inside=True)),
    "accelerate, docstring": Peer("accelerate", functools.partial(accelerate_search, built_inside=False)),
    "Trainer, auto_find": Peer("transformers", trainer_search),
    "Lightning, power": Peer("lightning", functools.partial(lightning_search, mode="power"), start=2),
    "Lightning, binsearch": Peer("lightning", functools.partial(lightning_search, mode="binsearch"), start=2),
}


@dataclass(frozen=True)
class Entry:
    """A peer with its first size. ``name``: its label in the table."""

    name: str
    peer: str
    start: int


def entries(case: Case) -> list[Entry]:
    """Return the peers whose package is installed, once for each first size."""
    found = []
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.package) is not None:
            starts = case.starts if peer.start is None else (peer.start,)
            found += [Entry(name if len(starts) == 1 else f"{name} {start}", name, start) for start in starts]
    return found


def skipped_lines() -> list[str]:
    """Return a line for each peer whose package is not installed."""
    gone = {name: peer.package for name, peer in PEERS.items() if importlib.util.find_spec(peer.package) is None}
    return [f"{name}: skipped, {package} is not installed" for name, package in gone.items()]


def import_everything(package: str) -> None:
    """Import what a process needs before its memory is limited."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    importlib.import_module(package)
    if package == "transformers":
        from transformers import Trainer, TrainingArguments  # noqa: F401


def our_search(case: Case, device: RunDevice) -> Search:
    """Run find_batch_size, which starts its own processes on the device. Only sizes that were run count as trials."""
    from hf_bsopt import find_batch_size

    report = find_batch_size(
        case.model,
        task=case.task,
        max_length=case.max_length,
        precision=case.precision,
        target=(0, 1),
        multiple_of=1,
        evaluation=False,
        cache=False,
        **device.search_arguments(),
    )
    trials = [trial for trial in report.trials if trial.source != "predicted"]
    run = [Attempt(trial.batch_size, trial.fits) for trial in trials]
    errors = sum(trial.outcome == "oom" for trial in trials)
    return Search(OURS[device.kind], run, errors, report.decision.batch_size)
