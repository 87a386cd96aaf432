"""Diffs and error messages show a little of a user's file, and no credentials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patched_files import BATCH, BOTH, notebook, refusal

from hf_bsopt.errors import PatchError
from hf_bsopt.patching import patch
from hf_bsopt.patching.edit_diff import apply_edits, edits_between
from hf_bsopt.patching.redaction import LONGEST_SHOWN, mask_credentials, without_credentials
from hf_bsopt.patching.shown_edits import shown_edits
from hf_bsopt.patching.sites import Edit

HIDDEN = [
    ("hub_token: {}", "abc"),
    ('{{"api_key": "{}", "x": 3}}', "hunter2"),
    ("HF_TOKEN = '{}'", "secret-of-mine"),
    ('os.environ["WANDB_API_KEY"] = "{}"', "0123456789abcdef"),
    ("export OPENAI_API_KEY={}", "xyz-1"),
    ("python train.py --hub_token {} --batch_size 8", "abc"),
    ("python train.py --hub-token={} --batch_size 8", "abc"),
    (r'"API_KEY = \"{}\"\n",', "abc"),
    ("login('{}')", "hf_QwErTyUiOp1234567890"),
    ("login({})", "sk-proj-aB3dEfGh1jKlMn0pQr5t"),
    ("clone https://{}@github.com/x", "me:pw123"),
    ('headers = {{"Authorization": "Bearer {}"}}', "abc.def.ghi"),
    ("password: {}", "12345"),
    ("dbPassword = '{}'", "x y z"),
    ("x = '''{}'''", "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"),
    ("call(b, '{}')", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY0"),
    ("x = '{}'", "0123456789abcdef0123456789abcdef01234567"),
]
SHOWN = [
    'CONFIG = {"batch_size": 16, "gradient_accumulation_steps": 4, "lr": 2e-5}',
    'pad_token: "<pad>"\nmax_tokens: 512\nnum_key_value_heads: 8\neos_token: "</s>"',
    "tokenizer = AutoTokenizer.from_pretrained('mistralai/Mistral-7B-Instruct-v0.3')",
    "sorted(rows, key=len); get(key='text')",
    "data: /kaggle/input/llm-detect-ai-2024/train_v2_drcat_02.csv",
    "push_to_hub: false\ntoken: true\nuse_auth_token: null",
]


@pytest.mark.parametrize(("line", "value"), HIDDEN)
def test_what_looks_like_a_credential_is_not_shown(line: str, value: str) -> None:
    text = line.format(value)
    masked = mask_credentials(text)
    assert len(masked) == len(text)
    assert all(part not in without_credentials(text) for part in value.split("\n"))
    assert "***" in without_credentials(text)


@pytest.mark.parametrize("text", SHOWN)
def test_settings_are_shown(text: str) -> None:
    assert without_credentials(text) == text


def one_line(**more: object) -> str:
    filler = {f"option_{number}": "some words " * 3 for number in range(40)}
    return json.dumps(
        {"hf_token": "hf_SECRETsecret12345678", **filler, "batch_size": 16, **more, "password": "hunter2"}
    )


def shown(text: str) -> None:
    assert "SECRET" not in text and "hunter2" not in text
    assert max(map(len, text.splitlines())) < LONGEST_SHOWN + 60


def test_the_diff_of_a_one_line_file_is_the_change_and_a_little_around_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(one_line(gradient_accumulation_steps=4))
    result = patch(path, BOTH)
    assert json.loads(path.read_text())["batch_size"] == 48
    assert "-…" in result.diff and '"batch_size": 16, "gradient_accumulation_steps": 4' in result.diff
    assert '"batch_size": 48, "gradient_accumulation_steps": 2' in result.diff
    shown(str(result))


def test_changes_that_are_far_apart_on_a_line_are_both_shown(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    filler = {f"x{number}": "y" * 20 for number in range(40)}
    path.write_text(json.dumps({"batch_size": 16, **filler, "gradient_accumulation_steps": 4}))
    diff = patch(path, BOTH).diff
    assert '-{"batch_size": 16' in diff and "…" in diff and '"gradient_accumulation_steps": 4}' in diff
    assert '+{"batch_size": 48' in diff and '"gradient_accumulation_steps": 2}' in diff
    shown(diff.replace("…", "\n"))


def test_an_error_on_a_one_line_file_shows_what_it_is_about(tmp_path: Path) -> None:
    for text in (one_line(inner={"batch_size": 8}), one_line().replace('"batch_size": 16', '"batch_size": "x"')):
        message = refusal(tmp_path, "config.json", text)
        assert '"batch_size"' in message
        shown(message)
        (tmp_path / "config.json").unlink()


def test_a_script_that_cannot_be_parsed_shows_the_place(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.py", f"CONFIG = {one_line()}; batch_size = = 3\n")
    assert "batch_size = = 3" in message
    shown(message)


def test_context_lines_of_a_diff_show_no_credentials(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("HF_TOKEN = 'hf_SECRETsecret12345678'\nbatch_size = 16\npassword = (\n    'hunter2'\n)\n")
    diff = patch(path, BATCH).diff
    assert "HF_TOKEN = '***'\n-batch_size = 16\n+batch_size = 48\n" in diff
    shown(diff)
    assert "hf_SECRETsecret12345678" in path.read_text()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_notebook_shows_no_credentials(indent: int | None, tmp_path: Path) -> None:
    cells = ["login(token='hf_SECRETsecret12345678')\nbatch_size = 16\npassword = 'hunter2'", f"X = {one_line()!r}"]
    path = tmp_path / "train.ipynb"
    path.write_text(notebook(*cells, *["pad = 1"] * 200, indent=indent))
    result = patch(path, BATCH)
    assert "batch_size = 48" in result.diff and "***" in result.diff
    shown(str(result))


def test_the_error_of_a_broken_yaml_file_shows_no_credentials(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 16\ntoken: *hf_SECRETsecret12345678\n")
    with pytest.raises(PatchError) as error:
        patch(path, BATCH)
    shown(str(error.value))


@given(
    st.lists(st.text("ab \n\r", max_size=8), max_size=12).map("".join),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.text("xy", max_size=3)), max_size=4),
)
def test_edits_between_two_texts_turn_one_into_the_other(text: str, changes: list[tuple[int, int, str]]) -> None:
    other = text
    for at, length, new in changes:
        other = other[:at] + new + other[at + length :]
    assert apply_edits(text, edits_between(text, other)) == other


@given(
    st.lists(st.sampled_from(["a = 1\n", "b\n", "\n", "c = 22", "x" * 500 + "\n"]), max_size=12).map("".join), st.data()
)
def test_text_without_credentials_and_long_lines_is_shown_as_it_is(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    edits = (Edit(at, at, "7"),)
    cut, moved = shown_edits(text, edits, 3)
    assert cut.count("\n") == text.count("\n")
    if "xxx" not in text:
        assert (cut, moved) == (text, edits)
    else:
        lines = [line for line in apply_edits(cut, moved).split("\n") if "7" in line]
        assert len(lines) == 1 and len(lines[0]) <= LONGEST_SHOWN + 2
