"""Compile the virtual device and make the environment in which a process sees it.

    subprocess.run([sys.executable, "train.py"], env=environment(catalog.gpu("T4")))
    environment(catalog.gpu("T4"), shared=Path("device"))  # one device for all processes that name this file

Compiled once for each build of torch, into the user's cache. Needs a C compiler and ``nm``, but no CUDA headers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .._utils.cache_folder import user_cache_folder
from ..errors import RehearsalError
from ..records import GpuSpec

FOLDER = Path(__file__).parent
DEVICE_SOURCES = tuple(
    FOLDER / name for name in ("device.c", "runtime.c", "memory.c", "driver.c", "cublas.c", "shared_device.c")
)
NVRTC_SOURCES = (FOLDER / "nvrtc.c",)
NVML_SOURCES = (FOLDER / "nvml.c",)
HEADERS = (FOLDER / "device.h", FOLDER / "shared_device.h")
SOURCES = (*DEVICE_SOURCES, *NVRTC_SOURCES, *NVML_SOURCES, *HEADERS)
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
"""Functions that launch work, set an option or register a kernel and return only a status: they report success. All
functions that are neither here nor implemented in C are refused."""

WORKS_ON_THE_DEVICE = re.compile(r"(__)?cuda(Launch|Stream|Event|Func|Mem|DeviceSynchronize|InitDevice)\w*")
"""The subset of these functions that need a context and so create it. The others may be called before there is one."""

SEPARATORS = re.compile(r"[\s:]")
STATUS_NOT_SUPPORTED = {"cuda": 801, "cublas": 15}


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, read from its files without importing it."""

    version: str
    cuda: str | None
    folder: Path

    @property
    def cuda_version(self) -> int:
        """The version in CUDA's own encoding: 12080 is 12.8."""
        major, minor = (self.cuda or "0.0").split(".")[:2]
        return int(major) * 1000 + int(minor) * 10


