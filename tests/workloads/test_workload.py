"""What is trained: claims about `hf_bsopt.workloads.workload` and `hf_bsopt.workloads.bnb_4bit`."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.errors import BatchSizeError, MissingExtraError, UsageError
from hf_bsopt.memory import Predictor
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.workload import Workload, describe

TINY = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A folder with a small configuration of that architecture."""

    def folder(model_type: str, **more: Any) -> str:
        values = {"model_type": model_type, "vocab_size": 500, **TINY[model_type], **more}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return str(tmp_path)

    return folder


def on_meta(workload: Workload | ModuleWorkload) -> Any:
    with torch.device("meta"):
        return workload.build()


def chosen(workload: Workload, what: str) -> str:
    """What the defaults say about it."""
    [said] = [line for line in workload.defaults if line.startswith(what)]
    return said


# ---- defaults, each with its reason


def test_with_a_name_alone_everything_is_chosen_and_said() -> None:
    workload = describe("biobert")
    assert workload.model == "dmis-lab/biobert-v1.1"
    assert workload.task == "token-classification"
    assert workload.max_length == 512
    assert workload.precision == "fp16"
    assert workload.weights_dtype == "float32"
    assert workload.optimizer == "adamw_torch_fused"
    assert workload.attention == "sdpa"
    for what in ("task", "max_length", "precision", "optimizer", "attention", "3 labels"):
        assert ":" in chosen(workload, what)


def test_what_was_said_is_kept_and_not_called_a_default() -> None:
    workload = describe(
        "bert-base-uncased",
        task="sequence-classification",
        max_length=64,
        precision="bf16",
        optimizer="sgd",
        attention="eager",
        num_labels=5,
    )
    assert workload.defaults == ()
    assert (workload.task, workload.max_length, workload.settings.precision) == ("sequence-classification", 64, "bf16")
    assert (workload.settings.optimizer, workload.attention, workload.config.num_labels) == ("sgd", "eager", 5)


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [
        ("bert-base-uncased", 512, "limit"),
        ("roberta-base", 512, "limit"),
        ("llama-3.2-1b", 512, "usual"),
        ("t5-small", 512, "usual"),
        ("tinystories", 256, "limit"),
        ("modernbert", 512, "usual"),
    ],
)
def test_the_length_is_512_or_the_model_s_limit(name: str, length: int, reason: str) -> None:
    workload = describe(name)
    assert workload.max_length == length
    assert reason in chosen(workload, "max_length")


@pytest.mark.parametrize(
    ("name", "too_long", "longest"),
    [("bert-base-uncased", 513, 512), ("roberta-base", 513, 512), ("gpt2", 1025, 1024), ("opt-125m", 2049, 2048)],
)
def test_a_length_over_the_limit_is_refused_with_the_limit(name: str, too_long: int, longest: int) -> None:
    with pytest.raises(UsageError, match=rf"max_length {too_long} .*use {longest} or less"):
        describe(name, max_length=too_long)
    assert describe(name, max_length=longest).max_length == longest


def test_relative_positions_have_no_limit() -> None:
    assert describe("t5-small", max_length=100_000).max_length == 100_000


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_of_nothing_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        describe("bert-base-uncased", max_length=length)


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("fp16", "float32"),
        ("bf16", "float32"),
        ("fp32", "float32"),
        ("fp16-weights", "float16"),
        ("bf16-weights", "bfloat16"),
    ],
)
def test_weights_are_float32_under_mixed_precision(precision: str, weights: str) -> None:
    assert describe("bert-base-uncased", precision=precision).weights_dtype == weights


