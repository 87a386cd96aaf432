"""A report as text, at most 78 columns wide: the inputs, the sizes, and last the answer and its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..advice.result import Advice
from ..records import VERDICTS, Trial
from ..search.answer import Answer
from .wording import answer_line, gib, hints, memory_name, percent, reason, warnings

WIDTH = 78
WIDTHS = {"batch size": 10, "samples/s": 9}
"""Widths of columns; others are 8 wide for a fraction and 11 for memory."""
DOUBTFUL_SPREAD = 0.2
"""Spread of the step times, as a fraction of the median, from which the report warns."""
NEAR = 4
"""The short table leaves out sizes below 1/NEAR of the chosen one."""
SHORT_VALUE = 24
"""Longest value of an option in characters; explanations in parentheses are left out of longer ones."""
NOT_EVEN_ONE = "not even one sequence stays under the target"
EXPECTED_PARTS = ("weights", "gradients", "optimizer", "activations")
"""Parts that are shown even if they take no memory."""


def format_report(answer: Answer, suggestions: Advice | None = None, *, verbose: bool = False) -> str:
    """Format the answer on one screen or, with ``verbose``, with all options, assumptions, hints and memory by use."""
    if not verbose:
        return _joined(
            _short_subject_text(answer),
            _table_text(answer, is_short=True),
            str(suggestions or ""),
            _sentences_text(warnings(answer, has_suggestions=suggestions is not None)),
            _answer_text(answer),
        )
    return _joined(
        _subject_text(answer),
        _table_text(answer),
        _composition_text(answer),
        str(suggestions or ""),
        _sentences_text([*warnings(answer, has_suggestions=suggestions is not None), *hints(answer)]),
        _answer_text(answer),
    )


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _short_subject_text(answer: Answer) -> str:
    """Return model, options and device in three lines."""
    rows = dict(answer.workload.describe())
    model = rows.pop("model", "model")
    task, length = rows.pop("task", ""), rows.pop("max_length", "")
    what = [part for part in (model, task, f"{length} tokens" if length else "", _parameters_in_short(answer)) if part]
    how = [value.split(" (")[0] if len(value) > SHORT_VALUE else value for value in rows.values()]
    notes = "; -v shows all options and assumptions" if answer.notes or answer.workload.defaults else ""
    where = f"{answer.device.name}, {gib(answer.device.total_bytes)}: {answer.source}{notes}"
    return "\n".join(_wrap(line, 2) for line in (", ".join(what), ", ".join(how), where))


def _parameters_in_short(answer: Answer) -> str:
    total = answer.parameters[0]
    return f"{total / 1e9:.2f}B parameters" if total >= 10**9 else f"{total / 1e6:.1f}M parameters"


def subject_rows(answer: Answer) -> list[tuple[str, str]]:
    """Return (name, value) of each input: the workload's options, the parameters, the device."""
    total, trained = answer.parameters
    rows = answer.workload.describe()
    parameters = f"{total:,}" if total == trained else f"{total:,}, of which {trained:,} are trained"
    rows.insert(1, ("parameters", parameters))
    compute = f" (compute {answer.device.capability})" if answer.device.kind == "cuda" else ""
    rows.append(("device", f"{answer.device.name}, {gib(answer.device.total_bytes)}{compute}"))
    return rows


def _subject_text(answer: Answer) -> str:
    lines = [_wrap(f"{name + ':':15}{value}", 15) for name, value in subject_rows(answer)]
    lines += [_wrap(f"  · {note}", 4) for note in (*answer.workload.defaults, *answer.notes)]
    return "\n".join(lines)


def size_rows(answer: Answer) -> tuple[list[str], list[list[str]]]:
    """Return the titles, and a row of cells for each size. The last column is text, all others are numbers."""
    return _verified_rows(answer) if answer.ran else _predicted_rows(answer)


def _table_text(answer: Answer, *, is_short: bool = False) -> str:
    titles, rows = size_rows(answer)
    if is_short:
        rows = [row for row in rows if _is_near(answer, int(row[0]))]
    widths = [WIDTHS.get(title, 8 if title.startswith("of ") else 11) for title in titles[:-1]]
    lines = [
        " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)) + f"  {cells[-1]}"
        for cells in (titles, *rows)
    ]
    if not answer.ran:
        return "\n".join(lines)
    failures = [_wrap(sentence, 2) for sentence in failure_sentences(answer)]
    return "\n".join([*lines, "", *failures, *(_wrap(sentence, 0) for sentence in verification_sentences(answer))])


def _is_near(answer: Answer, size: int) -> bool:
    """Return whether a size belongs in the short table: not far below the chosen one, or run."""
    ran = {trial.batch_size for trial in answer.ran}
    return size in ran or size * NEAR >= min(answer.decision.batch_size, answer.decision.safe)


