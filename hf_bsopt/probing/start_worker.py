"""The first code of the worker's process: it ends with its parent from the beginning, before imports that take seconds.

    python -P start_worker.py PARENT PATHS [PIPE]

PARENT: the process number of the parent. PATHS: the parent's sys.path, as JSON. PIPE: see worker.py. It is run as a
file, and imports nothing of the package before the end of the parent would end it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, or end it if that was before."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except AttributeError:  # not Linux
        return
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    from hf_bsopt.probing.worker import main

    main(sys.argv[2:])
