"""Which of several places in a script is the one that trains, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest
from written import BATCH, BOTH, patched, refusal

# (what is written, what 48 replaces there)
CHOSEN = {
    "a dict": ('CONFIG = {"batch_size": 16}', "16"),
    "a dict call": ("CONFIG = dict(lr=1e-4, batch_size=16)", "16"),
    "a later item": ('CONFIG = {"batch_size": 16}\nCONFIG["batch_size"] = 8', "8"),
    "a later update": ('CONFIG = {"batch_size": 16}\nCONFIG.update(epochs=2, batch_size=8)', "8"),
    "a later update with a dict": ('CONFIG = {"batch_size": 16}\nCONFIG.update({"batch_size": 8})', "8"),
    "the last of equal keys": ('CONFIG = {"batch_size": 16, "batch_size": 8}', "8"),
    "a rebinding nobody read before": ("BATCH_SIZE = 16\nprint(BATCH_SIZE)\nBATCH_SIZE = 8", "8"),
    "a class": ("class CFG:\n    seed = 16\n    batch_size = 8", "8"),
    "an annotated class": ("class CFG:\n    batch_size: int = 8", "8"),
    "a nested class": ("class CFG:\n    class train:\n        batch_size = 8", "8"),
    "an instance": ("class C:\n    batch_size = 16\ncfg = C()\ncfg.batch_size = 8", "8"),
    "what an instance is made with": ("class C:\n    batch_size: int = 16\ncfg = C(batch_size=8)", "8"),
    "an attribute of self": ("class C:\n    def __init__(self):\n        self.batch_size = 8", "8"),
    "a dataclass field": ("class C:\n    batch_size: int = field(metadata={}, default=8)", "8"),
    "a pydantic field": ("class C:\n    batch_size: int = Field(8, ge=1)", "8"),
    "a call's keyword": ("TrainingArguments(per_device_train_batch_size=8, per_device_eval_batch_size=16)", "8"),
    "a keyword in another call": ("Trainer(args=SFTConfig('out', per_device_train_batch_size=8))", "8"),
    "a partial": ("make = functools.partial(TrainingArguments, per_device_train_batch_size=8)", "8"),
    "an option": ('parser.add_argument("--batch_size", type=int, default=8)', "8"),
    "an option with two names": ('parser.add_argument("--batch-size", "--bs", default=8)', "8"),
    "an option in quotes": ('parser.add_argument("--batch-size", default="8")', "8"),
    "a default that is set": ('parser.add_argument("--bs", default=16)\nparser.set_defaults(bs=8)', "8"),
    "a click option": ('@click.option("--batch-size", default=8)\ndef main(batch_size): pass', "8"),
    "an absl flag": ('flags.DEFINE_integer("batch_size", 8, "per step")', "8"),
    "a flag given to the parser": ('p.add_argument("--bs", default=16)\na = p.parse_args(["--bs", "8"])', "8"),
    "a flag after an equals sign": ('subprocess.run(["python", "train.py", "--batch_size=8"])', "8"),
    "an option behind a function": (
        'def get():\n    p.add_argument("--bs", default=8)\n    return p.parse_args()\n'
        "args = get()\nCONFIG['batch_size'] = args.bs",
        "8",
    ),
    "what a call refers to": ("B = 8\nTrainingArguments(per_device_train_batch_size=B)", "8"),
    "what a call refers to, among several": (
        'BATCH_SIZE = 16\nCONFIG = {"batch_size": 8}\n'
        'TrainingArguments(per_device_train_batch_size=CONFIG["batch_size"])',
        "8",
    ),
    "what a call refers to with get": (
        'BATCH_SIZE = 16\nCONFIG = {"batch_size": 8}\n'
        'TrainingArguments(per_device_train_batch_size=CONFIG.get("batch_size"))',
        "8",
    ),
    "what a reference refers to": (
        'B = 8\nCONFIG = {"batch_size": B}\nTrainingArguments(per_device_train_batch_size=CONFIG["batch_size"])',
        "8",
    ),
    "what was set when it was used": (
        "BATCH_SIZE = 8\nargs = TrainingArguments(per_device_train_batch_size=BATCH_SIZE)\nBATCH_SIZE = 16",
        "8",
    ),
    "the more particular name": ('CONFIG = {"batch_size": 128, "micro_batch_size": 8}', "8"),
    "not for evaluation": ('C = {"train": {"batch_size": 8}, "valid": {"batch_size": 16}}', "8"),
    "not in a function for evaluation": ("batch_size = 8\ndef predict():\n    batch_size = 16", "8"),
    "the loader for training": ("DataLoader(train_set, batch_size=8)\nDataLoader(val_set, batch_size=16)", "8"),
    "what a loader refers to": ("B = 8\nDataLoader(train_set, batch_size=B)", "8"),
    "the function's default": ("def main(batch_size=8):\n    train(batch_size)\nfire.Fire(main)", "8"),
    "the function's argument": ("def main(batch_size=16):\n    train(batch_size)\nmain(batch_size=8)", "8"),
    "the function's argument without its name": ("def main(x, batch_size=16):\n    train(batch_size)\nmain(0, 8)", "8"),
    "the argument of a class without its name": (
        "class T:\n    def __init__(self, batch_size=16):\n        self.batch_size = batch_size\nT(8)",
        "8",
    ),
    "not in the debugging branch": ("BATCH_SIZE = 8\nif CFG.debug:\n    BATCH_SIZE = 2", "8"),
    "the branch without debugging": ("if DEBUG:\n    bs = 2\nelse:\n    bs = 8", "8"),
    "the value without debugging": ('CONFIG = {"batch_size": 2 if DEBUG else 8}', "8"),
    "several names of one number": ("BATCH_SIZE = bs = 8", "8"),
    "one of a tuple": ("epochs, batch_size = 16, 8", "8"),
    "not what is computed from it": ("batch_size = 8\ntrain_batch_size = batch_size * n_gpu", "8"),
    "not the shape of a batch": ("batch_size = 8\nfor x in loader:\n    batch_size = x.shape[0]", "8"),
    "hexadecimal": ("batch_size = 0xFF", "0xFF"),
    "after characters of many bytes": ("ü = '😀 é'; batch_size = 8", "8"),
    "after a form feed": ("x = 1\n\x0c\nbatch_size = 8", "8"),
    "a power": ("batch_size = 2**7", "2**7"),
    "a shift": ("batch_size = 1 << 7", "1 << 7"),
    "a command": ("os.system('python train.py --batch_size 8 --lr 1')", "8"),
    "a notebook's command": ("get_ipython().system('accelerate launch t.py --bs=8')", "8"),
    "a command in a list": ('subprocess.run(["python", "t.py", "--bs", "8"], check=True)', "8"),
    "in parentheses": ("batch_size = ((8))", "8"),
}


@pytest.mark.parametrize("shape", CHOSEN)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_batch_size_is_the_one_that_trains(shape: str, newline: str, tmp_path: Path) -> None:
    source, old = CHOSEN[shape]
    text = (source + "\n").replace("\n", newline)
    place = list(re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", text))
    assert len(place) == 1, "the case itself is ambiguous"
    expected = text[: place[0].start()] + "48" + text[place[0].end() :]
    assert patched(tmp_path, "train.py", text) == expected


SEVERAL = {
    "two names": 'BATCH_SIZE = 16\nCONFIG = {"batch_size": 32}\n',
    "two dicts": 'CONFIGS = {"bert": {"batch_size": 16},\n "roberta": {"batch_size": 8}}\n',
    "a list of dicts": 'GRID = [{"batch_size": 16},\n {"batch_size": 8}]\n',
    "two calls": "a = TrainingArguments(per_device_train_batch_size=16)\n"
    "b = SFTConfig(per_device_train_batch_size=8)\n",
    "two calls of one": "a = TrainingArguments(per_device_train_batch_size=16)\n"
    "b = TrainingArguments(per_device_train_batch_size=8)\n",
    "two branches": "if torch.cuda.is_available():\n    batch_size = 16\nelse:\n    batch_size = 4\n",
    "a condition": 'C = {"batch_size": 16}\nif torch.cuda.device_count() > 1:\n    C["batch_size"] = 32\n',
    "a read between": "BATCH_SIZE = 16\nfit(BATCH_SIZE)\nBATCH_SIZE = 64\n",
    "a read between in a function": "BATCH_SIZE = 16\ndef f():\n    return fit(BATCH_SIZE)\ndef g():\n    f()\ng()\n"
    "BATCH_SIZE = 64\n",
    "an attribute and what an instance is made with": "class C:\n    batch_size = 16\n"
    "    def __init__(self, batch_size=8):\n        self.batch_size = batch_size\n",
    "another class": "class A:\n    batch_size = 16\nclass B(A):\n    batch_size = 8\n",
    "another exception": "try:\n    batch_size = 16\nexcept OSError:\n    batch_size = 8\n",
    "a function that changes it": 'C = {"batch_size": 16}\ndef main():\n    C["batch_size"] = 8\n',
    "two parsers": 'p.add_argument("--batch_size", default=4)\nq.add_argument("--batch_size", default=8)\n',
    "two arguments of a function": "train(batch_size=4)\ntrain(batch_size=8)\n",
}


@pytest.mark.parametrize("shape", SEVERAL)
def test_two_that_do_not_know_of_each_other_are_an_error_whose_keys_choose(shape: str, tmp_path: Path) -> None:
    source = SEVERAL[shape]
    message = refusal(tmp_path, "train.py", source)
    assert "batch_size is set in 2 places" in message
    keys = re.findall(r"--key batch_size=(\S+?)(?:,|$)", message, re.MULTILINE)
    numbers = [place.span() for place in re.finditer(r"\b(?:16|32|64|4|8)\b", source)]
    results = {patched(tmp_path, "train.py", source, keys={"batch_size": key}) for key in keys}
    assert results == {source[:start] + "48" + source[end:] for start, end in numbers}
    for line in {source.count("\n", 0, start) + 1 for start, _ in numbers}:
        assert f"train.py:{line}:" in message


RUN_TIME = {
    "an expression": "BATCH_SIZE = 16 * strategy.num_replicas_in_sync",
    "the environment": 'BATCH_SIZE = int(os.environ.get("BATCH_SIZE", 16))',
    "a change": "BATCH_SIZE = 16\nBATCH_SIZE *= n_gpu",
    "a change of itself": "BATCH_SIZE = 16\nBATCH_SIZE = BATCH_SIZE // 2",
    "a change under a condition": "BATCH_SIZE = 16\nif n_gpu > 1:\n    BATCH_SIZE = BATCH_SIZE * n_gpu",
    "a condition": 'CONFIG = {"batch_size": 16 if torch.cuda.is_available() else 4}',
    "a loop": "for batch_size in (8, 16):\n    train(batch_size)",
    "a product of literals": 'CONFIG = {"batch_size": 16 * 8}',
    "a power of another name": "BATCH_SIZE = 2**EXPONENT",
    "a huge power": "BATCH_SIZE = 10**10**10",
}


@pytest.mark.parametrize("shape", RUN_TIME)
def test_what_is_known_at_run_time_only_is_an_error_that_shows_it(shape: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", RUN_TIME[shape] + "\n")
    assert "batch_size is known only at run time" in message
    assert RUN_TIME[shape].splitlines()[-1].strip() in message or "for batch_size in (8, 16)" in message


@pytest.mark.parametrize(
    "source",
    [
        "",
        "\n",
        "x = 1",
        "eval_batch_size = 8",
        "CONFIG = {'batch_size': None}",
        "def f(batch_size): pass",
        "'batch_size'",
    ],
)
def test_no_batch_size_is_an_error_that_shows_what_looks_like_one(source: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", source)
    assert "there is no batch_size to change here" in message
    assert ("batch_size" not in source) or source in message


def test_what_python_can_not_read_is_shown(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", "batch_size = 16\nprint 'epoch'\n")
    assert "can't be parsed by Python 3" in message
    assert "train.py:2:  print 'epoch'" in message


@pytest.mark.parametrize("source", ["(" * 400 + "1" + ")" * 400, "-" * 3000 + "1", "x = " + "+".join("1" * 5000)])
def test_what_is_nested_too_deep_is_refused(source: str, tmp_path: Path) -> None:
    assert "can't be parsed by Python" in refusal(tmp_path, "train.py", f"batch_size = 16\n{source}\n")


# ---- accumulation


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
def test_missing_accumulation_is_written_beside_as_its_neighbour_is(
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
def test_missing_accumulation_that_nothing_would_read_is_an_error(source: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", source, BOTH)
    assert "there is no gradient_accumulation_steps in this file" in message
    assert "train.py:1:" in message


@pytest.mark.parametrize(
    "accumulation",
    ["n", "None", "args.accum", '"four"'],
)
@pytest.mark.parametrize("wanted", [1, 2])
def test_accumulation_that_is_there_and_no_number_is_an_error(accumulation: str, wanted: int, tmp_path: Path) -> None:
    source = f"def f(n):\n    return dict(batch_size=16, gradient_accumulation_steps={accumulation})\n"
    values = {"batch_size": 48, "gradient_accumulation_steps": wanted}
    message = refusal(tmp_path, "train.py", source, values)
    assert "gradient_accumulation_steps is set, but not to a number" in message
    assert "train.py:2:" in message


def test_auto_in_another_place_does_not_stand_for_the_accumulation(tmp_path: Path) -> None:
    source = "ds = {'gradient_accumulation_steps': 'auto'}\nTrainingArguments(per_device_train_batch_size=16)\n"
    added = "TrainingArguments(gradient_accumulation_steps=2, per_device_train_batch_size=48)"
    assert added in patched(tmp_path, "train.py", source, BOTH)


def test_accumulation_beside_the_batch_size_goes_before_another(tmp_path: Path) -> None:
    source = 'A = {"accum": 1}\nC = {"batch_size": 16, "accum": 4}\n'
    assert patched(tmp_path, "train.py", source, BOTH) == 'A = {"accum": 1}\nC = {"batch_size": 48, "accum": 2}\n'


def test_accumulation_computed_from_the_batch_size_is_an_error(tmp_path: Path) -> None:
    source = "MICRO_BATCH_SIZE = 4\nBATCH_SIZE = 128\nGRADIENT_ACCUMULATION_STEPS = BATCH_SIZE // MICRO_BATCH_SIZE\n"
    message = refusal(tmp_path, "train.py", source, BOTH)
    assert "train.py:3:  GRADIENT_ACCUMULATION_STEPS = BATCH_SIZE // MICRO_BATCH_SIZE" in message


def test_only_what_was_asked_for_changes(tmp_path: Path) -> None:
    source = "C = {'batch_size': 16, 'lr': 1e-5, 'accum': 4, 'warmup_steps': 9, 'max_len': 8}\n"
    assert patched(tmp_path, "train.py", source, BATCH) == source.replace("16", "48")
    assert patched(tmp_path, "train.py", source, {"learning_rate": 0.5}) == source.replace("1e-5", "0.5")


def test_an_equal_number_keeps_its_spelling(tmp_path: Path) -> None:
    source = "C = {'batch_size': 0x30, 'lr': 20E-6}\n"
    assert patched(tmp_path, "train.py", source, {"batch_size": 48, "learning_rate": 2e-5}) == source


def test_positional_names_in_a_docstring_or_f_string_are_nothing(tmp_path: Path) -> None:
    source = dedent('''
        """CONFIG = {"batch_size": 1}"""
        CONFIG = {"batch_size": 16}
        print(f"""
        {dict(batch_size=2)} {CONFIG["batch_size"]}
        """)
        ''')
    assert patched(tmp_path, "train.py", source) == source.replace("16", "48")