@pytest.mark.parametrize(("precision", "weights"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_with_adapters_the_base_is_held_in_half_and_that_is_said(precision: str, weights: str) -> None:
    pytest.importorskip("peft")
    workload = describe("llama-3.2-1b", precision=precision, lora_r=8)
    assert workload.weights_dtype == weights
    assert any(line.startswith("weights in") for line in workload.defaults) == (weights != "float32")


def test_a_weights_dtype_that_was_asked_for_is_kept() -> None:
    assert describe("bert-base-uncased", weights_dtype="bfloat16").weights_dtype == "bfloat16"


def test_deberta_falls_back_to_eager_attention_and_says_so() -> None:
    for asked in (None, "sdpa", "flash_attention_2"):
        workload = describe("deberta-v3-base", attention=asked)
        assert workload.attention == "eager"
        assert "no other" in chosen(workload, "attention eager")


def test_an_alias_of_an_optimizer_is_spelt_out() -> None:
    pytest.importorskip("bitsandbytes")
    assert describe("bert-base-uncased", optimizer="adamw_8bit").optimizer == "adamw_bnb_8bit"


def test_a_classifier_of_a_decoder_gets_a_padding_token() -> None:
    assert describe("gpt2", task="sequence-classification").config.pad_token_id == 0


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "causal"}, r"'causal' is not one of .*did you mean causal-lm"),
        ({"task": "causal-lm", "model": "t5-small"}, "t5 has no head for causal-lm"),
        ({"precision": "bf-16"}, r"did you mean bf16"),
        ({"optimizer": "adamw_torchfused"}, r"did you mean adamw_torch_fused"),
        ({"attention": "flash"}, r"did you mean flash_attention_2"),
        ({"weights_dtype": "half"}, r"float32, float16, bfloat16"),
        ({"load_in_4bit": True}, r"add adapters, such as --lora_r 16"),
    ],
)
def test_what_can_not_be_is_refused_with_what_can(options: dict[str, Any], message: str) -> None:
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match=message):
        describe(options.pop("model", "llama-3.2-1b"), **options)


@pytest.mark.parametrize("labels", [0, -1])
def test_no_labels_are_refused(labels: int) -> None:
    with pytest.raises(UsageError):
        describe("bert-base-uncased", num_labels=labels)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lora_r": 8}, "pip install peft"),
        ({"lora_r": 8, "load_in_4bit": True}, "pip install bitsandbytes"),
        ({"optimizer": "adamw_bnb_8bit"}, "pip install bitsandbytes"),
        ({"optimizer": "adamw_8bit"}, "pip install bitsandbytes"),
    ],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    options: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = line.split()[-1]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    with pytest.raises(MissingExtraError, match=line):
        describe("llama-3.2-1b", **options)


def test_a_configuration_that_no_model_can_be_built_from_is_refused_in_words(tiny: Any) -> None:
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
def test_a_model_of_the_catalog_is_built_without_memory(name: str) -> None:
    model = on_meta(describe(name))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.config.use_cache is False
    entry = catalog.model_entry(name)
    assert entry is not None
    # the catalog counts the base model, without a head and with the pooler that some heads do without
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
def test_each_task_is_a_head_with_a_batch_that_it_computes_a_loss_of(
    model_type: str, task: str, name: str, tiny: Any
) -> None:
    """On the host, with numbers: so the batch fits the head."""
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
def test_a_batch_is_of_full_length_with_the_labels_of_its_task(
    task: str, shapes: dict[str, tuple[int, ...]], tiny: Any
) -> None:
    batch = describe(tiny("bert"), task=task, max_length=16).batch(3, "meta")
    both = {"input_ids": (3, 16), "attention_mask": (3, 16)}
    assert {name: tuple(value.shape) for name, value in batch.items()} == {**both, **shapes}
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert all(value.is_meta for value in batch.values())


def test_flash_attention_takes_no_mask(tiny: Any) -> None:
    assert "attention_mask" not in describe(tiny("llama"), attention="flash_attention_2").batch(2, "meta")


def test_labels_of_token_classification_are_three_unless_said(tiny: Any) -> None:
    folder = tiny("bert")
    assert on_meta(describe(folder)).classifier.out_features == 3
    assert on_meta(describe(folder, num_labels=9)).classifier.out_features == 9
    assert on_meta(describe(folder, task="sequence-classification")).classifier.out_features == 2


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float32), ("bf16-weights", torch.bfloat16)])
def test_the_weights_are_held_in_their_dtype(precision: str, dtype: torch.dtype, tiny: Any) -> None:
    model = on_meta(describe(tiny("bert"), precision=precision))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_one_that_was_asked_for(attention: str, tiny: Any) -> None:
    assert on_meta(describe(tiny("llama"), attention=attention)).config._attn_implementation == attention


def test_building_twice_leaves_the_configuration_as_it_was(tiny: Any) -> None:
    workload = describe(tiny("llama"))
    before = workload.config.to_dict()
    on_meta(workload)
    assert workload.config.to_dict() == before
    assert sum(p.numel() for p in on_meta(workload).parameters()) == sum(
        p.numel() for p in on_meta(workload).parameters()
    )


