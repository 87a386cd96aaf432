"""The training runs of benchmarks/record_truth.py: each case becomes one row of the recorded truth.

python benchmarks/record_truth.py --list
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from hf_bsopt.data import catalog

Row = dict[str, str]

TOKENS, SEQUENCES, MASKED = "token-classification", "sequence-classification", "masked-lm"
ANSWERS, CAUSAL, SEQ2SEQ = "question-answering", "causal-lm", "seq2seq"
T4, L4, A100, H100 = "T4", "L4", "A100-40GB", "H100-80GB"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of Trainer. The fields are named after the columns (benchmarks/truth/README.md)."""

    gpu: str
    model: str
    task: str
    batch_size: int
    max_length: int
    precision: str = "fp16"
    attention: str = "sdpa"
    optimizer: str = "adamw_torch_fused"
    gradient_accumulation: int = 1
    activation_checkpointing: bool = False
    lora_r: int = 0
    load_in_4bit: bool = False
    kind: str = "trainer"
    expandable_segments: bool = False

    @classmethod
    def of_row(cls, row: Row) -> Case:
        """Build a case from a row's columns; a missing or empty column takes the default."""
        given = {f.name: (f.type, row[f.name]) for f in dataclasses.fields(cls) if row.get(f.name)}
        typed = {name: bool(int(v)) if t == "bool" else int(v) if t == "int" else v for name, (t, v) in given.items()}
        return cls(**typed)  # type: ignore[arg-type]

    def row(self) -> Row:
        """Return the columns that describe the run."""
        entry = catalog.model_entry(self.model)
        values = {**dataclasses.asdict(self), "model": entry.hub_id if entry else self.model}
        return {name: str(int(v)) if isinstance(v, bool) else str(v) for name, v in values.items()}

    @property
    def needs(self) -> tuple[str, ...]:
        """The packages that the case needs in addition to torch and transformers."""
        wanted = (("peft", self.lora_r > 0), ("bitsandbytes", self.load_in_4bit or "8bit" in self.optimizer))
        return tuple(name for name, is_needed in wanted if is_needed)


def cases_of(path: Path) -> list[Case]:
    """Read cases from a CSV file with the columns of the truth, so that recorded runs can be repeated."""
    with path.open(newline="") as file:
        return [Case.of_row(row) for row in csv.DictReader(file)]


def sizes(case: Case, *batch_sizes: int) -> list[Case]:
    return [dataclasses.replace(case, batch_size=batch_size) for batch_size in batch_sizes]


def edge(largest: Case) -> list[Case]:
    """Return two cases: the largest size that is predicted to fit, and the next size, which does not."""
    return sizes(largest, largest.batch_size, largest.batch_size + 1)


ENCODERS = [
    *sizes(Case(T4, "biobert", TOKENS, 0, 512), 1, 8, 32, 48),
    *sizes(Case(T4, "biobert", TOKENS, 0, 128), 8, 64, 128),
    Case(T4, "biobert", TOKENS, 16, 100),
    Case(A100, "biobert", TOKENS, 64, 512, precision="bf16"),
    Case(H100, "biobert", TOKENS, 128, 512, precision="bf16"),
    Case(T4, "bert-base-uncased", SEQUENCES, 32, 128),
    Case(T4, "bert-base-uncased", ANSWERS, 16, 384),
    Case(T4, "bert-base-uncased", MASKED, 8, 512),
    Case(T4, "bert-base-cased", TOKENS, 8, 512, precision="fp32"),
    *sizes(Case(T4, "bert-large-uncased", TOKENS, 0, 512), 1, 8),
    Case(H100, "bert-large-cased", TOKENS, 32, 512, precision="bf16"),
    Case(T4, "pubmedbert", TOKENS, 24, 256),
    Case(T4, "scibert", SEQUENCES, 64, 64),
    Case(T4, "clinicalbert", ANSWERS, 12, 512),
    Case(T4, "bert-mini", MASKED, 128, 128),
    Case(T4, "bert-tiny", TOKENS, 1, 64),
    Case(T4, "minilm-l6", SEQUENCES, 128, 256),
    Case(A100, "minilm-l12", TOKENS, 128, 512, precision="bf16"),
    *sizes(Case(T4, "roberta-base", TOKENS, 0, 512), 2, 16),
    Case(A100, "roberta-base", MASKED, 32, 512, precision="bf16"),
    Case(T4, "roberta-large", SEQUENCES, 16, 128),
    Case(A100, "roberta-large", ANSWERS, 32, 384),
    Case(T4, "xlm-roberta-base", TOKENS, 16, 256),
    Case(H100, "xlm-roberta-base", MASKED, 32, 512, precision="bf16"),
    Case(T4, "distilroberta", SEQUENCES, 32, 512),
    *sizes(Case(T4, "distilbert", TOKENS, 0, 512), 4, 64),
    Case(T4, "distilbert-base-cased", ANSWERS, 32, 384, precision="fp32"),
    *sizes(Case(T4, "albert-base-v2", TOKENS, 0, 512), 4, 24),
    Case(A100, "albert-base-v2", SEQUENCES, 64, 256, precision="bf16"),
    Case(T4, "electra-small", TOKENS, 64, 256),
    Case(T4, "electra-base", ANSWERS, 16, 384),
    Case(A100, "electra-large", SEQUENCES, 32, 256, precision="bf16"),
    *sizes(Case(T4, "deberta-v3-small", TOKENS, 0, 256, attention="eager"), 2, 32),
    *sizes(Case(T4, "deberta-v3-base", TOKENS, 0, 512, attention="eager"), 1, 12),
    Case(A100, "deberta-v3-base", ANSWERS, 16, 384, precision="bf16", attention="eager"),
    Case(H100, "deberta-v3-large", TOKENS, 16, 512, precision="bf16", attention="eager"),
    *sizes(Case(A100, "ModernBERT-base", TOKENS, 0, 1024, precision="bf16"), 4, 16),
    Case(H100, "ModernBERT-large", MASKED, 8, 2048, precision="bf16"),
]

