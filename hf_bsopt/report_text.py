"""A Report as text, at most 78 columns wide: what was asked, what was found, and last the answer and its reason."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from .records import Trial
from .report import GIB, percent

if TYPE_CHECKING:
    from .report import Report

WIDTH = 78
DOUBTFUL_SPREAD = 0.2
VERDICTS = {
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
EXPECTED_PARTS = ("weights", "gradients", "optimizer", "activations")


def told(report: Report) -> str:
    """All of it."""
    parts = [
        _workload_text(report),
        _table_text(report),
        _composition_text(report),
        _advice_text(report),
        _answer_text(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _workload_text(report: Report) -> str:
    total, trained = report.parameters
    rows = report.workload.describe()
    parameters = f"{total:,}" if total == trained else f"{total:,}, of which {trained:,} are trained"
    rows.insert(1, ("parameters", parameters))
    compute = f" (compute {report.device.capability})" if report.device.kind == "cuda" else ""
    rows.append(("device", f"{report.device.name}, {_gib(report.device.total_bytes)}{compute}"))
    lines = [_wrap(f"{name + ':':15}{value}", 15) for name, value in rows]
    lines += [_wrap(f"  · {note}", 4) for note in (*report.workload.defaults, *report.notes)]
    return "\n".join(lines)


def _table_text(report: Report) -> str:
    return _proved_table_text(report) if report.ran else _predicted_table_text(report)


def _predicted_table_text(report: Report) -> str:
    title = f"{'batch size':>10} {'allocated':>11} {'reserved':>11} {'used':>11} {'of ' + report.memory:>8}"
    lines = [f"{title}  {report.source}"]
    for trial in report.trials:
        verdict = "fits" if trial.fits else "out of memory"
        if trial.fits and trial.peak:
            numbers = (
                f"{_gib(trial.peak.allocated_bytes):>11} {_gib(trial.peak.reserved_bytes):>11} "
                f"{_gib(trial.used_bytes):>11} {percent(report.share(trial)):>8}"
            )
        else:
            numbers = f"{'–':>11} {'–':>11} {'–':>11} {'over':>8}"
        lines.append(f"{trial.batch_size:>10} {numbers}  {verdict}{_mark(report, trial)}")
    return "\n".join(lines)


def _proved_table_text(report: Report) -> str:
    """Used memory, predicted and real side by side; a verdict without a word more is one that was run."""
    has_speed = any(trial.samples_per_second for trial in report.ran)
    speed_title = f" {'samples/s':>9}" if has_speed else ""
    title = f"{'batch size':>10} {'predicted':>11} {report.source:>11} {'of ' + report.memory:>8}"
    lines = [f"{title}{speed_title}  used memory"]
    predicted = {trial.batch_size: trial for trial in report.trials if trial.source == "predicted"}
    ran = {trial.batch_size: trial for trial in report.ran}
    for size in sorted({*predicted, *ran}):
        best = report.best(size)
        columns = [_used(predicted.get(size)), _used(ran.get(size))]
        share = percent(report.share(best)) if best.fits else "over"
        speed = f" {_speed(ran.get(size)):>9}" if has_speed else ""
        verdict = VERDICTS[best.outcome]
        if size not in ran:  # with another column there is no room for more words
            verdict = f"{verdict}, as predicted" if not has_speed else "predicted" if best.fits else "predicted: over"
        verdict += _mark(report, best)
        lines.append(f"{size:>10} {columns[0]:>11} {columns[1]:>11} {share:>8}{speed}  {verdict}")
    reasons = [
        _wrap(f"{trial.batch_size}: {trial.detail}.", 2)
        for trial in report.ran
        if trial.detail and trial.outcome not in ("fits", "oom")
    ]
    return "\n".join([*lines, "", *reasons, *_agreement_lines(report, predicted), *_speed_lines(report)])


def _speed_lines(report: Report) -> list[str]:
    """How fast it trained at the chosen size, and whether that can be relied on."""
    trial = report.chosen
    if not trial.step_seconds or not trial.samples_per_second or not trial.tokens_per_second:
        return []
    spread = trial.step_seconds_spread
    known = f"spread {percent(spread)}" if spread is not None else "timed once"
    text = (
        f"Speed at {trial.batch_size}: {trial.samples_per_second:.3g} samples/s, {trial.tokens_per_second:,.0f} "
        f"tokens/s; {trial.step_seconds:.3g} s an optimizer step ({known})."
    )
    if spread is not None and spread > DOUBTFUL_SPREAD:
        text += " The steps differ much: something else used the machine."
    return [_wrap(text, 0)]


def _agreement_lines(report: Report, predicted: dict[int, Trial]) -> list[str]:
    """What was run at the chosen size, and how far the prediction was from it."""
    real = report.chosen.peak
    if real is None:
        return []
    if report.device.kind != "cuda":
        return _one_figure_lines(report, predicted)
    lines = [
        f"{report.source.capitalize()} at {report.batch_size}: {_gib(real.allocated_bytes)} allocated, "
        f"{_gib(real.reserved_bytes)} reserved."
    ]
    foretold = predicted[report.batch_size].peak if report.batch_size in predicted else None
    if foretold is not None:
        allocated = foretold.allocated_bytes / real.allocated_bytes - 1
        reserved = foretold.reserved_bytes / real.reserved_bytes - 1
        lines.append(f"The prediction is {allocated:+.2%} off in allocated, {reserved:+.2%} in reserved memory.")
    return lines


def _one_figure_lines(report: Report, predicted: dict[int, Trial]) -> list[str]:
    """Where no caching allocator stands between, there is one figure to compare."""
    lines = [f"{report.source.capitalize()} at {report.batch_size}: {_gib(report.chosen.used_bytes)} used in all."]
    foretold = predicted[report.batch_size].used_bytes if report.batch_size in predicted else None
    if foretold and report.chosen.used_bytes:
        lines.append(f"The prediction is {foretold / report.chosen.used_bytes - 1:+.2%} off.")
    return lines


def _mark(report: Report, trial: Trial) -> str:
    marks = {report.decision.safe: " (safe)", report.decision.largest: " (max, risky)"}
    marks[report.decision.batch_size] = "  ◀ chosen"
    return marks.get(trial.batch_size, "")


def _composition_text(report: Report) -> str:
    label = " (predicted)" if report.ran else ""
    lines = [f"Where the memory goes at {report.decision.batch_size}{label}:"]
    for name, size in report.composition.items():
        if size or name in EXPECTED_PARTS:
            lines.append(f"  {name:16}{_gib(size):>11} {percent(size / (report.device.total_bytes or 1)):>7}")
    together = sum(report.composition.values())
    lines.append(f"  {'together':16}{_gib(together):>11} {percent(together / (report.device.total_bytes or 1)):>7}")
    return "\n".join(lines)


def _advice_text(report: Report) -> str:
    return "\n".join(_wrap(f"· {sentence}", 2) for sentence in report.advice)


def _answer_text(report: Report) -> str:
    lines = []
    if report.evaluation is not None:
        share = percent(report.share(report.evaluation.trial))
        label = f", {report.evaluation.trial.source}" if report.ran else ""
        size = report.evaluation.batch_size
        lines.append(f"Evaluation: per_device_eval_batch_size up to {size} ({share}{label}).")
        if report.evaluation.checked is not None:
            lines.append("In evaluation: " + _checked_text(report, report.evaluation.checked))
    if report.generation is not None:
        trial = report.generation.trial
        size = report.generation.batch_size
        lines.append(f"Generation: up to {size} prompts at once ({percent(report.share(trial))}, {trial.source}).")
    if report.checked is not None and report.checked.fits:
        lines.append(_checked_text(report, report.checked))
    low, high = report.target
    shown = round(report.utilisation, 2)
    inside = "within" if low <= shown <= high else "under" if shown < low else "over"
    lines.append(
        f"{report.memory}: {_gib(report.chosen.used_bytes)} of {_gib(report.device.total_bytes)} = "
        f"{percent(report.utilisation)}, {inside} the target of {percent(low)} to {percent(high)}."
    )
    lines.append(_wrap(f"Why {report.decision.reason}.", 4))
    if report.plan.accumulation > 1 or report.plan.processes > 1:
        processes = f" × {report.plan.processes} processes" if report.plan.processes > 1 else ""
        effective = (
            f"Effective batch: {report.plan.micro_batch} × {report.plan.accumulation} accumulation{processes} = "
            f"{report.plan.effective_batch} sequences, {report.plan.effective_tokens:,} tokens."
        )
        lines.append(_wrap(effective, 4))
    lines.append(f"\n✅ OPTIMAL BATCH SIZE: {report.batch_size}")
    lines.append("Update your config:")
    lines += [f'  CONFIG["{name}"] = {value}' for name, value in report.config.items()]
    if report.checked is not None and not report.checked.fits:
        lines.append("\n" + _checked_text(report, report.checked))
    return "\n".join(lines)


def _checked_text(report: Report, trial: Trial) -> str:
    if not trial.fits:
        why = VERDICTS["oom"] if trial.outcome == "oom" else f"{VERDICTS[trial.outcome]}, {trial.detail}"
        return f"❌ Batch size {trial.batch_size} does not fit: {why}."
    used = f"{_gib(trial.used_bytes)}, {percent(report.share(trial))} of the {report.memory}"
    return f"Batch size {trial.batch_size} fits: {used}."


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / GIB:.2f} GiB"


def _speed(trial: Trial | None) -> str:
    return f"{trial.samples_per_second:.3g}" if trial is not None and trial.samples_per_second else "–"


def _used(trial: Trial | None) -> str:
    return _gib(trial.used_bytes) if trial is not None and trial.fits else "–"


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
