"""Look up models and GPUs by name, without a network: data/models.json and data/gpus.json.

model_entry("biobert").hub_id        # "dmis-lab/biobert-v1.1"
gpu("NVIDIA A100-SXM4-40GB").name    # "A100-40GB"
gpu("24GiB").assumed                 # "24GiB is read as 25,769,803,776 bytes (GB is 10^9, GiB 2^30). A size ..."
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import SequenceMatcher
from importlib import resources
from typing import Any

from ..errors import UnknownGpuError
from ..records import GpuSpec

UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SEVERAL_GPUS = re.compile(r"(?P<name>.*?\S)\s*[x×*]\s*(?P<count>[0-9]+)", re.IGNORECASE)
SIZE = re.compile(rf"([+-]?[0-9]+(?:\.[0-9]+)?)\s*({'|'.join(UNITS)})", re.IGNORECASE)
SMALLEST_GPU_BYTES = 2**30
LARGEST_GPU_BYTES = 2**41
UNLIMITED_BYTES = 2**60
"""More than any device has; a larger size means the same."""

LONGEST_NAME = 60
"""Characters of a name that an error message repeats."""
BRANDS = {"nvidia", "tesla", "geforce"}

ASSUMED_COMPUTE_CAPABILITY = 80
ASSUMED_MULTIPROCESSORS = 108
"""Values for a memory size without a name: an A100's, because most GPUs in use run the kernels of compute capability
8.0.
"""


@dataclass(frozen=True)
class ModelEntry:
    """A model of the catalog.

    hub_id: its id on the Hugging Face hub.
    config: the fields of its config.json that determine shapes; a copy that the caller may change.
    architecture: the name of the class that the checkpoint was saved from.
    parameters: the number of parameters of the base model, without a task head.
    source: the address of the config.json.
    """

    hub_id: str
    config: dict[str, Any]
    architecture: str
    parameters: int
    source: str


def known_models() -> list[str]:
    """Return the hub ids of all models in the catalog."""
    return list(_models())


def model_entry(name: str) -> ModelEntry | None:
    """Return the model with this hub id, last part of a hub id, or short name, in any case; None if there is none.

    A name with an owner must match a whole hub id: ``someone/bert-base-uncased`` is not Google's model.
    """
    hub_id = _model_names().get(name.strip().casefold())
    if hub_id is None:
        return None
    entry = _models()[hub_id]
    return ModelEntry(
        hub_id=hub_id,
        config=copy.deepcopy(entry["config"]),
        architecture=entry["architecture"],
        parameters=entry["parameters"],
        source=entry["source"],
    )


def nearest_models(name: str, count: int = 3) -> list[str]:
    """Return the ``count`` hub ids whose id or short name is most similar to ``name``, the most similar first."""
    whole = name.strip().casefold()
    return _nearest({whole, _last_part(whole)}, _model_names(), count)


def known_gpus() -> list[str]:
    """Return the names of all GPUs in the catalog."""
    return list(_gpu_data()["gpus"])


def memory_size(text: str) -> int | None:
    """Return the bytes of a size such as "24GiB" (a number and one of UNITS); None if ``text`` is not a size."""
    size = SIZE.fullmatch(text.strip())
    return min(int(Decimal(size[1]) * UNITS[size[2].lower()]), UNLIMITED_BYTES) if size else None


def gpu(name: str) -> GpuSpec:
    """Return the GPU with this name or memory size.

    Names are those of `known_gpus`, their usual variants, and the output of `torch.cuda.get_device_name`; case, spaces,
    dashes and underscores are ignored. A size is a number and a unit ("24GiB", "15000 MiB", "24GB": GB is 10^9 bytes,
    GiB 2^30), from 1 GiB to 2 TiB. The ``assumed`` of the result states what the name left open.

    Raises `UnknownGpuError` with the nearest names for anything else.
    """
    size = memory_size(name)
    if size is not None:
        return _gpu_of_size(name.strip(), size)
    ambiguous = {_gpu_key(alias): meaning for alias, meaning in _gpu_data()["ambiguous"].items()}
    meaning = ambiguous.get(_gpu_key(name))
    if meaning:
        return _gpu_spec(meaning["gpu"], assumed=meaning["assumed"])
    known_name = _gpu_names().get(_gpu_key(name))
    if known_name is None:
        several = SEVERAL_GPUS.fullmatch(name.strip())
        if several is not None and _gpu_key(several["name"]) in _gpu_names():
            raise UnknownGpuError(
                f"{name!r} is several GPUs, and each has a batch of its own; use --gpu {several['name']} "
                f"--num_processes {several['count']}"
            )
        nearest = ", ".join(_nearest({_gpu_key(name)}, _gpu_names(), 3))
        raise UnknownGpuError(
            f"Unknown GPU {name[:LONGEST_NAME]!r}. Nearest names: {nearest}; a memory size such as 24GiB is valid, too."
        )
    return _gpu_spec(known_name)


def _gpu_spec(name: str, assumed: str = "") -> GpuSpec:
    entry = _gpu_data()["gpus"][name]
    return GpuSpec(
        name=name,
        total_bytes=entry["total_bytes"],
        compute_capability=entry["compute_capability"],
        multiprocessors=entry["multiprocessors"],
        context_bytes=_gpu_data()["context_bytes"],
        assumed=assumed,
    )


def _gpu_of_size(name: str, size: int) -> GpuSpec:
    if not SMALLEST_GPU_BYTES <= size <= LARGEST_GPU_BYTES:
        raise UnknownGpuError(
            f"A GPU with {name[:LONGEST_NAME]} of memory is not supported: sizes from 1GiB to 2TiB are valid, such as "
            f"24GiB."
        )
    return GpuSpec(
        name=name,
        total_bytes=size,
        compute_capability=ASSUMED_COMPUTE_CAPABILITY,
        multiprocessors=ASSUMED_MULTIPROCESSORS,
        context_bytes=_gpu_data()["context_bytes"],
        assumed=(
            f"{name} is read as {size:,} bytes (GB is 10^9, GiB 2^30). A size alone doesn't determine which kernels "
            f"run, so an A100's compute capability (sm{ASSUMED_COMPUTE_CAPABILITY}) and {ASSUMED_MULTIPROCESSORS} "
            "multiprocessors are assumed."
        ),
    )


def _nearest(spellings: set[str], names: Mapping[str, str], count: int) -> list[str]:
    """Return the ``count`` distinct values of ``names`` whose keys are most similar to ``spellings``, best first."""
    scores: dict[str, float] = {}
    for spelling in spellings:
        matcher = SequenceMatcher(b=spelling, autojunk=False)
        for name, meaning in names.items():
            matcher.set_seq1(name)
            scores[meaning] = max(scores.get(meaning, 0.0), matcher.ratio())
    return sorted(scores, key=lambda meaning: -scores[meaning])[:count]


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _gpu_key(name: str) -> str:
    """Return the name without case, separators and brand, equal for "NVIDIA A100-SXM4-40GB" and "a100_sxm4 40gb"."""
    return "".join(word for word in re.split(r"[\s_-]+", name.casefold()) if word not in BRANDS)


@functools.cache
def _model_names() -> dict[str, str]:
    """Return a map from each name of a model, case-folded, to its hub id."""
    return {
        name.casefold(): hub_id
        for hub_id, entry in _models().items()
        for name in (hub_id, _last_part(hub_id), *entry["aliases"])
    }


@functools.cache
def _gpu_names() -> dict[str, str]:
    """Return a map from each `_gpu_key` of a GPU to its name."""
    return {_gpu_key(alias): name for name, entry in _gpu_data()["gpus"].items() for alias in (name, *entry["aliases"])}


def _models() -> dict[str, Any]:
    models: dict[str, Any] = _read("models.json")["models"]
    return models


def _gpu_data() -> dict[str, Any]:
    return _read("gpus.json")


@functools.cache
def _read(file_name: str) -> dict[str, Any]:
    text = resources.files("hf_bsopt").joinpath("data", file_name).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
