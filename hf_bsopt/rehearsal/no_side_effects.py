"""What a rehearsed script may not do: leave anything behind that could pass for a result.

Models, checkpoints and metrics are not saved, nothing goes to the hub or to a tracker. Functions are replaced right
after their module was imported, each by one that does nothing and counts that it was asked to.
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

SCRATCH = str(Path(tempfile.gettempdir()) / "hf_bsopt_nowhere")
TRACKERS = {
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "NEPTUNE_MODE": "debug",
    "SWANLAB_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "MLFLOW_TRACKING_URI": f"file:{SCRATCH}",
    "CODECARBON_SAVE_TO_FILE": "false",
    "TRACKIO_DIR": SCRATCH,
}
"""Each tracker's own way of being told to do nothing."""

OF_HUB = ("upload", "create_", "delete_", "move_", "update_", "super_squash", "preupload", "add_", "duplicate_")


class Nothing:
    """Whatever was asked for: every attribute of it is nothing again, and its text is empty."""

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Nothing:
        return self

    def __getitem__(self, name: Any) -> Nothing:
        return self

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __str__(self) -> str:
        return ""


class Nowhere:
    """Replaces what writes; ``asked`` counts what was asked for, by name."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def install(self) -> None:
        os.environ.update(TRACKERS)
        after_import(
            {
                "shutil": self._keep_folders,
                "torch.serialization": self._save_to_memory_only,
                "torch.jit": self._of("save"),
                "torch.onnx": self._of("export"),
                "torch.distributed.checkpoint": self._of("save", "async_save", "save_state_dict"),
                "safetensors": self._of("serialize_file"),
                "safetensors.torch": self._of("save_file", "save_model"),
                "safetensors.numpy": self._of("save_file"),
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
                "tensorboard.summary.writer.event_file_writer": _into_scratch("EventFileWriter"),
                "tensorboardX.event_file_writer": _into_scratch("EventFileWriter"),
                "lightning.pytorch.trainer.trainer": self._lightning("lightning.pytorch"),
                "pytorch_lightning.trainer.trainer": self._lightning("pytorch_lightning"),
                "lightning.fabric.strategies.strategy": self._checkpoints,
                "lightning_fabric.strategies.strategy": self._checkpoints,
                "lightning.pytorch.strategies.strategy": self._checkpoints,
                "pytorch_lightning.strategies.strategy": self._checkpoints,
            }
        )

    def replace(self, owner: Any, *names: str, returns: Any = None) -> None:
        """Whatever of these the owner has: releases differ in what they call it."""
        for name in names:
            if callable(getattr(owner, name, None)):
                setattr(owner, name, self._counting(f"{owner.__name__.removesuffix('.serialization')}.{name}", returns))

    def _counting(self, name: str, returns: Any) -> Callable[..., Any]:
        def nowhere(*_: Any, **__: Any) -> Any:
            self.asked[name] += 1
            return returns

        return nowhere

    def _save_to_memory_only(self, module: Any) -> None:
        """A buffer in memory is nobody's result, and is often read again at once."""
        original = module.save

        def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
            if isinstance(f, io.BytesIO):
                original(obj, f, *args, **options)
            else:
                self.asked["torch.save"] += 1

        module.save = save

    def _keep_folders(self, module: Any) -> None:
        """Trainer removes old checkpoints in several places, and scripts empty their output folder."""
        original, make = module.rmtree, tempfile.mkdtemp
        scratch: list[Path] = []

        @functools.wraps(make)
        def mkdtemp(*args: Any, **options: Any) -> Any:
            folder = make(*args, **options)
            scratch.append(Path(os.fsdecode(folder)).resolve())
            return folder

        @functools.wraps(original)
        def rmtree(path: Any, *args: Any, **options: Any) -> None:
            if isinstance(path, int) or _is_in(Path(os.fsdecode(path)).resolve(), scratch):
                original(path, *args, **options)
            else:
                self.asked["shutil.rmtree"] += 1

        tempfile.mkdtemp = mkdtemp
        module.rmtree = rmtree

    def _of(self, *names: str) -> Action:
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
        self.replace(owner, "get_tracker", returns=Nothing())

    def _hub(self, module: Any) -> None:
        for name in dir(module.HfApi):
            if name.startswith(OF_HUB):
                self.replace(module.HfApi, name, returns=Nothing())
                if hasattr(module, name):
                    setattr(module, name, getattr(module.HfApi, name))

    def _checkpoints(self, module: Any) -> None:
        self.replace(module.Strategy, "save_checkpoint", "remove_checkpoint")

    def _lightning(self, package: str) -> Action:
        """Its callbacks insist on a logger, so that it gets its own that does nothing."""

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


def _into_scratch(class_name: str) -> Action:
    """A writer of event files, which writes them into a temporary folder."""

    def act(module: Any) -> None:
        owner = getattr(module, class_name)
        original = owner.__init__

        def init(writer: Any, _: str, *args: Any, **options: Any) -> None:
            original(writer, tempfile.mkdtemp(prefix="hf_bsopt_nowhere_"), *args, **options)

        owner.__init__ = init

    return act
