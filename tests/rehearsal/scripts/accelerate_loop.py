"""A training loop with accelerate that uses find_executable_batch_size and saves its state."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.utils.data import DataLoader

LENGTH = 1 << 20
accelerator = Accelerator(mixed_precision="fp16")
accelerator.init_trackers("mine")
tried: list[int] = []


@find_executable_batch_size(starting_batch_size=4096)
def train(batch_size: int) -> None:
    tried.append(batch_size)
    accelerator.free_memory()
    torch.empty(batch_size, LENGTH, device=accelerator.device)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader([torch.zeros(64)] * 80, batch_size=8))
    for step, batch in enumerate(loader):
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
        accelerator.save_state("state")
        accelerator.save_model(model, "model")
        accelerator.save(model.state_dict(), "model.pt")
        print("step", step, "of a batch found after", tried, flush=True)


train()