DECODERS = [
    *sizes(Case(T4, "gpt2", CAUSAL, 0, 512), 1, 8),
    *sizes(Case(A100, "gpt2", CAUSAL, 0, 1024, precision="bf16"), 2, 8),
    Case(A100, "gpt2-medium", CAUSAL, 4, 1024, precision="bf16"),
    Case(H100, "gpt2-large", CAUSAL, 4, 1024, precision="bf16"),
    Case(T4, "distilgpt2", SEQUENCES, 32, 128),
    Case(T4, "opt-125m", CAUSAL, 8, 256),
    Case(A100, "opt-350m", CAUSAL, 8, 1024, precision="bf16"),
    Case(H100, "opt-1.3b", CAUSAL, 4, 1024, precision="bf16"),
    Case(T4, "pythia-70m", CAUSAL, 16, 512),
    Case(A100, "pythia-410m", CAUSAL, 4, 2048, precision="bf16"),
    Case(T4, "SmolLM2-135M", CAUSAL, 4, 512),
    Case(A100, "SmolLM2-360M", CAUSAL, 8, 1024, precision="bf16"),
    Case(H100, "SmolLM2-1.7B", CAUSAL, 4, 2048, precision="bf16"),
    Case(T4, "tinystories", CAUSAL, 64, 256),
    *sizes(Case(A100, "Llama-3.2-1B", CAUSAL, 0, 1024, precision="bf16"), 1, 4),
    Case(H100, "Llama-3.2-1B", CAUSAL, 8, 2048, precision="bf16"),
    Case(A100, "TinyLlama", CAUSAL, 2, 2048, precision="bf16"),
    *sizes(Case(A100, "Qwen2.5-0.5B", CAUSAL, 0, 512, precision="bf16"), 1, 8),
    Case(A100, "Qwen2.5-1.5B", CAUSAL, 2, 512, precision="bf16"),
    Case(H100, "Qwen2.5-3B", CAUSAL, 1, 2048, precision="bf16"),
    Case(A100, "Qwen3-0.6B", CAUSAL, 4, 1024, precision="bf16"),
    Case(H100, "Qwen3-1.7B", CAUSAL, 4, 1024, precision="bf16"),
    Case(A100, "Qwen2.5-0.5B", SEQUENCES, 8, 512, precision="bf16"),
    Case(A100, "Qwen2.5-0.5B", TOKENS, 8, 512, precision="bf16"),
    Case(A100, "phi-2", CAUSAL, 2, 1024, precision="bf16", lora_r=16),
    Case(A100, "gemma-2-2b", CAUSAL, 2, 512, precision="bf16", attention="eager", lora_r=16),
    Case(T4, "t5-small", SEQ2SEQ, 16, 256, precision="fp32"),
    Case(A100, "t5-base", SEQ2SEQ, 16, 512, precision="bf16"),
    Case(A100, "flan-t5-base", SEQ2SEQ, 8, 512, precision="bf16", optimizer="adafactor"),
]

