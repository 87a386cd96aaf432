"""A missing gradient accumulation is added beside the batch size only if something reads it there."""

from __future__ import annotations

from pathlib import Path

import pytest
from patched_files import BOTH, patched, refusal

from hf_bsopt.errors import PatchError
from hf_bsopt.patching import check_patchable, patch


def test_accumulation_of_one_is_not_added(tmp_path: Path) -> None:
    values = {"batch_size": 48, "gradient_accumulation_steps": 1}
    assert patched(tmp_path, "train.py", "batch_size = 16\n", values) == "batch_size = 48\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("C = {'batch_size': 16}", "C = {'gradient_accumulation_steps': 2, 'batch_size': 48}"),
        (
            'C = {\n\t"batch_size" :  16, # a\n}',
            'C = {\n\t"batch_size" :  48, # a\n\t"gradient_accumulation_steps" :  2,\n}',
        ),
        ('C = {\n  "batch_size": 16\n}', 'C = {\n  "gradient_accumulation_steps": 2,\n  "batch_size": 48\n}'),
        ('C = {\n  "batch_size": (16),\n}', 'C = {\n  "gradient_accumulation_steps": 2,\n  "batch_size": (48),\n}'),
        ("C = dict(batch_size=16)", "C = dict(gradient_accumulation_steps=2, batch_size=48)"),
        ("class C:\n  batch_size = 16", "class C:\n  gradient_accumulation_steps = 2\n  batch_size = 48"),
        (
            "class C:\n  BATCH_SIZE=16 # a\n  b=1",
            "class C:\n  BATCH_SIZE=48 # a\n  GRADIENT_ACCUMULATION_STEPS=2\n  b=1",
        ),
        ("class C: batch_size = 16", "class C: gradient_accumulation_steps = 2; batch_size = 48"),
        (
            "class C:\n  batch_size: int = 16\n",
            "class C:\n  batch_size: int = 48\n  gradient_accumulation_steps: int = 2\n",
        ),
        ('C["batch_size"] = 16\n', 'C["batch_size"] = 48\nC["gradient_accumulation_steps"] = 2\n'),
        (
            "B = 16\nTrainingArguments(per_device_train_batch_size=B)",
            "B = 48\nTrainingArguments(gradient_accumulation_steps=2, per_device_train_batch_size=B)",
        ),
        (
            "TrainingArguments(\n    per_device_train_batch_size = 16,\n)",
            "TrainingArguments(\n    per_device_train_batch_size = 48,\n    gradient_accumulation_steps = 2,\n)",
        ),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_missing_accumulation_is_added_in_the_format_of_its_neighbour(
    before: str, after: str, newline: str, tmp_path: Path
) -> None:
    text = before.replace("\n", newline)
    assert patched(tmp_path, "train.py", text, BOTH) == after.replace("\n", newline)


