"""What else would make room when a model does not fit or is slow: each option predicted like the answer itself.

    report = find_batch_size("bert-large", gpu="T4", device="predict")
    print(advise(report))

One trace per option; a larger GPU of the same compute capability needs none. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..data import catalog
from ..errors import BatchSizeError, NothingFitsError, UsageError
from ..memory.flops import sequence_flops
from ..memory.predictor import Predictor
from ..options import SearchOptions
from ..records import Decision, GpuSpec
from ..search.answer import Answer, Question
from ..search.prediction import predict
from ..workloads.workload import Trainable
from .alternatives import Alternative, alternatives, combinations, shorter
from .result import Advice, Suggestion

USUAL_EFFECTIVE_BATCH = 16
"""Sequences in an optimizer step, at least: BERT's fine-tuning took 16 or 32 (Devlin et al. 2019, arXiv:1810.04805)."""
MORE_MEMORY = 1.5
"""If something fits already, a larger GPU is one with half as much memory again."""


def advise(found: Answer | NothingFitsError) -> Advice:
    """Predict what would make room, or let anything fit at all; also if the answer was verified by real steps.

    Raises UsageError for an error that came from real steps: a prediction would not agree with it.
    """
    if isinstance(found, Answer):
        return suggestions_for(found.question)
    if found.question is None:
        raise UsageError("this error came from real steps, not from a prediction: ask with device='predict'")
    return suggestions_for(found.question)


def suggestions_for(question: Question) -> Advice:
    """Predict every option that applies and is not used yet, best first; one that does not help says so."""
    return _Evaluation(replace(question, workload=question.workload.accumulating(1))).result()


