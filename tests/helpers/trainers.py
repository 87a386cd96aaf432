"""Small trainers for the tests, and observers of their training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


class Texts(Dataset[dict[str, Any]]):
    """A dataset whose examples have the given lengths."""

    def __init__(self, lengths: Sequence[int], labels_for_tokens: bool = False) -> None:
        self.lengths = list(lengths)
        self._labels_for_tokens = labels_for_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = self.lengths[index]
        tokens = [1 + (index + place) % 90 for place in range(length)]
        labels = tokens if self._labels_for_tokens else index % 2
        return {"input_ids": tokens, "attention_mask": [1] * length, "labels": labels}


class Pad:
    """A collator that pads to the longest example."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        return {name: torch.tensor([self._padded(e[name], name, length) for e in examples]) for name in examples[0]}

    def _padded(self, value: Any, name: str, length: int) -> Any:
        return value + [-100 if name == "labels" else 0] * (length - len(value)) if isinstance(value, list) else value


def classifier(dropout: float = 0.0, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    values = {**TINY, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **config}
    return BertForSequenceClassification(BertConfig(**values))


def language_model(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=128, **off))


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    plain = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 3,
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**plain, **values})


def trainer(
    folder: Path,
    model: nn.Module | None = None,
    dataset: Any = None,
    callbacks: Any = None,
    kind: type[Trainer] = Trainer,
    collator: Any = None,
    eval_dataset: Any = None,
    **values: Any,
) -> Trainer:
    return kind(
        model=classifier() if model is None else model,
        args=arguments(folder, **values),
        train_dataset=Texts([8, 12, 16, 24] * 16) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        data_collator=collator or Pad(),
        callbacks=callbacks,
    )


class Seen:
    """Records the shapes of the token ids that reach a model."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
