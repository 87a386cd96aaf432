"""How the virtual device is compiled, and the environment in which a process sees it.

    subprocess.run([sys.executable, "train.py"], env=environment(catalog.gpu("T4")))
    environment(catalog.gpu("T4"), shared=Path("card"))  # of all processes that name this file

Compiled once for each build of torch, into the user's cache; needs a C compiler and ``nm``, no header of CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import RehearsalError
from ..records import GpuSpec
from ..search.answer_cache import default_folder

SOURCE = Path(__file__).with_name("device.c")
SHARED_SOURCE = Path(__file__).with_name("shared_device.c")
NVRTC_SOURCE = Path(__file__).with_name("nvrtc.c")
NVML_SOURCE = Path(__file__).with_name("nvml.c")
SOURCES = (SOURCE, SHARED_SOURCE, SHARED_SOURCE.with_suffix(".h"), NVRTC_SOURCE, NVML_SOURCE)
VARIABLE = "HF_BSOPT_VIRTUAL_DEVICE"
SHARED_VARIABLE = "HF_BSOPT_VIRTUAL_DEVICE_SHARED"
LIBRARY = "libcuda.so.1"
NVML_LIBRARY = "libnvidia-ml.so.1"
INTERPOSED = ("libcudart", "libcublas", "libcublasLt")
OWN_LIBRARIES = (
    "libtorch_cuda.so",
    "libc10_cuda.so",
    "libtorch_cuda_linalg.so",
    "libtorch_python.so",
    "libcaffe2_nvrtc.so",
)

NEEDS_NO_ANSWER = re.compile(
    r"""__cuda(Register|Unregister|Init|Launch)\w+
    | cuda(Launch|Event|Stream)(Kernel|KernelExC|CooperativeKernel|Record|RecordWithFlags|Destroy|Synchronize|Query)
    | cudaStream(WaitEvent|AttachMemAsync|CopyAttributes|SetAttribute)
    | cuda(GetLastError|PeekAtLastError|DeviceSynchronize|DeviceReset|DeviceSetLimit|DeviceSetCacheConfig)
    | cuda(SetDeviceFlags|InitDevice|DeviceEnablePeerAccess|DeviceDisablePeerAccess|CtxResetPersistingL2Cache)
    | cudaFuncSet\w+ | cudaMem(Advise|PrefetchAsync)\w* | cudaMemcpy(Peer|PeerAsync|ToSymbol|ToSymbolAsync)
    | cudaProfiler(Start|Stop)
    | cublas([SDCZHI]|Gemm|Dot|Nrm2|Scal|Axpy|Asum|Uint8)\w+
    | cublas(Set|Logger|Destroy)\w*
    | cublasLt(Matmul|MatrixTransform|Destroy|\w+(Destroy|SetAttribute))
    """,
    re.VERBOSE,
)
"""Orders work, sets an option or registers a kernel, and gives nothing back but a status: accepted as done. What the C
file does not answer and this does not name is refused."""

WORKS_ON_THE_DEVICE = re.compile(r"(__)?cuda(Launch|Stream|Event|Func|Mem|DeviceSynchronize|InitDevice)\w*")
"""Of these, what needs a context, and so makes one. The rest is asked for where there may be none."""

STATUS_NOT_SUPPORTED = {"cuda": 801, "cublas": 15}


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed here, read from its files without importing it."""

    version: str
    cuda: str | None
    folder: Path

    @property
    def cuda_version(self) -> int:
        """As CUDA writes it: 12080 is 12.8."""
        major, minor = (self.cuda or "0.0").split(".")[:2]
        return int(major) * 1000 + int(minor) * 10


@functools.cache
def torch_build() -> TorchBuild | None:
    """None where torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    about = importlib.util.spec_from_file_location("_torch_version", folder / "version.py")
    if about is None or about.loader is None:
        return None
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return TorchBuild(str(module.__version__), module.cuda, folder)


def why_not() -> str | None:
    """Why nothing can be rehearsed here, in a sentence; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the virtual device is for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    build = torch_build()
    if build is None:
        return "torch is not installed"
    if build.cuda is None:
        return f"torch {build.version} is a build without CUDA; one with CUDA can, and needs no GPU"
    if build.cuda_version < 12000:
        return f"torch {build.version} is built for CUDA {build.cuda}; the virtual device is for CUDA 12 and later"
    if _is_built(_folder_of(build)):
        return None
    if _compiler() is None:
        return "there is no C compiler (cc, gcc or clang) to build the virtual device with"
    if shutil.which("nm") is None:
        return "there is no nm (of the package binutils) to read the names of CUDA's functions with"
    return None


def environment(gpu: GpuSpec, *, shared: Path | None = None) -> dict[str, str]:
    """This process's environment and what makes a child of it see ``gpu``. Builds the device if it must.

    ``shared`` is a file, which need not exist: all processes that name it have one card together, which NVML shows too
    and which treats them as a real one does (shared_device.c). Without it every process has a card of its own.

    Raises RehearsalError where the device can't be had (:func:`why_not`) or its compilation fails.
    """
    if gpu.total_bytes is None:
        raise RehearsalError("a virtual device needs a limit of memory")
    built = build()
    libraries = [str(path) for path in _preloadable(built) if shared or path.name != NVML_LIBRARY]
    card = (
        f"{gpu.total_bytes} {gpu.context_bytes} {gpu.compute_capability} {gpu.multiprocessors} "
        f"{gpu.threads_per_multiprocessor} {gpu.name}"
    )
    own = {path.name for path in built}
    others = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path and Path(path).name not in own]
    inherited = {name: value for name, value in os.environ.items() if name != SHARED_VARIABLE}
    return {
        **inherited,
        **({SHARED_VARIABLE: str(shared.resolve())} if shared else {}),
        "CUDA_VISIBLE_DEVICES": "0",
        VARIABLE: card,
        "LD_PRELOAD": ":".join([*libraries, *others]),
        "USE_PYTORCH_KERNEL_CACHE": "0",  # kernels that were compiled for this device are empty
    }


