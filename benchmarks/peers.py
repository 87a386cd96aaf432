"""Searches for the largest batch size, side by side: the same model, data, step and memory limit, in one run.

    python benchmarks/peers.py                         # all cases, under the CUDA build of torch; no card is needed
    python benchmarks/peers.py --case "BERT-base, T4" --sizes
    python benchmarks/peers.py --markdown              # the tables of docs/peers.md

Every search, and every training run that tells the true largest size, has a process of its own. The device is virtual
(hf_bsopt.rehearsal): it has memory and no arithmetic, so that sizes and errors are counted and seconds are not.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_bsopt import catalog
from hf_bsopt.records import GpuSpec
from hf_bsopt.rehearsal import environment, why_not
from hf_bsopt.workload import Workload, describe

STEPS = 3
SEQUENCES = 65_536
MAX_GRAD_NORM = 1.0  # Trainer's default
SIZES_ABOVE = 4  # tried too, since a larger size can fit where a smaller one does not
TIMEOUT_SECONDS = 300
OUTPUT = "output.txt"
PACKAGES = ("torch", "transformers", "accelerate", "lightning")


@dataclass(frozen=True)
class Case:
    """start: where accelerate and Trainer begin; 128 is accelerate's default and that of its documentation."""

    name: str
    model: str
    task: str
    max_length: int
    precision: str
    gpu: str
    start: int = 128

    @property
    def spec(self) -> GpuSpec:
        return catalog.gpu(self.gpu)

    def workload(self) -> Workload:
        return describe(self.model, task=self.task, max_length=self.max_length, precision=self.precision)

    def title(self) -> str:
        return f"{self.model}, {self.task}, {self.max_length} tokens, {self.precision}, {self.gpu}"


CASES = (
    Case("BERT-base, T4", "dmis-lab/biobert-v1.1", "token-classification", 512, "fp16", "T4"),
    Case("BERT-base, A100", "dmis-lab/biobert-v1.1", "token-classification", 512, "bf16", "A100-40GB"),
    Case("GPT-2, A100", "gpt2", "causal-lm", 1024, "bf16", "A100-40GB"),
)


@dataclass
class Attempt:
    """One size that was run, whatever made it run."""

    size: int
    fits: bool = True

    def __str__(self) -> str:
        return f"{self.size}" if self.fits else f"{self.size}✗"


@dataclass
class Search:
    """What a contender did. size is None where it named none, and failure says why."""

    contender: str
    attempts: list[Attempt] = field(default_factory=list)
    errors: int = 0
    size: int | None = None
    failure: str = ""

    @property
    def was_run(self) -> bool:
        return any(attempt.size == self.size and attempt.fits for attempt in self.attempts)


# ---- what is the same for all ----------------------------------------------------------------------------------------


class Watch:
    """Notes the sizes that reach the model and the out-of-memory errors of torch's allocator, from outside."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self._errors = 0

    def model(self, case: Case) -> Any:
        """The model, with random weights, on the device."""
        import torch

        with torch.device("cuda"):
            model = case.workload().build()
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return model

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = kwargs["input_ids"].size(0)
        if self.count() or not self.attempts or self.attempts[-1].size != size:
            self.attempts.append(Attempt(size))

    def count(self) -> int:
        """Errors since the last count; they belong to the attempt that is running."""
        import torch

        total = int(torch.cuda.memory_stats().get("num_ooms", 0))
        new, self._errors = total - self._errors, total
        if new and self.attempts:
            self.attempts[-1].fits = False
        return new

    def search(self, contender: str, size: int | None, failure: str = "") -> Search:
        self.count()
        return Search(contender, self.attempts, self._errors, size, failure)


class Sequences:
    """The dataset: sequences of full length, one like the other."""

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


def trainer(case: Case, watch: Watch, batch_size: int, *, auto_find: bool) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "trainer",
        per_device_train_batch_size=batch_size,
        auto_find_batch_size=auto_find,
        max_steps=STEPS,
        fp16=case.precision == "fp16",
        bf16=case.precision == "bf16",
        optim="adamw_torch_fused",
        max_grad_norm=MAX_GRAD_NORM,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model=watch.model(case), args=arguments, train_dataset=Sequences(case))


# ---- the contenders: each as its documentation shows it --------------------------------------------------------------


def accelerate_search(case: Case, watch: Watch, *, built_inside: bool) -> int:
    """built_inside: the function makes the model, as in https://huggingface.co/docs/accelerate/usage_guides/memory;
    otherwise it is given the model, as in the docstring of find_executable_batch_size.
    """
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size

    from hf_bsopt.training_step import make_optimizer

    accelerator = Accelerator(mixed_precision=case.precision)

    def prepared() -> Any:
        model = watch.model(case)
        return accelerator.prepare(model, make_optimizer(model, "adamw_torch_fused"))

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

    search = functools.partial(find_executable_batch_size, starting_batch_size=case.start)
    return int(search(build_and_train)() if built_inside else search(train)(*prepared()))


def trainer_search(case: Case, watch: Watch) -> int:
    training = trainer(case, watch, case.start, auto_find=True)
    training.train()
    return int(training.state.train_batch_size)


def lightning_search(case: Case, watch: Watch, mode: str) -> int:
    """https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html#batch-size-finder"""
    import lightning
    from lightning.pytorch.tuner import Tuner
    from torch.nn.utils import clip_grad_norm_

    from hf_bsopt.training_step import make_optimizer

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.model = watch.model(case)

        def train_dataloader(self) -> Any:
            return dataloader(case, self.batch_size)

        def training_step(self, batch: dict[str, Any]) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.model, "adamw_torch_fused")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            """Trainer(gradient_clip_val=1.0) refuses a fused optimizer under fp16."""
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    precision: Any = {"fp16": "16-mixed", "bf16": "bf16-mixed"}[case.precision]
    training = lightning.Trainer(
        accelerator="gpu", devices=1, precision=precision, max_epochs=1, logger=False, enable_checkpointing=False
    )
    return int(Tuner(training).scale_batch_size(Module(), mode=mode, init_val=2))


