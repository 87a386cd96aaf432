"""Claims about the command line: flags, exit codes, and error messages of one line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_bsopt.cli import arguments as cli_arguments
from hf_bsopt.cli import find as cli_find
from hf_bsopt.cli import main as cli
from hf_bsopt.cli.main import FOUND, NOTHING_FITS, USAGE, main
from hf_bsopt.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
MINI = ["--model", "bert-mini", "--gpu", "2GiB", "--max_length", "32", "--evaluation", "False"]
Capture = pytest.CaptureFixture[str]


def parse(argv: list[str]) -> SimpleNamespace:
    """Parse the command line and return every option and flag in one namespace."""
    parsed = cli_arguments.parse(argv)
    parts = (*vars(parsed.options).values(), parsed.model, parsed.table, parsed.dataset, parsed.output)
    values = {name: value for part in parts for name, value in vars(part).items()}
    return SimpleNamespace(**{**values, "max_length": parsed.max_lengths})


def usage_error(capsys: Capture, *argv: str) -> str:
    """Run the command, which exits with code 2, and return its error message of one line."""
    assert main(argv) == USAGE
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "Traceback" not in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    return streams.err


def test_the_answer_is_printed_and_the_exit_code_is_0(capsys: Capture) -> None:
    assert main(MINI) == FOUND
    assert "✅ OPTIMAL BATCH SIZE:" in capsys.readouterr().out


def test_the_standalone_script_runs_from_any_folder(tmp_path: Path) -> None:
    script = ROOT / "find_optimal_batch_size.py"
    done = subprocess.run([sys.executable, script, *MINI], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == FOUND, done.stderr
    assert "OPTIMAL BATCH SIZE" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_flags_may_have_underscores_or_dashes() -> None:
    assert parse(["--model", "x", "--max-length", "7"]) == parse(["--model", "x", "--max_length", "7"])


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        (["--fp16"], "precision", "fp16"),
        (["--bf16"], "precision", "bf16"),
        (["--optim", "sgd"], "optimizer", "sgd"),
        (["--gradient_checkpointing"], "activation_checkpointing", True),
        (["--gradient-checkpointing", "True"], "activation_checkpointing", True),
        (["--per_device_train_batch_size", "4"], "batch_size", 4),
        (["--per-device-train-batch-size", "4"], "batch_size", 4),
    ],
)
def test_the_names_of_training_arguments_are_accepted(alias: list[str], name: str, value: object) -> None:
    assert getattr(parse(["--model", "x", *alias]), name) == value


def test_each_of_several_lengths_has_a_report(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    flags = ["--model", "bert-mini", "--gpu", "2GiB", "--evaluation", "False", "--max_length", "16", "32"]
    assert main([*flags, "--json", str(path)]) == FOUND
    assert capsys.readouterr().out.count("OPTIMAL BATCH SIZE") == 2
    sizes = [each["batch_configuration"]["per_gpu_batch_size"] for each in json.loads(path.read_text())["reports"]]
    assert sizes[0] > sizes[1]


def test_a_length_that_does_not_fit_does_not_stop_the_others(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    flags = ["--model", "bert-mini", "--gpu", "1GiB", "--device", "predict", "--target", "0", "0.62"]
    flags += ["--evaluation", "False", "--advise", "False", "--json", str(path)]
    assert main([*flags, "--max_length", "512", "16"]) == NOTHING_FITS
    streams = capsys.readouterr()
    assert "one sequence of 512 tokens" in streams.err
    assert streams.out.count("OPTIMAL BATCH SIZE") == 1
    written = json.loads(path.read_text())
    assert [each["workload"]["max_length"] for each in written["reports"]] == [16]
    assert "512 tokens" in written["nothing_fits"][0]


def test_with_quiet_nothing_but_an_answer_is_on_standard_output(capsys: Capture) -> None:
    flags = ["--model", "bert-mini", "--gpu", "1GiB", "--device", "predict", "--target", "0", "0.5", "--quiet"]
    assert main(flags) == NOTHING_FITS
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("❌ not even one sequence")
    assert "make room" not in streams.err


def test_a_checked_size_that_does_not_fit_exits_with_1(capsys: Capture) -> None:
    assert main([*MINI, "--check", "1000000"]) == NOTHING_FITS
    assert "does not fit" in capsys.readouterr().out.strip().splitlines()[-1]


def test_a_checked_size_that_fits_exits_with_0(capsys: Capture) -> None:
    assert main([*MINI, "--check", "32"]) == FOUND
    assert "Batch size 32 fits" in capsys.readouterr().out


def test_if_nothing_fits_the_command_exits_with_1_and_names_the_needed_memory(capsys: Capture) -> None:
    flags = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--max_length", "32"]
    assert main([*flags, "--target", "0", "0.43", "--advise", "False"]) == NOTHING_FITS
    assert "GiB of 1.00 GiB" in capsys.readouterr().err


def test_an_effective_batch_that_cannot_be_divided_is_mentioned_and_not_an_error(capsys: Capture) -> None:
    assert main([*MINI, "--effective_batch_size", "7", "--num_processes", "2"]) == FOUND
    assert "7" in capsys.readouterr().out


def test_bf16_on_a_t4_is_a_warning(capsys: Capture) -> None:
    flags = ["--model", "bert-mini", "--gpu", "T4", "--max_length", "16", "--bf16", "--evaluation", "False"]
    assert main([*flags, "--batch_size", "8"]) == FOUND
    assert "no bf16 units" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "biobret"], "dmis-lab/biobert-v1.1"),
        (["--model", "bert-mini", "--gpu", "T44"], "T4"),
        (["--model", "bert-mini", "--gpu", "0GiB"], "GiB"),
        (["--model", "bert-mini", "--max_length", "4096"], "512"),
        (["--model", "bert-mini", "--max_length", "0"], "at least 1"),
        (["--modle", "bert-mini"], "--model"),
        (["--model", "bert-mini", "--max_lenght", "3"], "--max_length"),
        (["--model", "bert-mini", "--max_length", "many"], "many"),
        (["--model", "bert-mini", "--target", "0.9", "0.8"], "0.8 0.9"),
        (["--model", "bert-mini", "--target", "0.8", "1.5"], "between 0 and 1"),
        (["--model", "bert-mini", "--target", "0.8"], "two fractions"),
        (["--model", "bert-mini", "--effective_batch_size", "0"], "effective_batch_size"),
        (["--model", "bert-mini", "--effective_batch_size", "-8"], "effective_batch_size"),
        (["--model", "bert-mini", "--total_tokens", "0"], "total_tokens"),
        (["--model", "bert-mini", "--batch_size", "0"], "at least 1"),
        (["--model", "bert-mini", "--num_processes", "0"], "processes"),
        (["--model", "bert-mini", "--multiple_of", "0"], "multiple_of"),
        (["--model", "bert-mini", "--check", "0"], "check"),
        (["--model", "bert-mini", "--task", "token-clasification"], "token-classification"),
        (["--model", "bert-mini", "--task", "seq2seq"], "no head"),
        (["--model", "bert-mini", "--precision", "fp8"], "fp16"),
        (["--model", "bert-mini", "--fp16", "--bf16"], "give one"),
        (["--model", "bert-mini", "--optim", "adamx"], "adamw_torch_fused"),
        (["--model", "bert-mini", "--load_in_4bit"], "--lora_r"),
        (["--model", "bert-mini", "--gpu", "T4", "--attn_implementation", "flash_attention_2"], "sdpa"),
        (["--model", "bert-mini", "--gpu", "L4", "--precision", "fp32", "--attention", "flash_attention_2"], "half"),
        (["--model", "bert-mini", "--fp16", "--weights_dtype", "float16"], "float32"),
        (["--model", "bert-mini", "--lora_targets", "query"], "--lora_r"),
        (["--model", "bert-mini", "--lora_r", "-1"], "lora_r is at least 0"),
        (["--model", "bert-mini", "--num_labels", "0"], "num_labels"),
        (["--model", "bert-mini", "--json", "/dev/null"], "not a file"),
        (["--model", "bert-mini", "--json", "/tmp"], "not a file"),
        (["--model", "bert-mini", "--json", ""], "not a file"),
        (["--model", "bert-mini", "--torch_compile"], "torch.compile"),
        (["--model", "bert-mini", "--use_liger_kernel"], "Liger"),
        (["--model", "bert-mini", "--json", "/no/such/folder/x.json"], "no folder"),
        (["--model", "bert-mini", "--training_args", "/no/such/file.json"], "no such file"),
        (["--model", "bert-mini", "--no_cache", "--trust_cache"], "give one of them"),
        (["--model", "bert-mini", "--evaluation", "False", "--per_device_eval_batch_size", "8"], "--evaluation False"),
        (["--model", "bert-mini", "--quiet", "--advise"], "--json"),
        (["--model", "bert-mini", "--text_column", "words"], "--dataset"),
        (["--model", "bert-mini", "--split", "test"], "--dataset"),
        (["--model", "bert-mini", "--sample", "3"], "--dataset"),
        (["--model", "gpt2", "--num_labels", "7"], "causal-lm"),
        (["--model", "bert-mini", "--json", "a.out", "--html", "./a.out"], "one file"),
        (["--model", "bert-mini", "--patch", "/no/such/train.py"], "no such file"),
        (["bert-mini"], "--model"),
        ([], "--model"),
    ],
)
def test_invalid_input_is_an_error_of_one_line_and_exits_with_2(argv: list[str], named: str, capsys: Capture) -> None:
    assert named in usage_error(capsys, *argv)


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("peft", ["--lora_r", "8"]),
        ("bitsandbytes", ["--lora_r", "8", "--load_in_4bit"]),
        ("bitsandbytes", ["--optim", "adamw_bnb_8bit"]),
    ],
)
def test_the_error_on_a_missing_package_has_the_command_that_installs_it(
    package: str, flags: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    assert f"pip install {package}" in usage_error(capsys, "--model", "bert-mini", *flags)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": 3}'])
def test_a_folder_without_a_valid_config_is_a_usage_error(content: str | None, tmp_path: Path, capsys: Capture) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert "config" in usage_error(capsys, "--model", str(tmp_path))


def test_flags_override_saved_training_arguments(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text(
        json.dumps(
            {
                "bf16": True,
                "fp16": False,
                "optim": "adamw_torch",
                "gradient_checkpointing": True,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 8,
                "learning_rate": 3e-5,
                "output_dir": "out",
            }
        )
    )
    read = parse(["--model", "x", "--training_args", str(path)])
    assert (read.precision, read.optimizer, read.activation_checkpointing) == ("bf16", "adamw_torch", True)
    assert (read.effective_batch_size, read.learning_rate) == (32, 3e-5)
    assert parse(["--model", "x", "--training_args", str(path), "--optim", "sgd"]).optimizer == "sgd"
    assert parse(["--model", "x", "--training_args", str(path), "--fp16"]).precision == "fp16"


@pytest.mark.parametrize(
    ("flags", "effective", "tokens", "precision"),
    [
        ([], 64, None, "bf16"),
        (["--total_tokens", "4096"], None, 4096, "bf16"),
        (["--effective_batch_size", "8"], 8, None, "bf16"),
        (["--gradient_accumulation_steps", "2"], 32, None, "bf16"),
        (["--gradient_accumulation_steps=1"], 16, None, "bf16"),
        (["--fp16", "False"], 64, None, "bf16"),
        (["--bf16", "False"], 64, None, "fp32"),
        (["--precision", "fp16"], 64, None, "fp16"),
    ],
)
def test_a_flag_overrides_the_same_setting_under_another_name(
    flags: list[str], effective: int | None, tokens: int | None, precision: str, tmp_path: Path
) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "bf16": true}')
    read = parse(["--model", "x", "--training_args", str(path), *flags])
    assert (read.effective_batch_size, read.total_tokens, read.precision) == (effective, tokens, precision)
    assert read.gradient_accumulation_steps == 1


def test_an_effective_batch_from_the_flags_overrides_accumulation_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"gradient_accumulation_steps": 4, "fp16": true}')
    command = ["--model", "x", "--training_args", str(path)]
    assert parse(command).gradient_accumulation_steps == 4
    read = parse([*command, "--effective_batch_size", "64"])
    assert (read.effective_batch_size, read.gradient_accumulation_steps) == (64, 1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"deepspeed": "ds.json"}, "deepspeed"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"learning_rate": "abc"}, "learning_rate"),
        ({"fp16": "yes"}, "fp16"),
        ({"per_device_train_batch_size": "8"}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": -8}, "per_device_train_batch_size"),
        ({"optim": 3}, "optim"),
    ],
)
def test_training_arguments_that_cannot_be_predicted_are_a_usage_error(
    values: dict[str, object], named: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps(values))
    assert named in usage_error(capsys, "--model", "bert-mini", "--training_args", str(path))


def test_a_report_written_to_a_symlink_keeps_the_link(tmp_path: Path, capsys: Capture) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("{}")
    link.symlink_to(real)
    assert main([*MINI, "--json", str(link)]) == FOUND
    assert link.is_symlink()
    assert json.loads(real.read_text())["version"] == 2


def test_training_arguments_as_yaml_are_read(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text("fp16: false\nbf16: false\nper_device_train_batch_size: 16\n")
    read = parse(["--model", "x", "--training_args", str(path)])
    assert (read.precision, read.effective_batch_size) == ("fp32", 16)


def test_the_error_on_pickled_training_arguments_says_how_to_convert_them(tmp_path: Path) -> None:
    path = tmp_path / "training_args.bin"
    path.write_bytes(b"\x80\x05\x95\xff\xfe")
    with pytest.raises(UsageError, match="to_json_string") as error:
        parse(["--model", "x", "--training_args", str(path)])
    assert "torch.load" not in str(error.value), "loading a pickle can run any code"


def test_env_prints_what_a_bug_report_needs(capsys: Capture) -> None:
    assert main(["env"]) == FOUND
    out = capsys.readouterr().out
    assert all(name in out for name in ("python ", "torch ", "transformers ", "GPU: "))


def test_ctrl_c_prints_interrupted(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object, launch: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_find, "_find", interrupted)
    assert main(MINI) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


SCRIPT = 'CONFIG = {\n    "batch_size": 16,  # too small?\n    "lr": 2e-5,\n}\n'
COMMAND = ["--model", "bert-tiny", "--max_length", "32", "--gpu", "2GiB", "--device", "predict", "--no_evaluation"]


def test_patch_changes_the_value_in_a_script_and_dry_run_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert cli.main([*COMMAND, "--batch_size", "64", "--patch", str(script), "--dry_run"]) == cli.FOUND
    assert '+    "batch_size": 64,  # too small?' in capsys.readouterr().out
    assert script.read_text() == SCRIPT
    assert cli.main([*COMMAND, "--batch_size", "64", "--patch", str(script)]) == cli.FOUND
    assert script.read_text() == SCRIPT.replace("16", "64")


def test_a_script_that_cannot_be_patched_is_an_error_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_find, "_find", lambda *_: pytest.fail("a search was started"))
    script = tmp_path / "train.py"
    script.write_text("print('no size in here')\n")
    assert cli.main([*COMMAND, "--patch", str(script)]) == cli.USAGE
    script.write_text(SCRIPT)
    assert cli.main([*COMMAND, "--patch", str(script), "--key", "every=8"]) == cli.USAGE
    assert (
        cli.main([*COMMAND, "--patch", str(script), "--json", f"{tmp_path}/../{tmp_path.name}/train.py"]) == cli.USAGE
    )
    assert script.read_text() == SCRIPT


@pytest.mark.parametrize("wrong", [["--dry_run"], ["--key", "bs"], ["--patch", "a.py", "--max_length", "32", "64"]])
def test_invalid_combinations_with_patch_are_usage_errors(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--model", "bert-tiny", *wrong]) == cli.USAGE
    assert "--patch" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--html", "x.html"], ["--check", "8"], ["--throughput"]])
def test_lengths_refuses_flags_that_it_would_ignore(capsys: Capture, flag: list[str]) -> None:
    error = usage_error(capsys, "lengths", "--model", "bert-tiny", "--dataset", "train.jsonl", *flag)
    assert f"{flag[0]} does not apply to lengths: hf-bsopt find --dataset takes it" in error


def test_a_table_refuses_flags_about_one_answer(capsys: Capture) -> None:
    assert "--check is about one model on one GPU" in usage_error(
        capsys, "table", "--models", "bert-tiny", "--check", "8"
    )


def test_env_prints_its_help_and_refuses_flags(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["env", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: hf-bsopt env")
    assert "--nonsense" in usage_error(capsys, "env", "--nonsense")
