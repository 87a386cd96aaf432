"""The command line as one of several processes of a launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt.cli.main import main
from hf_bsopt.errors import UsageError
from hf_bsopt.parallel.launch import Launch

SCRIPT = Path(__file__).parents[2] / "find_optimal_batch_size.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIONS = ["--model", "bert-tiny", "--max_length", "64", "--device", "predict", "--no-evaluation"]


def launched(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, SCRIPT, *OPTIONS, *options], capture_output=True, text=True, timeout=300)


def test_two_processes_split_the_effective_batch_and_rank_zero_prints(tmp_path: Path) -> None:
    done = launched("--effective_batch_size", "1024", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OPTIMAL BATCH SIZE") == 1
    assert "512 × 1 accumulation × 2 processes = 1024" in done.stdout
    assert (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_conflicting_number_of_processes_is_reported_once() -> None:
    done = launched("--effective_batch_size", "1024", "--num_processes", "3")
    assert done.returncode != 0
    assert done.stderr.count("--num_processes 3, but the launcher started 2: omit it") == 1


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    alone = Launch.here()
    assert (alone.size, alone.is_main_process, alone.processes(4)) == (1, True, 4)


def test_number_of_processes_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    second = Launch.here()
    assert (second, second.is_main_process, second.processes(1)) == (Launch(1, 1, 2), False, 2)
    with pytest.raises(UsageError, match="started 2"):
        second.processes(3)


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        with Launch(rank, rank, 2).output_on_rank_zero_only():
            print(f"rank {rank}")
            print(f"rank {rank}", file=sys.stderr)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("rank 0\n", "rank 0\n")


@pytest.mark.parametrize("missing", [("MASTER_ADDR", "MASTER_PORT"), ("MASTER_ADDR",), ("MASTER_PORT",)])
def test_ranks_without_a_place_to_meet_are_refused_in_a_sentence(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in missing:
        monkeypatch.delenv(name)
    assert main(OPTIONS) == 2
    assert capsys.readouterr().err == (
        f"error: RANK=0 and WORLD_SIZE=2 are set, but not {' and '.join(missing)}, where the ranks meet: start with "
        f"torchrun or accelerate launch, which set all of them, or unset RANK and WORLD_SIZE\n"
    )


def test_ranks_that_do_not_meet_are_an_error_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hf_bsopt.parallel.launch.RENDEZVOUS_SECONDS", 1)
    assert main(OPTIONS) == 2
    assert "error: the 2 ranks did not meet at 127.0.0.1:0 (MASTER_ADDR): " in capsys.readouterr().err
