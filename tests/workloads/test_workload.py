"""Claims about models by name: `hf_bsopt.workloads.workload` and `hf_bsopt.workloads.bnb_4bit`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.errors import BatchSizeError, UsageError
from hf_bsopt.workloads.workload import Workload, describe


def on_meta(workload: Workload) -> Any:
    with torch.device("meta"):
        return workload.build()


def test_a_configuration_from_which_no_model_can_be_built_is_refused(tiny: Any) -> None:
    with pytest.raises(BatchSizeError):
        on_meta(describe(tiny("bert", num_attention_heads=7)))


# ---- the model


@pytest.mark.parametrize(
    "name",
    [
        "dmis-lab/biobert-v1.1",
        "roberta-large",
        "distilbert",
        "albert",
        "google/electra-base-discriminator",
        "deberta-v3-base",
        "modernbert",
        "opt-350m",
        "gpt2",
        "Llama-3.1-405B",
        "Qwen2.5-0.5B",
        "t5-base",
        "pythia-160m",
        "tinystories",
    ],
)
def test_a_model_of_the_catalog_is_built_on_meta(name: str) -> None:
    model = on_meta(describe(name))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.config.use_cache is False
    entry = catalog.model_entry(name)
    assert entry is not None
    # the catalog counts the base model: without a head, and with the pooler that some heads do not use
    assert sum(p.numel() for p in model.base_model.parameters()) == pytest.approx(entry.parameters, rel=0.06)


@pytest.mark.parametrize(
    ("model_type", "task", "name"),
    [
        ("bert", "token-classification", "BertForTokenClassification"),
        ("bert", "sequence-classification", "BertForSequenceClassification"),
        ("bert", "masked-lm", "BertForMaskedLM"),
        ("bert", "question-answering", "BertForQuestionAnswering"),
        ("llama", "causal-lm", "LlamaForCausalLM"),
        ("t5", "seq2seq", "T5ForConditionalGeneration"),
    ],
)
def test_each_task_has_its_head_and_a_batch_from_which_the_head_computes_a_loss(
    model_type: str, task: str, name: str, tiny: Any
) -> None:
    """Computed on the CPU: the batch has what the head expects."""
    workload = describe(tiny(model_type), task=task, max_length=16)
    torch.manual_seed(0)
    model = workload.build()
    assert type(model).__name__ == name
    assert model.config.use_cache is False
    loss = model(**workload.batch(3, "cpu"))["loss"]
    assert loss.shape == ()
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("task", "shapes"),
    [
        ("token-classification", {"labels": (3, 16)}),
        ("masked-lm", {"labels": (3, 16)}),
        ("sequence-classification", {"labels": (3,)}),
        ("question-answering", {"start_positions": (3,), "end_positions": (3,)}),
    ],
)
def test_a_batch_has_the_full_length_and_the_labels_of_its_task(
    task: str, shapes: dict[str, tuple[int, ...]], tiny: Any
) -> None:
    batch = describe(tiny("bert"), task=task, max_length=16).batch(3, "meta")
    inputs = {"input_ids": (3, 16), "attention_mask": (3, 16)}
    assert {name: tuple(value.shape) for name, value in batch.items()} == {**inputs, **shapes}
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert all(value.is_meta for value in batch.values())


def test_a_batch_for_flash_attention_has_no_mask(tiny: Any) -> None:
    assert "attention_mask" not in describe(tiny("llama"), attention="flash_attention_2").batch(2, "meta")


def test_token_classification_has_three_labels_by_default(tiny: Any) -> None:
    folder = tiny("bert")
    assert on_meta(describe(folder)).classifier.out_features == 3
    assert on_meta(describe(folder, num_labels=9)).classifier.out_features == 9
    assert on_meta(describe(folder, task="sequence-classification")).classifier.out_features == 2


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float32), ("bf16-weights", torch.bfloat16)])
def test_the_weights_have_the_dtype_of_the_workload(precision: str, dtype: torch.dtype, tiny: Any) -> None:
    model = on_meta(describe(tiny("bert"), precision=precision))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_has_the_requested_attention(attention: str, tiny: Any) -> None:
    assert on_meta(describe(tiny("llama"), attention=attention)).config._attn_implementation == attention


def test_building_a_model_does_not_change_the_configuration(tiny: Any) -> None:
    workload = describe(tiny("llama"))
    before = workload.config.to_dict()
    on_meta(workload)
    assert workload.config.to_dict() == before
    assert sum(p.numel() for p in on_meta(workload).parameters()) == sum(
        p.numel() for p in on_meta(workload).parameters()
    )


def test_activation_checkpointing_is_turned_on_in_the_model(tiny: Any) -> None:
    model = on_meta(describe(tiny("bert"), activation_checkpointing=True))
    layers = [
        m for m in model.modules() if hasattr(m, "activation_checkpointing") or hasattr(m, "gradient_checkpointing")
    ]
    assert layers
    assert any(
        getattr(m, "activation_checkpointing", False) or getattr(m, "gradient_checkpointing", False) for m in layers
    )


def test_tied_embeddings_share_one_weight(tiny: Any) -> None:
    model = on_meta(describe(tiny("llama", tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_building_draws_no_random_numbers(tiny: Any) -> None:
    workload = describe(tiny("bert"))
    before = torch.get_rng_state()
    on_meta(workload)
    assert torch.equal(torch.get_rng_state(), before)


# ---- adapters and 4-bit weights


def test_only_the_adapters_are_trained_and_they_are_in_float32(tiny: Any) -> None:
    pytest.importorskip("peft")
    model = on_meta(describe(tiny("llama"), precision="bf16", lora_r=4, lora_targets=("q_proj", "v_proj")))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # two layers, two modules, A and B
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert sorted(tuple(parameter.shape) for parameter in trained.values())[0] == (4, 64)
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}


def test_lora_targets_that_the_model_lacks_are_refused(tiny: Any) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=r"LoRA: .*nowhere"):
        on_meta(describe(tiny("llama"), lora_r=4, lora_targets=("nowhere",)))


def test_adapters_get_gradients_under_activation_checkpointing(tiny: Any) -> None:
    """Trainer calls enable_input_require_grads, without which reentrant checkpointing would cut the graph."""
    pytest.importorskip("peft")
    workload = describe(tiny("llama"), precision="fp32", lora_r=4, activation_checkpointing=True, max_length=8)
    model = workload.build().train()
    model(**workload.batch(2, "cpu"))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_linear_layers_except_the_head_have_4_bit_weights(tiny: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model = on_meta(describe(tiny("llama"), precision="bf16", lora_r=4, load_in_4bit=True))
    packed = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(packed) == 2 * 7  # q, k, v, o, gate, up and down
    assert type(model.get_output_embeddings()) is nn.Linear
    for module in packed.values():
        weight = module.weight
        values = module.in_features * module.out_features
        assert (weight.dtype, weight.numel(), weight.requires_grad) == (torch.uint8, values // 2, False)
        assert weight.quant_state.shape == (module.out_features, module.in_features)
        assert weight.quant_state.absmax.numel() == -(-values // 64)
        assert weight.quant_state.nested


# ---- accumulation and description


def test_accumulating_changes_only_the_accumulation() -> None:
    workload = describe("bert-base-uncased")
    assert workload.accumulation == 1
    accumulated = workload.accumulating(4)
    assert (accumulated.accumulation, accumulated.accumulating(1)) == (4, workload)


def test_the_description_names_everything_that_decides_about_memory(tiny: Any) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    rows = dict(
        describe(
            tiny("llama"),
            precision="bf16",
            lora_r=4,
            lora_targets=("q_proj",),
            load_in_4bit=True,
            activation_checkpointing=True,
        ).describe()
    )
    assert rows["task"] == "causal-lm"
    assert "bfloat16" in rows["precision"]
    assert rows["optimizer"].startswith("adamw_torch_fused")
    assert "r=4 on q_proj" in rows["adapters"]
    assert "4-bit" in rows["weights"]
    assert "checkpointing" in rows
    assert "weights" not in dict(describe(tiny("llama")).describe())
