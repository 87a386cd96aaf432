"""The CUDA functions that the virtual device implements, accepts or refuses, and its source files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_bsopt.virtual_gpu import library
from hf_bsopt.virtual_gpu.library import (
    DEVICE_SOURCES,
    FOLDER,
    INTERPOSED,
    NEEDS_NO_ANSWER,
    SOURCES,
    WORKS_ON_THE_DEVICE,
    TorchBuild,
)

CUDA_13 = TorchBuild("2.11.0+cu130", "13.0", Path("/nowhere/torch"))


@pytest.mark.parametrize(
    "name",
    [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cudaEventRecordWithFlags",
        "cudaStreamSynchronize",
        "cudaStreamWaitEvent",
        "cudaGetLastError",
        "cudaFuncSetAttribute",
        "cudaMemcpyPeerAsync",
        "cudaMemPrefetchAsync",
        "__cudaRegisterFunction",
        "cublasSgemm_v2",
        "cublasGemmEx",
        "cublasGemmStridedBatchedEx",
        "cublasSetStream_v2",
        "cublasSetWorkspace_v2",
        "cublasDestroy_v2",
        "cublasLtMatmul",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatrixLayoutDestroy",
    ],
)
def test_functions_that_only_launch_work_are_accepted(name: str) -> None:
    assert NEEDS_NO_ANSWER.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "cudaMalloc",
        "cudaMemGetInfo",
        "cudaMemcpy",
        "cudaMemcpy3D",
        "cudaGetDeviceProperties_v2",
        "cudaEventElapsedTime",
        "cudaEventCreate",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaStreamCreate",
        "cudaGraphLaunch",
        "cudaGraphInstantiate",
        "cudaIpcGetMemHandle",
        "cudaMemPoolCreate",
        "cudaFuncGetAttributes",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescGetAttribute",
        "cublasGetVersion_v2",
        "cuLaunchKernel",
    ],
)
def test_functions_with_results_are_implemented_or_refused(name: str) -> None:
    assert not NEEDS_NO_ANSWER.fullmatch(name)


@pytest.mark.parametrize("name", ["__cudaLaunchKernel", "cudaEventRecord", "cudaStreamSynchronize", "cudaInitDevice"])
def test_work_on_the_device_creates_its_context(name: str) -> None:
    assert WORKS_ON_THE_DEVICE.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["__cudaRegisterFatBinary", "__cudaInitModule", "cudaGetLastError", "cudaProfilerStart"]
)
def test_functions_called_before_a_context_exists_create_none(name: str) -> None:
    assert not WORKS_ON_THE_DEVICE.fullmatch(name)


def test_every_source_file_is_hashed_and_packaged() -> None:
    """The build is cached by the hash of its sources: changes to a file that is not listed would be missed."""
    assert {path for path in FOLDER.iterdir() if path.suffix in (".c", ".h")} == set(SOURCES)
    packaged = (FOLDER.parents[1] / "setup.cfg").read_text()
    assert all(f"virtual_gpu/*{path.suffix}" in packaged for path in SOURCES)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the C code that is generated for these functions."""
    names = {"cudaMalloc", "cudaLaunchKernel", "cudaGraphLaunch", "cublasSgemm_v2", "cublasLtMatmulAlgoGetIds"}
    names.add("__cudaRegisterFunction")
    monkeypatch.setattr(library, "_names", lambda replaced, installed: names)
    return library._stubs(DEVICE_SOURCES, INTERPOSED, CUDA_13)


def test_no_stub_is_generated_for_an_implemented_function(stubs: str) -> None:
    assert "cudaMalloc" not in stubs


def test_stubs_accept_launches_and_refuse_everything_else_by_name(stubs: str) -> None:
    assert "long cudaLaunchKernel(void) { return virtual_device_use(); }" in stubs
    assert "long __cudaRegisterFunction(void) { return 0; }" in stubs
    assert "long cublasSgemm_v2(void) { return 0; }" in stubs
    assert 'long cudaGraphLaunch(void) { return virtual_device_refuse("cudaGraphLaunch", 801); }' in stubs
    assert 'return virtual_device_refuse("cublasLtMatmulAlgoGetIds", 15);' in stubs


def test_no_function_is_implemented_twice() -> None:
    code = "".join(path.read_text() for path in DEVICE_SOURCES)
    names = re.findall(r"^(?:API|REFUSED)\((\w+)\)|^API_AS\([^,]+, (\w+)\)", code, re.MULTILINE)
    flat = [name for pair in names for name in pair if name and name != "name"]
    assert len(flat) > 100
    assert len(flat) == len(set(flat))


def test_the_functions_are_those_exported_or_imported_by_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libc10_cuda.so").write_bytes(b"")

    def output(command: list[str]) -> str:
        if command[0] == "ldd":
            return (
                "\tlibcudart.so.13 => /usr/local/cuda/lib/libcudart.so.13 (0x00007f)\n\tlibm.so.6 => /lib/libm.so.6\n"
            )
        if "--undefined-only" in command:
            return (
                "                 U cudaMalloc@libcudart.so.13\n                 U cudaFree@libcudart.so.13\n"
                "                 U cudnnCreate@libcudnn.so.9\n                 U malloc@GLIBC_2.2.5\n"
            )
        return "0000000000001000 T cudaGraphLaunch@@libcudart.so.13\n0000000000001000 T __internal\n"

    monkeypatch.setattr(library, "_output", output)
    monkeypatch.setattr(library, "_exported", library._exported.__wrapped__)
    names = library._names(INTERPOSED, TorchBuild("2.11.0+cu130", "13.0", tmp_path))
    assert names == {"cudaMalloc", "cudaFree", "cudaGraphLaunch"}