@pytest.mark.parametrize(
    "source",
    [
        "BATCH_SIZE = 16\n",
        "C = dict(batch_size=16, **base)\n",
        "C = {'batch_size': 16, **base}\n",
        "TrainingArguments(per_device_train_batch_size=16, **more)\n",
        'parser.add_argument("--batch_size", default=16)\n',
        "DataLoader(train_set, batch_size=16)\n",
        "def main(batch_size=16): ...\n",
    ],
)
def test_missing_accumulation_is_an_error_if_nothing_would_read_it(source: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", source, BOTH)
    assert "there is no gradient_accumulation_steps in this file" in message
    assert "train.py:1:" in message


@pytest.mark.parametrize(
    "accumulation",
    ["n", "None", "args.accum", '"four"'],
)
@pytest.mark.parametrize("wanted", [1, 2])
def test_accumulation_that_is_set_but_not_to_a_number_is_an_error(
    accumulation: str, wanted: int, tmp_path: Path
) -> None:
    source = f"def f(n):\n    return dict(batch_size=16, gradient_accumulation_steps={accumulation})\n"
    values = {"batch_size": 48, "gradient_accumulation_steps": wanted}
    message = refusal(tmp_path, "train.py", source, values)
    assert "gradient_accumulation_steps is set, but not to a number" in message
    assert "train.py:2:" in message


def test_auto_in_another_container_does_not_replace_the_accumulation(tmp_path: Path) -> None:
    source = "ds = {'gradient_accumulation_steps': 'auto'}\nTrainingArguments(per_device_train_batch_size=16)\n"
    added = "TrainingArguments(gradient_accumulation_steps=2, per_device_train_batch_size=48)"
    assert added in patched(tmp_path, "train.py", source, BOTH)


def test_accumulation_beside_the_batch_size_is_preferred(tmp_path: Path) -> None:
    source = 'A = {"accum": 1}\nC = {"batch_size": 16, "accum": 4}\n'
    assert patched(tmp_path, "train.py", source, BOTH) == 'A = {"accum": 1}\nC = {"batch_size": 48, "accum": 2}\n'


@pytest.mark.parametrize(
    ("annotation", "added"),
    [
        ("float", "int"),
        ("int", "int"),
        ("Optional[int]", "Optional[int]"),
        ("int | None", "int | None"),
        ("float | int", "int"),
        ("Union[int, str]", "int"),
        ("PositiveInt", "int"),
        ("'float'", "int"),
    ],
)
def test_the_annotation_of_an_added_field_is_that_of_its_value(annotation: str, added: str, tmp_path: Path) -> None:
    source = f"@dataclass\nclass C:\n    batch_size: {annotation} = 16\n    seed: int = 7\n"
    changed = source.replace("16\n", f"48\n    gradient_accumulation_steps: {added} = 2\n")
    assert patched(tmp_path, "train.py", source, BOTH) == changed


COMPUTED = [
    "args = TrainingArguments('o', per_device_train_batch_size=16, gradient_accumulation_steps=8 // 4)\n",
    "EFFECTIVE = 96\nPER_DEVICE = 16\nargs = TrainingArguments(\n    'o', per_device_train_batch_size=PER_DEVICE,\n"
    "    gradient_accumulation_steps=EFFECTIVE // PER_DEVICE)\n",
    "class CFG:\n    total = 100\n    batch_size = 16\n    accum = max(1, round(total / batch_size))\n",
    "def main():\n    total, bs = 96, 16\n    accum = int(total / bs)\n    args = TrainingArguments(\n"
    "        'o', per_device_train_batch_size=bs, gradient_accumulation_steps=accum)\n",
    "BATCH_SIZE = 16\nN = 2\nACCUM_STEPS = math.ceil((200 - 8) / (BATCH_SIZE * N))\n",
    "CONFIG = {'batch_size': 16, 'total': 97}\nCONFIG['accum'] = CONFIG['total'] // CONFIG['batch_size']\n",
]


@pytest.mark.parametrize("source", COMPUTED)
def test_accumulation_that_is_computed_as_wanted_stays_and_the_batch_size_changes(source: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(source)
    result = patch(path, BOTH)
    assert path.read_text() == source.replace("16", "48")
    assert any("computes 2, as wanted, and is left unchanged" in note for note in result.notes)
    check_patchable(path)


@pytest.mark.parametrize(
    "source",
    [
        "N = torch.cuda.device_count()\nbatch_size = 16\naccum = 96 // batch_size // N\n",
        "batch_size = 16\nif big:\n    total = 96\naccum = total // batch_size\n",
        "batch_size = 16\ntotal = 96\ntotal *= 2\naccum = total // batch_size\n",
        "batch_size = 16\naccum = 96 // 0\n",
        "batch_size = 16\na = b\nb = a\naccum = a // b\n",
    ],
)
def test_accumulation_that_is_not_known_before_it_runs_is_an_error(source: str, tmp_path: Path) -> None:
    assert "gradient_accumulation_steps is known only at run time" in refusal(tmp_path, "train.py", source, BOTH)
    with pytest.raises(PatchError, match="known only at run time"):
        check_patchable(tmp_path / "train.py")


def test_accumulation_computed_from_the_batch_size_is_an_error(tmp_path: Path) -> None:
    source = "MICRO_BATCH_SIZE = 4\nBATCH_SIZE = 256\nGRADIENT_ACCUMULATION_STEPS = BATCH_SIZE // MICRO_BATCH_SIZE\n"
    message = refusal(tmp_path, "train.py", source, BOTH)
    assert "It is 5 with the new batch size, not 2." in message
    assert "train.py:3:  GRADIENT_ACCUMULATION_STEPS = BATCH_SIZE // MICRO_BATCH_SIZE" in message
