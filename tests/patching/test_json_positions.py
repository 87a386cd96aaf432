"""JSON is parsed as the standard library parses it, with correct positions."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.patching import json_positions

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def as_python(node: json_positions.Node) -> object:
    if isinstance(node, json_positions.Object):
        return {key.value: as_python(value) for key, value in node.pairs}
    if isinstance(node, json_positions.Array):
        return [as_python(item) for item in node.items]
    return node.value


@given(documents, st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
def test_json_is_parsed_as_the_standard_library_parses_it(
    value: object, is_ascii: bool, indent: int | str | None
) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    node = json_positions.parse_json(f" \n{text}\t")
    assert as_python(node) == json.loads(text)
    assert f" \n{text}\t"[node.start : node.end] == text


@given(st.text(), st.booleans())
def test_each_character_of_a_string_has_its_position_in_the_json(value: str, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    node = json_positions.parse_json(text)
    assert isinstance(node, json_positions.Text)
    places = json_positions.raw_positions(text, node)
    assert len(places) == len(value) + 1
    for place, character in enumerate(value):
        assert json.loads(f'"{text[places[place] : places[place + 1]]}"') == character
