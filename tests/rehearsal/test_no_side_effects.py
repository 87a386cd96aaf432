"""What writes is replaced by what counts; tried on modules that stand in for the real ones."""

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
from hf_bsopt.rehearsal import no_side_effects as room
from hf_bsopt.rehearsal.no_side_effects import TRACKERS, Nothing, Nowhere


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[Nowhere, dict[str, Action]]:
    """What would be done to each module, none of it done."""
    actions: dict[str, Action] = {}
    monkeypatch.setattr(room, "after_import", actions.update)
    for name in TRACKERS:
        monkeypatch.setenv(name, "before")
    nowhere = Nowhere()
    nowhere.install()
    return nowhere, actions


def module(name: str, **members: Any) -> Any:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def written(*_: Any, **__: Any) -> Any:
    raise AssertionError("this would have been written")


def test_a_replaced_function_does_nothing_and_counts(installed: tuple[Nowhere, dict[str, Action]]) -> None:
    nowhere, actions = installed
    serialization = module("torch.serialization", save=written)
    actions["torch.serialization"](serialization)
    assert serialization.save({"weight": 1}, "model.pt") is None
    assert serialization.save({"weight": 1}, f="model.pt") is None
    assert nowhere.asked == {"torch.save": 2}


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
def test_every_function_that_saves_is_replaced(
    installed: tuple[Nowhere, dict[str, Action]], name: str, functions: list[str]
) -> None:
    nowhere, actions = installed
    fake = module(name, **dict.fromkeys(functions, written), load_file=lambda: "read")
    actions[name](fake)
    assert [getattr(fake, function)() for function in functions] == [None] * len(functions)
    assert sum(nowhere.asked.values()) == len(functions)
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
def test_every_method_that_saves_is_replaced(
    installed: tuple[Nowhere, dict[str, Action]], name: str, owner: str, method: str
) -> None:
    nowhere, actions = installed
    fake = module(name, **{owner: type(owner, (), {method: written})})
    actions[name](fake)
    getattr(getattr(fake, owner)(), method)("folder")
    assert nowhere.asked == {f"{owner}.{method}": 1}


def test_a_buffer_in_memory_is_written_for_whoever_reads_it_again(
    installed: tuple[Nowhere, dict[str, Action]],
) -> None:
    nowhere, actions = installed
    serialization = module("torch.serialization", save=lambda obj, f, protocol=2: f.write(obj))
    actions["torch.serialization"](serialization)
    buffer = io.BytesIO()
    serialization.save(b"weights", buffer, protocol=4)
    assert buffer.getvalue() == b"weights"
    assert not nowhere.asked


