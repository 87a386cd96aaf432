"""When it does not fit, or is slow: what could be done, each way predicted by the road that predicted the answer.

    report = find_batch_size("bert-large", gpu="T4", device="predict")
    print(find_ways_out(report))

One trace a way; a larger card of the same compute capability needs none. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..data import catalog
from ..errors import BatchSizeError, NothingFitsError, UsageError
from ..memory.flops import sequence_flops
from ..memory.predictor import Predictor
from ..records import Decision, GpuSpec
from ..report.report import Report
from ..search.pipeline import foretold
from ..search.wishes import Wishes
from ..workloads.workload import Trainable
from .candidates import Alternative, alternatives, combinations, shorter
from .result import WayOut, WaysOut

USUAL_EFFECTIVE_BATCH = 16
"""Sequences in an optimizer step, at least: BERT's fine-tuning took 16 or 32 (Devlin et al. 2019, arXiv:1810.04805)."""
MORE_MEMORY = 1.5
"""Where something fits already, a larger card is one with half as much memory again."""


def find_ways_out(found: Report | NothingFitsError) -> WaysOut:
    """What would make room, or let anything fit at all: predicted, also where a measurement proved the report.

    Raises UsageError for an error that no prediction led to: a real step said so, and a prediction would not agree.
    """
    if isinstance(found, Report):
        return ways_out(found.workload, found.device, found.wishes or Wishes(target=found.target))
    if found.asked is None:
        raise UsageError("this error came from real steps, not from a prediction: ask with device='predict'")
    return ways_out(*found.asked)


def advised(report: Report) -> Report:
    """The report with its ways out."""
    return replace(report, ways_out=find_ways_out(report))


def ways_out(workload: Trainable, device: GpuSpec, wishes: Wishes) -> WaysOut:
    """Those that apply to ``workload`` and are not taken yet, in order of preference. One that helps nothing is among
    them and says so: whoever reads the list would try it otherwise.
    """
    return _Ways(workload.accumulating(1), device, wishes).found()


