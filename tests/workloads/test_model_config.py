"""Where a model's configuration comes from, and what is read off it: claims about `hf_bsopt.workloads.model_config`."""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoConfig, BertConfig, LlamaConfig, RobertaConfig, T5Config, ViTConfig
from transformers.models.auto import modeling_auto

from hf_bsopt.data import catalog
from hf_bsopt.errors import UnknownModelError, UsageError
from hf_bsopt.workloads import model_config
from hf_bsopt.workloads.model_config import (
    AUTO_CLASSES,
    OFFSET_POSITIONS,
    TASK_MAPPINGS,
    check_head,
    default_task,
    load_config,
    position_limit,
    supports_sdpa,
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config, "is_hub_reachable", lambda: False)


def write(folder: Path, values: object) -> Path:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


TINY = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 77}

# ---- the catalog


@pytest.mark.parametrize("name", ["dmis-lab/biobert-v1.1", "biobert", "BioBERT"])
def test_a_model_of_the_catalog_needs_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    monkeypatch.setattr(model_config, "is_hub_reachable", no_network)
    config = load_config(name)
    assert isinstance(config, BertConfig)
    assert config.vocab_size == 28996


def test_every_configuration_of_the_catalog_is_understood_and_has_a_task() -> None:
    for name in catalog.known_models():
        config = load_config(name)
        task, reason = default_task(config)
        assert task in AUTO_CLASSES
        assert reason
        limit = position_limit(config)
        assert limit is None or limit >= 256


def test_each_caller_has_a_configuration_of_its_own() -> None:
    load_config("bert-base-uncased").num_hidden_layers = 1
    assert load_config("bert-base-uncased").num_hidden_layers == 12


# ---- a folder


def test_a_folder_s_configuration_is_read(tmp_path: Path) -> None:
    config = load_config(str(write(tmp_path, TINY)))
    assert isinstance(config, BertConfig)
    assert (config.hidden_size, config.vocab_size) == (64, 77)


def test_the_file_itself_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, TINY)
    assert load_config(str(tmp_path / "config.json")).hidden_size == 64


def test_a_folder_that_is_called_like_a_known_model_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    write(tmp_path / "gpt2", TINY)
    monkeypatch.chdir(tmp_path)
    assert load_config("gpt2").model_type == "bert"


def test_what_save_pretrained_wrote_is_read_back(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_key_value_heads=2).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("llama", 64, 2)


def test_code_that_a_folder_names_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    write(tmp_path, {**TINY, "auto_map": {"AutoConfig": "mine.Config"}})
    config = load_config(str(tmp_path))
    assert type(config) is BertConfig
    assert not hasattr(config, "auto_map")  # which would have the model's class looked for in the folder


def test_a_folder_without_a_configuration_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json in .*save_pretrained"):
        load_config(str(tmp_path))
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_config(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model_type": "bert"',
        b"not json",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b"{}",
        b'{"hidden_size": 64}',
        b'{"model_type": "of my own"}',
        b'{"model_type": 5}',
        b'{"model_type": "bert", "hidden_size": "many"}',
    ],
)
def test_a_broken_configuration_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        load_config(str(tmp_path))


# ---- the hub


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["bert-bass-uncased", "someone/bert-bass-uncased"])
def test_an_unknown_name_while_offline_gets_the_nearest_ones(name: str) -> None:
    with pytest.raises(UnknownModelError, match="google-bert/bert-base-uncased"):
        load_config(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["", "bert base!", "a/b/c", "../nothing"])
def test_a_name_that_is_none_is_refused_all_the_same(name: str) -> None:
    with pytest.raises(UsageError):
        load_config(name)


def test_a_name_outside_the_catalog_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(name: str, **options: Any) -> BertConfig:
        asked.append((name, options))
        return BertConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(model_config, "is_hub_reachable", lambda: True)
    assert isinstance(load_config("someone/else"), BertConfig)
    assert asked == [("someone/else", {"trust_remote_code": False, "local_files_only": False})]


@pytest.mark.usefixtures("offline")
def test_offline_only_the_cache_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> BertConfig:
        seen.update(options)
        return BertConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    load_config("someone/else")
    assert seen["local_files_only"] is True


