"""Compare the batch sizes of a published guide with the tool's: the Markdown table in docs/tables.md.

    python benchmarks/guide_tables.py

The guide's figures are copied unchanged from a "Batch Size Optimization Guide" for fine-tuning in fp16 on Kaggle.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import transformers

from hf_bsopt.options import ModelOptions, Options
from hf_bsopt.tables.table import batch_size_table


@dataclass(frozen=True)
class Row:
    """One line of the guide. ``most``: its "max batch (risky)"; None if it gives none."""

    gpu: str
    name: str
    model: str
    max_length: int
    optimal: int
    most: int | None
    trained: tuple[str, ...]


ENCODER, DECODER, QUANTIZED = ("sdpa", "eager"), ("all weights", "LoRA"), ("4-bit LoRA",)
GUIDE = (
    Row("T4", "BERT-base", "google-bert/bert-base-uncased", 512, 32, 40, ENCODER),
    Row("T4", "BioBERT v1.1", "dmis-lab/biobert-v1.1", 512, 32, 40, ENCODER),
    Row("T4", "PubMedBERT", "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext", 512, 32, 40, ENCODER),
    Row("T4", "SciBERT", "allenai/scibert_scivocab_uncased", 512, 32, 40, ENCODER),
    Row("T4", "BERT-base", "google-bert/bert-base-uncased", 256, 64, 80, ENCODER),
    Row("A100-40GB", "BERT-base", "google-bert/bert-base-uncased", 512, 128, None, ENCODER),
    Row("A100-40GB", "Llama-3.2-3B", "meta-llama/Llama-3.2-3B", 512, 32, None, DECODER),
    Row("A100-40GB", "Llama-3.2-3B (4-bit)", "meta-llama/Llama-3.2-3B", 512, 64, None, QUANTIZED),
)
TRAINED = {
    "sdpa": ("fp16, SDPA attention", ModelOptions(precision="fp16", attention="sdpa")),
    "eager": ("fp16, eager attention", ModelOptions(precision="fp16", attention="eager")),
    "all weights": ("bf16, all weights", ModelOptions(precision="bf16")),
    "LoRA": ("bf16, LoRA r=16", ModelOptions(precision="bf16", lora_r=16)),
    "4-bit LoRA": ("bf16, 4-bit, LoRA r=16", ModelOptions(precision="bf16", lora_r=16, load_in_4bit=True)),
}


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    frames = {how: _frame(how) for how in TRAINED}
    notes: list[str] = []
    print("| GPU | Model | Length | Guide: optimal | max | Trained as | Tool: optimal | max (risky) | safe | VRAM |")
    print("|---|---|---:|---:|---:|---|---:|---:|---:|---:|")
    for row in GUIDE:
        for how in row.trained:
            frame = frames[how]
            is_it = (frame["gpu"] == row.gpu) & (frame["model"] == row.model) & (frame["max_length"] == row.max_length)
            (found,) = frame[is_it].to_dict("records")
            print(f"| {' | '.join([*_guide(row, how == row.trained[0]), TRAINED[how][0], *_tool(found)])} |")
            if pd.isna(found["optimal"]):
                notes.append(f"{row.name}, {TRAINED[how][0]}: {found['why']}.")
    for note in notes:
        print(f"\n{note}")
    return 0


def _frame(how: str) -> pd.DataFrame:
    """Return the tool's table for the rows that are trained this way, one table for each GPU and length."""
    rows = [row for row in GUIDE if how in row.trained]
    parts = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        for length in dict.fromkeys(row.max_length for row in rows if row.gpu == gpu):
            models = [row.model for row in rows if (row.gpu, row.max_length) == (gpu, length)]
            parts.append(batch_size_table(models, [gpu], [length], options=Options(model=TRAINED[how][1])))
    return pd.concat(parts)


def _guide(row: Row, is_first: bool) -> list[str]:
    if not is_first:
        return [""] * 5
    return [row.gpu, row.name, str(row.max_length), str(row.optimal), str(row.most or "–")]


def _tool(found: dict[str, Any]) -> list[str]:
    if pd.isna(found["optimal"]):
        return ["does not fit", "–", "–", "–"]
    sizes = [str(found[name]) for name in ("optimal", "max_risky", "safe")]
    return [f"**{sizes[0]}**", *sizes[1:], f"{found['utilization'] * 100:.0f} %"]


if __name__ == "__main__":
    sys.exit(main())
