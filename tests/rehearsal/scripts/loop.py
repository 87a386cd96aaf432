"""A plain PyTorch loop that saves after each step and forks a child process that does steps of its own."""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=8)
options = parser.parse_args()


def train(who: str, device: str, batch: int, steps: int) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        outputs = model(torch.zeros(batch, 1024, device=device))
        outputs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, "of the", who, flush=True)
        torch.save(model.state_dict(), "model.pt")


if os.fork() == 0:
    train("child", "cpu", batch=1, steps=5)
    os._exit(0)
os.wait()
train("script", "cuda" if torch.cuda.is_available() else "cpu", options.batch, steps=10)
print("after the loop")
