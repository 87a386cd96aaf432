"""Every option, once: its name, type, default, documentation and the values that are valid.

    options = Options.of({"max_length": 512, "gpu": "T4", "optim": "adamw_8bit"}, for_="name")
    options.model.optimizer    # "adamw_8bit"

Three frozen dataclasses say what is trained, on what, and what is searched for. The docstring under a field is the
help text of its flag. The command line, the keyword arguments of ``find_batch_size`` and ``BatchSizeCallback``
(:mod:`hf_bsopt.option_keywords`, written by ``python -m hf_bsopt.options``) and the JSON report are derived from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ._utils.field_types import in_short, is_of_type, type_in_words, union_members
from .errors import InvalidOptionError, UsageError
from .records import GpuSpec

Subject = Literal["name", "module", "trainer", "accelerate"]
"""Kind of model: by name, any nn.Module, that of a Trainer, or that of an Accelerator."""
LearningRateScaling = Literal["sqrt", "linear", "none"]

TARGET = (0.80, 0.90)
MULTIPLE_OF = 8
MAX_ATTEMPTS = 5
PROBE_TIMEOUT_SECONDS = 600.0
LARGEST_NUMBER = 10**9
"""The largest number that any option takes, if none is named: beyond it sizes in bytes no longer fit 64 bits."""
LARGEST_CHECKED = 10**7
MAX_BATCH_SIZE = 8192
"""The largest size that is recommended when no limit is given: beyond it memory is not the limit in practice."""

EVERYTHING: tuple[Subject, ...] = ("name", "module", "trainer", "accelerate")
BY_NAME: tuple[Subject, ...] = ("name",)
DESCRIBED: tuple[Subject, ...] = ("name", "module")
"""A Trainer or an Accelerator has its own value."""
SIZED: tuple[Subject, ...] = ("name", "module", "trainer")
"""An Accelerator has no Report to answer in."""
NOT_TRAINER: tuple[Subject, ...] = ("name", "module", "accelerate")


def option(
    default: Any = None,
    *,
    aliases: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float = LARGEST_NUMBER,
    above: float | None = None,
    for_: tuple[Subject, ...] = EVERYTHING,
) -> Any:
    """Return the field of an option.

    aliases: other names for it, on the command line and as keywords. at_least, at_most, above: the smallest and the
    largest value, and a bound that a value must exceed. for_: the subjects that it applies to.
    """
    metadata = {"aliases": aliases, "at_least": at_least, "at_most": at_most, "above": above, "for": for_}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """The model, and how it is trained. None: chosen from the model's configuration, with the reason in the report."""

    task: str | None = option(for_=BY_NAME)
    """token-classification, sequence-classification, masked-lm, question-answering, causal-lm or seq2seq"""
    max_length: int | None = option(aliases=("max_seq_length",), at_least=1, at_most=10**7, for_=("name", "trainer"))
    """tokens per sequence; for a Trainer, only if the lengths of its dataset are unknown"""
    precision: str | None = option(for_=DESCRIBED)
    """fp16 or bf16 (mixed precision), fp32, fp16-weights or bf16-weights; default fp16, on a CPU fp32"""
    weights_dtype: str | None = option(aliases=("dtype",), for_=BY_NAME)
    """float32, float16 or bfloat16: the dtype in which the weights are held"""
    optimizer: str | None = option(aliases=("optim",), for_=NOT_TRAINER)
    """a name of TrainingArguments.optim; default adamw_torch_fused"""
    attention: str | None = option(aliases=("attn_implementation",), for_=BY_NAME)
    """sdpa, eager or flash_attention_2"""
    activation_checkpointing: bool = option(False, aliases=("gradient_checkpointing",), for_=BY_NAME)
    """recompute activations in the backward pass"""
    lora_r: int = option(0, at_least=0, at_most=10**5, for_=BY_NAME)
    """rank of LoRA adapters; 0 for none"""
    lora_targets: tuple[str, ...] | None = option(aliases=("lora_target_modules",), for_=BY_NAME)
    """names of the modules that get adapters, or all-linear; default: peft's choice for the architecture"""
    lora_dropout: float | None = option(at_least=0, for_=BY_NAME)
    """dropout before the adapters: any above 0 needs the same memory; default 0.05"""
    lora_alpha: float | None = option(above=0, for_=BY_NAME)
    """scale of the adapters, for the record: it needs no memory"""
    load_in_4bit: bool = option(False, for_=BY_NAME)
    """hold the frozen weights in 4 bits (requires lora_r)"""
    prepare_kbit: bool = option(True, aliases=("prepare_model_for_kbit_training",), for_=BY_NAME)
    """with load_in_4bit: peft's prepare_model_for_kbit_training casts all that is not in 4 bits to float32"""
    num_labels: int | None = option(at_least=1, at_most=10**6, for_=BY_NAME)
    """number of classes of a classification task"""
    generate: int = option(0, at_least=0, at_most=10**7, for_=BY_NAME)
    """find the largest batch for generating this many new tokens, too"""
    pretrained: bool = option(False, for_=BY_NAME)
    """load the checkpoint's weights for real steps, instead of random ones"""
    trust_remote_code: bool = option(False, for_=BY_NAME)
    """run the code that a hub repository brings for its configuration"""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DeviceOptions:
    """The device, how much of it may be used, and how real steps are run on it."""

    gpu: str | GpuSpec | None = option()
    """a GPU ("T4", "A100-40GB") or a memory size ("24GiB"); default: the one of this machine, else a T4"""
    device: str = option("auto")
    """auto, predict, rehearse (real steps on a virtual GPU), or cuda, mps, cpu (real steps there)"""
    memory: str | None = option()
    """use only this much of the device, such as 15GiB: a large device stands in for a small one"""
    expandable_segments: bool = option(False)
    """train with PYTORCH_ALLOC_CONF=expandable_segments:True"""
    probe_timeout: float = option(PROBE_TIMEOUT_SECONDS, above=0)
    """seconds after which running a size is abandoned"""
    cache: bool = option(True, for_=DESCRIBED)
    """keep measured answers, and confirm them with one step the next time"""
    trust_cache: bool = option(False, for_=DESCRIBED)
    """take a cached answer without running it again"""

    def __post_init__(self) -> None:
        if self.device is None:
            object.__setattr__(self, "device", "auto")
        validate(self)
        if self.trust_cache and not self.cache:
            raise UsageError(
                "trust_cache takes cached answers, and cache=False (--no_cache) has none: give one of them"
            )