def _preloadable(libraries: tuple[Path, ...]) -> list[Path]:
    """LD_PRELOAD separates paths at spaces and colons: a folder with one of them in its name gets a link without."""
    folder = libraries[0].parent.resolve()
    if re.search(r"[\s:]", str(folder)):
        link = Path(tempfile.gettempdir()) / f"hf_bsopt_{os.getuid()}_{folder.name}"
        with contextlib.suppress(FileExistsError):
            link.symlink_to(folder)
        if link.resolve() != folder:  # somebody else's
            link = Path(tempfile.mkdtemp(prefix="hf_bsopt_")) / folder.name
            link.symlink_to(folder)
        folder = link
    return [folder / path.name for path in libraries]


def build() -> tuple[Path, ...]:
    """The compiled libraries for the torch that is installed, from the cache or made now. Raises RehearsalError."""
    reason = why_not()
    if reason is not None:
        raise RehearsalError(f"can't rehearse here: {reason}")
    installed = torch_build()
    assert installed is not None
    folder = _folder_of(installed)
    if not _is_built(folder):
        _compile(installed, folder)
    return tuple(sorted(folder.iterdir()))


def _folder_of(installed: TorchBuild) -> Path:
    recipe = b"".join(path.read_bytes() for path in (*SOURCES, Path(__file__))) + str(installed).encode()
    return (
        default_folder().with_name("virtual_device") / f"{installed.version}-{hashlib.sha256(recipe).hexdigest()[:16]}"
    )


def _is_built(folder: Path) -> bool:
    return (folder / LIBRARY).is_file()


def _compiler() -> str | None:
    wanted = os.environ.get("CC", "").split(" ")[0]
    return next((path for name in (wanted, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)


def _compile(installed: TorchBuild, folder: Path) -> None:
    """Into a folder beside the final one, which is then renamed: another process may do the same at the same moment."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _build_library((SOURCE, SHARED_SOURCE), made / LIBRARY, INTERPOSED, installed)
            nvrtc = f"libnvrtc.so.{installed.cuda_version // 1000}"
            _build_library((NVRTC_SOURCE,), made / nvrtc, ("libnvrtc",), installed)
            _build_library((NVML_SOURCE,), made / NVML_LIBRARY, (), installed)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                made.rename(folder)
    except OSError as error:
        if not _is_built(folder):
            raise RehearsalError(
                f"the virtual device could not be kept in {folder.parent}: {error}; HF_BSOPT_CACHE names another folder"
            ) from error


def _build_library(sources: tuple[Path, ...], library: Path, replaced: tuple[str, ...], installed: TorchBuild) -> None:
    """``library`` from ``sources`` and from what :func:`_calls` writes for the rest of the libraries it replaces."""
    compiler = _compiler()
    assert compiler is not None
    calls, versions = library.with_suffix(".c"), library.with_suffix(".map")
    calls.write_text(_calls(sources[0], replaced, installed))
    command = [compiler, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-Wl,-soname,{library.name}"]
    if replaced == ("libnvrtc",):  # it stands in for the real library by name, so that its symbols need its version
        versions.write_text(f"{library.name} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={versions}")
    command += [f"-DCUDA_RUNTIME_VERSION={installed.cuda_version}", *map(str, sources), str(calls), "-o", str(library)]
    done = subprocess.run([*command, "-lpthread", "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise RehearsalError(f"the virtual device could not be compiled by {compiler}:\n{done.stderr.strip()[-2000:]}")
    for scrap in (calls, versions):
        scrap.unlink(missing_ok=True)


def _calls(source: Path, replaced: tuple[str, ...], installed: TorchBuild) -> str:
    """C for every function of the replaced libraries that the source does not answer itself."""
    answered = set(re.findall(r"\b(?:API|REFUSED)\((\w+)\)|API_AS\([^,]+, (\w+)\)", source.read_text()))
    names = _names(replaced, installed) - {name for pair in answered for name in pair}
    lines = ["int virtual_device_refuse(const char *name, int status);", "int virtual_device_use(void);"]
    for name in sorted(names):
        if NEEDS_NO_ANSWER.fullmatch(name):
            body = f"return {'virtual_device_use()' if WORKS_ON_THE_DEVICE.fullmatch(name) else '0'};"
        else:
            status = STATUS_NOT_SUPPORTED["cublas" if name.startswith("cublas") else "cuda"]
            body = f'return virtual_device_refuse("{name}", {status});'
        lines.append(f'__attribute__((visibility("default"))) long {name}(void) {{ {body} }}')
    return "\n".join(lines) + "\n"


def _names(replaced: tuple[str, ...], installed: TorchBuild) -> set[str]:
    """What the replaced libraries export, and what torch asks of them where they are not found."""
    names: set[str] = set()
    either = "|".join(replaced)
    for library in OWN_LIBRARIES if replaced else ():
        path = installed.folder / "lib" / library
        if path.is_file():
            wanted = _output(["nm", "-D", "--undefined-only", str(path)])
            names.update(re.findall(rf" U (\w+)@(?:{either})\.so", wanted))
            for real in re.findall(rf"(?:{either})[-\w.]*\.so[.\d]* => (/\S+)", _output(["ldd", str(path)])):
                names.update(_exported(real))
    return {name for name in names if re.match(r"(__)?cuda|cublas|nvrtc", name)}


@functools.cache
def _exported(library: str) -> tuple[str, ...]:
    return tuple(re.findall(r" [TW] (\w+)", _output(["nm", "-D", "--defined-only", library])))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
