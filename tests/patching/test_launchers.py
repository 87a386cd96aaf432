"""Shell launchers, TOML and Jsonnet are patched in place; what only a run could tell is refused."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from patched_files import BATCH, BOTH, notebook, patched, refusal, sources

from hf_bsopt.patching import patch

LAUNCHER = """\
#!/bin/bash
#SBATCH --gres=gpu:2
# --per_device_train_batch_size 99
export HF_TOKEN=hf_0123456789abcdef
torchrun --nproc_per_node 2 train.py \\
    --model_name_or_path bert-base-uncased \\
    --per_device_train_batch_size 8 \\
    --per_device_eval_batch_size 8 \\
    --gradient_accumulation_steps 1 \\
    --fp16 > log.txt 2>&1 &
"""
B, A = "\x01", "\x02"
SHELL = [
    "python train.py --per_device_train_batch_size \x01 --gradient_accumulation_steps=\x02",
    "accelerate launch train.py \\\n  --train-batch-size \\\n  \x01 \\\n  --grad_accum '\x02' # --batch_size 7",
    'BATCH_SIZE=\x01; ACCUM_STEPS="\x02"\npython t.py --batch_size $BATCH_SIZE --accum ${ACCUM_STEPS}',
    'export X=\x01 Y=\x02\nif true; then\n  torchrun t.py --micro_batch_size "$X" --grad_accum $Y\nfi',
    'ARGS=(\n  --batch_size \x01\n  --accum_steps \x02\n)\npython t.py "${ARGS[@]}"',
    'OPTS="--lr 1e-5 --batch_size \x01 --accum_steps \x02"\npython t.py $OPTS',
    "run() {\n  python t.py trainer.batch_size=\x01 trainer.accumulate_grad_batches=\x02\n}\nrun",
    "B=5\nB=\x01\npython t.py --bs=$B --accum=\x02 && echo done",
]
SHELL_NOISE = [
    "# batch_size=3",
    'echo --batch_size 4 "batch_size=5"',
    "cat > c.yaml <<EOF\nbatch_size: 6\n  --batch_size 7\nEOF",
    "cat <<-'END' | tee x\n\tbatch_size=8\nEND",
    "hf-bsopt find --batch_size 9 --gradient_accumulation_steps 2",
    "python eval.py --eval_batch_size 10 --per_device_eval_batch_size 11",
    "for i in 1 2; do\n  sleep 1\ndone",
    "x=$(ls | wc -l); y=$((x / 2))",
    "say='it''s' ; [ -z \"$1\" ] || exit 1",
    "case $1 in\n  a) z=1 ;;\nesac",
    "",
    "é=1; echo 漢字",
]
TOML = [
    "train_batch_size = \x01\ngradient_accumulation_steps = \x02 # é",
    "[train]\nbatch_size=\x01\n'accum' = \x02\n[valid]\nbatch_size = 7",
    "train = { batch_size = \x01, accum = \x02 }",
    'train.micro_batch_size = \x01\ntrain."grad_accum" = \x02',
    "[[runs]]\n  [runs.train]\n  bs = \x01\n  accum = \x02",
]
TOML_NOISE = [
    "# batch_size = 3",
    'text = """\nbatch_size = 4\n"""',
    "raw = '''\n[x]\nbatch_size = 5'''",
    "list = [\n  1, # batch_size = 6\n  [2, 3],\n]",
    "day = 1979-05-27 07:32:00",
    "eval_batch_size = 7",
    'q = "é \\" # 😀"',
    "hex = 0xff\nbig = 1_000",
    "",
]
JSONNET = [
    "{ batch_size: \x01, gradient_accumulation_steps: \x02 }",
    "local bs = \x01;\nlocal accum = \x02;\n{\n  data_loader: { batch_size: bs },\n"
    "  trainer: { num_gradient_accumulation_steps: accum },\n}",
    "(import 'base.libsonnet') + {\n  'train': {\n    'micro_batch_size': \x01, // 7\n"
    '    "grad_accum": \x02,\n  },\n}',
    "{\n  local n = \x01,\n  train_batch_size: n,\n  trainer+: { accumulate_grad_batches: \x02 },\n}",
]
JSONNET_NOISE = [
    "// batch_size: 3",
    "# { batch_size: 4 }",
    "/* batch_size: 5\n*/",
    "local f(batch_size) = { x: batch_size };",
    'local s = "batch_size: 6";',
    "local t = |||\n  batch_size: 7\n|||;",
    "local e = { validation_batch_size: 8, valid: { batch_size: 9 } };",
    "local l = [{ a: i } for i in [1, 2] if i > 1];",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(os, "fsync", lambda descriptor: None)
        yield tmp_path_factory.mktemp("launchers")


def filled(template: str, batch: str, accumulation: str) -> bytes:
    return template.replace(B, batch).replace(A, accumulation).encode()


def check(path: Path, template: str, newline: str) -> None:
    """Assert that the patch turns the template with one pair of values into the template with the other."""
    template = template.replace("\n", newline)
    path.write_bytes(filled(template, "16", "1"))
    result = patch(path, {"batch_size": 48, "gradient_accumulation_steps": 3})
    assert path.read_bytes() == filled(template, "48", "3")
    assert sorted(change.new for change in result.changes) == ["3", "48"]
    assert patch(path, {"batch_size": 48, "gradient_accumulation_steps": 3}).changes == ()


noise = st.lists(st.sampled_from(range(9)), max_size=3)


@examples(300, suppress_health_check=list(HealthCheck))
@given(noise, st.sampled_from(SHELL), noise, st.sampled_from(["\n", "\r\n"]))
def test_only_the_given_values_change_in_a_generated_launcher(
    folder: Path, before: list[int], definition: str, after: list[int], newline: str
) -> None:
    rows = [*(SHELL_NOISE[row] for row in before), definition, *(SHELL_NOISE[row + 3] for row in after)]
    check(folder / "run.sh", "\n".join(["#!/bin/sh", *rows, ""]), newline)


@examples(300, suppress_health_check=list(HealthCheck))
@given(noise, st.sampled_from(TOML), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\n", " # end"]))
def test_only_the_given_values_change_in_a_generated_toml_file(
    folder: Path, before: list[int], definition: str, newline: str, end: str
) -> None:
    template = "\n".join([*(TOML_NOISE[row] for row in dict.fromkeys(before)), definition]) + end
    check(folder / "c.toml", template, newline)
    tomllib.loads((folder / "c.toml").read_bytes().decode())


@examples(300, suppress_health_check=list(HealthCheck))
@given(
    noise, st.sampled_from(JSONNET), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\n", "\n# batch_size: 3"])
)
def test_only_the_given_values_change_in_a_generated_jsonnet_file(
    folder: Path, before: list[int], definition: str, newline: str, end: str
) -> None:
    check(folder / "c.jsonnet", "\n".join([*(JSONNET_NOISE[row] for row in before), definition]) + end, newline)


def test_a_launcher_is_patched_and_a_missing_accumulation_is_a_flag_beside_the_batch_size(tmp_path: Path) -> None:
    changed = LAUNCHER.replace("train_batch_size 8", "train_batch_size 48")
    assert patched(tmp_path, "run.sh", LAUNCHER, BOTH) == changed.replace("steps 1", "steps 2")
    without = LAUNCHER.replace("    --gradient_accumulation_steps 1 \\\n", "")
    added = without.replace("train_batch_size 8", "train_batch_size 48 --gradient_accumulation_steps 2")
    assert patched(tmp_path, "run.sh", without, BOTH) == added


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("for bs in 8 16; do\n python t.py --batch_size $bs\ndone\n", "known only at run time"),
        ("python t.py --batch_size $1\n", "known only at run time"),
        ("python t.py --batch_size ${BS:-8}\n", "known only at run time"),
        ("BS=$(cat bs.txt)\npython t.py --batch_size $BS\n", "known only at run time"),
        ("BS=8\nif [ $X ]; then BS=16; fi\npython t.py --batch_size $BS\n", "is set in 2 places"),
        ("BS=8\npython a.py --batch_size $BS\nBS=16\npython b.py --batch_size $BS\n", "is set in 2 places"),
        ("python a.py --batch_size 8\npython b.py --batch_size 16\n", "is set in 2 places"),
        ("echo --batch_size 8\n", "there is no batch_size to change"),
    ],
)
def test_a_launcher_that_only_a_run_could_tell_about_is_refused(source: str, problem: str, tmp_path: Path) -> None:
    assert problem in refusal(tmp_path, "run.sh", source)


def test_accumulation_that_a_launcher_computes_as_wanted_stays(tmp_path: Path) -> None:
    source = "BS=16\nACCUM=$((96 / BS))\ntorchrun t.py --batch_size $BS --accum $ACCUM\n"
    assert patched(tmp_path, "run.sh", source, BOTH) == source.replace("16", "48")


def test_missing_accumulation_is_added_in_toml_and_jsonnet(tmp_path: Path) -> None:
    toml = "[train]\nbatch_size = 16 # a\nseed = 7\n"
    added = "[train]\nbatch_size = 48 # a\ngradient_accumulation_steps = 2\nseed = 7\n"
    assert patched(tmp_path, "c.toml", toml, BOTH) == added
    inline = patched(tmp_path, "d.toml", "train = { batch_size = 16 }\n", BOTH)
    assert inline == "train = { gradient_accumulation_steps = 2, batch_size = 48 }\n"
    jsonnet = "{\n  batch_size: 16, // a\n  seed: 7,\n}\n"
    added = "{\n  batch_size: 48, // a\n  gradient_accumulation_steps: 2,\n  seed: 7,\n}\n"
    assert patched(tmp_path, "c.jsonnet", jsonnet, BOTH) == added


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("c.toml", "batch_size = 8\nbatch_size = 9\n", "c.toml is not TOML"),
        ("c.toml", "batch_size: 8\n", "c.toml is not TOML"),
        ("c.toml", "[[d]]\nbatch_size = 8\n[[d]]\nbatch_size = 9\n", "set in 2 places"),
        ("c.jsonnet", "{ batch_size: 8", "c.jsonnet is not Jsonnet"),
        ("c.jsonnet", "{ batch_size: 8 } }", "c.jsonnet is not Jsonnet"),
        ("c.jsonnet", "{ batch_size 8 }", "c.jsonnet is not Jsonnet"),
        ("c.jsonnet", "{ batch_size: `8` }", "c.jsonnet is not Jsonnet"),
        ("c.jsonnet", "[" * 400, "nested too deep|not Jsonnet"),
        ("c.jsonnet", "{ batch_size: if std.extVar('x') then 4 else 8 }", "known only at run time"),
        ("c.jsonnet", "if x then { batch_size: 4 } else { batch_size: 8 }", "set in 2 places"),
    ],
)
def test_what_is_not_valid_or_not_certain_is_refused(name: str, text: str, problem: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, name, text)
    assert any(part in message for part in problem.split("|"))
    assert message.endswith("The file is untouched.")


WRITTEN = {
    "yaml": ("%%writefile cfg.yaml\nmicro_batch_size: 16  # a\nlr: 1e-5\n", "micro_batch_size"),
    "json": ('%%writefile conf/cfg.json\n{"batch_size": 16}', "batch_size"),
    "toml": ("%%writefile -a cfg.toml\n[train]\nbatch_size = 16\n", "train.batch_size"),
    "shell": ("%%bash\npython t.py --batch_size 16 \\\n  --lr 1\n", "--batch_size"),
    "launcher": ("%%file run.sh\nBS=16\npython t.py --batch_size $BS\n", "BS"),
}


@pytest.mark.parametrize("format", WRITTEN)
def test_a_configuration_that_a_cell_writes_is_patched_where_a_key_names_it(format: str, tmp_path: Path) -> None:
    cell, key = WRITTEN[format]
    text = notebook("import yaml\n", cell, "x = 1\n")
    assert "there is no batch_size to change" in refusal(tmp_path, "n.ipynb", text)
    after = patched(tmp_path, "n.ipynb", text, BATCH, keys={"batch_size": key})
    assert sources(after)[1] == cell.replace("16", "48")


def test_the_accumulation_beside_the_key_is_patched_and_python_cells_stay(tmp_path: Path) -> None:
    cell = "%%writefile cfg.yaml\nmicro_batch_size: 16\ngradient_accumulation_steps: 1\n"
    text = notebook("CONFIG = {'batch_size': 8, 'gradient_accumulation_steps': 4}", cell)
    keyed = sources(patched(tmp_path, "n.ipynb", text, BOTH, keys={"batch_size": "micro_batch_size"}))
    assert keyed == [sources(text)[0], cell.replace("16", "48").replace("steps: 1", "steps: 2")]
    plain = sources(patched(tmp_path, "n.ipynb", text, BOTH))
    assert plain == ["CONFIG = {'batch_size': 48, 'gradient_accumulation_steps': 2}", cell]


def test_a_missing_accumulation_is_added_in_the_configuration_that_a_cell_writes(tmp_path: Path) -> None:
    cell = "%%writefile cfg.yaml\nmicro_batch_size: 16\nlr: 1e-5\n"
    text = notebook("args = TrainingArguments(per_device_train_batch_size=cfg.bs)", cell)
    after = sources(patched(tmp_path, "n.ipynb", text, BOTH, keys={"batch_size": "micro_batch_size"}))
    added = "%%writefile cfg.yaml\nmicro_batch_size: 48\ngradient_accumulation_steps: 2\nlr: 1e-5\n"
    assert after == [sources(text)[0], added]


def test_a_key_in_two_cells_that_write_files_is_ambiguous(tmp_path: Path) -> None:
    text = notebook("%%writefile a.yaml\nbs: 16\n", "%%writefile b.yaml\nbs: 16\n", "%%writefile c.yaml\nbs: [\n")
    message = refusal(tmp_path, "n.ipynb", text, BATCH, keys={"batch_size": "bs"})
    assert "--key batch_size=a.yaml.bs:1:2, or --key batch_size=b.yaml.bs:2:2" in message
    after = sources(patched(tmp_path, "n.ipynb", text, BATCH, keys={"batch_size": "bs:2:2"}))
    assert after[:2] == ["%%writefile a.yaml\nbs: 16\n", "%%writefile b.yaml\nbs: 48\n"]
    assert json.loads(text)["cells"][0]["cell_type"] == "code"