@pytest.fixture
def folders(
    installed: tuple[Nowhere, dict[str, Action]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Nowhere, Any, Path, Path]:
    """(what was asked, a shutil, a folder of the user's, the folder for temporary files)."""
    nowhere, actions = installed
    for name in ("user", "temporary"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    fake = module("shutil", rmtree=shutil.rmtree)
    actions["shutil"](fake)
    return nowhere, fake, tmp_path / "user" / "checkpoint-5", tmp_path / "temporary" / "checkpoint-5"


def test_a_folder_of_the_user_is_not_removed(folders: tuple[Nowhere, Any, Path, Path]) -> None:
    nowhere, fake, of_the_user, _ = folders
    for path in (of_the_user, str(of_the_user), os.fsencode(of_the_user)):
        fake.rmtree(path, ignore_errors=True)
    assert of_the_user.is_dir()
    assert nowhere.asked == {"shutil.rmtree": 3}


def test_a_folder_that_the_script_made_for_a_while_is_removed(folders: tuple[Nowhere, Any, Path, Path]) -> None:
    nowhere, fake, _, _ = folders
    folder = tempfile.mkdtemp()
    fake.rmtree(folder)
    assert not Path(folder).exists()
    assert not nowhere.asked


def test_what_is_known_of_the_function_is_kept(folders: tuple[Nowhere, Any, Path, Path]) -> None:
    assert folders[1].rmtree.avoids_symlink_attacks == shutil.rmtree.avoids_symlink_attacks


def test_an_output_folder_among_temporary_files_is_not_removed_either(
    folders: tuple[Nowhere, Any, Path, Path],
) -> None:
    """TrainingArguments("/tmp/out") is usual."""
    _, fake, _, earlier = folders
    fake.rmtree(earlier)
    assert earlier.is_dir()


def test_a_release_without_one_of_them_is_left_alone(installed: tuple[Nowhere, dict[str, Action]]) -> None:
    _, actions = installed
    for name in ("torch.jit", "transformers.modeling_utils", "datasets.dataset_dict"):
        older = module(name)
        before = dict(vars(older))
        actions[name](older)
        assert vars(older) == before


def test_a_tokenizer_says_that_it_wrote_no_files(installed: tuple[Nowhere, dict[str, Action]]) -> None:
    _, actions = installed
    fake = module(
        "tokenizers", PreTrainedTokenizerBase=type("PreTrainedTokenizerBase", (), {"save_pretrained": written})
    )
    actions["transformers.tokenization_utils_base"](fake)
    assert list(fake.PreTrainedTokenizerBase().save_pretrained("folder")) == []


def test_the_hub_is_only_read_from(installed: tuple[Nowhere, dict[str, Action]]) -> None:
    nowhere, actions = installed
    names = ("upload_folder", "create_repo", "delete_file", "move_repo", "update_repo_settings", "add_collection_item")
    api: Any = type("HfApi", (), {**dict.fromkeys(names, written), "model_info": lambda _: "read"})
    fake = module("hf_api", HfApi=api, upload_folder=written, create_repo=written)
    actions["huggingface_hub.hf_api"](fake)
    for name in names:
        getattr(api(), name)(repo_id="me/model")
    fake.upload_folder(folder_path=".")
    assert str(fake.create_repo("me/model").repo_id) == ""
    assert api().model_info() == "read"
    assert nowhere.asked["HfApi.upload_folder"] == 2
    assert sum(nowhere.asked.values()) == len(names) + 2


def test_an_accelerator_saves_nothing_and_its_tracker_is_nothing(
    installed: tuple[Nowhere, dict[str, Action]],
) -> None:
    nowhere, actions = installed
    methods = ("save_state", "save_model", "save", "init_trackers", "log", "get_tracker")
    fake = module("accelerator", Accelerator=type("Accelerator", (), dict.fromkeys(methods, written)))
    actions["accelerate.accelerator"](fake)
    accelerator = fake.Accelerator()
    accelerator.save_state("folder")
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.get_tracker("wandb").run.log({"loss": 1.0})
    assert nowhere.asked == {"Accelerator.save_state": 1, "Accelerator.log": 1, "Accelerator.get_tracker": 1}


def test_every_tracker_is_told_to_do_nothing(installed: tuple[Nowhere, dict[str, Action]]) -> None:
    assert {name: os.environ[name] for name in TRACKERS} == TRACKERS
    assert os.environ["WANDB_MODE"] == "disabled"


@pytest.mark.parametrize("name", ["tensorboard.summary.writer.event_file_writer", "tensorboardX.event_file_writer"])
def test_event_files_go_into_a_temporary_folder(
    installed: tuple[Nowhere, dict[str, Action]], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_lightning_gets_its_own_logger_that_logs_nothing(
    installed: tuple[Nowhere, dict[str, Action]], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_nothing_is_nothing_however_deep_it_is_asked() -> None:
    nothing = Nothing()
    assert nothing.run.config.update({"lr": 1}, allow_val_change=True) is nothing
    assert str(nothing.url) == ""
    with pytest.raises(AttributeError):
        nothing.__len__()
    assert isinstance(nothing, Nothing)


def test_the_items_of_nothing_are_nothing() -> None:
    run: Any = Nothing()
    run["parameters"] = {"lr": 1}
    assert run["train/loss"].append(1.0) is run