def test_code_of_the_hub_runs_only_when_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, *, trust_remote_code: bool, **options: Any) -> BertConfig:
        if not trust_remote_code:
            raise ValueError("... Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
        return BertConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(model_config, "is_hub_reachable", lambda: True)
    with pytest.raises(UsageError, match="--trust_remote_code"):
        load_config("someone/else")
    assert isinstance(load_config("someone/else", trust_remote_code=True), BertConfig)


@contextlib.contextmanager
def connection() -> Iterator[None]:
    yield


@pytest.mark.parametrize(("reachable", "answers"), [(True, True), (False, False)])
def test_one_look_tells_whether_the_hub_is_there(
    reachable: bool, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> object:
        looked.append(address)
        if not reachable:
            raise OSError("no route")
        return connection()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert model_config.is_hub_reachable() == answers
    assert len(looked) == 1


@pytest.mark.parametrize(("offline", "proxies", "answers"), [(True, {}, False), (False, {"https": "p:1"}, True)])
def test_no_look_is_taken_where_the_user_said_offline_or_a_proxy_is_between(
    offline: bool, proxies: dict[str, str], answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: object, **options: object) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert model_config.is_hub_reachable() == answers


# ---- what is read off a configuration


def test_each_task_has_an_auto_class_and_a_mapping_of_transformers() -> None:
    assert AUTO_CLASSES.keys() == TASK_MAPPINGS.keys()
    for name in AUTO_CLASSES.values():
        assert hasattr(transformers, name)
    for name in TASK_MAPPINGS.values():
        assert "bert" in getattr(modeling_auto, name) or "t5" in getattr(modeling_auto, name)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert-base-uncased", "token-classification"),
        ("roberta-base", "token-classification"),
        ("distilbert", "token-classification"),
        ("albert", "token-classification"),
        ("google/electra-base-discriminator", "token-classification"),
        ("deberta-v3-base", "token-classification"),
        ("modernbert", "token-classification"),
        ("gpt2", "causal-lm"),
        ("opt-125m", "causal-lm"),
        ("llama-3.2-1b", "causal-lm"),
        ("mistral-7b", "causal-lm"),
        ("Qwen2.5-0.5B", "causal-lm"),
        ("tinystories", "causal-lm"),
        ("t5-small", "seq2seq"),
        ("flan-t5-base", "seq2seq"),
    ],
)
def test_encoders_tag_tokens_decoders_continue_and_t5_translates(name: str, task: str) -> None:
    assert default_task(load_config(name))[0] == task


def test_an_architecture_without_a_text_head_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'vit' has no head"):
        default_task(ViTConfig())


def test_a_head_that_the_architecture_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(UsageError, match=r"llama has no head for masked-lm; it has .*causal-lm"):
        check_head(LlamaConfig(), "masked-lm")
    check_head(LlamaConfig(), "sequence-classification")
    with pytest.raises(UsageError, match="no head for token-classification"):
        check_head(transformers.OPTConfig(), "token-classification")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),  # positions start after the padding token's
        (T5Config(), None),
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (transformers.GPT2Config(n_positions=1024), 1024),
        (transformers.XLMRobertaConfig(max_position_embeddings=514), 512),
        (transformers.OPTConfig(max_position_embeddings=2048), 2048),
        (transformers.BloomConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_the_longest_input_is_known(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
}
OWN: dict[str, dict[str, Any]] = {
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 2, "pad_token_id": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


@pytest.mark.parametrize("kind", sorted({*OFFSET_POSITIONS} - {"layoutlmv3", "lilt", "longformer", "markuplm"}))
def test_one_token_more_than_the_longest_input_is_one_too_many(kind: str) -> None:
    """For those that take nothing but tokens, and do not pad them to a window."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **OWN.get(kind, {})})
    model = transformers.AutoModel.from_config(config).eval()
    longest = position_limit(config)
    assert longest == 10
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_rotary_positions_have_no_limit() -> None:
    assert position_limit(transformers.EsmConfig(position_embedding_type="rotary", max_position_embeddings=12)) is None


def test_an_unknown_architecture_is_told_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "berrt"}')
    with pytest.raises(UsageError, match="no model_type 'berrt'; the nearest is") as caught:
        load_config(str(tmp_path))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_deberta_has_no_sdpa_and_bert_has() -> None:
    assert not supports_sdpa(load_config("deberta-v3-base"), "token-classification")
    assert supports_sdpa(load_config("bert-base-uncased"), "token-classification")
    assert supports_sdpa(load_config("llama-3.2-1b"), "causal-lm")
