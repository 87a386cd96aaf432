"""A training script that saves everything: checkpoints, models, metrics, a model card, uploads to the hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

LENGTH = 64

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--accumulation", type=int, default=2)
parser.add_argument("--no_files", action="store_true")
options = parser.parse_args()


def example(index: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(LENGTH, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "labels": torch.tensor(index % 2)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


config = BertConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
model = BertForSequenceClassification(config)
arguments = TrainingArguments(
    "out",
    per_device_train_batch_size=options.batch,
    gradient_accumulation_steps=options.accumulation,
    num_train_epochs=3,
    logging_steps=1,
    disable_tqdm=True,
    dataloader_num_workers=0 if options.no_files else 1,
    eval_strategy="no" if options.no_files else "steps",
    eval_steps=1,
    save_strategy="no" if options.no_files else "steps",
    save_steps=1,
    save_total_limit=1,
    load_best_model_at_end=not options.no_files,
    metric_for_best_model="accuracy",
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=[example(index) for index in range(1024)],  # type: ignore[arg-type]
    eval_dataset=[example(index) for index in range(64)],  # type: ignore[arg-type]
    compute_metrics=accuracy,
)
trained = trainer.train()
facts: dict[str, Any] = {
    "trained": trained.metrics,
    "loss": trained.training_loss,
    "history": trainer.state.log_history,
}

if not options.no_files:
    facts["evaluated"] = trainer.evaluate()
    facts["predicted"] = trainer.predict(trainer.eval_dataset).metrics  # type: ignore[arg-type]
    trainer.save_model()
    trainer.save_model("out/best")
    trainer.save_state()
    try:
        trainer.log_metrics("train", trained.metrics)
        facts["log_metrics"] = "logged"
    except Exception as error:
        facts["log_metrics"] = repr(error)
    trainer.save_metrics("train", trained.metrics)
    trainer.create_model_card()
    trainer.push_to_hub()
    model.save_pretrained("final")
    model.push_to_hub("me/model")
    config.save_pretrained("final")
    torch.save(model.state_dict(), "model.pt")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "model.safetensors")
    facts["files"] = sorted(str(path) for path in Path().rglob("*") if path.is_file())

print("FACTS", json.dumps(facts))