@dataclass
class _Evaluation:
    """What is known of the workload as it is, and the predictions of all others."""

    question: Question
    _traced: Predictor = field(init=False)
    _now: Suggestion = field(init=False)
    _decision: Decision | None = field(init=False)
    _flops: int | None = field(init=False)
    _model_bytes: dict[Trainable, int] = field(init=False, default_factory=dict)

    @property
    def workload(self) -> Trainable:
        return self.question.workload

    @property
    def device(self) -> GpuSpec:
        return self.question.device

    @property
    def search(self) -> SearchOptions:
        return self.question.search

    def result(self) -> Advice:
        self._traced = self._predictor(self.workload)
        self._model_bytes[self.workload] = self._traced.timeline.model_bytes()
        now, self._decision = self._suggest(Alternative("now", "", "", self.workload), self.device, self._traced)
        self._flops = _operations(self.workload, self.device)
        self._now = replace(now, compute=None if self._flops is None else 1.0)
        suggestions = [*self._shorter(), *self._accumulated()]
        suggestions += [self._predicted(alternative) for alternative in alternatives(self.workload, self.device.kind)]
        if not self._now.fits and not any(suggestion.fits for suggestion in suggestions):
            suggestions += self._combined()
        return Advice(self._now, (*suggestions, *self._larger_gpu()), self.search.target[1])

    def _shorter(self) -> Iterator[Suggestion]:
        """Halve the length; if nothing fits, take the longest half that does, or else the last."""
        suggestion = None
        for alternative in shorter(self.workload):
            suggestion = self._predicted(alternative)
            if suggestion.fits or suggestion.is_lower_bound:
                break
        if suggestion is not None:
            yield suggestion

    def _accumulated(self) -> Iterator[Suggestion]:
        """Accumulate, if a batch is wanted that does not fit at once, and no accumulation was asked for."""
        search, now = self.search, self._now.batch_size or 0
        if not now or search.effective_batch_size or search.total_tokens or search.gradient_accumulation_steps > 1:
            return
        if search.check is not None and search.check > now:
            wanted, why = search.check * search.num_processes, "what was asked about"
        elif now * search.num_processes < USUAL_EFFECTIVE_BATCH and self._is_memory:
            wanted, why = USUAL_EFFECTIVE_BATCH, "the least that BERT was fine-tuned with (arXiv:1810.04805)"
        else:
            return
        cost = (
            f"an optimizer step takes several passes, with its gradients in memory meanwhile; {wanted} sequences are "
            f"{why}"
        )
        alternative = Alternative("accumulation", f"--effective_batch_size {wanted}", cost, self.workload)
        suggestion, _ = self._suggest(
            alternative, self.device, self._traced, replace(search, effective_batch_size=wanted)
        )
        yield replace(suggestion, compute=self._now.compute)

    def _combined(self) -> Iterator[Suggestion]:
        """If no option alone is enough, return the first combination that fits."""
        for alternative in combinations(self.workload, self.device.kind):
            suggestion = self._predicted(alternative)
            if suggestion.fits:
                yield suggestion
                return

    def _larger_gpu(self) -> Iterator[Suggestion]:
        """Return the smallest GPU that is large enough and no older than this one: what runs here runs there."""
        if self.device.kind != "cuda" or (self._now.fits and not self._is_memory):
            return
        least = self._total * MORE_MEMORY if self._now.fits else self._total + 1
        why = "with half as much memory again" if self._now.fits else "on which it fits"
        suggestion = None
        for gpu in sorted(map(catalog.gpu, catalog.known_gpus()), key=_memory):
            if gpu.compute_capability >= self.device.compute_capability and _memory(gpu) >= least:
                suggestion = self._on(gpu, f"the smallest GPU of the catalog {why}, no older than {self.device.name}")
                if suggestion.fits:
                    break
        if suggestion is not None:
            cost = f"even {gpu.name}, the largest of the catalog, is too small for it"
            yield suggestion if suggestion.fits else replace(suggestion, cost=cost)

    def _on(self, gpu: GpuSpec, cost: str) -> Suggestion:
        cost += "; its price and its speed are not known here"
        alternative = Alternative(f"larger GPU: {gpu.name}", f"--gpu {gpu.name!r}", cost, self.workload)
        least = self._model_bytes[self.workload] + gpu.context_bytes  # on every GPU: known without a trace
        if least > _memory(gpu) * self.search.target[1]:
            return _too_much(alternative, gpu, least)
        suggestion, _ = self._suggest(alternative, gpu, self._traced)
        return replace(suggestion, compute=self._now.compute)

    def _predicted(self, alternative: Alternative) -> Suggestion:
        if alternative.workload is None:
            return _unknown(alternative, self.device)
        workload = alternative.workload
        try:
            traced = self._predictor(workload)
            kept = alternative.model_of or workload
            if kept not in self._model_bytes:
                self._model_bytes[kept] = traced.timeline.model_bytes()
            least = self._model_bytes[kept] + self.device.context_bytes
            if least > self._total * self.search.target[1]:
                return _too_much(alternative, self.device, least)
            suggestion, _ = self._suggest(alternative, self.device, traced)
        except BatchSizeError as error:
            return _unknown(replace(alternative, obstacle=f"not possible: {error}"), self.device)
        return replace(suggestion, compute=self._compute(workload) if suggestion.fits else None)

    def _suggest(
        self, alternative: Alternative, device: GpuSpec, traced: Predictor, search: SearchOptions | None = None
    ) -> tuple[Suggestion, Decision | None]:
        """``traced``: a predictor of the alternative's workload, on this device or another."""
        assert alternative.workload is not None
        suggestion = _unknown(alternative, device)
        try:
            predicted = predict(
                alternative.workload,
                device,
                search or self.search,
                expandable_segments=self.question.expandable_segments,
                traced=traced,
            )
        except NothingFitsError:
            return replace(suggestion, batch_size=0, used_bytes=traced.on(device).unlimited(1)), None
        decision, plan = predicted.decision, predicted.plan
        used = predicted.predictor(decision.batch_size).used_bytes
        return replace(
            suggestion, batch_size=plan.micro_batch, accumulation=plan.accumulation, used_bytes=used
        ), decision

    def _predictor(self, workload: Trainable) -> Predictor:
        accumulating = workload.accumulating(self.search.gradient_accumulation_steps)
        return Predictor(accumulating, self.device, expandable_segments=self.question.expandable_segments)

    def _compute(self, workload: Trainable) -> float | None:
        flops = _operations(workload, self.device) if self._flops else None
        return None if flops is None or not self._flops else flops / self._flops

    @property
    def _total(self) -> int:
        return _memory(self.device)

    @property
    def _is_memory(self) -> bool:
        """Whether memory keeps the batch from being larger, not a constraint."""
        wanted = self.search.effective_batch_size or self.search.total_tokens
        is_whole = bool(wanted) and self._now.accumulation == 1
        return self._decision is not None and self._decision.bound not in ("limit", "dataset size") and not is_whole


def _memory(device: GpuSpec) -> int:
    return device.total_bytes or 0


def _unknown(alternative: Alternative, device: GpuSpec) -> Suggestion:
    return Suggestion(
        name=alternative.name,
        flags=alternative.flags,
        batch_size=None,
        accumulation=1,
        used_bytes=None,
        total_bytes=_memory(device),
        compute=None,
        cost=alternative.cost,
        obstacle=alternative.obstacle,
    )


def _too_much(alternative: Alternative, device: GpuSpec, least: int) -> Suggestion:
    return replace(_unknown(alternative, device), batch_size=0, used_bytes=least, is_lower_bound=True)


def _operations(workload: Trainable, device: GpuSpec) -> int | None:
    """Return the operations per sequence; None if counting fails, which does not affect the memory prediction."""
    try:
        return sequence_flops(workload, device)
    except (BatchSizeError, NotImplementedError, RuntimeError):
        return None