@dataclass(frozen=True)
class SearchOptions:
    """The constraints on the batch size, and what else is searched for."""

    target: tuple[float, float] = option(TARGET)
    """lower and upper fraction of the device's memory; only the upper one is a limit"""
    multiple_of: int = option(MULTIPLE_OF, at_least=1)
    """the batch size is a multiple of this, unless it is smaller"""
    batch_size: int | None = option(aliases=("per_device_train_batch_size",), at_least=1)
    """upper limit on the micro-batch"""
    dataset_size: int | None = option(at_least=1, for_=NOT_TRAINER)
    """number of training sequences: no micro-batch is larger than a process's share of them"""
    check: int | None = option(at_least=1, at_most=LARGEST_CHECKED, for_=SIZED)
    """does this micro-batch fit, and how full is the device then?"""
    effective_batch_size: int | None = option(at_least=1)
    """sequences per optimizer step, over all processes; kept exactly"""
    total_tokens: int | None = option(at_least=1, for_=NOT_TRAINER)
    """the effective batch size in tokens; the nearest number that divides into sequences"""
    fill: bool = option(False, for_=("trainer",))
    """fill the device, instead of keeping the Trainer's effective batch size"""
    gradient_accumulation_steps: int = option(1, at_least=1, for_=DESCRIBED)
    """micro-batches per optimizer step, if no effective batch size is given"""
    num_processes: int = option(1, at_least=1, for_=DESCRIBED)
    """GPUs that share the effective batch"""
    learning_rate: float | None = option(above=0, for_=NOT_TRAINER)
    """the learning rate that was tuned for base_batch_size"""
    base_batch_size: int | None = option(at_least=1, for_=NOT_TRAINER)
    """effective batch size that the learning rate was tuned for"""
    lr_scaling: LearningRateScaling = option("sqrt")
    """rule for scaling the learning rate: sqrt, linear or none"""
    evaluation: bool = option(True)
    """find the largest evaluation batch, too"""
    verify_evaluation: bool = option(False, aliases=("eval",), for_=DESCRIBED)
    """run the evaluation batch, too, if training steps are run"""
    check_evaluation: int | None = option(
        aliases=("per_device_eval_batch_size",), at_least=1, at_most=LARGEST_CHECKED, for_=DESCRIBED
    )
    """does this evaluation batch fit?"""
    throughput: bool = option(False, for_=NOT_TRAINER)
    """measure up to five sizes, and choose the smallest that trains about as fast as the fastest"""
    max_attempts: int = option(MAX_ATTEMPTS, at_least=1)
    """number of sizes that are run at most to verify the answer"""

    def __post_init__(self) -> None:
        validate(self)
        check_target(self.target)
        if self.fill and self.effective_batch_size is not None:
            raise UsageError("fill uses all of the device, effective_batch_size an exact number: give one of them")
        has_effective_batch = self.effective_batch_size is not None or self.total_tokens is not None
        if self.gradient_accumulation_steps > 1 and has_effective_batch:
            raise UsageError(
                "gradient_accumulation_steps follows from the effective batch size (effective_batch_size or "
                "total_tokens): give one of them"
            )

    @property
    def changes_effective_batch(self) -> bool:
        """True if the requested effective batch differs from that of a Trainer."""
        return self.fill or self.effective_batch_size is not None


