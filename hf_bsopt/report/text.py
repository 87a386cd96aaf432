"""A Report as text, at most 78 columns wide: what was asked, what was found, and last the answer and its reason."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..records import VERDICTS, Trial
from .report import GIB, percent

if TYPE_CHECKING:
    from .report import Report

WIDTH = 78
WIDTHS = {"batch size": 10, "samples/s": 9}
"""Of columns; 8 for a share, 11 for memory."""
DOUBTFUL_SPREAD = 0.2
NOT_EVEN_ONE = "not even one sequence stays under the target"
EXPECTED_PARTS = ("weights", "gradients", "optimizer", "activations")


def told(report: Report) -> str:
    """All of it."""
    parts = [
        _workload_text(report),
        _table_text(report),
        _composition_text(report),
        str(report.ways_out or ""),
        _advice_text(report),
        _answer_text(report),
    ]
    return "\n\n".join(part for part in parts if part)


def subject_rows(report: Report) -> list[tuple[str, str]]:
    """(name, value) of what was asked about."""
    total, trained = report.parameters
    rows = report.workload.describe()
    parameters = f"{total:,}" if total == trained else f"{total:,}, of which {trained:,} are trained"
    rows.insert(1, ("parameters", parameters))
    compute = f" (compute {report.device.capability})" if report.device.kind == "cuda" else ""
    rows.append(("device", f"{report.device.name}, {gib(report.device.total_bytes)}{compute}"))
    return rows


def _workload_text(report: Report) -> str:
    lines = [_wrap(f"{name + ':':15}{value}", 15) for name, value in subject_rows(report)]
    lines += [_wrap(f"  · {note}", 4) for note in (*report.workload.defaults, *report.notes)]
    return "\n".join(lines)


def size_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """(titles, a row of cells for each size): the last column is in words, all others are numbers."""
    return _proved_rows(report) if report.ran else _predicted_rows(report)


def _table_text(report: Report) -> str:
    titles, rows = size_rows(report)
    widths = [WIDTHS.get(title, 8 if title.startswith("of ") else 11) for title in titles[:-1]]
    lines = [
        " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)) + f"  {cells[-1]}"
        for cells in (titles, *rows)
    ]
    if not report.ran:
        return "\n".join(lines)
    failures = [_wrap(sentence, 2) for sentence in failure_sentences(report)]
    return "\n".join([*lines, "", *failures, *(_wrap(sentence, 0) for sentence in proof_sentences(report))])


def _predicted_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    rows = []
    for trial in report.trials:
        numbers = ["–", "–", "–", "over"]
        if trial.fits and trial.peak:
            sizes = trial.peak.allocated_bytes, trial.peak.reserved_bytes, trial.used_bytes
            numbers = [*map(gib, sizes), percent(report.share(trial))]
        verdict = "fits" if trial.fits else "out of memory"
        rows.append([str(trial.batch_size), *numbers, verdict + _mark(report, trial)])
    return ["batch size", "allocated", "reserved", "used", f"of {report.memory}", report.source], rows


def _proved_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Used memory, predicted and real side by side; a verdict without a word more is one that was run."""
    has_speed = any(trial.samples_per_second for trial in report.ran)
    predicted = {trial.batch_size: trial for trial in report.trials if trial.source == "predicted"}
    ran = {trial.batch_size: trial for trial in report.ran}
    rows = []
    for size in sorted({*predicted, *ran}):
        best = report.best(size)
        share = percent(report.share(best)) if best.fits else "over"
        speed = [_speed(ran.get(size))] if has_speed else []
        verdict = VERDICTS[best.outcome]
        if size not in ran:  # with another column there is no room for more words
            verdict = f"{verdict}, as predicted" if not has_speed else "predicted" if best.fits else "predicted: over"
        cells = [str(size), _used(predicted.get(size)), _used(ran.get(size)), share, *speed]
        rows.append([*cells, verdict + _mark(report, best)])
    speed_title = ["samples/s"] if has_speed else []
    return ["batch size", "predicted", report.source, f"of {report.memory}", *speed_title, "used memory"], rows


def failure_sentences(report: Report) -> list[str]:
    """What became of sizes that ended otherwise than by fitting or by an out-of-memory error."""
    return [
        f"{trial.batch_size}: {trial.detail}."
        for trial in report.ran
        if trial.detail and trial.outcome not in ("fits", "oom")
    ]


def proof_sentences(report: Report) -> list[str]:
    """What was run at the chosen size, how far the prediction was from it, and how fast it trained; none where nothing
    was run.
    """
    if not report.ran:
        return []
    predicted = {trial.batch_size: trial for trial in report.trials if trial.source == "predicted"}
    return [*_agreement_lines(report, predicted), *_speed_lines(report)]


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
    return [text]


