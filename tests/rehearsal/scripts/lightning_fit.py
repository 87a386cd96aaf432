"""Train with Lightning, with its default checkpoints and logger."""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        print("batch", index, flush=True)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


trainer = lightning.Trainer(max_epochs=5, accelerator="gpu", devices=1, log_every_n_steps=1, enable_progress_bar=False)
loader = DataLoader([torch.zeros(64)] * 80, batch_size=8)  # type: ignore[arg-type]
trainer.fit(Module(), loader)
trainer.save_checkpoint("last.ckpt")
