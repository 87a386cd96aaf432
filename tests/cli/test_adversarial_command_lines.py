"""Command lines that nobody should type end with a documented exit code, one message, and whole files.

At full size: python benchmarks/attack.py --lines 500
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attacks import failures

from hf_bsopt.cli.main import USAGE, main

Capture = pytest.CaptureFixture[str]
MINI = ["--model", "bert-tiny", "--gpu", "2GiB", "--device", "predict", "--evaluation", "False", "--max_length", "32"]


@pytest.mark.slow
def test_hostile_command_lines_survive() -> None:
    assert failures("line", 40) == []


@pytest.mark.parametrize(
    ("flag", "content", "words"),
    [
        ("json", None, "cannot write"),
        ("html", None, "cannot write"),
        ("plot", None, "cannot write"),
    ],
)
@pytest.mark.parametrize("name", ["n" * 256, "a\0b", "/proc/report", "missing/report"])
def test_a_file_that_cannot_be_written_is_refused_before_the_search(
    flag: str, content: object, words: str, name: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / (name + (".png" if flag == "plot" else ""))
    assert main([*MINI, f"--{flag}", str(path)]) == USAGE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_name_that_no_file_can_have_is_a_usage_error(capsys: Capture) -> None:
    for name in ("x" * 100_000, "a\0b", "\x1b[2J"):
        assert main([*MINI, "--model", name]) == USAGE
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err) < 1000


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to a device", "pickle", "yaml that calls"])
def test_training_arguments_that_are_no_file_are_refused_and_nothing_is_run(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    import os

    path = tmp_path / "args.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "pickle":
        path.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch executed'\ntR.")
    else:
        path.write_text(f"fp16: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n")
    assert main([*MINI, "--training_args", str(path)]) == USAGE
    err = capsys.readouterr().err
    assert err.startswith(f"error: --training_args {path}") and err.count("\n") == 1
    assert "hf_" not in err and not (tmp_path / "executed").exists()


def test_the_error_of_broken_training_arguments_does_not_show_the_file(tmp_path: Path, capsys: Capture) -> None:
    for name, text in (("a.yaml", "hub_token: hf_SECRET12345678\nfp16: [\n"), ("a.json", '{"t": "hf_SECRET1", fp16}')):
        (tmp_path / name).write_text(text)
        assert main([*MINI, "--training_args", str(tmp_path / name)]) == USAGE
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "SECRET" not in err


@pytest.mark.parametrize("rate", ["NaN", "Infinity", "-1", "0", '"1e-4"', "true"])
def test_a_learning_rate_that_no_training_has_is_refused(rate: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "args.json"
    path.write_text(f'{{"learning_rate": {rate}}}')
    assert main([*MINI, "--training_args", str(path)]) == USAGE
    assert "learning_rate is a number above 0" in capsys.readouterr().err


def test_an_existing_report_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")
    path.chmod(0o600)
    assert main([*MINI, "--quiet", "--json", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["version"] >= 2