def _agreement_lines(report: Report, predicted: dict[int, Trial]) -> list[str]:
    """What was run at the chosen size, and how far the prediction was from it."""
    real = report.chosen.peak
    if real is None:
        return []
    if report.device.kind != "cuda":
        return _one_figure_lines(report, predicted)
    lines = [
        f"{report.source.capitalize()} at {report.batch_size}: {gib(real.allocated_bytes)} allocated, "
        f"{gib(real.reserved_bytes)} reserved."
    ]
    foretold = predicted[report.batch_size].peak if report.batch_size in predicted else None
    if foretold is not None:
        allocated = foretold.allocated_bytes / real.allocated_bytes - 1
        reserved = foretold.reserved_bytes / real.reserved_bytes - 1
        lines.append(f"The prediction is {allocated:+.2%} off in allocated, {reserved:+.2%} in reserved memory.")
    return lines


def _one_figure_lines(report: Report, predicted: dict[int, Trial]) -> list[str]:
    """Where no caching allocator stands between, there is one figure to compare."""
    lines = [f"{report.source.capitalize()} at {report.batch_size}: {gib(report.chosen.used_bytes)} used in all."]
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
            lines.append(f"  {name:16}{gib(size):>11} {percent(size / (report.device.total_bytes or 1)):>7}")
    together = sum(report.composition.values())
    lines.append(f"  {'together':16}{gib(together):>11} {percent(together / (report.device.total_bytes or 1)):>7}")
    return "\n".join(lines)


def _advice_text(report: Report) -> str:
    return "\n".join(_wrap(f"· {sentence}", 2) for sentence in report.advice)


def answer_sentences(report: Report) -> list[str]:
    """What leads to the answer."""
    sentences = []
    if report.evaluation is not None:
        trial, size = report.evaluation.trial, report.evaluation.batch_size
        label = f", {trial.source}" if report.ran else ""
        largest = f"per_device_eval_batch_size up to {size} ({percent(report.share(trial))}{label})"
        sentences.append(f"Evaluation: {largest if size else NOT_EVEN_ONE}.")
        if report.evaluation.checked is not None:
            sentences.append("In evaluation: " + checked_sentence(report, report.evaluation.checked))
    if report.generation is not None:
        trial, size = report.generation.trial, report.generation.batch_size
        largest = f"up to {size} prompts at once ({percent(report.share(trial))}, {trial.source})"
        sentences.append(f"Generation: {largest if size else NOT_EVEN_ONE}.")
    if report.checked is not None and report.checked.fits:
        sentences.append(checked_sentence(report, report.checked))
    low, high = report.target
    shown = round(report.utilization, 2)
    inside = "within" if low <= shown <= high else "under" if shown < low else "over"
    sentences.append(
        f"{report.memory}: {gib(report.chosen.used_bytes)} of {gib(report.device.total_bytes)} = "
        f"{percent(report.utilization)}, {inside} the target of {percent(low)} to {percent(high)}."
    )
    sentences.append(f"Why {report.decision.reason}.")
    if report.plan.accumulation > 1 or report.plan.processes > 1:
        processes = f" × {report.plan.processes} processes" if report.plan.processes > 1 else ""
        sentences.append(
            f"Effective batch: {report.plan.micro_batch} × {report.plan.accumulation} accumulation{processes} = "
            f"{report.plan.effective_batch} sequences, {report.plan.effective_tokens:,} tokens."
        )
    return sentences


def config_lines(report: Report) -> list[str]:
    """The answer as a script takes it."""
    return [f'CONFIG["{name}"] = {value}' for name, value in report.config.items()]


def _answer_text(report: Report) -> str:
    lines = [_wrap(sentence, 4) for sentence in answer_sentences(report)]
    lines.append(f"\n✅ OPTIMAL BATCH SIZE: {report.batch_size}")
    lines.append("Update your config:")
    lines += [f"  {line}" for line in config_lines(report)]
    if report.checked is not None and not report.checked.fits:
        lines.append("\n" + checked_sentence(report, report.checked))
    return "\n".join(lines)


def checked_sentence(report: Report, trial: Trial) -> str:
    """The answer about a size that was asked for."""
    if not trial.fits:
        why = VERDICTS["oom"] if trial.outcome == "oom" else f"{VERDICTS[trial.outcome]}, {trial.detail}"
        return f"❌ Batch size {trial.batch_size} does not fit: {why}."
    used = f"{gib(trial.used_bytes)}, {percent(report.share(trial))} of the {report.memory}"
    return f"Batch size {trial.batch_size} fits: {used}."


def gib(size: int | None) -> str:
    """As it is printed: 9.57 GiB."""
    return "–" if size is None else f"{size / GIB:.2f} GiB"


def _speed(trial: Trial | None) -> str:
    return f"{trial.samples_per_second:.3g}" if trial is not None and trial.samples_per_second else "–"


def _used(trial: Trial | None) -> str:
    return gib(trial.used_bytes) if trial is not None and trial.fits else "–"


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
