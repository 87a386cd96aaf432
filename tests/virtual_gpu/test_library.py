"""Where there can be a virtual device, why not elsewhere, and what it is compiled from. Nothing is compiled here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.errors import RehearsalError
from hf_bsopt.records import GpuSpec
from hf_bsopt.virtual_gpu import library
from hf_bsopt.virtual_gpu.library import TorchBuild, environment, why_not

T4 = catalog.gpu("T4")
CUDA_13 = TorchBuild("2.11.0+cu130", "13.0", Path("/nowhere/torch"))


@pytest.fixture
def can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which everything is there and nothing is built; its folder of programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cc", "nm"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(library, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(library, "platform", machine("Linux", "x86_64"))
    monkeypatch.setattr(library, "torch_build", lambda: CUDA_13)
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    return programs


def machine(system: str, processor: str) -> SimpleNamespace:
    return SimpleNamespace(system=lambda: system, machine=lambda: processor)


def built(tmp_path: Path, build: TorchBuild = CUDA_13) -> list[Path]:
    """Files in the place of the compiled ones; the result is those that every process gets."""
    folder = library._folder_of(build)
    folder.mkdir(parents=True)
    files = [folder / "libcuda.so.1", folder / "libnvrtc.so.13"]
    (folder / "libnvidia-ml.so.1").write_bytes(b"")  # for a card that is shared
    for file in files:
        file.write_bytes(b"")
    return files


def test_nothing_stands_in_the_way_where_everything_is_there(can: Path) -> None:
    assert why_not() is None


@pytest.mark.parametrize(
    ("platform", "system", "processor", "named"),
    [
        ("darwin", "Darwin", "arm64", "not Darwin on arm64"),
        ("win32", "Windows", "AMD64", "not Windows on AMD64"),
        ("linux", "Linux", "aarch64", "not Linux on aarch64"),
    ],
)
def test_other_machines_are_named(
    can: Path, monkeypatch: pytest.MonkeyPatch, platform: str, system: str, processor: str, named: str
) -> None:
    monkeypatch.setattr(library, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(library, "platform", machine(system, processor))
    assert why_not() == f"the virtual device is for Linux on x86-64, {named}"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (None, "torch is not installed"),
        (
            TorchBuild("2.13.0+cpu", None, Path()),
            "torch 2.13.0+cpu is a build without CUDA; one with CUDA can, and needs no GPU",
        ),
        (
            TorchBuild("2.6.0+cu118", "11.8", Path()),
            "torch 2.6.0+cu118 is built for CUDA 11.8; the virtual device is for CUDA 12 and later",
        ),
    ],
)
def test_other_builds_of_torch_are_named(
    can: Path, monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None, reason: str
) -> None:
    monkeypatch.setattr(library, "torch_build", lambda: build)
    assert why_not() == reason


@pytest.mark.parametrize(("program", "named"), [("cc", "C compiler (cc, gcc or clang)"), ("nm", "nm (of the package")])
def test_a_program_that_is_missing_is_named(can: Path, program: str, named: str) -> None:
    (can / program).unlink()
    assert named in (why_not() or "")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_any_usual_compiler_does(can: Path, name: str) -> None:
    (can / "cc").rename(can / name)
    assert why_not() is None


def test_the_compiler_that_the_user_names_comes_first(can: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (can / "own-cc").write_bytes((can / "cc").read_bytes())
    (can / "own-cc").chmod(0o755)
    monkeypatch.setenv("CC", "own-cc -m64")
    assert library._compiler() == str(can / "own-cc")


def test_what_is_built_needs_no_compiler_any_more(can: Path, tmp_path: Path) -> None:
    built(tmp_path)
    for program in can.iterdir():
        program.unlink()
    assert why_not() is None


def test_there_is_no_environment_where_there_is_no_device(can: Path) -> None:
    (can / "cc").unlink()
    with pytest.raises(RehearsalError, match="can't rehearse here: there is no C compiler"):
        environment(T4)


def test_there_is_no_device_without_a_limit_of_memory() -> None:
    with pytest.raises(RehearsalError, match="needs a limit of memory"):
        environment(GpuSpec("endless", None, 80, 108, 0))


def test_a_compiler_that_fails_is_quoted(can: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_names", lambda replaced, installed: set())
    (can / "cc").write_text("#!/bin/sh\necho 'virtual_device.c:1: error: no' >&2\nexit 1\n")
    with pytest.raises(RehearsalError, match=r"(?s)could not be compiled by .*/cc:\nvirtual_device.c:1: error: no"):
        environment(T4)


def test_a_failed_compilation_leaves_nothing_that_looks_built(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_names", lambda replaced, installed: set())
    with pytest.raises(RehearsalError):
        environment(T4)
    assert list((tmp_path / "cache" / "virtual_device").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RehearsalError, match="HF_BSOPT_CACHE names another folder"):
        environment(T4)


def test_the_device_of_another_process_that_was_faster_is_taken(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Path] = []

    def build_library(source: Path, library: Path, *_: object) -> None:
        library.write_bytes(b"")
        if not files:
            files.extend(built(tmp_path))

    monkeypatch.setattr(library, "_build_library", build_library)
    assert set(files) < set(library.build())


def test_the_environment_has_the_card_and_the_libraries(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = built(tmp_path)
    monkeypatch.setenv("OWN", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so")
    made = environment(T4)
    assert made["HF_BSOPT_VIRTUAL_DEVICE"] == f"15637413888 {T4.context_bytes} 75 40 1024 T4"
    assert made["LD_PRELOAD"] == ":".join([*map(str, files), "/usr/lib/libjemalloc.so"])
    assert made["OWN"] == "kept"
    assert made["CUDA_VISIBLE_DEVICES"] == "0"
    assert made["USE_PYTORCH_KERNEL_CACHE"] == "0"


def test_a_card_of_ones_own_has_no_management_library(can: Path, tmp_path: Path) -> None:
    """NVML would tell of one card for all processes."""
    built(tmp_path)
    assert "libnvidia-ml" not in environment(T4)["LD_PRELOAD"]


def test_a_card_that_is_shared_is_named_wherever_its_processes_are_started(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = built(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = environment(T4, shared=Path("card"))
    assert made["HF_BSOPT_VIRTUAL_DEVICE_SHARED"] == str(tmp_path / "card")
    assert {Path(path).name for path in made["LD_PRELOAD"].split(":")} == {
        "libnvidia-ml.so.1",
        *(path.name for path in files),
    }


def test_a_process_on_a_shared_card_that_rehearses_on_one_of_its_own_does_not_share_that(
    can: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = built(tmp_path)
    shared = environment(T4, shared=tmp_path / "card")
    for name in ("HF_BSOPT_VIRTUAL_DEVICE_SHARED", "LD_PRELOAD"):
        monkeypatch.setenv(name, shared[name])
    made = environment(T4)
    assert "HF_BSOPT_VIRTUAL_DEVICE_SHARED" not in made
    assert {Path(path).name for path in made["LD_PRELOAD"].split(":")} == {path.name for path in files}


def test_this_process_is_as_it_was(can: Path, tmp_path: Path) -> None:
    built(tmp_path)
    before = dict(os.environ)
    environment(T4)
    assert dict(os.environ) == before


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["J. Doe", "a:b"])
def test_a_cache_in_a_folder_that_cannot_be_preloaded_is_reached_by_a_link(
    can: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The loader takes a space or a colon in LD_PRELOAD for the end of a path."""
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / name))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    files = built(tmp_path)
    preloaded = environment(T4)["LD_PRELOAD"].split(":")
    assert [Path(path).resolve() for path in preloaded] == files
    assert not any(" " in path for path in preloaded)