PRECISION_AND_ATTENTION = [
    *sizes(Case(T4, "biobert", TOKENS, 0, 512, attention="eager"), 1, 16),
    Case(T4, "biobert", TOKENS, 16, 512, precision="fp32", attention="eager"),
    *sizes(Case(T4, "biobert", TOKENS, 0, 512, precision="fp32"), 4, 24),
    Case(T4, "biobert", TOKENS, 32, 256, precision="fp16-weights"),
    Case(A100, "biobert", TOKENS, 32, 256, precision="bf16-weights"),
    Case(A100, "biobert", TOKENS, 32, 512, precision="fp32"),
    Case(H100, "biobert", TOKENS, 32, 512),
    Case(A100, "gpt2", CAUSAL, 8, 1024, attention="eager"),
    Case(A100, "Qwen2.5-0.5B", CAUSAL, 4, 1024, precision="bf16-weights"),
    Case(A100, "Qwen2.5-0.5B", CAUSAL, 2, 1024, precision="bf16", attention="eager"),
    Case(H100, "Llama-3.2-1B", CAUSAL, 4, 1024, precision="bf16-weights", attention="eager"),
    Case(T4, "SmolLM2-360M", CAUSAL, 4, 512, precision="fp16-weights"),
    Case(A100, "TinyLlama", CAUSAL, 4, 1024, precision="bf16-weights"),
    Case(A100, "Llama-3.2-3B", CAUSAL, 1, 512, precision="bf16-weights"),
    Case(H100, "Mistral-7B-v0.1", CAUSAL, 1, 512, precision="bf16-weights", optimizer="adafactor"),
    Case(A100, "t5-base", SEQ2SEQ, 8, 512, attention="eager"),
    Case(A100, "electra-base", TOKENS, 32, 512, precision="bf16", attention="eager"),
    Case(L4, "roberta-base", TOKENS, 32, 512, precision="bf16"),
]

OPTIMIZERS = [
    *[
        Case(T4, "biobert", TOKENS, 2, 128, optimizer=name)
        for name in ("adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit", "paged_adamw_8bit", "rmsprop", "adagrad")
    ],
    Case(T4, "bert-large-uncased", TOKENS, 4, 256, optimizer="adamw_torch"),
    Case(T4, "roberta-large", TOKENS, 4, 256, optimizer="adafactor"),
    Case(T4, "xlm-roberta-base", TOKENS, 2, 128, optimizer="sgd"),
    Case(A100, "Qwen2.5-0.5B", CAUSAL, 1, 256, precision="bf16", optimizer="adamw_torch"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 1, 256, precision="bf16", optimizer="adafactor"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 2, 512, precision="bf16", optimizer="adamw_bnb_8bit"),
    Case(A100, "Qwen2.5-1.5B", CAUSAL, 1, 512, precision="bf16-weights", optimizer="paged_adamw_8bit"),
]

ACCUMULATION_AND_CHECKPOINTING = [
    *[Case(T4, "biobert", TOKENS, 16, 256, gradient_accumulation=steps) for steps in (2, 3, 8)],
    Case(T4, "roberta-base", SEQUENCES, 8, 256, precision="fp32", gradient_accumulation=4),
    Case(A100, "gpt2", CAUSAL, 4, 512, precision="bf16", gradient_accumulation=4),
    Case(A100, "Qwen2.5-0.5B", CAUSAL, 2, 512, precision="bf16", gradient_accumulation=2),
    Case(A100, "SmolLM2-135M", CAUSAL, 4, 512, precision="bf16-weights", gradient_accumulation=16),
    *sizes(Case(T4, "biobert", TOKENS, 0, 512, activation_checkpointing=True), 8, 128),
    Case(T4, "bert-large-uncased", TOKENS, 32, 512, activation_checkpointing=True),
    Case(T4, "deberta-v3-base", TOKENS, 16, 512, attention="eager", activation_checkpointing=True),
    Case(T4, "distilbert", TOKENS, 64, 512, precision="fp32", activation_checkpointing=True),
    Case(A100, "gpt2-large", CAUSAL, 4, 1024, precision="bf16", activation_checkpointing=True),
    Case(A100, "Llama-3.2-1B", CAUSAL, 4, 2048, precision="bf16", activation_checkpointing=True),
    Case(A100, "t5-base", SEQ2SEQ, 16, 512, precision="bf16", activation_checkpointing=True),
    Case(T4, "biobert", TOKENS, 32, 512, gradient_accumulation=2, activation_checkpointing=True),
]

