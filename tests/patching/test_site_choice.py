"""Of several definitions the one that training uses is chosen; ambiguous scripts are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from patched_files import patched, refusal

# name: (the source, the text in it that 48 replaces)
SOURCES = {
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


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_batch_size_that_training_uses_is_patched(case: str, newline: str, tmp_path: Path) -> None:
    source, old = SOURCES[case]
    text = (source + "\n").replace("\n", newline)
    place = list(re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", text))
    assert len(place) == 1, "the text to replace must occur once in the source"
    expected = text[: place[0].start()] + "48" + text[place[0].end() :]
    assert patched(tmp_path, "train.py", text) == expected


AMBIGUOUS = {
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


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_two_independent_definitions_are_an_error_whose_keys_select_one(case: str, tmp_path: Path) -> None:
    source = AMBIGUOUS[case]
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


@pytest.mark.parametrize("case", RUN_TIME)
def test_a_value_known_only_at_run_time_is_an_error_that_shows_the_line(case: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", RUN_TIME[case] + "\n")
    assert "batch_size is known only at run time" in message
    assert RUN_TIME[case].splitlines()[-1].strip() in message or "for batch_size in (8, 16)" in message


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
def test_a_missing_batch_size_is_an_error_that_shows_similar_lines(source: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", source)
    assert "there is no batch_size to change here" in message
    assert ("batch_size" not in source) or source in message


def test_a_syntax_error_is_reported_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", "batch_size = 16\nprint 'epoch'\n")
    assert "can't be parsed by Python 3" in message
    assert "train.py:2:  print 'epoch'" in message


@pytest.mark.parametrize("source", ["(" * 400 + "1" + ")" * 400, "-" * 3000 + "1", "x = " + "+".join("1" * 5000)])
def test_source_that_is_nested_too_deep_is_refused(source: str, tmp_path: Path) -> None:
    assert "can't be parsed by Python" in refusal(tmp_path, "train.py", f"batch_size = 16\n{source}\n")
