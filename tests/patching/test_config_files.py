"""YAML and JSON files of axolotl, LLaMA-Factory, TRL, accelerate, DeepSpeed and transformers are patched in place."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from patched_files import BATCH, BOTH, patched, refusal
from ruamel.yaml import YAML

from hf_bsopt.errors import MissingExtraError
from hf_bsopt.patching import patch

WITH_SCHEDULE = {**BOTH, "learning_rate": 2e-5, "warmup_steps": 7}

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B   # the "small" one – é 😀
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
sequence_len: 2048

gradient_accumulation_steps: 2
micro_batch_size:   1
eval_batch_size: 4
num_epochs: 1
learning_rate: 0.0002
bf16: auto
warmup_steps: 100
"""
LLAMA_FACTORY = """\
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
warmup_ratio: 0.1

### eval
per_device_eval_batch_size: 1
"""
DEEPSPEED = """\
{
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 500}}
}
"""
ARGUMENTS = json.dumps(
    {
        "output_dir": "out",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "per_gpu_train_batch_size": None,
        "gradient_accumulation_steps": 1,
        "eval_accumulation_steps": None,
        "learning_rate": 5e-05,
        "warmup_steps": 0,
        "accelerator_config": {"gradient_accumulation_kwargs": None},
        "auto_find_batch_size": False,
    },
    indent=2,
)


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_values_of_an_axolotl_config_change_in_place(tmp_path: Path) -> None:
    assert patched(tmp_path, "a.yml", AXOLOTL, WITH_SCHEDULE | {"max_length": 512}) == replaced(
        AXOLOTL,
        ("micro_batch_size:   1", "micro_batch_size:   48"),
        ("learning_rate: 0.0002", "learning_rate: 2.0e-05"),
        ("warmup_steps: 100", "warmup_steps: 7"),
        ("sequence_len: 2048", "sequence_len: 512"),
    )


def test_values_of_a_llama_factory_or_trl_config_change_in_place(tmp_path: Path) -> None:
    assert patched(tmp_path, "a.yaml", LLAMA_FACTORY, WITH_SCHEDULE) == replaced(
        LLAMA_FACTORY,
        ("train_batch_size: 1\n", "train_batch_size: 48\nwarmup_steps: 7\n"),
        ("accumulation_steps: 8", "accumulation_steps: 2"),
        ("1.0e-4", "2.0e-05"),
    )


def test_values_of_saved_training_arguments_change_in_place(tmp_path: Path) -> None:
    assert patched(tmp_path, "args.json", ARGUMENTS, WITH_SCHEDULE) == replaced(
        ARGUMENTS,
        ('"per_device_train_batch_size": 8', '"per_device_train_batch_size": 48'),
        ('"gradient_accumulation_steps": 1', '"gradient_accumulation_steps": 2'),
        ("5e-05", "2e-05"),
        ('"warmup_steps": 0', '"warmup_steps": 7'),
    )


