"""The models and GPUs that are known by name, with no network: data/models.json and data/gpus.json.

model_entry("biobert").hub_id        # "dmis-lab/biobert-v1.1"
gpu("NVIDIA A100-SXM4-40GB").name    # "A100-40GB"
gpu("24GiB").assumed                 # "24GiB is read as 25,769,803,776 bytes (GB is 10^9, GiB 2^30), and since ..."
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
SEVERAL_CARDS = re.compile(r"(?P<name>.*?\S)\s*[x×*]\s*(?P<count>[0-9]+)", re.IGNORECASE)
SIZE = re.compile(rf"([+-]?[0-9]+(?:\.[0-9]+)?)\s*({'|'.join(UNITS)})", re.IGNORECASE)
SMALLEST_GPU_BYTES = 2**30
LARGEST_GPU_BYTES = 2**41

BRANDS = {"nvidia", "tesla", "geforce"}

ASSUMED_COMPUTE_CAPABILITY = 80
ASSUMED_MULTIPROCESSORS = 108
"""A size without a name is taken as an A100's: the kernels of compute capability 8.0 are those of most cards in use."""


@dataclass(frozen=True)
class ModelEntry:
    """A model of the catalog.

    hub_id: as the Hugging Face hub calls it.
    config: what its config.json says about shapes; a copy, the caller's own.
    architecture: the class that the checkpoint was saved from.
    parameters: of the base model, without a task head.
    source: the address of the config.json.
    """

    hub_id: str
    config: dict[str, Any]
    architecture: str
    parameters: int
    source: str


def known_models() -> list[str]:
    """The hub ids of all models in the catalog."""
    return list(_models())


def model_entry(name: str) -> ModelEntry | None:
    """The model of that hub id, last part of a hub id, or short name (case aside); None where there is none.

    A name with an owner is looked up whole: ``someone/bert-base-uncased`` is not Google's.
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
    """The hub ids whose id or short name is spelt most like ``name``, best first."""
    whole = name.strip().casefold()
    return _nearest({whole, _last_part(whole)}, _model_names(), count)


def known_gpus() -> list[str]:
    """The names of all GPUs in the catalog."""
    return list(_gpu_data()["gpus"])


def memory_size(text: str) -> int | None:
    """Bytes of a number and a unit, as `gpu` reads them; None for what is no size."""
    size = SIZE.fullmatch(text.strip())
    return int(Decimal(size[1]) * UNITS[size[2].lower()]) if size else None


def gpu(name: str) -> GpuSpec:
    """The GPU of that name, or one of that memory size.

    Names are those of `known_gpus`, their usual variants, and what `torch.cuda.get_device_name` says; case, spaces,
    dashes and underscores don't count. A size is a number and a unit ("24GiB", "15000 MiB", "24GB": GB is 10^9 bytes,
    GiB 2^30), from 1 GiB to 2 TiB. Whatever the name leaves open is told in the ``assumed`` of the result.

    Raises `UnknownGpuError` for anything else, with the nearest names.
    """
    size = memory_size(name)
    if size is not None:
        return _gpu_of_size(name.strip(), size)
    ambiguous = {_gpu_key(alias): meaning for alias, meaning in _gpu_data()["ambiguous"].items()}
    meaning = ambiguous.get(_gpu_key(name))
    if meaning:
        return _card(meaning["gpu"], assumed=meaning["assumed"])
    card = _gpu_names().get(_gpu_key(name))
    if card is None:
        several = SEVERAL_CARDS.fullmatch(name.strip())
        if several is not None and _gpu_key(several["name"]) in _gpu_names():
            raise UnknownGpuError(
                f"{name} is several cards, and each takes its own batch: --gpu {several['name']} --num_processes "
                f"{several['count']}"
            )
        nearest = ", ".join(_nearest({_gpu_key(name)}, _gpu_names(), 3))
        raise UnknownGpuError(
            f"Unknown GPU {name!r}. Nearest names: {nearest}; a memory size will do too, as in 24GiB."
        )
    return _card(card)


def _card(name: str, assumed: str = "") -> GpuSpec:
    card = _gpu_data()["gpus"][name]
    return GpuSpec(
        name=name,
        total_bytes=card["total_bytes"],
        compute_capability=card["compute_capability"],
        multiprocessors=card["multiprocessors"],
        context_bytes=_gpu_data()["context_bytes"],
        assumed=assumed,
    )


def _gpu_of_size(name: str, size: int) -> GpuSpec:
    if not SMALLEST_GPU_BYTES <= size <= LARGEST_GPU_BYTES:
        raise UnknownGpuError(f"A GPU with {name} of memory? Sizes from 1GiB to 2TiB are understood, as in 24GiB.")
    return GpuSpec(
        name=name,
        total_bytes=size,
        compute_capability=ASSUMED_COMPUTE_CAPABILITY,
        multiprocessors=ASSUMED_MULTIPROCESSORS,
        context_bytes=_gpu_data()["context_bytes"],
        assumed=(
            f"{name} is read as {size:,} bytes (GB is 10^9, GiB 2^30), and since a size alone doesn't say which "
            f"kernels run, an A100's compute capability (sm{ASSUMED_COMPUTE_CAPABILITY}) and "
            f"{ASSUMED_MULTIPROCESSORS} multiprocessors are assumed."
        ),
    )


def _nearest(spellings: set[str], names: Mapping[str, str], count: int) -> list[str]:
    """The ``count`` different values of ``names`` whose keys are most like one of ``spellings``, best first."""
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
    """The name without case, separators and brand: "NVIDIA A100-SXM4-40GB" and "a100_sxm4 40gb" are one."""
    return "".join(word for word in re.split(r"[\s_-]+", name.casefold()) if word not in BRANDS)


@functools.cache
def _model_names() -> dict[str, str]:
    """Every name that a model goes by, without case, and its hub id."""
    return {
        name.casefold(): hub_id
        for hub_id, entry in _models().items()
        for name in (hub_id, _last_part(hub_id), *entry["aliases"])
    }


@functools.cache
def _gpu_names() -> dict[str, str]:
    """Every key that a card goes by, and its name."""
    return {_gpu_key(alias): name for name, card in _gpu_data()["gpus"].items() for alias in (name, *card["aliases"])}


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