def _predicted_rows(answer: Answer) -> tuple[list[str], list[list[str]]]:
    rows = []
    for trial in answer.trials:
        numbers = ["–", "–", "–", "over"]
        if trial.fits and trial.peak:
            sizes = trial.peak.allocated_bytes, trial.peak.reserved_bytes, trial.used_bytes
            numbers = [*map(gib, sizes), percent(answer.utilization_of(trial))]
        verdict = "fits" if trial.fits else "out of memory"
        rows.append([str(trial.batch_size), *numbers, verdict + _mark(answer, trial)])
    return ["batch size", "allocated", "reserved", "used", f"of {memory_name(answer)}", answer.source], rows


def _verified_rows(answer: Answer) -> tuple[list[str], list[list[str]]]:
    """Return predicted and real memory side by side. The verdict of a size that was not run says so."""
    has_speed = any(trial.samples_per_second for trial in answer.ran)
    predicted = {trial.batch_size: trial for trial in answer.trials if trial.source == "predicted"}
    ran = {trial.batch_size: trial for trial in answer.ran}
    rows = []
    for size in sorted({*predicted, *ran}):
        best = answer.best(size)
        share = percent(answer.utilization_of(best)) if best.fits else "over"
        speed = [_speed(ran.get(size))] if has_speed else []
        verdict = VERDICTS[best.outcome]
        if size not in ran:  # with the speed column there is no room for a longer verdict
            verdict = f"{verdict}, as predicted" if not has_speed else "predicted" if best.fits else "predicted: over"
        cells = [str(size), _used(predicted.get(size)), _used(ran.get(size)), share, *speed]
        rows.append([*cells, verdict + _mark(answer, best)])
    speed_title = ["samples/s"] if has_speed else []
    return ["batch size", "predicted", answer.source, f"of {memory_name(answer)}", *speed_title, "used memory"], rows


def failure_sentences(answer: Answer) -> list[str]:
    """Return details of sizes that neither fit nor ran out of memory, in sentences."""
    return [
        f"{trial.batch_size}: {trial.detail}."
        for trial in answer.ran
        if trial.detail and trial.outcome not in ("fits", "oom")
    ]


def verification_sentences(answer: Answer) -> list[str]:
    """Return memory at the chosen size, error of the prediction and speed, in sentences; empty if nothing was run."""
    if not answer.ran:
        return []
    predicted = {trial.batch_size: trial for trial in answer.trials if trial.source == "predicted"}
    return [*_agreement_lines(answer, predicted), *_speed_lines(answer)]


def _speed_lines(answer: Answer) -> list[str]:
    """Return the speed at the chosen size, with a warning if step times vary widely."""
    trial = answer.chosen
    if not trial.step_seconds or not trial.samples_per_second or not trial.tokens_per_second:
        return []
    spread = trial.step_seconds_spread
    known = f"spread {percent(spread)}" if spread is not None else "timed once"
    text = (
        f"Speed at {trial.batch_size}: {trial.samples_per_second:.3g} samples/s, {trial.tokens_per_second:,.0f} "
        f"tokens/s; {trial.step_seconds:.3g} s an optimizer step ({known})."
    )
    if spread is not None and spread > DOUBTFUL_SPREAD:
        text += f" Step times vary widely (spread {percent(spread)}): the machine may be shared."
    return [text]


def _agreement_lines(answer: Answer, predicted: dict[int, Trial]) -> list[str]:
    """Return real memory at the chosen size, and the error of the prediction."""
    real = answer.chosen.peak
    if real is None:
        return []
    if answer.device.kind != "cuda":
        return _one_figure_lines(answer, predicted)
    lines = [
        f"{answer.source.capitalize()} at {answer.batch_size}: {gib(real.allocated_bytes)} allocated, "
        f"{gib(real.reserved_bytes)} reserved."
    ]
    predicted_peak = predicted[answer.batch_size].peak if answer.batch_size in predicted else None
    if predicted_peak is not None:
        allocated = predicted_peak.allocated_bytes / real.allocated_bytes - 1
        reserved = predicted_peak.reserved_bytes / real.reserved_bytes - 1
        lines.append(f"The prediction is {allocated:+.2%} off in allocated, {reserved:+.2%} in reserved memory.")
    return lines


def _one_figure_lines(answer: Answer, predicted: dict[int, Trial]) -> list[str]:
    """Return used memory and the error of its prediction, for devices without a caching allocator."""
    lines = [f"{answer.source.capitalize()} at {answer.batch_size}: {gib(answer.chosen.used_bytes)} used in total."]
    predicted_peak = predicted[answer.batch_size].used_bytes if answer.batch_size in predicted else None
    if predicted_peak and answer.chosen.used_bytes:
        lines.append(f"The prediction is {predicted_peak / answer.chosen.used_bytes - 1:+.2%} off.")
    return lines