ADAPTERS = [
    Case(T4, "SmolLM2-1.7B", CAUSAL, 2, 512, lora_r=8),
    Case(T4, "Qwen2.5-1.5B", CAUSAL, 2, 512, lora_r=16),
    *sizes(Case(A100, "Llama-3.2-3B", CAUSAL, 0, 1024, precision="bf16", lora_r=16), 1, 4),
    Case(A100, "Qwen2.5-7B", CAUSAL, 1, 1024, precision="bf16", lora_r=16),
    Case(A100, "Qwen3-4B", CAUSAL, 2, 1024, precision="bf16", lora_r=64),
    Case(A100, "Mistral-7B-v0.3", CAUSAL, 4, 512, precision="bf16", lora_r=16, gradient_accumulation=4),
    Case(A100, "Llama-2-7b-hf", CAUSAL, 2, 2048, precision="bf16", lora_r=8, activation_checkpointing=True),
    Case(H100, "Llama-3.1-8B", CAUSAL, 4, 2048, precision="bf16", lora_r=16, activation_checkpointing=True),
    Case(H100, "Llama-2-13b-hf", CAUSAL, 2, 1024, precision="bf16", lora_r=16),
    Case(T4, "Qwen3-1.7B", CAUSAL, 2, 512, lora_r=16, load_in_4bit=True),
    Case(T4, "TinyLlama", CAUSAL, 4, 1024, lora_r=16, load_in_4bit=True, activation_checkpointing=True),
    Case(T4, "Mistral-7B-v0.1", CAUSAL, 1, 512, lora_r=16, load_in_4bit=True),
    Case(T4, "Llama-3.1-8B", CAUSAL, 1, 1024, lora_r=16, load_in_4bit=True, activation_checkpointing=True),
    Case(A100, "Qwen2.5-7B", CAUSAL, 4, 1024, precision="bf16", lora_r=16, load_in_4bit=True),
    Case(A100, "Qwen3-8B", CAUSAL, 2, 2048, precision="bf16", lora_r=16, load_in_4bit=True, attention="eager"),
    Case(H100, "Llama-2-13b-hf", CAUSAL, 8, 2048, "bf16", lora_r=64, load_in_4bit=True, activation_checkpointing=True),
    Case(A100, "Llama-3.2-1B", SEQUENCES, 8, 512, precision="bf16", lora_r=16, load_in_4bit=True),
]

EVALUATION = [
    *sizes(Case(T4, "biobert", TOKENS, 0, 512, kind="evaluation"), 8, 128),
    Case(T4, "bert-base-uncased", SEQUENCES, 128, 256, kind="evaluation"),
    Case(T4, "biobert", MASKED, 16, 512, kind="evaluation"),
    Case(T4, "deberta-v3-base", TOKENS, 64, 512, attention="eager", kind="evaluation"),
    Case(T4, "roberta-large", ANSWERS, 64, 384, precision="fp32", kind="evaluation"),
    Case(T4, "gpt2", CAUSAL, 16, 512, kind="evaluation"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 4, 1024, precision="bf16", kind="evaluation"),
    Case(A100, "Llama-3.2-3B", CAUSAL, 4, 1024, precision="bf16", lora_r=16, kind="evaluation"),
    Case(A100, "t5-base", SEQ2SEQ, 16, 512, precision="bf16", kind="evaluation"),
    Case(T4, "gpt2", CAUSAL, 16, 512, kind="evaluation-loss"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 4, 1024, precision="bf16", kind="evaluation-loss"),
    Case(T4, "biobert", TOKENS, 128, 512, kind="evaluation-joined"),
    Case(T4, "gpt2", CAUSAL, 16, 512, kind="evaluation-joined"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 4, 1024, precision="bf16", kind="evaluation-joined"),
]

