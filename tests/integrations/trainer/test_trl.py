"""trl's trainers, where trl is installed: predicted as they are rehearsed.

The figures were rehearsed on a virtual T4 (torch 2.11, transformers 5.23, trl 1.16): three steps of a Llama with 2
layers, hidden size 256 and 8,000 words, in fp32 and with at most 256 tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_bsopt.data import catalog
from hf_bsopt.errors import UsageError
from hf_bsopt.integrations.trainer import find_batch_size
from hf_bsopt.integrations.trainer.workload import trainer_workload
from hf_bsopt.memory.predictor import Predictor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
T4 = catalog.gpu("T4")
GIB = 2**30
CONFIG = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(500))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    fast.model_max_length = 2048
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def text(words: int) -> str:
    return " ".join(f"w{random.randrange(500)}" for _ in range(words))


def of(folder: Path, name: str, row: dict[str, Any], classifier: bool = False, **values: Any) -> Any:
    """Return trl's trainer of this name, on 64 rows like ``row``, whose numbers are those of words."""
    random.seed(0)
    rows = [
        {key: text(value) if type(value) is int else index % 2 == 0 for key, value in row.items()}
        for index in range(64)
    ]
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    config = LlamaConfig(**CONFIG, **({"num_labels": 1} if classifier else {}))
    given = {"ref_model": kind(config)} if name in ("DPO", "KTO") else {}
    if "peft_config" in values:
        given["peft_config"] = values.pop("peft_config")
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "max_length": 256,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
    }
    return getattr(trl, f"{name}Trainer")(
        model=kind(config),
        args=getattr(trl, f"{name}Config")(**{**arguments, **values}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **given,
    )


def lora() -> Any:
    return pytest.importorskip("peft").LoraConfig(r=8, task_type="CAUSAL_LM")


PLAIN = {"text": 254}
PAIRS = {"prompt": 56, "chosen": 198, "rejected": 198}
CASES = {
    "SFT": ("SFT", PLAIN, {}, 0.4152),
    "SFT, packed in pieces": ("SFT", PLAIN, {"packing": True, "packing_strategy": "wrapped"}, 0.4173),
    "SFT, packed": ("SFT", PLAIN, {"packing": True}, 0.4442),
    "SFT, without padding": ("SFT", PLAIN, {"padding_free": True, "max_length": None}, 0.4442),
    "SFT, completions": ("SFT", {"prompt": 100, "completion": 150}, {}, 0.4111),
    "SFT, LoRA": ("SFT", PLAIN, {"peft_config": lora}, 0.3437),
    "DPO": ("DPO", PAIRS, {}, 0.7640),
    "reward": ("Reward", {"chosen": 254, "rejected": 254}, {"classifier": True}, 0.2299),
    "KTO": ("KTO", {"prompt": 56, "completion": 198, "label": True}, {}, 0.4352),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_needs_what_it_needs_on_a_virtual_gpu(tmp_path: Path, case: str) -> None:
    name, row, values, rehearsed = CASES[case]
    made = of(tmp_path, name, row, **{key: value() if callable(value) else value for key, value in values.items()})
    peak = Predictor(trainer_workload(made), T4)(8).peak
    assert peak is not None
    assert peak.allocated_bytes / GIB == pytest.approx(rehearsed, rel=0.002)


def test_metrics_of_the_trainer_are_left_as_they_are(tmp_path: Path) -> None:
    made = of(tmp_path, "SFT", PLAIN)
    find_batch_size(made, device="predict", gpu="T4")
    assert not any(made._metrics["train"].values())
    assert made._total_train_tokens == 0


def test_trainer_that_generates_is_refused_with_the_rehearsal(tmp_path: Path) -> None:
    rewards = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    rows = datasets.Dataset.from_list([{"prompt": text(50)} for _ in range(16)])
    arguments = trl.GRPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, num_generations=8)
    made = trl.GRPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(**CONFIG)), args=arguments, train_dataset=rows,
        processing_class=tokenizer(), **rewards,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"trl's GRPOTrainer.*hf-bsopt rehearse"):
        find_batch_size(made, device="predict", gpu="T4")
