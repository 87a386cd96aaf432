"""Functions that save are replaced by functions that count, tested on fake modules."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_bsopt._utils.import_hooks import Action
from hf_bsopt.rehearsal import no_side_effects as no_side_effects_module
from hf_bsopt.rehearsal.no_side_effects import TRACKERS, NoSideEffects, NullObject

Installed = tuple[NoSideEffects, dict[str, Action]]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Return a NoSideEffects and its action for each module; no action has run yet."""
    actions: dict[str, Action] = {}
    monkeypatch.setattr(no_side_effects_module, "after_import", actions.update)
    for name in TRACKERS:
        monkeypatch.setenv(name, "before")
    no_side_effects = NoSideEffects()
    no_side_effects.install()
    return no_side_effects, actions


def module(name: str, **members: Any) -> Any:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def written(*_: Any, **__: Any) -> Any:
    raise AssertionError("this would have been written")


def test_a_replaced_function_does_nothing_and_counts_its_calls(
    installed: Installed,
) -> None:
    no_side_effects, actions = installed
    serialization = module("torch.serialization", save=written)
    actions["torch.serialization"](serialization)
    assert serialization.save({"weight": 1}, "model.pt") is None
    assert serialization.save({"weight": 1}, f="model.pt") is None
    assert no_side_effects.skipped == {"torch.save": 2}


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("torch.jit", ["save"]),
        ("torch.onnx", ["export"]),
        ("torch.distributed.checkpoint", ["save", "async_save", "save_state_dict"]),
        ("safetensors", ["serialize_file"]),
        ("safetensors.torch", ["save_file", "save_model"]),
        ("safetensors.numpy", ["save_file"]),
    ],
)
def test_each_function_that_saves_is_replaced(installed: Installed, name: str, functions: list[str]) -> None:
    no_side_effects, actions = installed
    fake = module(name, **dict.fromkeys(functions, written), load_file=lambda: "read")
    actions[name](fake)
    assert [getattr(fake, function)() for function in functions] == [None] * len(functions)
    assert sum(no_side_effects.skipped.values()) == len(functions)
    assert fake.load_file() == "read"


@pytest.mark.parametrize(
    ("name", "owner", "method"),
    [
        ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained"),
        ("transformers.configuration_utils", "PreTrainedConfig", "save_pretrained"),
        ("transformers.processing_utils", "ProcessorMixin", "save_pretrained"),
        ("transformers.utils.hub", "PushToHubMixin", "push_to_hub"),
        ("transformers.trainer_callback", "TrainerState", "save_to_json"),
        ("peft.peft_model", "PeftModel", "save_pretrained"),
        ("datasets.arrow_dataset", "Dataset", "push_to_hub"),
        ("lightning.pytorch.strategies.strategy", "Strategy", "save_checkpoint"),
    ],
)
def test_each_method_that_saves_is_replaced(installed: Installed, name: str, owner: str, method: str) -> None:
    no_side_effects, actions = installed
    fake = module(name, **{owner: type(owner, (), {method: written})})
    actions[name](fake)
    getattr(getattr(fake, owner)(), method)("folder")
    assert no_side_effects.skipped == {f"{owner}.{method}": 1}


def test_saving_to_a_buffer_in_memory_still_works(
    installed: Installed,
) -> None:
    no_side_effects, actions = installed
    serialization = module("torch.serialization", save=lambda obj, f, protocol=2: f.write(obj))
    actions["torch.serialization"](serialization)
    buffer = io.BytesIO()
    serialization.save(b"weights", buffer, protocol=4)
    assert buffer.getvalue() == b"weights"
    assert not no_side_effects.skipped


