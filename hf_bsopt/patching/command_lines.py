"""Find flags in command lines: `!python train.py --batch_size 16` in a notebook, `os.system("…")` in a script."""

from __future__ import annotations

import re

from .python_values import as_number
from .sites import COMMAND_LINE, Chunk, Container, Number, Site

OWN_COMMAND = re.compile(r"find[-_]optimal[-_]batch[-_]size|hf_bsopt")
"""This package's own command: its flags describe a search and are not settings of the training."""
_LAUNCHES = re.compile(
    r"\b(python[0-9.]*|torchrun|accelerate|deepspeed|uv|%run|[\w-]+\.(py|sh)|[\w-]+[-_](cli|train))\b"
)
_FLAG = re.compile(
    r"""(?<![\w$.-])(?P<dashes>--?)?(?P<name>[A-Za-z_][\w.-]*)(?P<sep>=|[ \t]+(?:\\\r?\n[ \t]*)?)"""
    r"""(?P<quote>["']?)(?P<value>[+-]?[0-9.][\w.+-]*)(?P=quote)(?=[\s\\;&|]|$)"""
)


def flag_sites(chunk: Chunk, start: int, end: int) -> list[Site]:
    """Return each flag with a number on the command line from ``start`` to ``end``; none for this package's command."""
    line = chunk.text[start:end]
    if OWN_COMMAND.search(line) or not _LAUNCHES.search(line):
        return []
    found = list(_FLAG.finditer(line))
    names = frozenset(flag["name"].replace("-", "_") for flag in found)
    container = Container(-1 - start - 1_000_000 * (chunk.cell or 0), "flags", names)
    sites = []
    for flag in found:
        number = as_number(flag["value"])
        if number is None or (flag["sep"] != "=" and flag["dashes"] != "--"):
            continue
        value = Number(number, start + flag.start("value"), start + flag.end("value"))
        path = (COMMAND_LINE, *flag["name"].replace("-", "_").split("."))
        sites.append(Site(path, "flag", value, chunk, container, start + flag.start(), start + flag.end()))
    return sites
