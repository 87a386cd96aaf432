"""The command's flags: what they are, how they are read, and which can't be together."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import UsageError
from ..workloads.training_arguments import read_training_arguments

if TYPE_CHECKING:
    from transformers import HfArgumentParser

DESCRIPTION = (
    "Finds the largest batch size with which a model trains on a GPU. 'env' in place of the flags tells what a bug "
    "report needs. Exit codes: 0 found, 1 nothing fits, 2 the arguments or the device can't be, 130 interrupted."
)
WRITTEN = ("json", "html", "plot", "patch")
EXAMPLE = {"batch_size": 8, "gradient_accumulation_steps": 1}
"""An answer with which it is tried whether a file can be patched."""


def _flag(help: str, default: Any = None, *aliases: str) -> Any:
    """A field of the arguments; like HfArgumentParser's own, every alias is understood with dashes too."""
    spelled = [f"--{alias}" if len(alias) > 1 else f"-{alias}" for alias in aliases]
    spelled += [name.replace("_", "-") for name in spelled if "_" in name[2:]]
    metadata = {"help": help, "aliases": spelled}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Arguments:
    """The flags, with Trainer's own names as aliases."""

    model: str | None = _flag("hub id, short name, or a folder with a config.json", None, "model_name_or_path")
    models: list[str] = _flag("several of them: a table of batch sizes by model, length and GPU", [])
    gpu: str | None = _flag('a card ("T4", "A100-40GB") or a size ("24GiB"); default: the one here, else a T4')
    gpus: list[str] = _flag("several of them, for the table", [])
    format: str = _flag("of the table: text, markdown or csv", "text")
    device: str = _flag(
        "auto, predict, rehearse (real steps on a virtual card), or cuda, mps, cpu (real steps there)", "auto"
    )
    memory: str | None = _flag("use so much of the device, such as 15GiB: a large one stands in for a small one")
    task: str | None = _flag(
        "token-classification, sequence-classification, masked-lm, question-answering, causal-lm, seq2seq"
    )
    max_length: list[int] = _flag("tokens in a sequence; several give a report each", [], "max_seq_length")
    precision: str | None = _flag("fp16, bf16 (mixed), fp32, fp16-weights, bf16-weights; default fp16")
    fp16: bool = _flag("the same as --precision fp16", False)
    bf16: bool = _flag("the same as --precision bf16", False)
    weights_dtype: str | None = _flag("float32, float16 or bfloat16: what the weights are held in", None, "dtype")
    optimizer: str | None = _flag("as TrainingArguments.optim; default adamw_torch_fused", None, "optim")
    attention: str | None = _flag("sdpa, eager or flash_attention_2", None, "attn_implementation")
    activation_checkpointing: bool = _flag(
        "recompute activations in the backward pass", False, "gradient_checkpointing"
    )
    lora_r: int = _flag("rank of LoRA adapters; 0: none", 0)
    lora_targets: list[str] = _flag("modules that get adapters; default: peft's choice", [], "lora_target_modules")
    load_in_4bit: bool = _flag("frozen weights in 4 bits (with --lora_r)", False)
    num_labels: int | None = _flag("classes of a classification task")
    pretrained: bool = _flag("real steps load the checkpoint's weights, in place of random ones", False)
    target: list[float] = _flag("lower and upper share of the memory", [0.80, 0.90])
    multiple_of: int = _flag("the batch size is a multiple of it", 8)
    batch_size: int | None = _flag("an upper limit on the micro-batch", None, "per_device_train_batch_size")
    dataset_size: int | None = _flag("sequences that there are to train on: no micro-batch is larger than their share")
    check: int | None = _flag("does this micro-batch fit, and how full is the card then?")
    effective_batch_size: int | None = _flag("sequences in an optimizer step, over all processes; kept exactly")
    total_tokens: int | None = _flag("the same in tokens, or the nearest number that divides into sequences")
    gradient_accumulation_steps: int = _flag("micro-batches in a step, where no effective batch is given", 1)
    num_processes: int = _flag("GPUs that share the effective batch", 1)
    learning_rate: float | None = _flag("the rate that belongs to --base_batch_size")
    base_batch_size: int | None = _flag("effective batch that the learning rate was tuned for")
    lr_scaling: str = _flag("sqrt, linear or none", "sqrt")
    per_device_eval_batch_size: int | None = _flag("does this evaluation batch fit?")
    evaluation: bool = _flag("predict the largest evaluation batch too", True)
    eval: bool = _flag("run the evaluation batch too, where anything is run", False)
    generate: int = _flag("find the largest batch for a generation of so many tokens too", 0)
    throughput: bool = _flag("measure at up to five sizes, and take the smallest that trains as fast as any", False)
    expandable_segments: bool = _flag("as with PYTORCH_ALLOC_CONF=expandable_segments:True", False)
    max_attempts: int = _flag("sizes that are run at most to prove the answer", 5)
    probe_timeout: float = _flag("seconds for one of them", 600.0)
    cache: bool = _flag("keep measured answers, and confirm them by one step the next time", True)
    trust_cache: bool = _flag("take a kept answer without running it once more", False)
    training_args: str | None = _flag("a saved TrainingArguments, JSON or YAML: its values are the defaults")
    dataset: list[str] = _flag("how long its sequences are: files, a saved dataset, or a hub name", [])
    text_column: list[str] = _flag("of the dataset: one, or two for pairs", ["text"])
    tokenizer: str | None = _flag(
        "a folder, a tokenizer.json or a hub id; default: the model's", None, "tokenizer_name"
    )
    split: str = _flag("of the dataset", "train")
    sample: int = _flag("rows of it that are tokenized at most", 10_000)
    packing: bool = _flag("sequences are packed to max_length", False)
    use_liger_kernel: bool = _flag("refused in words: see docs/cli.md", False)
    torch_compile: bool = _flag("refused in words: see docs/cli.md", False)
    trust_remote_code: bool = _flag("run code that a hub repository brings for its configuration", False)
    json: str | None = _flag("write everything to this file")
    plot: str | None = _flag("draw memory against batch size, and over the step, to this .png, .svg or .pdf")
    html: str | None = _flag("write the report to this file as a page of its own, with pictures")
    patch: str | None = _flag("change the batch size in this script, notebook, YAML or JSON: see docs/patching.md")
    advise: bool | None = dataclasses.field(
        default=None,
        metadata={
            "help": "predict what else would make room; False: not even where nothing fits. See docs/ways_out.md",
            "nargs": "?",
            "const": True,
        },
    )
    key: list[str] = _flag("where in it, if it is not found by its name: NAME, or accumulation=NAME, NAME:LINE", [])
    dry_run: bool = _flag("print what --patch would change, and change nothing", False)
    verbose: bool = _flag("log what is done, each size that is run for one", False, "v")
    quiet: bool = _flag("print only the CONFIG lines", False, "q")

    @property
    def is_table(self) -> bool:
        """Whether several models or GPUs are asked for."""
        return bool(self.models or self.gpus)