def _mark(answer: Answer, trial: Trial) -> str:
    marks = {answer.decision.safe: " (safe)", answer.decision.largest: " (max, risky)"}
    marks[answer.decision.batch_size] = "  ◀ chosen"
    return marks.get(trial.batch_size, "")


def _composition_text(answer: Answer) -> str:
    label = " (predicted)" if answer.ran else ""
    lines = [f"Where the memory goes at {answer.decision.batch_size}{label}:"]
    for name, size in answer.composition.items():
        if size or name in EXPECTED_PARTS:
            lines.append(f"  {name:16}{gib(size):>11} {percent(size / (answer.device.total_bytes or 1)):>7}")
    total = sum(answer.composition.values())
    lines.append(f"  {'total':16}{gib(total):>11} {percent(total / (answer.device.total_bytes or 1)):>7}")
    return "\n".join(lines)


def _sentences_text(sentences: Sequence[str]) -> str:
    return "\n".join(_wrap(f"· {sentence}", 2) for sentence in sentences)


def answer_sentences(answer: Answer) -> list[str]:
    """Return the facts behind the answer, in sentences."""
    sentences = []
    if answer.evaluation is not None:
        trial, size = answer.evaluation.trial, answer.evaluation.batch_size
        label = f", {trial.source}" if answer.ran else ""
        largest = f"per_device_eval_batch_size up to {size} ({percent(answer.utilization_of(trial))}{label})"
        sentences.append(f"Evaluation: {largest if size else NOT_EVEN_ONE}.")
        if answer.evaluation.checked is not None:
            sentences.append("In evaluation: " + checked_sentence(answer, answer.evaluation.checked))
    if answer.generation is not None:
        trial, size = answer.generation.trial, answer.generation.batch_size
        largest = f"up to {size} prompts at once ({percent(answer.utilization_of(trial))}, {trial.source})"
        sentences.append(f"Generation: {largest if size else NOT_EVEN_ONE}.")
    if answer.checked is not None and answer.checked.fits:
        sentences.append(checked_sentence(answer, answer.checked))
    low, high = answer.target
    shown = round(answer.utilization, 2)
    inside = "within" if low <= shown <= high else "under" if shown < low else "over"
    sentences.append(
        f"{memory_name(answer)}: {gib(answer.chosen.used_bytes)} of {gib(answer.device.total_bytes)} = "
        f"{percent(answer.utilization)}, {inside} the target of {percent(low)} to {percent(high)}."
    )
    sentences.append(f"Why {reason(answer.decision, answer.plan, answer.search)}.")
    if answer.plan.accumulation > 1 or answer.plan.processes > 1:
        processes = f" × {answer.plan.processes} processes" if answer.plan.processes > 1 else ""
        sentences.append(
            f"Effective batch: {answer.plan.micro_batch} × {answer.plan.accumulation} accumulation{processes} = "
            f"{answer.plan.effective_batch} sequences, {answer.plan.effective_tokens:,} tokens."
        )
    return sentences


def config_lines(answer: Answer) -> list[str]:
    """Return the answer as assignments for a script."""
    return [f'CONFIG["{name}"] = {value}' for name, value in answer.config.items()]


def _answer_text(answer: Answer) -> str:
    lines = [_wrap(sentence, 4) for sentence in answer_sentences(answer)]
    lines.append(f"\n{answer_line(answer)}")
    lines.append("Update your config:")
    lines += [f"  {line}" for line in config_lines(answer)]
    if answer.checked is not None and not answer.checked.fits:
        lines.append("\n" + checked_sentence(answer, answer.checked))
    return "\n".join(lines)


def checked_sentence(answer: Answer, trial: Trial) -> str:
    """Return whether a size that was checked fits, in a sentence."""
    if not trial.fits:
        why = VERDICTS["oom"] if trial.outcome == "oom" else f"{VERDICTS[trial.outcome]}, {trial.detail}"
        return f"❌ Batch size {trial.batch_size} does not fit: {why}."
    used = f"{gib(trial.used_bytes)}, {percent(answer.utilization_of(trial))} of the {memory_name(answer)}"
    return f"Batch size {trial.batch_size} fits: {used}."


def _speed(trial: Trial | None) -> str:
    return f"{trial.samples_per_second:.3g}" if trial is not None and trial.samples_per_second else "–"


def _used(trial: Trial | None) -> str:
    return gib(trial.used_bytes) if trial is not None and trial.fits else "–"


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