PEERS: dict[str, tuple[str, Callable[[Case, Watch], int]]] = {
    "accelerate, guide": ("accelerate", functools.partial(accelerate_search, built_inside=True)),
    "accelerate, docstring": ("accelerate", functools.partial(accelerate_search, built_inside=False)),
    "Trainer, auto_find": ("transformers", trainer_search),
    "Lightning, power": ("lightning", functools.partial(lightning_search, mode="power")),
    "Lightning, binsearch": ("lightning", functools.partial(lightning_search, mode="binsearch")),
}
"""contender: (its package, its search)"""


def our_search(case: Case) -> Search:
    """It starts its own processes on the virtual device: the trials are what they ran, not what was predicted."""
    from hf_bsopt import find_batch_size

    report = find_batch_size(
        case.model,
        gpu=case.spec,
        device="rehearse",
        task=case.task,
        max_length=case.max_length,
        precision=case.precision,
        target=(0, 1),
        multiple_of=1,
        evaluation=False,
    )
    run = [Attempt(t.batch_size, t.fits) for t in report.trials if t.source == "rehearsed"]
    return Search("this project, rehearsed", run, sum(not attempt.fits for attempt in run), report.decision.batch_size)


# ---- the true largest ------------------------------------------------------------------------------------------------


class Truth:
    """Whether Trainer trains at a size: three steps in a fresh process, each size once."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.known: dict[int, bool] = {}

    def fits(self, size: int) -> bool:
        if size not in self.known:
            search = in_a_process(train_for_real, self._case, size)
            if search.failure:
                raise RuntimeError(f"{self._case.name} at {size}: {search.failure}")
            self.known[size] = search.size is not None
        return self.known[size]

    def largest(self) -> int:
        """Doubling, bisection, and then the sizes right above."""
        if not self.fits(1):
            return 0
        low, high = 1, 2
        while self.fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return max([low, *(size for size in range(high, high + SIZES_ABOVE) if self.fits(size))])


def train_for_real(case: Case, watch: Watch, batch_size: int) -> Search:
    import torch

    try:
        trainer(case, watch, batch_size, auto_find=False).train()
    except torch.OutOfMemoryError:
        return watch.search("truth", None)
    return watch.search("truth", batch_size)


def peer_search(case: Case, watch: Watch, contender: str) -> Search:
    return watch.search(contender, PEERS[contender][1](case, watch))


# ---- processes -------------------------------------------------------------------------------------------------------


def in_a_process(function: Callable[..., Search], case: Case, argument: Any) -> Search:
    """``function(case, watch, argument)`` in a fork of this process, which has imported everything and not yet touched
    the device. What it prints is dropped, but for the end of it where it dies.
    """
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = forking.Process(target=_child, args=(sender, Path(folder), function, case, argument))
        child.start()
        sender.close()
        try:
            answer: Search | None = receiver.recv() if receiver.poll(TIMEOUT_SECONDS) else None
            failure = "" if answer else f"not done after {TIMEOUT_SECONDS} s"
        except EOFError:
            answer, failure = None, "the process died: " + (Path(folder) / OUTPUT).read_text()[-300:]
        if answer is None:
            child.kill()
        child.join()
        return answer or Search(str(argument), failure=failure)


def _child(sender: Connection, folder: Path, function: Callable[..., Search], case: Case, argument: Any) -> None:
    os.chdir(folder)
    warnings.filterwarnings("ignore")
    watch = Watch()
    with (folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        sender.send(function(case, watch, argument))
    except Exception as error:  # any contender may fail in a way of its own, and that is its result
        sender.send(watch.search(str(argument), None, f"{type(error).__name__}: {error}"[:300]))


def on_the_device(case: Case, contenders: list[str], sizes: list[int]) -> Iterator[dict[str, Any]]:
    """The peers; then the true largest, and whether what they found and the given sizes fit in training."""
    import torch
    import transformers

    for package in {PEERS[name][0] for name in contenders}:
        importlib.import_module(package)
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    transformers.utils.logging.set_verbosity_error()
    found = set(sizes)
    for name in contenders:
        search = in_a_process(peer_search, case, name)
        found |= {search.size} if search.size else set()
        yield asdict(search)
    truth = Truth(case)
    yield {"largest": truth.largest(), "fits": {size: truth.fits(size) for size in sorted(found)}}


def worker(request: dict[str, Any]) -> None:
    """What `answers` started: a line of JSON for each answer."""
    case = Case(**request["case"])
    found = [asdict(our_search(case))] if request["ours"] else on_the_device(case, request["peers"], request["sizes"])
    for answer in found:
        print(json.dumps(answer), flush=True)


def answers(environment: Mapping[str, str], **request: Any) -> Iterator[dict[str, Any]]:
    """What `worker` answers in a process with that environment."""
    command = [sys.executable, __file__, "--worker", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")


def environment_of(device: str, gpu: GpuSpec) -> dict[str, str]:
    """What a process needs to see that GPU. `virtual` is the only device yet."""
    if device != "virtual":
        raise ValueError(f"no device {device!r}")
    return environment(gpu)


# ---- what is told ----------------------------------------------------------------------------------------------------

HEADER = ("contender", "trials", "OOM", "found", "of largest", "was run", "trains")


@dataclass(frozen=True)
class Comparison:
    """searches of one case; largest is the true one; fits says of the sizes found whether Trainer trains at them."""

    case: Case
    searches: list[Search]
    largest: int
    fits: dict[int, bool]

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                search.contender,
                str(len(search.attempts)),
                str(search.errors),
                str(search.size or "–"),
                f"{search.size / self.largest:.1%}".replace("%", " %") if search.size else "–",
                _yes(search.was_run) if search.size else "–",
                _yes(self.fits[search.size]) if search.size else "–",
            )
            for search in self.searches
        ]

    def failures(self) -> list[str]:
        return [f"{search.contender}: {search.failure}" for search in self.searches if search.failure]

    def text(self, *, sizes: bool) -> str:
        lines = [self.case.title(), f"true largest: {self.largest}", ""]
        layout = "{:<24} {:>6} {:>5} {:>6} {:>11}  {:<8} {}"
        lines += [layout.format(*row) for row in (HEADER, *self.rows())]
        lines += [f"  {failure}" for failure in self.failures()]
        if sizes:
            lines += ["", "sizes run, ✗ out of memory:"]
            for search in self.searches:
                line = f"{search.contender}: {' '.join(map(str, search.attempts)) or 'none'}"
                lines += textwrap.wrap(line, 78, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)

    def markdown(self) -> str:
        cells = [(*row, " ".join(map(str, s.attempts))) for row, s in zip(self.rows(), self.searches, strict=True)]
        lines = [f"**{self.case.title()}**: true largest {self.largest}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in ((*HEADER, "sizes run"), ("---",) * 8, *cells)]
        return "\n".join([*lines, *(f"\n{failure}" for failure in self.failures())])


def compare(case: Case, device: str, peers: list[str]) -> Comparison:
    ours = [_search(answer) for answer in answers(os.environ, case=asdict(case), ours=True)]
    sizes = [search.size for search in ours if search.size]
    *searches, truth = answers(
        environment_of(device, case.spec), case=asdict(case), ours=False, peers=peers, sizes=sizes
    )
    fits = {int(size): fits for size, fits in truth["fits"].items()}
    return Comparison(case, [*map(_search, searches), *ours], truth["largest"], fits)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _search(answer: dict[str, Any]) -> Search:
    return Search(**{**answer, "attempts": [Attempt(**attempt) for attempt in answer["attempts"]]})


def installed() -> list[str]:
    """The peers whose package is here; says which are not."""
    missing = {name: package for name, (package, _) in PEERS.items() if importlib.util.find_spec(package) is None}
    for name, package in missing.items():
        print(f"{name}: skipped, {package} is not installed")
    return [name for name in PEERS if name not in missing]


def versions() -> str:
    known = [package for package in PACKAGES if importlib.util.find_spec(package)]
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["virtual"], default="virtual")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--start", type=int, default=128, help="where accelerate and Trainer begin (default: 128)")
    parser.add_argument("--sizes", action="store_true", help="the sizes that each of them ran")
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/peers.md, with those sizes")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    reason = why_not()
    if reason is not None:
        parser.error(f"no virtual device here: {reason}")
    print(versions())
    peers = installed()
    for case in CASES:
        if args.case in (None, case.name):
            comparison = compare(replace(case, start=args.start), args.device, peers)
            print("\n" + (comparison.markdown() if args.markdown else comparison.text(sizes=args.sizes)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