VARYING = [
    *sizes(Case(T4, "biobert", TOKENS, 0, 512, kind="varying"), 8, 48, 62),
    Case(T4, "biobert", TOKENS, 62, 512, kind="varying", expandable_segments=True),
    Case(T4, "biobert", TOKENS, 24, 512, attention="eager", kind="varying"),
    Case(T4, "biobert", TOKENS, 32, 512, kind="varying", optimizer="adamw_torch"),
    Case(T4, "roberta-base", MASKED, 16, 512, kind="varying"),
    Case(T4, "distilbert", SEQUENCES, 64, 512, kind="varying", precision="fp32"),
    Case(A100, "gpt2", CAUSAL, 16, 1024, precision="bf16", kind="varying"),
    Case(A100, "SmolLM2-135M", CAUSAL, 16, 1024, precision="bf16", kind="varying"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 4, 1024, precision="bf16", lora_r=16, kind="varying"),
    Case(A100, "Llama-3.2-1B", CAUSAL, 10, 1024, precision="bf16", lora_r=16, kind="varying"),
]

EDGES = [
    *edge(Case(T4, "biobert", TOKENS, 62, 512)),
    *edge(Case(T4, "biobert", TOKENS, 63, 512, expandable_segments=True)),
    *edge(Case(T4, "biobert", TOKENS, 27, 512, attention="eager")),
    *edge(Case(T4, "biobert", TOKENS, 28, 512, attention="eager", expandable_segments=True)),
    *edge(Case(T4, "biobert", TOKENS, 40, 512, precision="fp32")),
    *edge(Case(T4, "biobert", TOKENS, 61, 512, gradient_accumulation=2)),
    *edge(Case(T4, "bert-large-uncased", TOKENS, 18, 512)),
    *edge(Case(T4, "bert-large-uncased", TOKENS, 18, 512, expandable_segments=True)),
    *edge(Case(T4, "roberta-base", MASKED, 22, 512)),
    *edge(Case(T4, "roberta-base", MASKED, 25, 512, expandable_segments=True)),
    *edge(Case(T4, "deberta-v3-base", TOKENS, 18, 512, attention="eager")),
    *edge(Case(T4, "deberta-v3-base", TOKENS, 18, 512, attention="eager", expandable_segments=True)),
    *edge(Case(T4, "distilbert", SEQUENCES, 126, 512)),
    *edge(Case(T4, "SmolLM2-135M", CAUSAL, 14, 512)),
    *edge(Case(T4, "SmolLM2-135M", CAUSAL, 16, 512, expandable_segments=True)),
    *edge(Case(T4, "Mistral-7B-v0.1", CAUSAL, 3, 512, lora_r=16, load_in_4bit=True)),
    *edge(Case(L4, "roberta-large", ANSWERS, 44, 384, precision="bf16")),
    *edge(Case(A100, "gpt2", CAUSAL, 26, 1024, precision="bf16")),
    *edge(Case(A100, "gpt2", CAUSAL, 27, 1024, precision="bf16", expandable_segments=True)),
    *edge(Case(A100, "t5-base", SEQ2SEQ, 38, 512, precision="bf16")),
    *edge(Case(A100, "Qwen2.5-0.5B", CAUSAL, 8, 1024, precision="bf16")),
    *edge(Case(A100, "Qwen2.5-0.5B", CAUSAL, 9, 1024, precision="bf16", expandable_segments=True)),
    *edge(Case(A100, "Llama-3.2-1B", CAUSAL, 11, 1024, precision="bf16", lora_r=16)),
    *edge(Case(A100, "Llama-3.2-1B", CAUSAL, 12, 1024, precision="bf16", lora_r=16, expandable_segments=True)),
    *edge(Case(A100, "Mistral-7B-v0.3", CAUSAL, 6, 1024, precision="bf16", lora_r=16, load_in_4bit=True)),
    *edge(Case(H100, "Llama-3.1-8B", CAUSAL, 17, 2048, precision="bf16", lora_r=16, activation_checkpointing=True)),
    *edge(Case(H100, "Llama-3.2-3B", CAUSAL, 5, 2048, precision="bf16-weights")),
    *edge(Case(T4, "gpt2", CAUSAL, 36, 512, kind="evaluation")),
]


def by_gpu(cases: list[Case]) -> list[Case]:
    """Group the cases by GPU: a worker is started whenever the GPU changes."""
    order = list(dict.fromkeys(case.gpu for case in cases))
    return sorted(cases, key=lambda case: order.index(case.gpu))


CASES = by_gpu(
    [
        *ENCODERS,
        *DECODERS,
        *PRECISION_AND_ATTENTION,
        *OPTIMIZERS,
        *ACCUMULATION_AND_CHECKPOINTING,
        *ADAPTERS,
        *EVALUATION,
        *VARYING,
        *EDGES,
    ]
)
