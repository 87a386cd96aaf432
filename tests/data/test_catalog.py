"""Models and GPUs are found by their usual names, with correct data, and unknown names are refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_bsopt.data.catalog import (
    _gpu_data,
    _gpu_key,
    _models,
    gpu,
    known_gpus,
    known_models,
    model_entry,
    nearest_models,
)
from hf_bsopt.errors import UnknownGpuError
from hf_bsopt.records import GpuSpec

MIB = 2**20


def test_no_two_entries_share_a_name() -> None:
    """The later one would hide the other."""
    models = [name.casefold() for hub_id, entry in _models().items() for name in {hub_id, *entry["aliases"]}]
    gpu_names = ((name, *entry["aliases"]) for name, entry in _gpu_data()["gpus"].items())
    gpus = [key for names in gpu_names for key in {_gpu_key(name) for name in names}]
    assert sorted(set(models)) == sorted(models)
    assert sorted(set(gpus)) == sorted(gpus)


# ---- models


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("bert-base-cased", "google-bert/bert-base-cased"),
        ("bert-large-uncased", "google-bert/bert-large-uncased"),
        ("bert-large-cased", "google-bert/bert-large-cased"),
        ("dmis-lab/biobert-v1.1", "dmis-lab/biobert-v1.1"),
        ("BioBERT", "dmis-lab/biobert-v1.1"),
        ("pubmedbert", "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"),
        ("scibert", "allenai/scibert_scivocab_uncased"),
        ("clinicalbert", "emilyalsentzer/Bio_ClinicalBERT"),
        ("roberta-base", "FacebookAI/roberta-base"),
        ("roberta-large", "FacebookAI/roberta-large"),
        ("distilbert", "distilbert/distilbert-base-uncased"),
        ("albert-base-v2", "albert/albert-base-v2"),
        ("google/electra-base-discriminator", "google/electra-base-discriminator"),
        ("microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
        ("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-base"),
        ("answerdotai/ModernBERT-large", "answerdotai/ModernBERT-large"),
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("facebook/opt-350m", "facebook/opt-350m"),
        ("gpt2", "openai-community/gpt2"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("t5-small", "google-t5/t5-small"),
        ("t5-base", "google-t5/t5-base"),
        ("bert-mini", "prajjwal1/bert-mini"),
        ("tinystories-reference", "tinystories-reference"),
    ],
)
def test_models_are_found_by_their_usual_names(name: str, hub_id: str) -> None:
    entry = model_entry(name)
    assert entry is not None
    assert entry.hub_id == hub_id
    assert entry.config["model_type"]
    assert entry.parameters > 0


@given(st.sampled_from(known_models()), st.booleans())
def test_every_model_is_found_by_its_id_and_last_part_in_any_case(hub_id: str, upper: bool) -> None:
    for name in (hub_id, hub_id.rsplit("/", 1)[-1]):
        entry = model_entry(name.upper() if upper else name.lower())
        assert entry is not None
        assert entry.hub_id == hub_id


def test_the_same_name_with_another_owner_is_not_found() -> None:
    assert model_entry("someone/bert-base-uncased") is None


def test_unknown_model_is_none() -> None:
    assert model_entry("no-such-model") is None
    assert model_entry("") is None


def test_changing_the_config_of_an_entry_does_not_change_the_catalog() -> None:
    first, second = model_entry("biobert"), model_entry("biobert")
    assert first is not None
    assert second is not None
    first.config.pop("model_type")
    assert second.config["model_type"] == "bert"


@pytest.mark.parametrize(
    ("misspelt", "hub_id"),
    [
        ("biobret", "dmis-lab/biobert-v1.1"),
        ("dmis-lab/biobert-v1.0", "dmis-lab/biobert-v1.1"),
        ("bert-base-uncase", "google-bert/bert-base-uncased"),
        ("google/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("lama-3.2-3b", "meta-llama/Llama-3.2-3B"),
    ],
)
def test_the_intended_model_is_among_the_nearest_of_a_misspelt_name(misspelt: str, hub_id: str) -> None:
    nearest = nearest_models(misspelt)
    assert hub_id in nearest
    assert len(set(nearest)) == 3


def test_every_model_has_a_public_source() -> None:
    for name in known_models():
        entry = model_entry(name)
        assert entry is not None
        assert entry.source.strip()
        assert entry.architecture


# ---- GPUs

GPUS = [
    ("T4", 15_637_413_888, 75, 40),
    ("P100", 16_269 * MIB, 60, 56),
    ("V100-16GB", 16_914_055_168, 70, 80),
    ("V100-32GB", 32_494 * MIB, 70, 80),
    ("L4", 22_693 * MIB, 89, 58),
    # CUDA samples' deviceQuery, driver 12.2: 23,609,475,072 bytes; with driver 12.8 it was 23,696,375,808
    ("A10", 23_609_475_072, 86, 72),
    ("A10G", 22_587 * MIB, 86, 80),
    ("L40S", 45_495 * MIB, 89, 142),
    ("A100-40GB", 42_405_462_016, 80, 108),
    ("A100-80GB", 81_222 * MIB, 80, 108),
    ("A800-40GB", 42_405_462_016, 80, 108),  # an A100 with slower links between GPUs
    ("A800-80GB", 81_222 * MIB, 80, 108),
    ("H100-80GB", 81_082 * MIB, 90, 132),
    ("H200", 150_109_945_856, 90, 132),
    ("RTX 3060", 12_622_168_064, 86, 28),
    ("RTX 4060", 7_933 * MIB, 89, 24),
    ("RTX 3090", 24_124 * MIB, 86, 82),
    ("RTX 4090", 24_045 * MIB, 89, 128),
    ("RTX 5090", 32_120 * MIB, 120, 170),
    ("RTX 6000 Ada", 50_865_307_648, 89, 142),
]


@pytest.mark.parametrize(("name", "total_bytes", "compute_capability", "multiprocessors"), GPUS)
def test_known_gpus_have_the_values_that_the_driver_reports(
    name: str, total_bytes: int, compute_capability: int, multiprocessors: int
) -> None:
    spec = gpu(name)
    assert (spec.name, spec.total_bytes, spec.compute_capability, spec.multiprocessors) == (
        name,
        total_bytes,
        compute_capability,
        multiprocessors,
    )
    assert spec.assumed == ""
    assert 300 * MIB <= spec.context_bytes <= 430 * MIB


def test_every_known_gpu_is_checked_above() -> None:
    assert set(known_gpus()) == {name for name, *_ in GPUS}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Tesla T4", "T4"),
        ("t4", "T4"),
        (" T4 ", "T4"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-PCIE-32GB", "V100-32GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("A800-SXM4-80GB", "A800-80GB"),
        ("NVIDIA A800 80GB PCIe", "A800-80GB"),
        ("NVIDIA A800-SXM4-40GB", "A800-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("a100-40gb", "A100-40GB"),
        ("A100_40 GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("3060", "RTX 3060"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_gpus_are_found_by_the_names_that_users_and_drivers_give_them(spelling: str, name: str) -> None:
    assert gpu(spelling) == gpu(name)
    assert gpu(spelling).assumed == ""


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("A100", "A100-40GB"), ("v100", "V100-16GB"), ("H100", "H100-80GB"), ("H100 PCIe", "H100-80GB")],
)
def test_an_ambiguous_name_states_which_gpu_is_assumed(spelling: str, name: str) -> None:
    assert gpu(spelling).name == name
    assert "assumed" in gpu(spelling).assumed


@pytest.mark.parametrize(
    ("spelling", "total_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("15000MiB", 15_000 * MIB),
        ("1.5TiB", 3 * 2**39),
        ("10.7 GiB", 11_489_037_516),
        ("1GiB", 2**30),
        ("2TiB", 2**41),
    ],
)
def test_a_memory_size_is_exact_to_the_byte_and_states_its_assumptions(spelling: str, total_bytes: int) -> None:
    spec = gpu(spelling)
    assert (spec.total_bytes, spec.compute_capability, spec.multiprocessors) == (total_bytes, 80, 108)
    assert f"{total_bytes:,} bytes" in spec.assumed
    assert "sm80" in spec.assumed


@pytest.mark.parametrize("spelling", ["0GiB", "-24GiB", "1023MiB", "1GB", "2049GiB", "9" * 500 + "GiB"])
def test_an_invalid_memory_size_is_refused_with_an_example(spelling: str) -> None:
    with pytest.raises(UnknownGpuError, match="24GiB"):
        gpu(spelling)


@pytest.mark.parametrize(
    ("spelling", "nearest"),
    [
        ("T5", "T4"),
        ("A100-60GB", "A100-80GB"),
        ("A10X", "A10"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060"),
        ("RTX 4060 Ti", "RTX 4060"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100-40GB"),
    ],
)
def test_a_name_similar_to_a_known_gpu_is_refused_with_the_nearest_names(spelling: str, nearest: str) -> None:
    with pytest.raises(UnknownGpuError, match="Nearest names") as refused:
        gpu(spelling)
    assert nearest in str(refused.value)
    assert "24GiB" in str(refused.value)


@given(st.text(max_size=40))
def test_any_text_is_a_gpu_or_raises_unknown_gpu(spelling: str) -> None:
    with contextlib.suppress(UnknownGpuError):
        assert gpu(spelling).total_bytes


# ---- properties derived from a GPU


@pytest.mark.parametrize(("name", "workspace_bytes"), [("T4", 8_519_680), ("A100", 8_519_680), ("H200", 33_554_432)])
def test_the_cublas_workspace_is_that_of_pytorch_for_the_compute_capability(name: str, workspace_bytes: int) -> None:
    assert gpu(name).cublas_workspace_bytes == workspace_bytes


@pytest.mark.parametrize(
    ("compute_capability", "threads"),
    [(60, 2048), (70, 2048), (75, 1024), (80, 2048), (86, 1536), (89, 1536), (90, 2048), (100, 2048), (120, 1536)],
)
def test_threads_per_multiprocessor_depend_on_the_compute_capability(compute_capability: int, threads: int) -> None:
    assert GpuSpec("", None, compute_capability, 1, 0).threads_per_multiprocessor == threads


@pytest.mark.parametrize(("name", "supported"), [("T4", False), ("V100", False), ("A100", True), ("RTX 4090", True)])
def test_bfloat16_is_supported_from_ampere_on(name: str, supported: bool) -> None:
    assert gpu(name).supports_bfloat16 == supported


def test_importing_the_catalog_imports_no_torch_and_reads_no_file() -> None:
    code = (
        "import sys, hf_bsopt.data.catalog as c;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)) or c._read.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
