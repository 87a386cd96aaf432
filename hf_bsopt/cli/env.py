"""``hf-bsopt env``: versions and devices, for a bug report."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from .. import virtual_gpu
from .._utils.argument_parser import ArgumentParser
from .._utils.package_versions import package_version
from .._utils.terminal import show
from ..parallel.launch import Launch
from .exit_codes import FOUND

DESCRIPTION = "Prints versions and devices, for a bug report."
PACKAGES = ("hf-bsopt", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "pandas")


def run(argv: Sequence[str], launch: Launch) -> int:
    """Run the subcommand and return its exit code."""
    ArgumentParser("hf-bsopt env", DESCRIPTION).parse_args(argv)
    show(environment())
    return FOUND


def environment() -> str:
    """Return what a bug report needs, one line each."""
    import torch

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{package} {package_version(package) or 'not installed'}" for package in PACKAGES]
    lines.append(f"CUDA of torch: {torch.version.cuda or 'none (CPU build)'}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(
            f"GPU: {torch.cuda.device_count()} × {properties.name}, {properties.total_memory} bytes, compute "
            f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        )
    else:
        lines.append("GPU: none")
    reason = virtual_gpu.why_not()
    lines.append("rehearsal: " + ("possible" if reason is None else f"not possible, {reason}"))
    return "\n".join(lines)
