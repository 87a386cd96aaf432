"""Run a command on a virtual GPU that all its processes share.

    python benchmarks/on_virtual_gpu.py T4 -- bash benchmarks/on_gpu.sh
    python benchmarks/on_virtual_gpu.py 24GiB -- python -m pytest -q -m gpu

Memory use is that of a real GPU; computed values and times are not (docs/rehearsal.md). The exit code is the command's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.errors import BatchSizeError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", help="the name of a GPU, or a memory size")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and a command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command is given; for example -- bash benchmarks/on_gpu.sh")
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = virtual_gpu.environment(catalog.gpu(args.gpu), shared=Path(folder) / "gpu")
        except BatchSizeError as error:
            parser.error(str(error))
        try:
            return subprocess.run(command, env=environment, check=False).returncode
        except FileNotFoundError as error:
            parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