@dataclass(frozen=True)
class Options:
    """All options of one search."""

    model: ModelOptions = field(default_factory=ModelOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    search: SearchOptions = field(default_factory=SearchOptions)

    @classmethod
    def of(cls, keywords: Mapping[str, Any], for_: Subject) -> Options:
        """Return the options that these keyword arguments, or aliases of them, give for a subject.

        Raises UsageError for an unknown keyword, one that does not apply to the subject, or an invalid value; the
        message has the keyword as it was spelled.
        """
        spelled: dict[str, str] = {}
        for keyword in keywords:
            name = _canonical_name(keyword)
            if name in spelled:
                raise UsageError(f"{keyword} and {spelled[name]} are the same option: give one of them")
            spelled[name] = keyword
        given = {name: keywords[keyword] for name, keyword in spelled.items()}
        for name in given:
            _check_subject(name, spelled[name], given[name], for_)
        try:
            return cls(*(kind(**_given_for(kind, given)) for kind in OPTION_CLASSES))
        except InvalidOptionError as error:
            raise error.spelled(spelled.get(error.option, error.option)) from None

    def values(self, subject: Subject) -> dict[str, Any]:
        """Return every option of a subject by name; ``device`` is None if it is left to be chosen."""
        parts = (self.model, self.device, self.search)
        values = {
            entry.name: getattr(part, entry.name)
            for part in parts
            for entry in dataclasses.fields(part)
            if subject in entry.metadata["for"]
        }
        return {**values, "device": None if values["device"] == "auto" else values["device"]}


OPTION_CLASSES: tuple[type, ...] = (ModelOptions, DeviceOptions, SearchOptions)


def check_target(target: tuple[float, float]) -> None:
    """Raise UsageError unless 0 <= lower end <= upper end <= 1."""
    low, high = target
    if not 0 <= low <= 1 or not 0 < high <= 1:
        raise InvalidOptionError(
            "target", f"takes two fractions of the memory between 0 and 1, such as 0.8 0.9, not {low} {high}"
        )
    if low > high:
        raise InvalidOptionError("target", f"has its ends swapped: {low} {high}; did you mean {high} {low}?")


def validate(options: Any) -> None:
    """Raise InvalidOptionError for a field whose value is not of its type or range.

    Lists are taken as tuples, a string as a list of names separated by commas, whole numbers as floats, numpy's numbers
    as Python's, and PyTorch's dtypes and optimizer classes as their names.
    """
    hints = typing.get_type_hints(type(options))
    for entry in dataclasses.fields(options):
        value = _normalized(getattr(options, entry.name), hints[entry.name])
        object.__setattr__(options, entry.name, value)
        if not is_of_type(value, hints[entry.name]):
            raise InvalidOptionError(entry.name, f"is {type_in_words(hints[entry.name])}, not {in_short(value)}")
        if value is None or isinstance(value, (bool, str, tuple, GpuSpec)):
            continue
        at_least, above, at_most = (entry.metadata[bound] for bound in ("at_least", "above", "at_most"))
        if at_least is not None and not value >= at_least:
            raise InvalidOptionError(entry.name, f"is at least {at_least}, not {in_short(value)}")
        if above is not None and not above < value < math.inf:
            raise InvalidOptionError(entry.name, f"is above {above}, not {in_short(value)}")
        if value > at_most:
            raise InvalidOptionError(entry.name, f"is at most {at_most:,}, not {in_short(value)}")


def _normalized(value: Any, hint: Any) -> Any:
    kinds = union_members(hint)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        if isinstance(value, list):
            value = tuple(value)
        if tuple[str, ...] in kinds and isinstance(value, (str, tuple)):
            names = (value,) if isinstance(value, str) else value
            if all(isinstance(name, str) for name in names):
                return tuple(part.strip() for name in names for part in name.split(",") if part.strip()) or None
        return value
    module, kind = type(value).__module__, type(value).__name__
    if str in kinds and (module, kind) == ("torch", "dtype"):
        return str(value).removeprefix("torch.")
    if str in kinds and isinstance(value, type) and value.__module__.startswith("torch.optim"):
        return f"torch.optim.{value.__name__}"
    if (int in kinds or float in kinds) and module == "numpy" and hasattr(value, "item"):
        return value.item()
    return value


def _canonical_name(keyword: str) -> str:
    """Return the option that goes by this name or alias. Raises UsageError with the nearest."""
    names = {alias: entry.name for entry in all_fields() for alias in (entry.name, *entry.metadata["aliases"])}
    if keyword not in names:
        near = difflib.get_close_matches(keyword, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{keyword} is not an option{hint}")
    return names[keyword]


def all_fields() -> list[dataclasses.Field[Any]]:
    """Return the fields of all options."""
    return [entry for kind in OPTION_CLASSES for entry in dataclasses.fields(kind)]


SUBJECTS: dict[Subject, str] = {
    "name": "a model by name",
    "module": "a module, which is taken as it is",
    "trainer": "a Trainer, whose own arguments say it",
    "accelerate": "an Accelerator's model, which says it itself",
}


def _check_subject(name: str, spelled: str, value: Any, subject: Subject) -> None:
    """Raise UsageError for an option that is set for a subject that it does not apply to."""
    entry = next(entry for entry in all_fields() if entry.name == name)
    if subject in entry.metadata["for"] or value == entry.default:
        return
    allowed = [SUBJECTS[other].split(",")[0] for other in entry.metadata["for"]]
    usable = sorted(other.name for other in all_fields() if subject in other.metadata["for"])
    raise UsageError(
        f"{spelled} is an option for {' or '.join(allowed)}, not for {SUBJECTS[subject]}; "
        f"its options are {', '.join(usable)}"
    )


def _given_for(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in given.items() if name in names}


# ---- option_keywords.py: what type checkers and editors know of the keyword arguments

KEYWORD_CLASSES: dict[str, tuple[Subject, ...]] = {
    "FindKeywords": ("name", "module", "trainer"),
    "TrainerKeywords": ("trainer",),
    "AccelerateKeywords": ("accelerate",),
}
KEYWORDS_HEADER = '''"""The options as keyword arguments, for editors. Written by ``python -m hf_bsopt.options``."""

from __future__ import annotations

from typing import TypedDict

from .options import LearningRateScaling
from .records import GpuSpec
'''


def keywords_source() -> str:
    """Return the source of option_keywords.py: a TypedDict for each function that takes options."""
    parts = [KEYWORDS_HEADER]
    for class_name, subjects in KEYWORD_CLASSES.items():
        lines = [
            f"class {class_name}(TypedDict, total=False):",
            '    """See the fields of the same names in options.py."""\n',
        ]
        for entry in all_fields():
            if set(subjects) & set(entry.metadata["for"]):
                lines += [f"    {alias}: {entry.type}" for alias in (entry.name, *entry.metadata["aliases"])]
        parts.append("\n".join(lines) + "\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).with_name("option_keywords.py").write_text(keywords_source(), encoding="utf-8")
