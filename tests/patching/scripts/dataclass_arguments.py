"""Fine-tune a token classifier; started with HfArgumentParser."""
from dataclasses import dataclass, field
from typing import Optional

from transformers import HfArgumentParser, Trainer, TrainingArguments


@dataclass
class DataArguments:
    max_seq_length: int = field(
        default=256,
        metadata={"help": "Longest sequence; batch_size = 16 was tuned for 256."},
    )
    pad_to_max_length: bool = field(default=False)


@dataclass
class RunArguments:
    lr: float = 3e-5
    train_batch_size: int = field(default=16, metadata={"help": "per device"})
    eval_batch_size: Optional[int] = field(default=None)
    warmup_steps: int = field(default=100)


def main():
    parser = HfArgumentParser((DataArguments, RunArguments))
    data_args, run_args = parser.parse_args_into_dataclasses()
    args = TrainingArguments(
        output_dir="out", learning_rate=run_args.lr, warmup_steps=run_args.warmup_steps,
        per_device_train_batch_size=run_args.train_batch_size,
    )
    Trainer(args=args)


if __name__ == "__main__":
    main()