@pytest.fixture
def folders(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[NoSideEffects, Any, Path, Path]:
    """Return (a NoSideEffects, a changed shutil, a folder of the user, one among temporary files)."""
    no_side_effects, actions = installed
    for name in ("user", "temporary"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    fake = module("shutil", rmtree=shutil.rmtree)
    actions["shutil"](fake)
    return no_side_effects, fake, tmp_path / "user" / "checkpoint-5", tmp_path / "temporary" / "checkpoint-5"


def test_a_folder_of_the_user_is_not_removed(folders: tuple[NoSideEffects, Any, Path, Path]) -> None:
    no_side_effects, fake, user_folder, _ = folders
    for path in (user_folder, str(user_folder), os.fsencode(user_folder)):
        fake.rmtree(path, ignore_errors=True)
    assert user_folder.is_dir()
    assert no_side_effects.skipped == {"shutil.rmtree": 3}


def test_a_folder_made_by_mkdtemp_is_removed(folders: tuple[NoSideEffects, Any, Path, Path]) -> None:
    no_side_effects, fake, _, _ = folders
    folder = tempfile.mkdtemp()
    fake.rmtree(folder)
    assert not Path(folder).exists()
    assert not no_side_effects.skipped


def test_attributes_of_rmtree_are_kept(folders: tuple[NoSideEffects, Any, Path, Path]) -> None:
    assert folders[1].rmtree.avoids_symlink_attacks == shutil.rmtree.avoids_symlink_attacks


def test_an_output_folder_among_temporary_files_is_not_removed_either(
    folders: tuple[NoSideEffects, Any, Path, Path],
) -> None:
    """TrainingArguments("/tmp/out") is usual."""
    _, fake, _, earlier = folders
    fake.rmtree(earlier)
    assert earlier.is_dir()


def test_modules_of_releases_without_these_names_are_unchanged(
    installed: Installed,
) -> None:
    _, actions = installed
    for name in ("torch.jit", "transformers.modeling_utils", "datasets.dataset_dict"):
        older = module(name)
        before = dict(vars(older))
        actions[name](older)
        assert vars(older) == before


def test_save_pretrained_of_a_tokenizer_returns_no_files(installed: Installed) -> None:
    _, actions = installed
    fake = module(
        "tokenizers", PreTrainedTokenizerBase=type("PreTrainedTokenizerBase", (), {"save_pretrained": written})
    )
    actions["transformers.tokenization_utils_base"](fake)
    assert list(fake.PreTrainedTokenizerBase().save_pretrained("folder")) == []


def test_hub_functions_that_write_are_replaced_and_those_that_read_are_not(
    installed: Installed,
) -> None:
    no_side_effects, actions = installed
    names = ("upload_folder", "create_repo", "delete_file", "move_repo", "update_repo_settings", "add_collection_item")
    api: Any = type("HfApi", (), {**dict.fromkeys(names, written), "model_info": lambda _: "read"})
    fake = module("hf_api", HfApi=api, upload_folder=written, create_repo=written)
    actions["huggingface_hub.hf_api"](fake)
    for name in names:
        getattr(api(), name)(repo_id="me/model")
    fake.upload_folder(folder_path=".")
    assert str(fake.create_repo("me/model").repo_id) == ""
    assert api().model_info() == "read"
    assert no_side_effects.skipped["HfApi.upload_folder"] == 2
    assert sum(no_side_effects.skipped.values()) == len(names) + 2


def test_an_accelerator_saves_nothing_and_its_tracker_does_nothing(
    installed: Installed,
) -> None:
    no_side_effects, actions = installed
    methods = ("save_state", "save_model", "save", "init_trackers", "log", "get_tracker")
    fake = module("accelerator", Accelerator=type("Accelerator", (), dict.fromkeys(methods, written)))
    actions["accelerate.accelerator"](fake)
    accelerator = fake.Accelerator()
    accelerator.save_state("folder")
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.get_tracker("wandb").run.log({"loss": 1.0})
    assert no_side_effects.skipped == {"Accelerator.save_state": 1, "Accelerator.log": 1, "Accelerator.get_tracker": 1}


def test_all_trackers_are_disabled(installed: Installed) -> None:
    assert {name: os.environ[name] for name in TRACKERS} == TRACKERS
    assert os.environ["WANDB_MODE"] == "disabled"


@pytest.mark.parametrize("name", ["tensorboard.summary.writer.event_file_writer", "tensorboardX.event_file_writer"])
def test_event_files_are_written_to_a_temporary_folder(
    installed: Installed, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, actions = installed
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class EventFileWriter:
        def __init__(self, logdir: str, max_queue_size: int = 10) -> None:
            self.logdir, self.size = logdir, max_queue_size

    fake = module("event_file_writer", EventFileWriter=EventFileWriter)
    actions[name](fake)
    writer = fake.EventFileWriter("runs/mine", max_queue_size=3)
    assert Path(writer.logdir).parent == tmp_path
    assert writer.size == 3


def test_lightning_gets_its_dummy_logger(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    _, actions = installed
    for package in ("lightning", "lightning.pytorch", "lightning.pytorch.loggers"):
        monkeypatch.setitem(sys.modules, package, module(package, __path__=[]))
    logger = SimpleNamespace(DummyLogger=lambda: "a logger that does nothing")
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers.logger", logger)  # type: ignore[arg-type]

    class Trainer:
        def __init__(self, *, logger: object = True, max_epochs: int = 1) -> None:
            self.logger, self.max_epochs = logger, max_epochs

        save_checkpoint: Callable[..., Any] = written

    fake = module("trainer", Trainer=Trainer)
    actions["lightning.pytorch.trainer.trainer"](fake)
    trainer = fake.Trainer(logger="mine", max_epochs=3)
    trainer.save_checkpoint("last.ckpt")
    assert (trainer.logger, trainer.max_epochs) == ("a logger that does nothing", 3)


def test_each_attribute_and_call_of_a_null_object_is_itself() -> None:
    null = NullObject()
    assert null.run.config.update({"lr": 1}, allow_val_change=True) is null
    assert str(null.url) == ""
    with pytest.raises(AttributeError):
        null.__len__()
    assert isinstance(null, NullObject)


def test_each_item_of_a_null_object_is_itself() -> None:
    run: Any = NullObject()
    run["parameters"] = {"lr": 1}
    assert run["train/loss"].append(1.0) is run