def test_deepspeeds_train_batch_size_is_updated_for_the_same_number_of_gpus(tmp_path: Path) -> None:
    after = json.loads(patched(tmp_path, "ds.json", DEEPSPEED, WITH_SCHEDULE))
    assert after["train_batch_size"] == 48 * 2 * (64 // (4 * 8))
    assert (after["train_micro_batch_size_per_gpu"], after["gradient_accumulation_steps"]) == (48, 2)
    assert after["optimizer"]["params"]["lr"] == 2e-5
    assert after["scheduler"]["params"]["warmup_num_steps"] == 7


def test_deepspeeds_train_batch_size_stays_if_the_effective_batch_stays(tmp_path: Path) -> None:
    after = patched(tmp_path, "ds.json", DEEPSPEED, {"batch_size": 16, "gradient_accumulation_steps": 2})
    assert after == replaced(DEEPSPEED, ('per_gpu": 4', 'per_gpu": 16'), ('steps": 8', 'steps": 2'))


def test_deepspeeds_train_batch_size_is_updated_if_only_the_accumulation_changes(tmp_path: Path) -> None:
    after = patched(tmp_path, "ds.json", DEEPSPEED, {"gradient_accumulation_steps": 2})
    assert after == replaced(DEEPSPEED, ('batch_size": 64', 'batch_size": 16'), ('steps": 8', 'steps": 2'))


@pytest.mark.parametrize("name", ["ds.json", "ds.yaml"])
def test_auto_stays_auto(name: str, tmp_path: Path) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    text = json.dumps(dict.fromkeys(names, "auto"), indent=2)
    assert patched(tmp_path, name, text, BOTH) == text
    notes = patch(tmp_path / name, BOTH).notes
    assert any('batch_size is "auto" and stays "auto"' in note for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 64, "zero_optimization": {}}', "the total of all GPUs and accumulation steps"),
        ('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": "auto"}', "the total of all GPUs"),
        ('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}', "delete train_batch_size"),
        (
            '{"train_batch_size": 60, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}',
            "not a multiple of micro-batch × accumulation",
        ),
    ],
)
def test_inconsistent_deepspeed_batch_sizes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, "ds.json", text, BOTH)


def test_axolotls_batch_size_is_refused_if_the_accumulation_is_computed_from_it(tmp_path: Path) -> None:
    for accumulation in (1, 2):
        values = {"batch_size": 48, "gradient_accumulation_steps": accumulation}
        message = refusal(tmp_path, "a.yml", "micro_batch_size: 2\nbatch_size: 64\n", values)
        assert "it is computed from batch_size beside it" in message


def test_accelerate_config_gets_the_accumulation_only(tmp_path: Path) -> None:
    text = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_accumulation_steps: 1\n  zero_stage: 2\n"
    assert patched(tmp_path, "default_config.yaml", text, BOTH) == text.replace("steps: 1", "steps: 2")
    assert "has no batch size" in patch(tmp_path / "default_config.yaml", BOTH).notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("per_device_train_batch_size: 1", "gradient_accumulation_steps: 2\nper_device_train_batch_size: 48"),
        ("batch_size: 1 # a\nx: 2\n", "batch_size: 48 # a\ngradient_accumulation_steps: 2\nx: 2\n"),
        ("a:\n  - bs: 1\n    b: 2\n", "a:\n  - gradient_accumulation_steps: 2\n    bs: 48\n    b: 2\n"),
        ("{x: 1, bs: 2}\n", "{x: 1, gradient_accumulation_steps: 2, bs: 48}\n"),
        ("a:\r\n    'bs' : 1\r\n", "a:\r\n    'bs' : 48\r\n    'gradient_accumulation_steps' : 2\r\n"),
        ("'bs': '8'\n", "'bs': '48'\n'gradient_accumulation_steps': 2\n"),
    ],
)
def test_missing_accumulation_is_added_to_yaml(text: str, expected: str, tmp_path: Path) -> None:
    assert patched(tmp_path, "a.yaml", text, BOTH) == expected
    assert YAML(typ="safe").load(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bs": 1}', '{"gradient_accumulation_steps": 2, "bs": 48}'),
        ('{\n\t"bs": 1\n}', '{\n\t"gradient_accumulation_steps": 2,\n\t"bs": 48\n}'),
        ('{\n  "bs" : 1,\n  "x": {}\n}', '{\n  "bs" : 48,\n  "gradient_accumulation_steps" : 2,\n  "x": {}\n}'),
        ('[{"bs":1}]', '[{"gradient_accumulation_steps":2, "bs":48}]'),
    ],
)
def test_missing_accumulation_is_added_to_json(text: str, expected: str, tmp_path: Path) -> None:
    assert patched(tmp_path, "a.json", text, BOTH) == expected
    assert json.loads(expected)