def parse(argv: Sequence[str]) -> Arguments:
    """Raises UsageError for what is misspelt or missing; exits only for --help."""
    parser = _parser()
    known = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; --help shows all"
            raise UsageError(f"{name} is not a flag{hint}")
    values, rest = parser.parse_known_args(list(argv))
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no flag; the model is named with --model")
    arguments = Arguments(**vars(values))
    if arguments.training_args is not None:
        words = {word.split("=")[0] for word in argv}
        given = {action.dest for action in parser._actions if words & {*action.option_strings}}
        _take_from_file(arguments, given)
    return _checked(arguments)


def _take_from_file(arguments: Arguments, given: set[str]) -> None:
    """The file's values for what is not ``given``, under this or another of its names."""
    accumulation = arguments.gradient_accumulation_steps if "gradient_accumulation_steps" in given else None
    values = read_training_arguments(Path(arguments.training_args or ""), accumulation)
    if given & {"effective_batch_size", "total_tokens"}:
        values.pop("effective_batch_size", None)
        values.pop("gradient_accumulation_steps", None)
    elif "effective_batch_size" in values:
        arguments.gradient_accumulation_steps = 1  # it is in there
    if "precision" in given or any(getattr(arguments, name) for name in given & {"fp16", "bf16"}):
        given = given | {"precision", "fp16", "bf16"}
    elif not any(values.get(name) for name in {"fp16", "bf16"} - given):
        values["precision"] = "fp32"
    if not arguments.evaluation:
        values.pop("per_device_eval_batch_size", None)
    for name, value in values.items():
        if name not in given:
            setattr(arguments, name, value)