def test_activation_checkpointing_is_switched_on_in_every_layer(tiny: Any) -> None:
    model = on_meta(describe(tiny("bert"), activation_checkpointing=True))
    layers = [
        m for m in model.modules() if hasattr(m, "activation_checkpointing") or hasattr(m, "gradient_checkpointing")
    ]
    assert layers
    assert any(
        getattr(m, "activation_checkpointing", False) or getattr(m, "gradient_checkpointing", False) for m in layers
    )


def test_tied_embeddings_are_tied(tiny: Any) -> None:
    model = on_meta(describe(tiny("llama", tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_building_draws_no_random_numbers(tiny: Any) -> None:
    workload = describe(tiny("bert"))
    before = torch.get_rng_state()
    on_meta(workload)
    assert torch.equal(torch.get_rng_state(), before)


# ---- adapters and 4-bit weights


def test_adapters_alone_are_trained_in_float32(tiny: Any) -> None:
    pytest.importorskip("peft")
    model = on_meta(describe(tiny("llama"), precision="bf16", lora_r=4, lora_targets=("q_proj", "v_proj")))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # two layers, two modules, A and B
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert sorted(tuple(parameter.shape) for parameter in trained.values())[0] == (4, 64)
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}


def test_modules_that_are_not_there_are_no_targets(tiny: Any) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=r"LoRA: .*nowhere"):
        on_meta(describe(tiny("llama"), lora_r=4, lora_targets=("nowhere",)))


def test_with_checkpointing_adapters_get_gradients_through_their_inputs(tiny: Any) -> None:
    """Trainer's enable_input_require_grads: without it reentrant checkpointing would cut the graph."""
    pytest.importorskip("peft")
    workload = describe(tiny("llama"), precision="fp32", lora_r=4, activation_checkpointing=True, max_length=8)
    model = workload.build().train()
    model(**workload.batch(2, "cpu"))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_linear_layers_but_the_head_are_held_in_4_bits(tiny: Any) -> None:
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


def test_accumulating_changes_nothing_else() -> None:
    workload = describe("bert-base-uncased")
    assert workload.accumulation == 1
    four = workload.accumulating(4)
    assert (four.accumulation, four.accumulating(1)) == (4, workload)


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


# ---- any module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Parameter(torch.randn(3, 5).t(), requires_grad=False)
        self.register_buffer("table", torch.arange(6.0).view(2, 3).t())

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.embedding(ids).flatten(0, 1))
        return {"loss": F.cross_entropy(self.head(hidden), labels.flatten())}


def example() -> dict[str, Any]:
    return {"ids": torch.ones(4, 7, dtype=torch.int64), "labels": torch.zeros(4, 7, dtype=torch.int64)}


def test_the_user_s_module_and_batch_are_untouched_bit_for_bit() -> None:
    torch.manual_seed(0)
    module, batch = Tied().eval(), example()
    module(**batch)["loss"].backward()
    state = copy.deepcopy(module.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    places = [p.data_ptr() for p in module.parameters()]
    random_numbers = torch.get_rng_state()
    before = copy.deepcopy(batch)

    workload = ModuleWorkload(module, batch, StepSettings("fp32"))
    assert Predictor(workload, catalog.gpu("T4"))(4).fits
    workload.batch(2, "cpu")["ids"].fill_(9)

    assert not module.training
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert [p.data_ptr() for p in module.parameters()] == places
    assert module.head.weight is module.embedding.weight
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_the_first_dimension_of_an_example_is_the_batch() -> None:
    given = {
        **example(),
        "scale": torch.tensor(2.0),
        "return_dict": True,
        "mask": torch.ones(4, 7, 7, dtype=torch.bool),
    }
    workload = ModuleWorkload(Tied(), given)
    batch = workload.batch(5, "meta")
    assert {name: tuple(batch[name].shape) for name in ("ids", "labels", "mask")} == {
        "ids": (5, 7),
        "labels": (5, 7),
        "mask": (5, 7, 7),
    }
    assert (batch["mask"].dtype, batch["ids"].dtype) == (torch.bool, torch.int64)
    assert batch["scale"] is given["scale"]
    assert batch["return_dict"] is True
    assert workload.length == 7


def test_a_module_without_sequences_has_a_length_of_one() -> None:
    assert ModuleWorkload(nn.Linear(2, 2), {"x": torch.ones(3)}).length == 1


def test_a_module_s_description_has_its_shapes() -> None:
    rows = dict(ModuleWorkload(Tied(), example()).describe())
    assert rows["model"] == "Tied"
    assert "ids [4, 7]" in rows["batch"]