@functools.cache
def torch_build() -> TorchBuild | None:
    """Return the installed build of torch; None if torch is not installed."""
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
    """Return why rehearsals cannot run here, in a sentence; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the virtual device is for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    build = torch_build()
    if build is None:
        return "torch is not installed"
    if build.cuda is None:
        return f"torch {build.version} is a build without CUDA; install one with CUDA, which needs no GPU"
    if build.cuda_version < 12000:
        return f"torch {build.version} is built for CUDA {build.cuda}; the virtual device is for CUDA 12 and later"
    if _is_built(_folder_of(build)):
        return None
    if _compiler() is None:
        return "there is no C compiler (cc, gcc or clang) to build the virtual device with"
    if shutil.which("nm") is None:
        return "there is no nm (of the package binutils) to list the functions of the CUDA libraries"
    return None


def environment(gpu: GpuSpec, *, shared: Path | None = None) -> dict[str, str]:
    """Return this process's environment, extended so that a child process sees ``gpu``. Build the device if needed.

    ``shared`` is a file, which need not exist: all processes that name it share one device, which NVML reports too
    (shared_device.c). Without it every process has its own device.

    Raises RehearsalError if rehearsals cannot run here (:func:`why_not`) or the compilation fails.
    """
    if gpu.total_bytes is None:
        raise RehearsalError("a virtual device needs a memory size: the GpuSpec has no total_bytes")
    built = build()
    libraries = [str(path) for path in _preloadable(built) if shared or path.name != NVML_LIBRARY]
    device = (
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
        VARIABLE: device,
        "LD_PRELOAD": ":".join([*libraries, *others]),
        "USE_PYTORCH_KERNEL_CACHE": "0",  # do not cache kernels compiled for this device: they are empty
    }


def _preloadable(libraries: tuple[Path, ...]) -> list[Path]:
    """Return paths without spaces and colons, which separate paths in LD_PRELOAD: through a link in a folder of this
    process alone if necessary, since a link with a known name could be another user's. Raise RehearsalError.
    """
    folder = libraries[0].parent.resolve()
    for path in (folder.parent, folder, *libraries):
        _check_owner(path)
    if SEPARATORS.search(str(folder)):
        folder = _link_to(folder)
    return [folder / path.name for path in libraries]


@functools.cache
def _link_to(folder: Path) -> Path:
    """Return a link to the folder, which is removed with its own folder when this process ends."""
    temporary = tempfile.gettempdir()
    if SEPARATORS.search(temporary):
        temporary = "/tmp"
    private = Path(tempfile.mkdtemp(prefix="hf_bsopt_", dir=temporary))  # mode 0700
    atexit.register(_remove_link, private, os.getpid())
    link = private / "device"
    link.symlink_to(folder)
    return link


def _remove_link(private: Path, maker: int) -> None:
    if os.getpid() == maker:  # not in a fork
        shutil.rmtree(private, ignore_errors=True)


def _check_owner(path: Path) -> None:
    """Raise RehearsalError if another user could have written the file or folder, which is loaded into processes."""
    status = path.stat()
    is_ours = status.st_uid in (0, os.geteuid())
    is_sticky_folder = bool(stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
    if is_ours and (is_sticky_folder or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return
    why = "can be written by others" if is_ours else f"belongs to another user (uid {status.st_uid})"
    raise RehearsalError(
        f"the virtual device is not loaded from {path}, which {why}: remove it, or set HF_BSOPT_CACHE to a folder of "
        f"your own"
    )


def build() -> tuple[Path, ...]:
    """Return the libraries compiled for the installed torch, from the cache or built now. Raise RehearsalError."""
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
    return user_cache_folder("virtual_device") / f"{installed.version}-{hashlib.sha256(recipe).hexdigest()[:16]}"


def _is_built(folder: Path) -> bool:
    return (folder / LIBRARY).is_file()


def _compiler() -> str | None:
    wanted = os.environ.get("CC", "").split(" ")[0]
    return next((path for name in (wanted, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)


def _compile(installed: TorchBuild, folder: Path) -> None:
    """Compile into a temporary folder, then rename it: another process may compile at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        _close_to_others(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            _build_library(DEVICE_SOURCES, made / LIBRARY, INTERPOSED, installed)
            nvrtc = f"libnvrtc.so.{installed.cuda_version // 1000}"
            _build_library(NVRTC_SOURCES, made / nvrtc, ("libnvrtc",), installed)
            _build_library(NVML_SOURCES, made / NVML_LIBRARY, (), installed)
            for path in (made, *made.iterdir()):
                _close_to_others(path)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                made.rename(folder)
    except OSError as error:
        if not _is_built(folder):
            raise RehearsalError(
                f"cannot store the virtual device in {folder.parent}: {error}; set HF_BSOPT_CACHE to another folder"
            ) from error


def _close_to_others(path: Path) -> None:
    """Let nobody else write here, whatever the umask is, if it is ours."""
    with contextlib.suppress(PermissionError):
        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def _build_library(sources: tuple[Path, ...], library: Path, replaced: tuple[str, ...], installed: TorchBuild) -> None:
    """Compile ``library`` from ``sources`` and the stubs of :func:`_stubs` for the libraries that it replaces."""
    compiler = _compiler()
    assert compiler is not None
    stubs, versions = library.with_suffix(".c"), library.with_suffix(".map")
    stubs.write_text(_stubs(sources, replaced, installed))
    command = [compiler, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-Wl,-soname,{library.name}"]
    if replaced == ("libnvrtc",):  # it replaces the real library by name, so its symbols need that version
        versions.write_text(f"{library.name} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={versions}")
    command += [f"-DCUDA_RUNTIME_VERSION={installed.cuda_version}", *map(str, sources), str(stubs), "-o", str(library)]
    done = subprocess.run([*command, "-lpthread", "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise RehearsalError(f"the virtual device could not be compiled by {compiler}:\n{done.stderr.strip()[-2000:]}")
    for file in (stubs, versions):
        file.unlink(missing_ok=True)


def _stubs(sources: tuple[Path, ...], replaced: tuple[str, ...], installed: TorchBuild) -> str:
    """Return C code for every function of the replaced libraries that the sources do not implement."""
    code = "".join(path.read_text() for path in sources)
    implemented = re.findall(r"\b(?:API|REFUSED)\((\w+)\)|API_AS\([^,]+, (\w+)\)", code)
    names = _names(replaced, installed) - {name for pair in implemented for name in pair}
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
    """Return the exported functions of the replaced libraries and those that torch imports from them."""
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
