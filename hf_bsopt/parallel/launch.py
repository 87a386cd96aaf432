"""Runs the command as one of several processes: with ``accelerate launch`` or ``torchrun`` each rank sizes its own GPU.

accelerate launch --num_processes 2 find_optimal_batch_size.py --model dmis-lab/biobert-v1.1
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import AgreementError, UsageError
from .agreement import start_heartbeat

RENDEZVOUS_SECONDS = 600


@dataclass(frozen=True)
class Launch:
    """rank: of this process among all ``size``; local_rank: on this machine."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Launch:
        """Return the launch that torchrun describes in the environment; a single process if there is none."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError):
            return cls()

    @property
    def is_main_process(self) -> bool:
        """True if this process prints and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def output_on_rank_zero_only(self) -> Iterator[None]:
        """Silence stdout and stderr except on rank 0."""
        if self.is_main_process:
            yield
            return
        devnull = Path(os.devnull).open("w")  # noqa: SIM115  closed below
        with devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
            yield

    def processes(self, requested: int) -> int:
        """Return the number of processes of the plan. Raise UsageError if the command and the launcher disagree."""
        if self.size > 1 and requested not in (1, self.size):
            raise UsageError(f"--num_processes {requested}, but the launcher started {self.size}: omit it")
        return self.size if self.size > 1 else requested

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        """Initialize a process group with the other ranks and let this process see only its own GPU. The group
        communicates on the host, so it allocates nothing on a GPU. Raises UsageError if the environment does not say
        where the ranks meet, AgreementError if they do not come.
        """
        if self.size == 1:
            yield
            return
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"RANK={self.rank} and WORLD_SIZE={self.size} are set, but not {' and '.join(missing)}, where the "
                f"ranks meet: start with torchrun or accelerate launch, which set all of them, or unset RANK and "
                f"WORLD_SIZE"
            )
        from torch import distributed

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(number) for number in range(self.local_rank + 1)]
        if self.local_rank < len(gpus):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[self.local_rank]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=RENDEZVOUS_SECONDS))
        except (RuntimeError, ValueError) as error:  # each cause has an error of its own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise AgreementError(f"the {self.size} ranks did not meet at {address} (MASTER_ADDR): {reason}") from error
        start_heartbeat()
        try:
            yield
        finally:
            distributed.destroy_process_group()
