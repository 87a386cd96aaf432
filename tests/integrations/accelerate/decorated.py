"""Run the same training with accelerate's decorator or with ours on the visible GPU; print facts in JSON.

    python decorated.py ours outside bert-mini 128 fp16 2048  # whose, where, model, length, precision, start

outside: model and optimizer are created once, as in the docstring of accelerate's decorator; inside: by the training
function, as in its guide on memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import find_executable_batch_size as accelerates
from torch import nn

from hf_bsopt.integrations.accelerate.accelerator import find_executable_batch_size as ours
from hf_bsopt.workloads.workload import Workload, describe

STEPS = 3


def main() -> None:
    whose, place, name, length, precision, start = sys.argv[1:]
    accelerator = Accelerator(mixed_precision=precision)
    workload = describe(name, max_length=int(length), precision=precision)
    tried: list[int] = []
    made = None if place == "inside" else model_and_optimizer(accelerator, workload)

    def train(batch_size: int) -> int:
        tried.append(batch_size)
        if place == "inside":
            accelerator.free_memory()
        model, optimizer = made or model_and_optimizer(accelerator, workload)
        for _ in range(STEPS):
            loss = model(**workload.batch(batch_size, "cuda")).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return batch_size

    decorate: Any = ours if whose == "ours" else accelerates
    training = decorate(train, starting_batch_size=int(start))
    found = training()
    facts = {"found": found, "tried": tried, "errors": torch.cuda.memory_stats()["num_ooms"]}
    if whose == "ours":
        facts["details"] = [attempt.detail for attempt in training.report.attempts]
        facts["peaks"] = [attempt.peak.reserved_bytes for attempt in training.report.attempts]
        facts["fits"] = [attempt.fits for attempt in training.report.attempts]
        facts["sizes"] = [attempt.batch_size for attempt in training.report.attempts]
    print(json.dumps(facts))


def model_and_optimizer(accelerator: Accelerator, workload: Workload) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.device("cuda"):
        model = workload.build()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prepared: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(model, optimizer)
    return prepared


if __name__ == "__main__":
    main()
