"""Train with a batch that does not fit on the GPU; print facts in JSON.

python trained.py callback    # with BatchSizeCallback; or: auto_find, plain, full (the GPU's memory is in use)
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_bsopt import BatchSizeCallback, BatchSizeError

REQUESTED, STEPS, LENGTH = 768, 2, 128


class Texts(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 4 * REQUESTED

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [1] * LENGTH, "attention_mask": [1] * LENGTH, "labels": index % 2}


def main() -> None:
    mode = sys.argv[1]
    occupied = torch.empty(2600 * 2**20 if mode == "full" else 1, dtype=torch.uint8, device="cuda")
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model = BertForSequenceClassification(config)
    shapes: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, kw: shapes.append(list(kw["input_ids"].shape)), with_kwargs=True)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=REQUESTED,
        max_steps=STEPS,
        fp16=True,
        auto_find_batch_size=mode == "auto_find",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    callback = BatchSizeCallback()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Texts(), callbacks=[callback] if mode in ("callback", "full") else []
    )
    random_numbers: list[bool] = []
    size = callback.size

    def checked_size(*args: Any) -> None:
        before = torch.cuda.get_rng_state()
        size(*args)
        random_numbers.append(torch.equal(before, torch.cuda.get_rng_state()))

    callback.size = checked_size  # type: ignore[method-assign]
    error = ""
    try:
        trainer.train()
    except (torch.OutOfMemoryError, BatchSizeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    del occupied
    report = callback.report
    print(
        json.dumps(
            {
                "error": error,
                "shapes": shapes,
                "micro_batch": arguments.per_device_train_batch_size,
                "accumulation": arguments.gradient_accumulation_steps,
                "steps": trainer.state.global_step,
                "errors": torch.cuda.memory_stats()["num_ooms"],
                "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
                "reserved": torch.cuda.max_memory_reserved(),
                "random_numbers": random_numbers,
                "source": "" if report is None else report.source,
                "ran": [] if report is None else [t.outcome for t in report.trials if t.source != "predicted"],
                "logged": [entry for entry in trainer.state.log_history if "memory_utilization" in entry],
            }
        )
    )


if __name__ == "__main__":
    main()
