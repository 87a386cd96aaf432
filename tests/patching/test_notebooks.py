"""In notebooks only the value changes: magics, non-Python cells, files written by cells and the JSON stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from patched_files import BATCH, BOTH, notebook, patched, refusal, sources

from hf_bsopt.patching import patch

OTHER_CELLS = [
    "!pip install -q transformers",
    "%matplotlib inline\n%config InlineBackend.figure_format = 'retina'",
    "files = !ls \\\n    -la\nfiles, n = !ls",
    "x = %sql select 1",
    "torch?\n?torch\ntorch.nn??\nnp.*sum?",
    "if True:\n    !ls\nelse:\n    %cd ..",
    "%%time\nx = 1",
    "\n\n%%capture out\nx = 1",
    '%%bash\nbatch_size=16\necho "$batch_size" | cat',
    "%%html\n<b>batch_size = 16</b>",
    "%%writefile config.yaml\nbatch_size: 16",
    "sql = '''\n%s\n!ls\n?''' % (1\n  % 2)",
    "a = [1,\n  2][0] \\\n % 2\n!ls",
    "s = 'it''s # no comment' # it's a comment\n!ls",
    "print 'Python 2'",
    "def broken(:",
    "!python find_optimal_batch_size.py --batch_size 64 --gradient_accumulation_steps 2",
    "!python -m hf_bsopt --batch_size 64",
    "!find-optimal-batch-size --batch_size=64",
    "!pip install bs==16",
    "await loop()\nreturn_ = 1\nyield_ = 2",
    ",f a b\n;f a b\n/f a b",
    "",
]


@pytest.mark.parametrize("cell", OTHER_CELLS)
@pytest.mark.parametrize("as_list", [True, False])
def test_other_cells_stay_unchanged_and_do_not_prevent_the_patch(cell: str, as_list: bool, tmp_path: Path) -> None:
    after = patched(tmp_path, "n.ipynb", notebook(cell, "batch_size = 8", as_list=as_list))
    assert sources(after) == [cell, "batch_size = 48"]


OTHER_CODE = [
    cell
    for cell in OTHER_CELLS
    if not cell.lstrip().startswith("%%") and cell not in ("print 'Python 2'", "def broken(:")
]


@pytest.mark.parametrize("cell", OTHER_CODE)
def test_magics_in_the_same_cell_do_not_prevent_the_patch(cell: str, tmp_path: Path) -> None:
    after = patched(tmp_path, "n.ipynb", notebook(f"{cell}\nbatch_size = 8 # é😀\n{cell}"))
    assert sources(after) == [f"{cell}\nbatch_size = 48 # é😀\n{cell}"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["!python train.py --batch_size 16"], ["!python train.py --batch_size 48"]),
        (["!accelerate launch t.py --batch-size=16 --x 1"], ["!accelerate launch t.py --batch-size=48 --x 1"]),
        (["%run train.py --batch_size '16'"], ["%run train.py --batch_size '48'"]),
        (["!python t.py train.batch_size=16 lr=2"], ["!python t.py train.batch_size=48 lr=2"]),
        (["out = !python t.py \\\n --bs \\\n 16"], ["out = !python t.py \\\n --bs \\\n 48"]),
        (
            ["%%writefile -a t.py\nbatch_size = 16", "!python t.py"],
            ["%%writefile -a t.py\nbatch_size = 48", "!python t.py"],
        ),
        (
            ["%%writefile t.py\nB = 4\np.add_argument('--bs', default=B)", "!python t.py --bs 16"],
            ["%%writefile t.py\nB = 4\np.add_argument('--bs', default=B)", "!python t.py --bs 48"],
        ),
        (
            ["C = {'batch_size': 16}", "C['batch_size'] = 8", "fit(C)"],
            ["C = {'batch_size': 16}", "C['batch_size'] = 48", "fit(C)"],
        ),
    ],
)
def test_the_cell_that_training_uses_is_patched(cells: list[str], expected: list[str], tmp_path: Path) -> None:
    assert sources(patched(tmp_path, "n.ipynb", notebook(*cells))) == expected


def test_two_commands_are_an_error_that_names_cell_and_line(tmp_path: Path) -> None:
    text = notebook("x = 1", "!ls\n!python a.py --batch_size 4", "!python b.py --batch_size 8")
    message = refusal(tmp_path, "n.ipynb", text)
    assert "n.ipynb, cell 2, line 2:  !python a.py --batch_size 4" in message
    after = patched(tmp_path, "n.ipynb", text, keys={"batch_size": "--batch_size:3:1"})
    assert sources(after)[2] == "!python b.py --batch_size 48"


def test_accumulation_is_added_as_a_flag_only_if_transformers_reads_the_command(tmp_path: Path) -> None:
    text = notebook("!python run_ner.py --per_device_train_batch_size=16 --fp16")
    command = "!python run_ner.py --per_device_train_batch_size=48 --gradient_accumulation_steps=2 --fp16"
    assert sources(patched(tmp_path, "n.ipynb", text, BOTH)) == [command]
    own = notebook("!python train.py --batch_size 16")
    assert "there is no gradient_accumulation_steps" in refusal(tmp_path, "n.ipynb", own, BOTH)


def test_an_added_line_is_a_string_of_its_own_in_the_source(tmp_path: Path) -> None:
    after = patched(tmp_path, "n.ipynb", notebook("C = {\n  'batch_size': 16,\n  'é': 1,\n}"), BOTH)
    assert json.loads(after)["cells"][0]["source"] == [
        "C = {\n",
        "  'batch_size': 48,\n",
        "  'gradient_accumulation_steps': 2,\n",
        "  'é': 1,\n",
        "}",
    ]


def test_a_cell_with_invalid_python_that_sets_a_batch_size_is_an_error(tmp_path: Path) -> None:
    text = notebook("print 'a'\nBATCH_SIZE = 16", "batch_size = 8")
    message = refusal(tmp_path, "n.ipynb", text)
    assert "n.ipynb, cell 1:" in message and "BATCH_SIZE = 16" in message
    after = patched(tmp_path, "n.ipynb", text, keys={"batch_size": "batch_size"})
    assert sources(after)[1] == "batch_size = 48"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a notebook"),
        ("[]", "is not a notebook"),
        ("{}", "nbformat 3 and 4"),
        ('{"nbformat": 2, "worksheets": []}', "nbformat 3 and 4"),
        ('{"nbformat": 4, "cells": [}', "line 1: expected a value"),
        ('{"nbformat": 4}', "there is no batch_size"),
        ('{"nbformat": 4, "cells": 7}', "there is no batch_size"),
        ('{"nbformat": 4, "cells": [7, {"cell_type": "code", "source": [1]}]}', "there is no batch_size"),
        (notebook("batch_size <- 16", language="R"), "a notebook in r;"),
        (notebook("batch_size = 1").replace("batch_size = 1", 'batch_size = 1", "6'), "split between two strings"),
    ],
)
def test_anything_but_a_python_notebook_is_refused(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, "n.ipynb", text)


def test_the_diff_of_a_notebook_on_one_line_is_a_diff_of_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(notebook("x = '" + "a" * 3000 + "'", "y = 1\nbatch_size = 8\n", indent=None))
    diff = patch(path, BATCH).diff
    assert "+++ b/n.ipynb (cell 2)" in diff
    assert "-batch_size = 8\n+batch_size = 48\n" in diff
    assert len(diff) < 300


def test_the_last_of_equal_source_keys_in_a_cell_is_patched(tmp_path: Path) -> None:
    text = '{"nbformat": 4, "cells": [{"cell_type": "code", "source": "batch_size = 1", "source": "batch_size = 2"}]}'
    assert patched(tmp_path, "n.ipynb", text) == text.replace("= 2", "= 48")


def test_surrogates_and_escapes_do_not_shift_positions(tmp_path: Path) -> None:
    source = r"s = '\ud83d \ud83d\ude00 \u00e9 \\ \/'\tand 1;batch_size = 8"
    text = '{"nbformat": 4, "cells": [{"cell_type": "code", "source": ["' + source + '"]}]}'
    assert patched(tmp_path, "n.ipynb", text) == text.replace("= 8", "= 48")