@pytest.mark.parametrize(
    "text",
    [
        "batch_size: &b 8\nlearning_rate: 1.0e-3\n",
        "batch_size: !!int 8\n",
        "%YAML 1.1\n---\nbatch_size: 8\n...\n",
        "# é 😀\n\nbatch_size:\n    8 # here\n",
        "a: &d\n  batch_size: 8\ntrain:\n  <<: *d\n",
        "batch_size: ${a.b}\na: {b: 8}\n",
        "\ufeffbatch_size: 8\n",
        "train: {batch_size: 8}\neval: {batch_size: 9}\n",
        '"batch_size": "8"\n',
        "x: |\n  batch_size: 9\nbatch_size: 8\n",
        "batch_size: 9\nbatch_size: 8\n",
    ],
)
def test_only_the_number_changes_in_a_yaml_file(text: str, tmp_path: Path) -> None:
    assert patched(tmp_path, "a.yaml", text) == text.replace("8", "48")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &d\n  batch_size: 8\ntrain:\n  <<: *d\neval:\n  <<: *d\n", "known only at run time"),
        ("batch_size: &b 8\neval_batch_size: *b\n", "known only at run time"),
        ('batch_size: "{{ bs }}"\n', "known only at run time"),
        ("batch_size: ${oc.env:BS}\n", "known only at run time"),
        ("batch_size: {{ bs }}\n", "there is no batch_size"),
        ("batch_size:\n", "there is no batch_size"),
        ("batch_size: 0x10\n", "there is no batch_size"),
        ("", "there is no batch_size"),
        ("just words\n", "there is no batch_size"),
        ("batch_size: 8\n---\nbatch_size: 9\n", "set in 2 places"),
        ("a: {batch_size: 8}\nb: {batch_size: 9}\n", "set in 2 places"),
        ("\tbatch_size: 8\n", "is not YAML: line 1"),
        ("a: [1, 2\nbatch_size: 8\n", "is not YAML: line 2"),
        ("a: \x07\nbatch_size: 8\n", "is not YAML"),
        ("[" * 1200, "is not YAML"),
    ],
)
def test_yaml_is_refused_if_it_is_not_certain_what_to_change(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, "a.yaml", text)


def test_nested_yaml_aliases_are_visited_once(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    text = "\n".join([*rows, "batch_size: 8\n"])
    assert patched(tmp_path, "a.yaml", text) == text.replace("batch_size: 8", "batch_size: 48")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a value"),
        ('{"a": 1}\n x', "line 2: there is text after the end"),
        ('{"a": [1, 2,\n}', "line 2: expected a value"),
        ("{'batch_size': 1}", "expected a name in double quotes"),
        ('{"batch_size" 1}', "expected a colon"),
        ('{"batch_size": 1 "b": 2}', "expected a comma"),
        ('{"batch_size": 1', "expected a comma or the end"),
        ('{"batch_size": "1', "Unterminated string"),
        ('{"batch_size": 01}', "expected a comma or the end"),
        ("[" * 100_000, "nested more than 200 deep"),
        ('{"batch_size": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"batch_size": true}', "there is no batch_size"),
        ('{"batch_size": null}', "there is no batch_size"),
        ("8", "there is no batch_size"),
    ],
)
def test_json_that_can_not_be_patched_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, "a.json", text)


def test_the_last_of_equal_json_keys_is_patched(tmp_path: Path) -> None:
    assert patched(tmp_path, "a.json", '{"bs": 1, "bs": 2}') == '{"bs": 1, "bs": 48}'


def test_yaml_without_ruamel_raises_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ruamel(name: str, *args: Any) -> Any:
        if name.startswith("ruamel"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    (tmp_path / "a.yaml").write_text("batch_size: 8\n")
    monkeypatch.setattr(builtins, "__import__", without_ruamel)
    with pytest.raises(MissingExtraError, match=r"pip install ruamel.yaml"):
        patch(tmp_path / "a.yaml", BATCH)
