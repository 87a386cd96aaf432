"""The command as one process of several: under ``accelerate launch`` or ``torchrun`` each rank sizes its own card.

accelerate launch --num_processes 2 find_optimal_batch_size.py --model dmis-lab/biobert-v1.1
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

MEETING_SECONDS = 600


@dataclass(frozen=True)
class Launch:
    """rank: of this process among all ``size``; local_rank: on this machine."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Launch:
        """As torchrun tells its processes. Alone where nobody does."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError):
            return cls()

    @property
    def tells(self) -> bool:
        """Whether this process prints, and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def voice(self) -> Iterator[None]:
        """While it lasts, only the first process is heard."""
        if self.tells:
            yield
            return
        nobody = Path(os.devnull).open("w")  # noqa: SIM115  closed below
        with nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
            yield

    def processes(self, asked: int) -> int:
        """For the plan. Raises UsageError where the command says another number than the launcher."""
        if self.size > 1 and asked not in (1, self.size):
            raise UsageError(f"--num_processes {asked}, and the launcher started {self.size}: leave it out")
        return self.size if self.size > 1 else asked

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While it lasts, this process can agree with the others, and sees one card, its own. The others are met on
        the host: nothing is allocated on a card for it.
        """
        if self.size == 1:
            yield
            return
        from torch import distributed

        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        cards = seen.split(",") if seen else [str(number) for number in range(self.local_rank + 1)]
        if self.local_rank < len(cards):
            os.environ["CUDA_VISIBLE_DEVICES"] = cards[self.local_rank]
        distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEETING_SECONDS))
        try:
            yield
        finally:
            distributed.destroy_process_group()
