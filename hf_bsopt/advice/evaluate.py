"""Predict other ways to train when a model does not fit or is slow, each in the same way as the answer itself.

    report = find_batch_size("bert-large", gpu="T4", device="predict")
    print(advise(report))

There is one trace per alternative; a larger GPU of the same compute capability needs none. Nothing is run.
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
from ..workloads.trainable import Trainable
from .alternatives import Alternative, alternatives, combinations, shorter
from .result import Advice, Suggestion

USUAL_EFFECTIVE_BATCH = 16
"""Sequences in an optimizer step: BERT was fine-tuned with 16 or 32 (Devlin et al. 2019, arXiv:1810.04805)."""
MORE_MEMORY = 1.5
"""If something fits already, a suggested larger GPU has at least this multiple of the memory."""


def advise(found: Answer | NothingFitsError) -> Advice:
    """Predict what would make room for a larger batch, or for any batch if nothing fits.

    An answer that was verified by real steps is compared by its prediction. Raises UsageError for an error that came
    from real steps: a prediction would not agree with it.
    """
    if isinstance(found, Answer):
        return suggestions_for(found.question)
    if found.question is None:
        raise UsageError("this error came from real steps, not from a prediction: ask with device='predict'")
    return suggestions_for(found.question)


def suggestions_for(question: Question) -> Advice:
    """Predict every alternative that applies and is not in use yet, best first, those that do not help included."""
    return _Evaluation(replace(question, workload=question.workload.accumulating(1))).result()


@dataclass
class _Evaluation:
    """The prediction for the current workload, and those for the alternatives."""

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
        """Halve the length until something fits; yield the last length that was tried."""
        suggestion = None
        for alternative in shorter(self.workload):
            suggestion = self._predicted(alternative)
            if suggestion.fits or suggestion.is_lower_bound:
                break
        if suggestion is not None:
            yield suggestion

    def _accumulated(self) -> Iterator[Suggestion]:
        """Yield accumulation if the wanted batch does not fit at once and no accumulation was requested."""
        search, now = self.search, self._now.batch_size or 0
        if not now or search.effective_batch_size or search.total_tokens or search.gradient_accumulation_steps > 1:
            return
        if search.check is not None and search.check > now:
            wanted, why = search.check * search.num_processes, "the size that was checked"
        elif now * search.num_processes < USUAL_EFFECTIVE_BATCH and self._is_memory:
            wanted, why = USUAL_EFFECTIVE_BATCH, "the fewest that BERT was fine-tuned with (arXiv:1810.04805)"
        else:
            return
        cost = (
            f"an optimizer step takes several forward and backward passes, with gradients in memory between them; "
            f"{wanted} sequences are {why}"
        )
        alternative = Alternative("accumulation", f"--effective_batch_size {wanted}", cost, self.workload)
        suggestion, _ = self._suggest(
            alternative, self.device, self._traced, replace(search, effective_batch_size=wanted)
        )
        yield replace(suggestion, compute=self._now.compute)

    def _combined(self) -> Iterator[Suggestion]:
        """Yield the first combination that fits, for when no alternative alone is enough."""
        for alternative in combinations(self.workload, self.device.kind):
            suggestion = self._predicted(alternative)
            if suggestion.fits:
                yield suggestion
                return

    def _larger_gpu(self) -> Iterator[Suggestion]:
        """Yield the smallest GPU that is large enough and no older than this one, so that it runs the same code."""
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
        """Predict an alternative. ``traced``: a predictor of its workload, on this device or another."""
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
        """True if memory limits the batch size, not one of the user's constraints."""
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
