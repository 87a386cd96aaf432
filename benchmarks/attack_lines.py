"""Hostile command lines: a valid one with one to three flags replaced by what nobody should type."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BASE = {
    "model": "bert-tiny",
    "gpu": "2GiB",
    "device": "predict",
    "evaluation": "False",
    "max_length": "32",
    "batch_size": "16",
}
CANARY = "executed"
"""A file that exists only if something that was given as data was run."""
NUMBERS = ["0", "-1", "-0", "1e400", "9" * 5000, "-" + "9" * 400, "nan", "inf", "-inf", "1_000", "٣", "0x10", "", " "]
NUMBERS += [
    "1.5",
    "true",
    "1e-400",
    "2147483648",
    "18446744073709551616",
    "1" + "0" * 19,
    "100000000",
    "one",
    "1,5",
    "+3",
]
WORDS = ["", " ", "\x1b[2J\x1b]0;owned\x07", "a\nb", "é" * 300, "../../etc/passwd", "/proc/self/environ", "/dev/zero"]
WORDS += [
    "%s%n%x",
    "{0}{x.__class__}",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    "x" * 100_000,
    "\udcff",
    "\u202egpj.exe",
]
WORDS += [
    "a\0b",
    "null",
    "None",
    "True",
    "-",
    "..",
    "~",
    "*",
    "http://127.0.0.1:1/x",
    "bert-tiny\r",
    "0" * 300,
    "T4; rm -rf .",
]
BOOLEANS = ["maybe", "", "2", "None", "TRUE ", "\x1b[0m"]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100, "n_positions": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
BAD_VALUES: list[Any] = [None, -1, 0, 1.5, "x", [], {}, True, 10**19, 7, 1e308, "9" * 50, [[]], {"a": 1}]


def deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


def config_text(random_: random.Random) -> str:
    """Return a config.json with one or two fields broken, or broken as a whole."""
    whole = [
        "",
        "[]",
        "null",
        "3",
        '"bert"',
        "{",
        deep(900),
        deep(100_000),
        '{"model_type": "bert", "model_type": 3}',
        "\ufeff{}",
    ]
    whole += [
        "NaN",
        '{"model_type": "no-such-model"}',
        '{"architectures": ["BertModel"]}',
        '{"model_type": ' + "9" * 5000 + "}",
    ]
    if random_.random() < 0.3:
        return random_.choice(whole)
    config: dict[str, Any] = dict(random_.choice([CONFIG, CONFIG, GPT2, T5]))
    names = [
        *config,
        "to_dict",
        "architectures",
        "num_labels",
        "id2label",
        "torch_dtype",
        "dtype",
        "hidden_act",
        "pad_token_id",
    ]
    names += [
        "decoder_start_token_id",
        "is_encoder_decoder",
        "tie_word_embeddings",
        "chunk_size_feed_forward",
        "auto_map",
    ]
    names += [
        "_attn_implementation",
        "quantization_config",
        "position_embedding_type",
        "layer_types",
        "text_config",
        "\x1b[31m",
    ]
    for name in random_.sample(names, random_.choice([1, 1, 2])):
        config[name] = random_.choice(BAD_VALUES)
    if random_.random() < 0.1:
        config["auto_map"] = {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}
    return json.dumps(config)


def planted(folder: Path) -> None:
    """Plant code where only a careless import or unpickling would run it."""
    code = f"import pathlib\npathlib.Path({str(folder / CANARY)!r}).touch()\n"
    for name in ("queue.py", "planted.py", "sitecustomize.py", "json.py"):
        (folder / name).write_text(code)


class _Bomb:
    def __init__(self, folder: Path) -> None:
        self._command = f"touch {folder / CANARY}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def output_path(random_: random.Random, folder: Path, suffix: str) -> str:
    """Return a path to write to: a good one, or one that no file can have."""
    kept = folder / f"kept{suffix}"
    kept.write_text("as it was")
    kept.chmod(0o600)
    os.mkfifo(folder / f"pipe{suffix}")
    (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (folder / f"dangling{suffix}").symlink_to(folder / "none" / "x")
    paths = [
        folder / f"new{suffix}",
        kept,
        "/dev/full",
        "/dev/null",
        f"/proc/report{suffix}",
        folder,
        folder / f"pipe{suffix}",
    ]
    paths += [folder / ("n" * (255 - len(suffix)) + suffix), folder / ("n" * 256 + suffix), folder / f"a\0b{suffix}"]
    paths += [
        folder / "missing" / f"x{suffix}",
        folder / f"loop{suffix}",
        folder / f"dangling{suffix}",
        f"/sys/report{suffix}",
    ]
    paths += [
        "",
        " ",
        f"/dev/stdout{suffix}",
        folder / f"\x1b[2J{suffix}",
        folder / f"\udcff{suffix}",
        "/".join(["d"] * 3000),
    ]
    return str(random_.choice(paths))


def input_file(random_: random.Random, folder: Path, name: str) -> str:
    """Return a file to be read that is not what it should be."""
    path = folder / name
    kind = random_.randrange(12)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.write_bytes(pickle.dumps(_Bomb(folder)))
    elif kind == 3:
        path.write_bytes(random_.randbytes(300))
    elif kind == 4:
        path.write_text(deep(random_.choice([50, 2000])))
    elif kind == 5:
        path.write_text("a: &a [" + "*a, " * 5 + "]\nb: !!python/object/apply:os.system ['touch executed']\n")
    elif kind == 6:
        path.write_text("")
    elif kind == 7:
        path.symlink_to("/dev/zero")
    elif kind == 8:
        path.write_text(json.dumps({random_.choice(["fp16", "optim", "learning_rate"]): random_.choice(BAD_VALUES)}))
    elif kind == 9:
        values = {"per_device_train_batch_size": random_.choice(BAD_VALUES), "gradient_accumulation_steps": 10**30}
        path.write_text(json.dumps(values))
    elif kind == 10:
        return random_.choice(["/dev/zero", "/proc/self/mem", "/proc/kmsg", "a\0b", "x" * 300, "missing.json"])
    else:
        path.write_text('text\n"unbalanced\n' + "a" * 100_000)
    return str(path)


SCRIPTS = [
    "batch_size = 8\n",
    "batch_size = 8\nbatch_size = 16 if x else 4\n",
    'HF_TOKEN = "hf_SECRETsecret12345678"; CONFIG = {"batch_size": 8, "accum": n}\n',
    "batch_size = (" * 300,
    "\x0c\x00batch_size = 8",
    "import os; os.system('touch executed')\nbatch_size = 8\naccum = 1\n",
    "# coding: klingon\nbatch_size = 8\n",
    "{" * 500,
    '{"batch_size": 8, "password": "hunter2-SECRET", "batch_size": 9}',
    "a: &x {batch_size: 8}\nb: *x\n",
    "",
    "batch_size = 8 #" + "\udcff",
]


def mutate_option(random_: random.Random, flags: dict[str, str], folder: Path) -> None:
    from hf_bsopt.options import OPTION_CLASSES

    entries = [(entry, kind) for kind in OPTION_CLASSES for entry in dataclasses.fields(kind) if entry.name != "fill"]
    entry, kind = random_.choice(entries)
    hints = typing.get_args(typing.get_type_hints(kind)[entry.name]) or (typing.get_type_hints(kind)[entry.name],)
    values = BOOLEANS if bool in hints else NUMBERS if {int, float} & {*hints} else WORDS
    if entry.name == "target":
        flags[entry.name] = " ".join(
            random_.choices(["0", "1", "nan", "-1", "2", "0.8", "x", "1e400"], k=random_.choice([1, 2, 2, 3]))
        )
    else:
        flags[entry.name] = random_.choice([*values, *(values if random_.random() < 0.8 else NUMBERS + WORDS)])


def mutate_model(random_: random.Random, flags: dict[str, str], folder: Path) -> None:
    if random_.random() < 0.2:
        flags["model"] = random_.choice(WORDS)
        return
    name = random_.choice(["model", "mo del", "m\x1b[31m", "é", "m" * 200])
    (folder / name).mkdir()
    (folder / name / "config.json").write_bytes(config_text(random_).encode("utf-8", "surrogatepass"))
    flags["model"] = str(folder / name)


def mutate_output(random_: random.Random, flags: dict[str, str], folder: Path) -> None:
    name, suffix = random_.choice(
        [("json", ".json"), ("html", ".html"), ("plot", ".png"), ("plot", ".svg"), ("plot", ".exe")]
    )
    flags[name] = output_path(random_, folder, suffix)


def mutate_input(random_: random.Random, flags: dict[str, str], folder: Path) -> None:
    name = random_.choice(["training_args", "dataset", "tokenizer", "training_args"])
    suffix = random_.choice([".json", ".yaml", ".bin", ".jsonl", ".csv", ".txt", ".parquet", ""])
    if name == "tokenizer":
        (folder / "rows.jsonl").write_text('{"text": "a"}\n')
        flags["dataset"] = str(folder / "rows.jsonl")
    flags[name] = input_file(random_, folder, f"input{suffix}")


def mutate_patch(random_: random.Random, flags: dict[str, str], folder: Path) -> None:
    suffix = random_.choice([".py", ".py", ".ipynb", ".yaml", ".json", ".toml", ".sh", ".jsonnet", ".txt", ""])
    path = folder / f"train{suffix}"
    if random_.random() < 0.3:
        flags["patch"] = input_file(random_, folder, path.name)
    else:
        path.write_bytes(random_.choice(SCRIPTS).encode("utf-8", "surrogateescape"))
        flags["patch"] = str(path)
    if random_.random() < 0.3:
        flags["key"] = random_.choice(
            ["", "=", "batch_size=", "x=y", "a:b", "bs:1:2:3", ":", "batch_size=batch_size:1", "\x1b[1m", "--x"]
        )
    if random_.random() < 0.3:
        flags["dry_run"] = random_.choice(["", "maybe"])


MUTATIONS = [mutate_option] * 4 + [mutate_model] * 2 + [mutate_output] * 2 + [mutate_input, mutate_patch]


def hostile_line(random_: random.Random, folder: Path) -> list[str]:
    """Return a command line, and prepare the files that it names in ``folder``."""
    planted(folder)
    flags = dict(BASE)
    if random_.random() < 0.05:
        flags["bf16"] = ""
    for mutate in random_.sample(MUTATIONS, random_.choice([1, 1, 2, 3])):
        with contextlib.suppress(FileExistsError):
            mutate(random_, flags, folder)
    words = [word for name, value in flags.items() for word in _spelled(random_, name, value)]
    subcommand = random_.random()
    if subcommand < 0.1:
        words = [random_.choice(["find", "table", "lengths", "env", "rehearse", "fnid", "", "\x1b[1m", "--"]), *words]
    elif subcommand < 0.2:
        words.insert(
            random_.randrange(len(words) + 1),
            random_.choice(["--", "-v", "-q", "--no_such_flag", "stray", "--help", "-"]),
        )
    elif subcommand < 0.25:
        words = words[: random_.randrange(len(words) + 1)]
    return words


def _spelled(random_: random.Random, name: str, value: str) -> list[str]:
    flag = "--" + (name.replace("_", "-") if random_.random() < 0.3 else name)
    if name in ("target", "max_length"):
        return [flag, *value.split(" ")]
    if value.startswith("-") or random_.random() < 0.3:
        return [f"{flag}={value}"]
    return [flag] if not value and random_.random() < 0.5 else [flag, value]


def run_line(seed: int, folder: Path) -> tuple[str, str | None]:
    """Run one hostile command line in this process; return it, and what is wrong with its outcome."""
    from hf_bsopt.cli.main import FOUND, INTERRUPTED, NOTHING_FITS, USAGE, main

    words = hostile_line(random.Random(f"line {seed}"), folder)
    before = contents(folder)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    shown = " ".join(f"{word[:60]!r}" for word in words)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    except SystemExit as error:  # --help and --version of argparse
        code = error.code if isinstance(error.code, int) else 0
    except BaseException as error:
        return shown, f"{type(error).__name__} escaped: {str(error)[:200]}"
    texts = {name: _text_of(stream) for name, stream in (("output", out), ("errors", err))}
    if code not in (FOUND, NOTHING_FITS, USAGE, INTERRUPTED):
        return shown, f"exit code {code}"
    if code == USAGE and not (texts["errors"].startswith("error: ") and len(texts["errors"]) < 5000):
        return shown, f"exit code 2 with {texts['errors'][:200]!r}"
    for name, text in texts.items():
        if "Traceback" in text:
            return shown, f"a traceback in the {name}"
        if set(text) & CONTROLS:
            return shown, f"control characters in the {name}"
        if "SECRET" in text:
            return shown, f"a credential in the {name}"
    return shown, check_folder(folder, before, {word.split("=", 1)[-1] for word in words})


CONTROLS = {chr(code) for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return typing.cast(io.BytesIO, stream.buffer).getvalue().decode("utf-8", "replace")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder; nothing is opened that could block."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                found[str(path)] = path.read_bytes()
    return found


def check_folder(folder: Path, before: Mapping[str, bytes], named: set[str]) -> str | None:
    """Return what is wrong with the files after a run: half-written, left behind, changed, or proof of execution."""
    for name, content in contents(folder).items():
        path = Path(name)
        if path.name == CANARY:
            return "something that was data was executed"
        if path.name.startswith(".hf_bsopt.") or "__pycache__" in name:
            return f"{path.name[:80]} was left behind"
        if before.get(name) == content or "cache" in path.parts:
            continue
        if name not in named and path.name not in named:
            return f"{path.name[:80]} was changed and not named"
        if (problem := _COMPLETE.get(path.suffix, lambda content: None)(content)) is not None:
            return f"{path.name[:80]} is half-written: {problem}"
        if name.endswith(("kept.json", "kept.html", "kept.png")) and path.stat().st_mode & 0o777 != 0o600:
            return f"{path.name} lost its permissions"
    return None


def _json_problem(content: bytes) -> str | None:
    try:
        json.loads(content)
    except ValueError as error:
        return str(error)
    return None


_COMPLETE: dict[str, Callable[[bytes], str | None]] = {
    ".json": _json_problem,
    ".html": lambda content: None if content.rstrip().endswith(b"</html>") else "no end",
    ".svg": lambda content: None if content.rstrip().endswith(b"</svg>") else "no end",
    ".png": lambda content: None if content.endswith(b"IEND\xaeB`\x82") else "no end",
}
