"""A training script that resumes from its last checkpoint and keeps only the best one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


arguments = TrainingArguments(
    "out",
    max_steps=10,
    save_strategy="steps",
    save_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    save_total_limit=1,
    load_best_model_at_end=True,
    disable_tqdm=True,
)
data = [{"x": torch.ones(4), "labels": torch.ones(1)} for _ in range(256)]
trainer = Trainer(model=Model(), args=arguments, train_dataset=data, eval_dataset=data[:8])  # type: ignore[arg-type]
print("GLOBAL STEP", trainer.train(resume_from_checkpoint=True).global_step)