def test_a_link_that_points_elsewhere_is_not_followed(
    can: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older cache that was moved, or somebody else's libraries: the folder is open to all."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for name in ("J. Doe", "K. Doe"):
        monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / name))
        files = built(tmp_path)
        assert [Path(path).resolve() for path in environment(T4)["LD_PRELOAD"].split(":")] == files


def test_each_build_of_torch_has_a_device_of_its_own(can: Path) -> None:
    others = [
        CUDA_13,
        TorchBuild("2.11.0+cu128", "12.8", CUDA_13.folder),
        TorchBuild("2.11.0+cu130", "13.0", Path("x")),
    ]
    assert len({library._folder_of(build) for build in others}) == 3


def test_the_installed_torch_is_read_without_importing_it() -> None:
    source = "import sys; from hf_bsopt.virtual_gpu.library import torch_build as b; \
print(b().version, b().cuda, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [torch.__version__, str(torch.version.cuda), "False"]


@pytest.mark.parametrize(("cuda", "number"), [("12.8", 12080), ("13.0", 13000), ("12.9.1", 12090), (None, 0)])
def test_the_version_of_cuda_is_a_number_as_cuda_writes_it(cuda: str | None, number: int) -> None:
    assert TorchBuild("2.11.0", cuda, Path()).cuda_version == number


def test_the_room_has_two_doors() -> None:
    assert virtual_gpu.__all__ == ["environment", "why_not"]
