"""Train on a CPU in a process with limited memory, with a batch size that does not fit; print facts in JSON.

python limited.py callback 620MiB    # with BatchSizeCallback; or: auto_find, plain
"""

from __future__ import annotations

import json
import sys
import tempfile

from trainers import Pad, Seen, Texts, classifier
from transformers import Trainer, TrainingArguments

from hf_bsopt import BatchSizeCallback
from hf_bsopt.data.catalog import memory_size
from hf_bsopt.probing.host_memory import limit_this_process

REQUESTED, STEPS, LENGTH = 192, 2, 128
MODEL = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 512}


def main() -> None:
    mode, memory = sys.argv[1:]
    model = classifier(**MODEL)
    seen = Seen(model)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=REQUESTED,
        max_steps=STEPS,
        auto_find_batch_size=mode == "auto_find",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = BatchSizeCallback(memory=memory)
    callbacks = [callback] if mode == "callback" else []
    trainer = Trainer(model, arguments, Pad(), Texts([LENGTH] * 2 * REQUESTED), callbacks=callbacks)
    limit_this_process(memory_size(memory) or 0)
    error = ""
    try:
        trainer.train()
    except RuntimeError as raised:
        error = str(raised)
    report = callback.report
    facts = {
        "error": error,
        "sizes": [size for size, _ in seen.shapes],
        "micro_batch": arguments.per_device_train_batch_size,
        "accumulation": arguments.gradient_accumulation_steps,
        "steps": trainer.state.global_step,
        "ran": [] if report is None else [t.outcome for t in report.trials if t.source == "measured"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
