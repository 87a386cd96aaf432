"""``hf-bsopt rehearse``: run a training script, unmodified, on a virtual GPU."""

from __future__ import annotations

from collections.abc import Sequence

from ..parallel.launch import Launch
from ..rehearsal.command import main


def run(argv: Sequence[str], launch: Launch) -> int:
    """Run the subcommand and return its exit code."""
    return main(list(argv), prog="hf-bsopt rehearse")
