"""What the patch stands on: positions in JSON, masked magics, the diff that is made from edits."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.patching import edit_diff, json_positions
from hf_bsopt.patching.magics import mask_magics
from hf_bsopt.patching.setting_names import specificity_rank, split_words
from hf_bsopt.patching.sites import Edit, line_starts

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def as_python(node: json_positions.Node) -> object:
    if isinstance(node, json_positions.Object):
        return {key.value: as_python(value) for key, value in node.pairs}
    if isinstance(node, json_positions.Array):
        return [as_python(item) for item in node.items]
    return node.value


@given(documents, st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
def test_json_is_read_as_the_standard_library_reads_it(value: object, is_ascii: bool, indent: int | str | None) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    node = json_positions.parse_json(f" \n{text}\t")
    assert as_python(node) == json.loads(text)
    assert f" \n{text}\t"[node.start : node.end] == text


@given(st.text(), st.booleans())
def test_each_character_of_a_string_is_found_in_its_json(value: str, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    node = json_positions.parse_json(text)
    assert isinstance(node, json_positions.Text)
    places = json_positions.raw_positions(text, node)
    assert len(places) == len(value) + 1
    for place, character in enumerate(value):
        assert json.loads(f'"{text[places[place] : places[place + 1]]}"') == character


lines = st.lists(
    st.sampled_from(["!ls", "x = !ls \\", "  -l", "%time", "y?", "s = '''", "'''", "f(", ")", "# '", "é = 1"])
)


@given(lines, st.sampled_from(["\n", "\r\n"]))
def test_masking_keeps_the_length_of_every_line(cell: list[str], newline: str) -> None:
    text = newline.join(cell)
    masked = mask_magics(text)
    assert masked is not None
    assert list(map(len, re.split(newline, masked.source))) == list(map(len, re.split(newline, text)))
    for start, end in masked.commands:
        assert "ls" in text[start:end]


def applied(text: str, diff: str) -> str:
    """The text with a unified diff applied, as strictly as `patch` does."""
    old, new, here = edit_diff.split_lines(text), [], 0
    rows = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)", diff)[2:]
    for place, row in enumerate(rows):
        if found := re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", row):
            start = int(found[1]) - (found[2] != "0")
            new += old[here:start]
            here = start
            assert len(new) == int(found[3]) - (found[4] != "0")
            continue
        is_last = place + 1 < len(rows) and rows[place + 1].startswith("\\")
        body = row[1:-1] if is_last else row[1:]
        if row[0] in " -":
            assert old[here] == body
            here += 1
        if row[0] in " +":
            new.append(body)
    return "".join(new + old[here:])


@given(
    st.lists(st.sampled_from(["a = 1", "b", "", "é = 22"]), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.sampled_from(["48", "x", "new\n"])), max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_the_diff_makes_the_new_text_of_the_old(
    rows: list[str], places: list[tuple[int, int, str]], newline: str, ends: bool
) -> None:
    text = newline.join(rows) + (newline if ends else "")
    edits: list[Edit] = []
    for at, length, new in sorted(places):
        if "\n" in new:  # whole lines go in between lines
            starts = line_starts(text)
            start = starts[at % len(starts)]
            edit = Edit(start, start, new.replace("\n", newline))
        else:  # numbers are replaced inside of lines
            start = min(at, len(text))
            edit = Edit(start, min(start + length, len(text)), new)
        inside = set(text[edit.start : edit.end]) & {"\r", "\n"}
        if not inside and not text[: edit.start].endswith("\r") and (not edits or edits[-1].end < edit.start):
            edits.append(edit)
    assert applied(text, edit_diff.unified_diff("a.py", text, edits)) == edit_diff.apply_edits(text, edits)


@pytest.mark.parametrize(
    "name", ["batch_size", "BATCH_SIZE", "batchSize", "BatchSize", "--batch-size", "train_bs", "TRAIN_BATCH_SIZE", "bs"]
)
def test_spellings_of_the_batch_size_are_one(name: str) -> None:
    assert specificity_rank("batch_size", name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "eval_batch_size",
        "per_device_eval_batch_size",
        "valid_bs",
        "effective_batch_size",
        "batch_size_file",
        "auto_find_batch_size",
        "batch",
        "gradient_accumulation_kwargs",
        "eval_accumulation_steps",
        "",
    ],
)
def test_names_that_only_contain_one_are_none(name: str) -> None:
    assert specificity_rank("batch_size", name) is None
    assert specificity_rank("gradient_accumulation_steps", name) is None


def test_words_of_names() -> None:
    assert split_words("SFTConfig") == ("sft", "config")
    assert split_words("perDeviceTrainBatchSize") == split_words("PER_DEVICE_TRAIN_BATCH_SIZE")
