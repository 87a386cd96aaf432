"""The formats of configuration files and launchers, by suffix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..errors import PatchError
from .config_files import FormatError, Found, json_sites, yaml_sites
from .jsonnet_file import jsonnet_sites
from .shell_script import shell_sites
from .sites import COMMAND_LINE, Chunk, Computed, Document, Operation, Reference, Site, Value, whole_file_chunk
from .toml_file import toml_sites

__all__ = ["READERS", "FormatError", "config_document", "in_file"]

READERS: dict[str, Callable[[Chunk, str], Found]] = {
    ".yaml": yaml_sites,
    ".yml": yaml_sites,
    ".json": json_sites,
    ".toml": toml_sites,
    ".jsonnet": jsonnet_sites,
    ".libsonnet": jsonnet_sites,
    ".sh": shell_sites,
    ".bash": shell_sites,
    ".slurm": shell_sites,
    ".sbatch": shell_sites,
}
"""suffix: the function that finds the sites of a chunk in its text, in which other characters may be masked."""


def config_document(suffix: str, name: str, text: str) -> Document:
    """Return the sites of a file. Raise PatchError if it does not have its format, MissingExtraError for YAML without
    ruamel.yaml.
    """
    chunk = whole_file_chunk(text)
    try:
        found = READERS[suffix](chunk, text)
    except FormatError as error:
        raise PatchError(f"{name} is {error}. The file is untouched.") from None
    return Document(name, text, found.sites, reads=found.reads, chunks=(chunk,))


def in_file(site: Site, file: str) -> Site:
    """Return the site with its path, and the names that its value refers to, below the file that a cell writes."""
    path = site.path if site.path[0] == COMMAND_LINE else (file, *site.path)
    return dataclasses.replace(site, path=path, value=_below(file, site.value), file=file)


def _below(file: str, value: Value) -> Value:
    if isinstance(value, Reference):
        return Reference((file, *value.path))
    if isinstance(value, Computed) and value.operation is not None:
        operands = tuple(_below(file, operand) for operand in value.operation.operands)
        return dataclasses.replace(value, operation=Operation(value.operation.operator, operands))
    return value