@dataclass
class _Ways:
    """What is known of the workload as it is, and the predictions of all others."""

    workload: Trainable
    device: GpuSpec
    wishes: Wishes
    _traced: Predictor = field(init=False)
    _now: WayOut = field(init=False)
    _decision: Decision | None = field(init=False)
    _flops: int | None = field(init=False)
    _model_bytes: dict[Trainable, int] = field(init=False, default_factory=dict)

    def found(self) -> WaysOut:
        self._traced = self._predictor(self.workload)
        self._model_bytes[self.workload] = self._traced.timeline.model_bytes()
        now, self._decision = self._way(Alternative("now", "", "", self.workload), self.device, self._traced)
        self._flops = _operations(self.workload, self.device)
        self._now = replace(now, compute=None if self._flops is None else 1.0)
        ways = [*self._shorter(), *self._accumulated()]
        ways += [self._predicted(alternative) for alternative in alternatives(self.workload, self.device.kind)]
        if not self._now.fits and not any(way.fits for way in ways):
            ways += self._together()
        return WaysOut(self._now, (*ways, *self._larger_card()), self.wishes.target[1])

    def _shorter(self) -> Iterator[WayOut]:
        """Half the length; where nothing fits, the longest of the halves that does, or else the last."""
        way = None
        for alternative in shorter(self.workload):
            way = self._predicted(alternative)
            if way.fits or way.is_lower_bound:
                break
        if way is not None:
            yield way

    def _accumulated(self) -> Iterator[WayOut]:
        """Where a batch is wanted that does not fit at once, and no accumulation has been asked for."""
        wishes, now = self.wishes, self._now.batch_size or 0
        if not now or wishes.effective_batch or wishes.total_tokens or wishes.accumulation > 1:
            return
        if wishes.check is not None and wishes.check > now:
            wanted, why = wishes.check * wishes.processes, "what was asked about"
        elif now * wishes.processes < USUAL_EFFECTIVE_BATCH and self._is_memory:
            wanted, why = USUAL_EFFECTIVE_BATCH, "the least that BERT was fine-tuned with (arXiv:1810.04805)"
        else:
            return
        cost = (
            f"an optimizer step takes several passes, with its gradients in memory meanwhile; {wanted} sequences are "
            f"{why}"
        )
        alternative = Alternative("accumulation", f"--effective_batch_size {wanted}", cost, self.workload)
        way, _ = self._way(alternative, self.device, self._traced, replace(wishes, effective_batch=wanted))
        yield replace(way, compute=self._now.compute)

    def _together(self) -> Iterator[WayOut]:
        """Where no way alone is enough: the first combination that fits."""
        for alternative in combinations(self.workload, self.device.kind):
            way = self._predicted(alternative)
            if way.fits:
                yield way
                return

    def _larger_card(self) -> Iterator[WayOut]:
        """The smallest of the catalog that does, no older than the present one: what runs here runs there."""
        if self.device.kind != "cuda" or (self._now.fits and not self._is_memory):
            return
        least = self._total * MORE_MEMORY if self._now.fits else self._total + 1
        why = "with half as much memory again" if self._now.fits else "on which it fits"
        way = None
        for card in sorted(map(catalog.gpu, catalog.known_gpus()), key=_memory):
            if card.compute_capability >= self.device.compute_capability and _memory(card) >= least:
                way = self._on(card, f"the smallest card of the catalog {why}, no older than {self.device.name}")
                if way.fits:
                    break
        if way is not None:
            cost = f"even {card.name}, the largest of the catalog, is too small for it"
            yield way if way.fits else replace(way, cost=cost)

    def _on(self, card: GpuSpec, cost: str) -> WayOut:
        cost += "; its price and its speed are not known here"
        alternative = Alternative(f"larger GPU: {card.name}", f"--gpu {card.name!r}", cost, self.workload)
        least = self._model_bytes[self.workload] + card.context_bytes  # on every card: no trace is needed to know it
        if least > _memory(card) * self.wishes.target[1]:
            return _too_much(alternative, card, least)
        way, _ = self._way(alternative, card, self._traced)
        return replace(way, compute=self._now.compute)

    def _predicted(self, alternative: Alternative) -> WayOut:
        if alternative.workload is None:
            return _unknown(alternative, self.device)
        workload = alternative.workload
        try:
            traced = self._predictor(workload)
            kept = alternative.model_of or workload
            if kept not in self._model_bytes:
                self._model_bytes[kept] = traced.timeline.model_bytes()
            least = self._model_bytes[kept] + self.device.context_bytes
            if least > self._total * self.wishes.target[1]:
                return _too_much(alternative, self.device, least)
            way, _ = self._way(alternative, self.device, traced)
        except BatchSizeError as error:
            return _unknown(replace(alternative, obstacle=f"can't be: {error}"), self.device)
        return replace(way, compute=self._compute(workload) if way.fits else None)

    def _way(
        self, alternative: Alternative, device: GpuSpec, traced: Predictor, wishes: Wishes | None = None
    ) -> tuple[WayOut, Decision | None]:
        """``traced``: of the alternative's workload, on this device or another."""
        assert alternative.workload is not None
        way = _unknown(alternative, device)
        try:
            predictor, decision, plan = foretold(alternative.workload, device, wishes or self.wishes, traced)
        except NothingFitsError:
            return replace(way, batch_size=0, used_bytes=traced.on(device).unlimited(1)), None
        used = predictor(decision.batch_size).used_bytes
        return replace(way, batch_size=plan.micro_batch, accumulation=plan.accumulation, used_bytes=used), decision

    def _predictor(self, workload: Trainable) -> Predictor:
        accumulating = workload.accumulating(self.wishes.accumulation)
        return Predictor(accumulating, self.device, expandable_segments=self.wishes.expandable_segments)

    def _compute(self, workload: Trainable) -> float | None:
        flops = _operations(workload, self.device) if self._flops else None
        return None if flops is None or not self._flops else flops / self._flops

    @property
    def _total(self) -> int:
        return _memory(self.device)

    @property
    def _is_memory(self) -> bool:
        """Whether memory keeps the batch from being larger, and no wish."""
        wanted = self.wishes.effective_batch or self.wishes.total_tokens
        is_whole = bool(wanted) and self._now.accumulation == 1
        return self._decision is not None and self._decision.bound not in ("limit", "dataset size") and not is_whole


def _memory(device: GpuSpec) -> int:
    return device.total_bytes or 0


def _unknown(alternative: Alternative, device: GpuSpec) -> WayOut:
    return WayOut(
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


def _too_much(alternative: Alternative, device: GpuSpec, least: int) -> WayOut:
    return replace(_unknown(alternative, device), batch_size=0, used_bytes=least, is_lower_bound=True)


def _operations(workload: Trainable, device: GpuSpec) -> int | None:
    """None too where counting fails, which the prediction of the memory does not depend on."""
    try:
        return sequence_flops(workload, device)
    except (BatchSizeError, NotImplementedError, RuntimeError):
        return None
