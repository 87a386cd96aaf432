"""Claims about loading a model's configuration: `load_config` of `hf_bsopt.workloads.model_config`."""

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
from huggingface_hub import constants
from transformers import AutoConfig, AutoModel, BertConfig, LlamaConfig

from hf_bsopt.data import catalog
from hf_bsopt.errors import UnknownModelError, UsageError
from hf_bsopt.workloads import model_config
from hf_bsopt.workloads.heads import AUTO_CLASSES, default_task
from hf_bsopt.workloads.model_config import load_config
from hf_bsopt.workloads.positions import position_limit


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config, "is_hub_reachable", lambda: False)


def write(folder: Path, values: object) -> Path:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


TINY = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 77}

# ---- the catalog


@pytest.mark.parametrize("name", ["dmis-lab/biobert-v1.1", "biobert", "BioBERT"])
def test_a_model_of_the_catalog_is_loaded_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    monkeypatch.setattr(model_config, "is_hub_reachable", no_network)
    config = load_config(name)
    assert isinstance(config, BertConfig)
    assert config.vocab_size == 28996


def test_every_configuration_of_the_catalog_can_be_loaded_and_has_a_default_task() -> None:
    for name in catalog.known_models():
        config = load_config(name)
        task, reason = default_task(config)
        assert task in AUTO_CLASSES
        assert reason
        limit = position_limit(config)
        assert limit is None or limit >= 256


@pytest.mark.parametrize("name", catalog.known_models())
def test_the_catalog_has_the_number_of_parameters_of_the_base_model(name: str) -> None:
    entry = catalog.model_entry(name)
    assert entry is not None
    with torch.device("meta"):
        model = AutoModel.from_config(load_config(name))
    assert entry.parameters == model.num_parameters()


def test_each_call_returns_a_new_configuration() -> None:
    load_config("bert-base-uncased").num_hidden_layers = 1
    assert load_config("bert-base-uncased").num_hidden_layers == 12


# ---- a folder


def test_the_configuration_of_a_folder_is_loaded(tmp_path: Path) -> None:
    config = load_config(str(write(tmp_path, TINY)))
    assert isinstance(config, BertConfig)
    assert (config.hidden_size, config.vocab_size) == (64, 77)


def test_the_path_may_be_that_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, TINY)
    assert load_config(str(tmp_path / "config.json")).hidden_size == 64


def test_a_folder_takes_precedence_over_a_model_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    write(tmp_path / "gpt2", TINY)
    monkeypatch.chdir(tmp_path)
    assert load_config("gpt2").model_type == "bert"


def test_a_configuration_written_by_save_pretrained_is_loaded(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_key_value_heads=2).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("llama", 64, 2)


def test_code_that_a_folder_refers_to_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    write(tmp_path, {**TINY, "auto_map": {"AutoConfig": "mine.Config"}})
    config = load_config(str(tmp_path))
    assert type(config) is BertConfig
    assert not hasattr(config, "auto_map")  # otherwise the model's class would be looked for in the folder


def test_a_folder_without_a_configuration_is_refused_with_how_to_write_one(tmp_path: Path) -> None:
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
def test_an_unknown_name_is_refused_offline_with_the_nearest_names(name: str) -> None:
    with pytest.raises(UnknownModelError, match="google-bert/bert-base-uncased"):
        load_config(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["", "bert base!", "a/b/c", "../nothing"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        load_config(name)


def test_a_name_that_is_not_in_the_catalog_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(name: str, **options: Any) -> BertConfig:
        requests.append((name, options))
        return BertConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(model_config, "is_hub_reachable", lambda: True)
    assert isinstance(load_config("someone/else"), BertConfig)
    assert requests == [("someone/else", {"trust_remote_code": False, "local_files_only": False})]


@pytest.mark.usefixtures("offline")
def test_offline_only_the_local_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> BertConfig:
        seen.update(options)
        return BertConfig()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    load_config("someone/else")
    assert seen["local_files_only"] is True


def test_code_from_the_hub_is_run_only_if_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(("reachable", "expected"), [(True, True), (False, False)])
def test_the_hub_is_tried_once_to_see_if_it_is_reachable(
    reachable: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> object:
        attempts.append(address)
        if not reachable:
            raise OSError("no route")
        return connection()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert model_config.is_hub_reachable() == expected
    assert len(attempts) == 1


@pytest.mark.parametrize(("offline", "proxies", "expected"), [(True, {}, False), (False, {"https": "p:1"}, True)])
def test_the_hub_is_not_tried_when_offline_is_set_or_there_is_a_proxy(
    offline: bool, proxies: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: object, **options: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert model_config.is_hub_reachable() == expected


def test_an_unknown_architecture_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "berrt"}')
    with pytest.raises(UsageError, match="no model_type 'berrt'; the nearest is") as caught:
        load_config(str(tmp_path))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
