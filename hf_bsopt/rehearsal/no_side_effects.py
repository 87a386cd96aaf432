"""Keep a rehearsed script from saving anything that could be mistaken for a result.

Models, checkpoints and metrics are not saved, nothing is uploaded to the hub or sent to a tracker. Right after a module
is imported, its functions that save are replaced by functions that do nothing and count their calls.
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._utils.import_hooks import Action, after_import

DISCARD_FOLDER = str(Path(tempfile.gettempdir()) / "hf_bsopt_discarded")
TRACKERS = {
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "NEPTUNE_MODE": "debug",
    "SWANLAB_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "MLFLOW_TRACKING_URI": f"file:{DISCARD_FOLDER}",
    "CODECARBON_SAVE_TO_FILE": "false",
    "TRACKIO_DIR": DISCARD_FOLDER,
}
"""Environment variables that disable each tracker."""

HUB_WRITE_PREFIXES = (
    "upload",
    "create_",
    "delete_",
    "move_",
    "update_",
    "super_squash",
    "preupload",
    "add_",
    "duplicate_",
)


class NullObject:
    """Stands in for any object: each attribute, item and call of it is itself, and its text is empty."""

    def __getattr__(self, name: str) -> NullObject:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> NullObject:
        return self

    def __getitem__(self, name: Any) -> NullObject:
        return self

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def __enter__(self) -> NullObject:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __str__(self) -> str:
        return ""


class NoSideEffects:
    """Replaces functions that save or upload; ``skipped`` counts their calls by name."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def install(self) -> None:
        """Disable trackers, and replace functions as soon as their modules are imported."""
        os.environ.update(TRACKERS)
        after_import(
            {
                "shutil": self._keep_folders,
                "torch.serialization": self._save_to_memory_only,
                "torch.jit": self._functions("save"),
                "torch.onnx": self._functions("export"),
                "torch.distributed.checkpoint": self._functions("save", "async_save", "save_state_dict"),
                "safetensors": self._functions("serialize_file"),
                "safetensors.torch": self._functions("save_file", "save_model"),
                "safetensors.numpy": self._functions("save_file"),
                "transformers.modeling_utils": self._methods("PreTrainedModel", "save_pretrained", "push_to_hub"),
                "transformers.configuration_utils": self._methods("PreTrainedConfig", "save_pretrained", "push_to_hub"),
                "transformers.tokenization_utils_base": self._methods(
                    "PreTrainedTokenizerBase", "save_pretrained", "push_to_hub", returns=()
                ),
                "transformers.processing_utils": self._methods("ProcessorMixin", "save_pretrained", "push_to_hub"),
                "transformers.image_processing_base": self._methods("ImageProcessingMixin", "save_pretrained"),
                "transformers.feature_extraction_utils": self._methods("FeatureExtractionMixin", "save_pretrained"),
                "transformers.generation.configuration_utils": self._methods("GenerationConfig", "save_pretrained"),
                "transformers.utils.hub": self._methods("PushToHubMixin", "push_to_hub", "_upload_modified_files"),
                "transformers.trainer_callback": self._methods("TrainerState", "save_to_json"),
                "peft.peft_model": self._methods("PeftModel", "save_pretrained"),
                "accelerate.accelerator": self._accelerator,
                "huggingface_hub.hf_api": self._hub,
                "datasets.arrow_dataset": self._methods("Dataset", "push_to_hub"),
                "datasets.dataset_dict": self._methods("DatasetDict", "push_to_hub"),
                "tensorboard.summary.writer.event_file_writer": _discard_events("EventFileWriter"),
                "tensorboardX.event_file_writer": _discard_events("EventFileWriter"),
                "lightning.pytorch.trainer.trainer": self._lightning("lightning.pytorch"),
                "pytorch_lightning.trainer.trainer": self._lightning("pytorch_lightning"),
                "lightning.fabric.strategies.strategy": self._checkpoints,
                "lightning_fabric.strategies.strategy": self._checkpoints,
                "lightning.pytorch.strategies.strategy": self._checkpoints,
                "pytorch_lightning.strategies.strategy": self._checkpoints,
            }
        )

    def replace(self, owner: Any, *names: str, returns: Any = None) -> None:
        """Replace those of ``names`` that the owner has: releases name them differently."""
        for name in names:
            if callable(getattr(owner, name, None)):
                setattr(owner, name, self._counting(f"{owner.__name__.removesuffix('.serialization')}.{name}", returns))

    def _counting(self, name: str, returns: Any) -> Callable[..., Any]:
        def skip(*_: Any, **__: Any) -> Any:
            self.skipped[name] += 1
            return returns

        return skip

    def _save_to_memory_only(self, module: Any) -> None:
        """Skip torch.save except to a buffer in memory, which is no result and is often read again at once."""
        original = module.save

        def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
            if isinstance(f, io.BytesIO):
                original(obj, f, *args, **options)
            else:
                self.skipped["torch.save"] += 1

        module.save = save

    def _keep_folders(self, module: Any) -> None:
        """Remove only folders from mkdtemp: Trainer removes old checkpoints, scripts empty their output folder."""
        original, original_mkdtemp = module.rmtree, tempfile.mkdtemp
        temporary: list[Path] = []

        @functools.wraps(original_mkdtemp)
        def mkdtemp(*args: Any, **options: Any) -> Any:
            folder = original_mkdtemp(*args, **options)
            temporary.append(Path(os.fsdecode(folder)).resolve())
            return folder

        @functools.wraps(original)
        def rmtree(path: Any, *args: Any, **options: Any) -> None:
            if isinstance(path, int) or _is_in(Path(os.fsdecode(path)).resolve(), temporary):
                original(path, *args, **options)
            else:
                self.skipped["shutil.rmtree"] += 1

        tempfile.mkdtemp = mkdtemp
        module.rmtree = rmtree

    def _functions(self, *names: str) -> Action:
        return lambda module: self.replace(module, *names)

    def _methods(self, class_name: str, *names: str, returns: Any = None) -> Action:
        def act(module: Any) -> None:
            owner = getattr(module, class_name, None)
            if owner is not None:
                self.replace(owner, *names, returns=returns)

        return act

    def _accelerator(self, module: Any) -> None:
        owner = module.Accelerator
        self.replace(owner, "save_state", "save_model", "save", "init_trackers", "log")
        self.replace(owner, "get_tracker", returns=NullObject())

    def _hub(self, module: Any) -> None:
        for name in dir(module.HfApi):
            if name.startswith(HUB_WRITE_PREFIXES):
                self.replace(module.HfApi, name, returns=NullObject())
                if hasattr(module, name):
                    setattr(module, name, getattr(module.HfApi, name))

    def _checkpoints(self, module: Any) -> None:
        self.replace(module.Strategy, "save_checkpoint", "remove_checkpoint")

    def _lightning(self, package: str) -> Action:
        """Give Lightning its own DummyLogger, since its callbacks need a logger."""

        def act(module: Any) -> None:
            import importlib

            original = module.Trainer.__init__

            def init(trainer: Any, *args: Any, **options: Any) -> None:
                options["logger"] = importlib.import_module(f"{package}.loggers.logger").DummyLogger()
                original(trainer, *args, **options)

            module.Trainer.__init__ = init
            self.replace(module.Trainer, "save_checkpoint")

        return act


def _is_in(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _discard_events(class_name: str) -> Action:
    """Return an action that makes the writer put its event files into a temporary folder."""

    def act(module: Any) -> None:
        owner = getattr(module, class_name)
        original = owner.__init__

        def init(writer: Any, _: str, *args: Any, **options: Any) -> None:
            original(writer, tempfile.mkdtemp(prefix="hf_bsopt_discarded_"), *args, **options)

        owner.__init__ = init

    return act