def _parser() -> HfArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    parser = Parser(Arguments, prog="find-optimal-batch-size", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hf_bsopt {__version__}")
    for action in parser._actions:  # HfArgumentParser repeats the help of the flag that they turn off
        if action.option_strings[0].startswith("--no_"):
            action.help = f"not: {action.help}"
    return parser


def _checked(arguments: Arguments) -> Arguments:
    if not arguments.model and not arguments.models:
        raise UsageError("which model? For example --model dmis-lab/biobert-v1.1")
    named = [name for name in ("fp16", "bf16") if getattr(arguments, name)]
    if len(named) == 2:
        raise UsageError("--fp16 and --bf16 are two precisions; give one")
    if named and arguments.precision not in (None, *named):
        raise UsageError(f"--{named[0]} and --precision {arguments.precision} contradict each other; give one")
    if named:
        arguments.precision = named[0]
    if len(arguments.target) != 2:
        raise UsageError("--target takes two shares of the memory, such as --target 0.80 0.90")
    if arguments.torch_compile:
        raise UsageError(
            "torch.compile fuses operations as it runs, and what it then keeps can't be predicted: predict without it, "
            "which needs about as much memory or more"
        )
    if arguments.use_liger_kernel:
        raise UsageError(
            "Liger kernels are Triton programs, which can't be traced: predict without them, an upper bound (they save "
            "most where the vocabulary is large, since the logits are never whole)"
        )
    if not arguments.dataset:
        usual = Arguments()
        for name in ("tokenizer", "text_column", "split", "sample"):
            if getattr(arguments, name) != getattr(usual, name):
                raise UsageError(f"--{name} goes with --dataset")
    if arguments.trust_cache and not arguments.cache:
        raise UsageError("--trust_cache and --no_cache contradict each other; give one")
    if arguments.per_device_eval_batch_size is not None and not arguments.evaluation:
        raise UsageError("--per_device_eval_batch_size asks about an evaluation, and --evaluation False is for none")
    if arguments.quiet and arguments.dataset and not arguments.json:
        raise UsageError("--dataset is a table, and --quiet prints none: add --json FILE for it")
    if arguments.quiet and arguments.advise and not (arguments.json or arguments.html):
        raise UsageError("--advise is a table, and --quiet prints none: add --json FILE or --html FILE for it")
    if arguments.quiet and arguments.verbose:
        raise UsageError("--quiet and --verbose contradict each other; give one")
    if arguments.format != "text" and not arguments.is_table:
        raise UsageError("--format is that of a table: name several --models or --gpus")
    if arguments.patch is None and (arguments.key or arguments.dry_run):
        raise UsageError("--key and --dry_run go with --patch FILE")
    if arguments.patch is not None and len(arguments.max_length) > 1:
        raise UsageError("--patch writes one answer: give one --max_length")
    if arguments.dry_run and arguments.quiet:
        raise UsageError("--dry_run shows what would change, and --quiet shows nothing; give one")
    _check_files(arguments)
    return arguments


def _check_files(arguments: Arguments) -> None:
    """What is to be written can be: said before a search that may take minutes, and not after it."""
    from .._utils.files import writable

    named = {name: Path(getattr(arguments, name)) for name in WRITTEN if getattr(arguments, name) is not None}
    for (name, path), (other, same) in itertools.combinations(named.items(), 2):
        if path.resolve() == same.resolve():
            raise UsageError(f"--{name} and --{other} name one file, {path}: what one writes, the other would replace")
    for name in ("json", "html"):
        if name in named:
            writable(named[name])
    if "plot" in named:
        from ..report.plots import check_file

        check_file(named["plot"])
    if "patch" in named and not arguments.is_table:  # which refuses it
        from ..patching import parse_keys, patch

        patch(named["patch"], EXAMPLE, keys=parse_keys(arguments.key), dry_run=True)
