"""Claims about adapters and 4-bit weights: `hf_bsopt.workloads.adapters` and `hf_bsopt.workloads.bnb_4bit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bsopt.data import catalog
from hf_bsopt.errors import UsageError
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.workloads.workload import Workload, describe

pytest.importorskip("peft")

QWEN = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
QLORA = {"max_length": 512, "precision": "bf16", "lora_r": 16, "lora_targets": "all-linear", "load_in_4bit": True}


def on_meta(workload: Workload) -> Any:
    with torch.device("meta"):
        return workload.build()


@pytest.mark.parametrize(
    ("options", "allocated"),
    [
        ({}, 4_523_582_464),
        ({"lora_dropout": 0.0}, 4_235_748_352),
        ({"prepare_kbit": False}, 3_633_894_912),
        ({"prepare_kbit": False, "lora_dropout": 0.0}, 3_212_908_032),
    ],
)
def test_qlora_needs_what_a_script_of_its_usual_recipe_needs(
    options: dict[str, Any], allocated: int, tmp_path: Path
) -> None:
    """Recorded by rehearsing a script on the virtual GPU (torch 2.11.0, transformers 5.23.0, peft 0.21.2, bitsandbytes
    0.50.2): from_pretrained with a BitsAndBytesConfig, prepare_model_for_kbit_training with
    use_gradient_checkpointing=False, get_peft_model and three steps of Trainer, 8 sequences of 512 tokens.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import Qwen2Config

    Qwen2Config(**QWEN).save_pretrained(tmp_path)
    workload = describe(str(tmp_path), **QLORA, **options)  # type: ignore[arg-type]
    peak = Predictor(workload, catalog.gpu("A100-40GB"), torch_version="2.11.0")(8).peak
    assert peak is not None
    assert peak.allocated_bytes == pytest.approx(allocated, rel=0.002)


def test_the_preparation_of_4_bit_models_is_in_the_report_either_way(tiny: Any) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"precision": "bf16", "lora_r": 4, "load_in_4bit": True}
    for is_prepared, row, reason in (
        (True, "cast to float32 by prepare_model_for_kbit_training", "as in the usual recipe"),
        (False, "without prepare_model_for_kbit_training", "as asked"),
    ):
        workload = describe(tiny("llama"), **options, prepare_kbit=is_prepared)  # type: ignore[arg-type]
        assert row in dict(workload.describe())["weights"]
        assert any(reason in default for default in workload.defaults)
        norms = {p.dtype for name, p in on_meta(workload).named_parameters() if "norm" in name}
        assert norms == {torch.float32 if is_prepared else torch.bfloat16}
        assert workload.values()["prepare_kbit"] is is_prepared


def test_the_experts_of_a_mixture_are_said_to_stay_unquantized(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import OlmoeConfig

    OlmoeConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=500,
        eos_token_id=None,
    ).save_pretrained(tmp_path)
    options = {"precision": "bf16", "lora_r": 4, "load_in_4bit": True, "prepare_kbit": False}
    with pytest.raises(UsageError, match=r"peft has no modules of its own for olmoe; .*--lora_targets all-linear"):
        on_meta(describe(str(tmp_path), **options))  # type: ignore[arg-type]
    workload = describe(str(tmp_path), **options, lora_targets="all-linear")  # type: ignore[arg-type]
    assert any("experts are not linear layers: transformers 5 leaves them in 16 bits" in d for d in workload.defaults)
    model = on_meta(workload)
    experts = {p.dtype for name, p in model.named_parameters() if "experts" in name and "lora" not in name}
    assert experts == {torch.bfloat16}
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())


def test_dropout_is_that_of_tutorials_unless_another_is_given_and_the_report_says_so(tiny: Any) -> None:
    workload = describe(tiny("llama"), lora_r=4)
    assert workload.lora_dropout == 0.05
    assert "dropout 0.05" in dict(workload.describe())["adapters"]
    assert any("lora_dropout 0.05" in reason and "peft's own is 0" in reason for reason in workload.defaults)
    dropouts = [m for name, m in on_meta(workload).named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts and all(m.p == 0.05 for m in dropouts)
    given = describe(tiny("llama"), lora_r=4, lora_dropout=0, lora_alpha=32)
    assert dict(given.describe())["adapters"].endswith("dropout 0, alpha 32")
    assert not any("lora_dropout" in reason for reason in given.defaults)
    assert describe(tiny("llama")).lora_dropout == 0


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear",), ["all-linear"]])
def test_all_linear_targets_every_linear_layer_but_the_head(targets: Any, tiny: Any) -> None:
    model = on_meta(describe(tiny("llama"), lora_r=4, lora_targets=targets))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_names_of_targets_may_be_separated_by_commas(tiny: Any) -> None:
    assert describe(tiny("llama"), lora_r=4, lora_targets="q_proj, v_proj").lora_targets == ("q_proj", "v_proj")  # type: ignore[arg-type]


def test_the_new_head_of_a_classifier_is_trained_as_peft_trains_it_and_can_be_scaled(tiny: Any) -> None:
    model = on_meta(describe(tiny("bert"), task="sequence-classification", precision="fp16", lora_r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}  # GradScaler refuses float16 gradients


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 1.0, "lora_r": 4}, r"lora_dropout is below 1, such as 0\.05, not 1\.0"),
        ({"lora_dropout": -0.1, "lora_r": 4}, "lora_dropout is at least 0"),
        ({"lora_dropout": float("nan"), "lora_r": 4}, "lora_dropout is at least 0, not nan"),
        ({"lora_dropout": 0.1}, "lora_dropout is about adapters: add their rank, such as --lora_r 16"),
        ({"lora_alpha": 16}, "lora_alpha is about adapters"),
        ({"lora_alpha": 0, "lora_r": 4}, "lora_alpha is above 0"),
        ({"lora_targets": ["all-linear", "q_proj"], "lora_r": 4}, "give it alone"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(UsageError, match=message):
        describe(tiny("llama"), **options)
