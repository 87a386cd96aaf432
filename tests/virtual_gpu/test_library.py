"""When the virtual device is available, the reasons if not, and its environment. Nothing is compiled here."""

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
CUDA_13 = TorchBuild("2.11.0+cu130", "13.0", Path("/not/installed/torch"))


@pytest.fixture
def available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Emulate a machine with everything needed and nothing built; return its folder of programs."""
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
    """Create empty files in place of the compiled ones; return those that every process loads."""
    folder = library._folder_of(build)
    folder.mkdir(parents=True)
    files = [folder / "libcuda.so.1", folder / "libnvrtc.so.13"]
    (folder / "libnvidia-ml.so.1").write_bytes(b"")  # for a shared device
    for file in files:
        file.write_bytes(b"")
    return files


def test_rehearsals_are_available_with_everything_installed(available: Path) -> None:
    assert why_not() is None


@pytest.mark.parametrize(
    ("platform", "system", "processor", "named"),
    [
        ("darwin", "Darwin", "arm64", "not Darwin on arm64"),
        ("win32", "Windows", "AMD64", "not Windows on AMD64"),
        ("linux", "Linux", "aarch64", "not Linux on aarch64"),
    ],
)
def test_other_machines_are_refused_by_name(
    available: Path, monkeypatch: pytest.MonkeyPatch, platform: str, system: str, processor: str, named: str
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
            "torch 2.13.0+cpu is a build without CUDA; install one with CUDA, which needs no GPU",
        ),
        (
            TorchBuild("2.6.0+cu118", "11.8", Path()),
            "torch 2.6.0+cu118 is built for CUDA 11.8; the virtual device is for CUDA 12 and later",
        ),
    ],
)
def test_other_builds_of_torch_are_refused_by_name(
    available: Path, monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None, reason: str
) -> None:
    monkeypatch.setattr(library, "torch_build", lambda: build)
    assert why_not() == reason


@pytest.mark.parametrize(("program", "named"), [("cc", "C compiler (cc, gcc or clang)"), ("nm", "nm (of the package")])
def test_a_missing_program_is_named(available: Path, program: str, named: str) -> None:
    (available / program).unlink()
    assert named in (why_not() or "")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_gcc_and_clang_are_accepted(available: Path, name: str) -> None:
    (available / "cc").rename(available / name)
    assert why_not() is None


def test_the_users_cc_variable_comes_first(available: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (available / "own-cc").write_bytes((available / "cc").read_bytes())
    (available / "own-cc").chmod(0o755)
    monkeypatch.setenv("CC", "own-cc -m64")
    assert library._compiler() == str(available / "own-cc")


def test_a_cached_build_needs_no_compiler(available: Path, tmp_path: Path) -> None:
    built(tmp_path)
    for program in available.iterdir():
        program.unlink()
    assert why_not() is None


def test_environment_raises_if_rehearsals_are_not_available(available: Path) -> None:
    (available / "cc").unlink()
    with pytest.raises(RehearsalError, match="can't rehearse here: there is no C compiler"):
        environment(T4)


def test_environment_raises_without_a_memory_size() -> None:
    with pytest.raises(RehearsalError, match="needs a memory size"):
        environment(GpuSpec("unlimited", None, 80, 108, 0))


def test_the_output_of_a_failing_compiler_is_quoted(available: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_names", lambda replaced, installed: set())
    (available / "cc").write_text("#!/bin/sh\necho 'virtual_device.c:1: error: no' >&2\nexit 1\n")
    with pytest.raises(RehearsalError, match=r"(?s)could not be compiled by .*/cc:\nvirtual_device.c:1: error: no"):
        environment(T4)


def test_a_failed_compilation_leaves_no_files(available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_names", lambda replaced, installed: set())
    with pytest.raises(RehearsalError):
        environment(T4)
    assert list((tmp_path / "cache" / "virtual_device").iterdir()) == []


def test_an_unwritable_cache_folder_is_reported_with_a_remedy(
    available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RehearsalError, match="set HF_BSOPT_CACHE to another folder"):
        environment(T4)


def test_a_build_finished_first_by_another_process_is_used(
    available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Path] = []

    def build_library(source: Path, library: Path, *_: object) -> None:
        library.write_bytes(b"")
        if not files:
            files.extend(built(tmp_path))

    monkeypatch.setattr(library, "_build_library", build_library)
    assert set(files) < set(library.build())


def test_the_environment_has_the_device_and_the_libraries(
    available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_device_that_is_not_shared_has_no_nvml(available: Path, tmp_path: Path) -> None:
    """NVML would report a single device for all processes."""
    built(tmp_path)
    assert "libnvidia-ml" not in environment(T4)["LD_PRELOAD"]


def test_a_shared_device_is_named_by_its_absolute_path(
    available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = built(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = environment(T4, shared=Path("device"))
    assert made["HF_BSOPT_VIRTUAL_DEVICE_SHARED"] == str(tmp_path / "device")
    assert {Path(path).name for path in made["LD_PRELOAD"].split(":")} == {
        "libnvidia-ml.so.1",
        *(path.name for path in files),
    }


def test_a_process_on_a_shared_device_can_start_one_that_is_not_shared(
    available: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = built(tmp_path)
    shared = environment(T4, shared=tmp_path / "device")
    for name in ("HF_BSOPT_VIRTUAL_DEVICE_SHARED", "LD_PRELOAD"):
        monkeypatch.setenv(name, shared[name])
    made = environment(T4)
    assert "HF_BSOPT_VIRTUAL_DEVICE_SHARED" not in made
    assert {Path(path).name for path in made["LD_PRELOAD"].split(":")} == {path.name for path in files}


def test_the_environment_of_this_process_is_unchanged(available: Path, tmp_path: Path) -> None:
    built(tmp_path)
    before = dict(os.environ)
    environment(T4)
    assert dict(os.environ) == before


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["J. Doe", "a:b"])
def test_a_cache_folder_with_a_space_or_colon_is_reached_by_a_link(
    available: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The loader splits LD_PRELOAD at spaces and colons."""
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / name))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    files = built(tmp_path)
    preloaded = environment(T4)["LD_PRELOAD"].split(":")
    assert [Path(path).resolve() for path in preloaded] == files
    assert not any(" " in path for path in preloaded)


def test_an_existing_link_to_another_folder_is_not_followed(
    available: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be an older cache or another user's libraries: anyone can write to the temporary folder."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for name in ("J. Doe", "K. Doe"):
        monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path / name))
        files = built(tmp_path)
        assert [Path(path).resolve() for path in environment(T4)["LD_PRELOAD"].split(":")] == files


def test_each_build_of_torch_has_its_own_device(available: Path) -> None:
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
def test_the_cuda_version_is_encoded_as_cuda_does(cuda: str | None, number: int) -> None:
    assert TorchBuild("2.11.0", cuda, Path()).cuda_version == number


def test_the_package_exports_two_functions() -> None:
    assert virtual_gpu.__all__ == ["environment", "why_not"]
