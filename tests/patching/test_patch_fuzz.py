"""In 5,000 generated scripts, notebooks and configuration files the given values change, and no other byte.

The generator writes each source twice, with the old and with the new values: the patch must turn one into the other.
"""

from __future__ import annotations

import ast
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from hf_bsopt.errors import UsageError
from hf_bsopt.patching import patch

HERE = Path(__file__).parent
NEW = {"batch_size": 48, "gradient_accumulation_steps": 3}
B, A = "\x01", "\x02"
"""Placeholders for the batch size and the accumulation in a template."""

DEFINITIONS = [
    'CONFIG = {"batch_size": \x01, "gradient_accumulation_steps": \x02}',
    "CONFIG = {\n    'é': 'ü😀', 'batch_size' : \x01 , # batch_size = 7\n    'x': [1, 2],\n    'accum': (\x02),\n}",
    "CONFIG = dict(lr=1e-4, batch_size=\x01, accumulation_steps = \x02)",
    'CONFIG = {"batch_size": 5, "grad_accum": \x02}\nCONFIG["batch_size"] = \x01',
    "class CFG:\n    seed = 7\n    batch_size = \x01\n    n_accumulate: int = \x02  # é",
    "class CFG:\n    class train:\n        bs = \x01; accum = \x02\n    class valid:\n        bs = 7",
    "BATCH_SIZE, ACCUM_STEPS = \x01, \x02",
    "args = TrainingArguments(\n    'ö', per_device_train_batch_size=\x01,\n    gradient_accumulation_steps=\x02)",
    "B = \x01\nargs = SFTConfig(per_device_train_batch_size=B, gradient_accumulation_steps=\x02)",
    "p.add_argument('--batch-size', type=int, default=\x01)\np.add_argument('--accum-iter', default=\x02)",
    "p.add_argument('--batch_size', default=5)\na = p.parse_args(['--batch_size', '\x01', '--grad-accum=\x02'])",
    "cfg = SimpleNamespace(train_bs=\x01, valid_bs=9)\naccelerator = Accelerator(gradient_accumulation_steps=\x02)",
    "def main(batch_size: int = \x01, accum=\x02):\n    fit(batch_size, accum)",
    "if DEBUG:\n    batch_size = 2\nelse:\n    batch_size = \x01\naccum = \x02",
    "@dataclass\nclass C:\n    batch_size: int = field(default=\x01)\n    grad_accum: int = field(default=\x02)",
]
NOISE = [
    "import os, sys",
    "x = '''\nbatch_size = 9\n''' # '''",
    "s = f\"{x!r:>{10}} {'a'} batch_size={1 + 1}\"",
    's = "é 漢字 😀 \\N{BULLET} \\x41"; t = r"\\d+" + b"".decode()',
    "# CONFIG = {'batch_size': 11}",
    "eval_batch_size = 12; per_device_eval_batch_size = 13",
    "VALID = {'val_batch_size': 14, 'test': {'batch_size': 15}}",
    "def f(a, *b, c=3, **d):\n    '''batch_size: 3'''\n    batch_size = a.shape[0]\n    return lambda q: q[::2]",
    "for step, batch in enumerate(loader):\n    bs, n = batch.shape\n    if step % 2 == 0: continue",
    "with open('x') as h, open('y') as g:\n    data = [i for i in h if i]",
    "try:\n    import apex\nexcept ImportError:\n    apex = None\nfinally:\n    pass",
    "match x:\n    case {'batch_size': 3}: y = 1\n    case _: y = 2",
    "async def go():\n    async for z in w:\n        await z",
    "loader = DataLoader(valid_set, batch_size=16)",
    "print('batch_size', 17)",
    "a = b = [\n  1,\n\t2] ; c: int = 3",
    "\x0c",
    "assert 1 if 2 else 3, (yield_ := 4)",
    "model.predict(x_test, batch_size=1024)",
    "ds = {'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 'auto'}",
    "",
]
MAGICS = [
    "!pip install -q x==1.0 \\\n   y",
    "%matplotlib inline",
    "files = !ls *.csv",
    "x?",
    "if 1:\n    !ls\n    %cd ..",
    "%time y = 1",
    "!python find_optimal_batch_size.py --batch_size 4",
]
OTHER_CELLS = [
    "%%bash\nbatch_size=3",
    "%%html\n<p>'",
    "print 'Python 2'",
    "%%writefile a.yaml\nbatch_size: 3",
    "%%time\nz = 1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a temporary folder in which files are written without fsync, because 10,000 of them are written."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(os, "fsync", lambda descriptor: None)
        yield tmp_path_factory.mktemp("fuzz")


def filled(template: str, batch: str, accumulation: str) -> str:
    return template.replace(B, batch).replace(A, accumulation)


numbers = st.sampled_from(["1", "2", "16", "0x10", "1_024", "7", "32"])


@st.composite
def programs(draw: st.DrawFn, extra: tuple[str, ...] = ()) -> str:
    """Draw a template: unrelated lines, a definition, unrelated lines."""
    noise = st.lists(st.sampled_from([*NOISE, *extra]), max_size=3)
    return "\n".join([*draw(noise), draw(st.sampled_from(DEFINITIONS)), *draw(noise)])


def check(path: Path, before: bytes, after: bytes) -> None:
    path.write_bytes(before)
    result = patch(path, NEW)
    assert path.read_bytes() == after
    assert sorted(change.new for change in result.changes) == ["3", "48"]
    assert patch(path, NEW).changes == ()


@examples(2000, suppress_health_check=list(HealthCheck))
@given(
    template=programs(),
    batch=numbers,
    accumulation=st.sampled_from(["1", "2", "8"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    end=st.sampled_from(["", "\n", "\n\n  # end"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_only_the_given_values_change_in_a_generated_script(
    folder: Path, template: str, batch: str, accumulation: str, newline: str, end: str, encoding: str
) -> None:
    is_text = "'\x01'" in template
    batch = "16" if is_text else batch

    def written(batch: str, accumulation: str) -> bytes:
        return filled(template + end, batch, accumulation).replace("\n", newline).encode(encoding)

    before, after = written(batch, accumulation), written("48", "3")
    check(folder / "train.py", before, after)
    ast.parse(after)


def as_notebook(
    cells: list[str], version: int, as_list: bool, indent: int | None, is_ascii: bool, tight: bool
) -> bytes:
    made = []
    for number, source in enumerate(cells):
        written = source.splitlines(keepends=True) if as_list else source
        cell = {"cell_type": "code", "metadata": {"é": number}, "outputs": [{"text": ["batch_size = 3\n", "😀"]}]}
        made.append({**cell, "source" if version == 4 else "input": written})
    body = {"cells": made, "metadata": {}} if version == 4 else {"worksheets": [{"cells": made}], "metadata": {}}
    separators = (",", ":") if tight else None
    return json.dumps(
        {**body, "nbformat": version, "nbformat_minor": 2}, indent=indent, ensure_ascii=is_ascii, separators=separators
    ).encode()


@examples(1500, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from([*NOISE, *MAGICS, *OTHER_CELLS]), max_size=2),
    template=programs(tuple(MAGICS)),
    after=st.lists(st.sampled_from([*NOISE, *MAGICS, *OTHER_CELLS]), max_size=2),
    accumulation=st.sampled_from(["1", "8"]),
    version=st.sampled_from([3, 4]),
    as_list=st.booleans(),
    indent=st.sampled_from([None, 1, 2]),
    is_ascii=st.booleans(),
    tight=st.booleans(),
)
def test_only_the_given_values_change_in_a_generated_notebook(
    folder: Path,
    before: list[str],
    template: str,
    after: list[str],
    accumulation: str,
    version: int,
    as_list: bool,
    indent: int | None,
    is_ascii: bool,
    tight: bool,
) -> None:
    def written(batch: str, accumulation: str) -> bytes:
        cells = [*before, filled(template, batch, accumulation), *after]
        return as_notebook(cells, version, as_list, indent, is_ascii, tight)

    check(folder / "n.ipynb", written("16", accumulation), written("48", "3"))


names = st.text(st.characters(codec="utf-8", exclude_characters=B + A + "\x00"), max_size=6).map(lambda s: f"k{s}")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@examples(700, suppress_health_check=list(HealthCheck))
@given(
    rest=st.dictionaries(names, values, max_size=4),
    inside=st.booleans(),
    name=st.sampled_from(["per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"]),
    seed=st.integers(0, 99),
    indent=st.sampled_from([None, 1, 4, "\t"]),
    is_ascii=st.booleans(),
)
def test_only_the_given_values_change_in_a_generated_json_file(
    folder: Path, rest: dict[str, object], inside: bool, name: str, seed: int, indent: int | str | None, is_ascii: bool
) -> None:
    def written(batch: int, accumulation: int) -> bytes:
        items = [*rest.items(), (name, batch), ("gradient_accumulation_steps", accumulation), ("eval_batch_size", 3)]
        random.Random(seed).shuffle(items)
        body = {"train": dict(items), "validation": {"batch_size": 5}} if inside else dict(items)
        return json.dumps(body, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")

    check(folder / "args.json", written(16, 1), written(48, 3))


YAML_NOISE = [
    "a: [1, 2]",
    "b: {c: 'd, e'}",
    "# batch_size: 4",
    "eval_batch_size: 5",
    "text: |\n  batch_size: 6\n  more",
    'q: "é 😀 \\u00e9"',
    "z: &anchor\n  - 1\ny: *anchor",
    "",
    "folded: >-\n  a\n  b",
    "evaluation:\n  batch_size: 7",
    "u: http://x/#y",
]
YAML_DEFINITIONS = [
    "micro_batch_size: \x01\ngradient_accumulation_steps:   \x02 # é",
    "train:\n  - name: 'é'\n    batch_size:\n      \x01\n    accum: \"\x02\"",
    "? per_device_train_batch_size\n: \x01\n'gradient_accumulation_steps' : !!int \x02",
    "trainer: {batch_size: \x01, accumulate_grad_batches: \x02}",
    "batch_size: ${opt.bs}\nopt: {bs: \x01}\ngrad_accum: &g \x02",
]


@examples(300, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from(YAML_NOISE), max_size=3, unique=True),
    definition=st.sampled_from(YAML_DEFINITIONS),
    after=st.lists(st.sampled_from(YAML_NOISE), max_size=3, unique=True),
    newline=st.sampled_from(["\n", "\r\n"]),
    end=st.sampled_from(["", "\n"]),
)
def test_only_the_given_values_change_in_a_generated_yaml_file(
    folder: Path, before: list[str], definition: str, after: list[str], newline: str, end: str
) -> None:
    template = "\n".join([*before, definition, *(row for row in after if row not in before)]) + end

    def written(batch: str, accumulation: str) -> bytes:
        return filled(template, batch, accumulation).replace("\n", newline).encode()

    check(folder / "a.yaml", written("16", "1"), written("48", "3"))


class _NumberCollector(ast.NodeTransformer):
    """Transformer that replaces every number by 0 and collects the numbers in ``found``."""

    def __init__(self) -> None:
        self.found: list[object] = []

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            self.found.append(node.value)
            return ast.Constant(0)
        return node


def structure_and_numbers(source: bytes) -> tuple[str, list[object]]:
    numbers = _NumberCollector()
    return ast.dump(numbers.visit(ast.parse(source))), numbers.found


SCRIPTS = [path.read_bytes() for path in sorted((HERE / "scripts").glob("*.py")) if path.name != "constants.py"]


@examples(500, suppress_health_check=list(HealthCheck))
@given(
    script=st.sampled_from(SCRIPTS),
    cuts=st.lists(
        st.tuples(st.integers(0, 1 << 16), st.integers(0, 60), st.sampled_from(["", "\n", "16", "=", "(", "é"]))
    ),
    order=st.booleans(),
)
def test_only_the_given_values_change_in_a_mangled_script_or_it_is_refused(
    folder: Path, script: bytes, cuts: list[tuple[int, int, str]], order: bool
) -> None:
    lines = script.decode().splitlines(keepends=True)
    for place, length, new in cuts[:3]:
        at = place % (len(lines) + 1)
        lines[at : at + (length % 4 if order else 0)] = [new] if new != "\n" else lines[:2]
    path, before = folder / "mangled.py", "".join(lines).encode()
    path.write_bytes(before)
    try:
        result = patch(path, {"batch_size": 48})
    except UsageError:
        assert path.read_bytes() == before
        return
    old, new_numbers = structure_and_numbers(before), structure_and_numbers(path.read_bytes())
    assert old[0] == new_numbers[0]
    differ = [now for was, now in zip(old[1], new_numbers[1], strict=True) if was != now]
    assert differ == [48] * len(result.changes)
