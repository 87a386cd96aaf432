"""The flags: derived from the options (:mod:`hf_bsopt.options`) and from what only the command line has."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import typing
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from .._utils.argument_parser import ArgumentParser
from .._utils.field_docs import field_docs
from .._utils.field_types import in_short
from ..errors import InvalidOptionError, UsageError
from ..options import OPTION_CLASSES, Options
from .flags import FLAG_CLASSES, DatasetFlags, ModelFlags, OutputFlags, TableFlags
from .training_arguments import read_training_arguments

SEVERAL = {"max_length": (int, "; several give a report each")}
"""Options that the command line takes several times, with an addition to their help."""
MOST_DIGITS = 18
"""Digits of the longest number that a flag takes; Python itself converts no more than 4,300."""
WRITTEN = ("json", "html", "plot", "patch")


@dataclass(frozen=True)
class Arguments:
    """The parsed command line. options: without max_length, of which there may be several."""

    options: Options
    max_lengths: tuple[int, ...]
    model: ModelFlags
    table: TableFlags
    dataset: DatasetFlags
    output: OutputFlags
    given: frozenset[str] = frozenset()
    """Options and flags that were named, on the command line or in --training_args."""

    @property
    def is_table(self) -> bool:
        """True if several models or GPUs are named."""
        return bool(self.table.models or self.table.gpus)

    def options_at(self, max_length: int | None) -> Options:
        """Return the options for one of the lengths."""
        model = dataclasses.replace(self.options.model, max_length=max_length)
        return dataclasses.replace(self.options, model=model)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of every option and flag, each known with underscores and with dashes."""
    made = ArgumentParser(prog, description)
    made.add_argument("--version", action="version", version=f"hf_bsopt {__version__}")
    for kind in (*OPTION_CLASSES, *FLAG_CLASSES):
        group = made.add_argument_group((kind.__doc__ or "").split(". ")[0].rstrip("."))
        for entry in dataclasses.fields(kind):
            if entry.name != "fill":  # for a Trainer only; the command line has none
                _add(group, entry, typing.get_type_hints(kind)[entry.name], field_docs(kind)[entry.name])
    return made


def _add(group: Any, entry: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    """Add the flag of a field, and --no_NAME for one that is on by default."""
    default = None if entry.default is dataclasses.MISSING else entry.default
    settings: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": doc.replace("%", "%%")}
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    first = hint if typing.get_origin(hint) in (tuple, list, Literal) else kinds[0]
    origin = typing.get_origin(first)
    if entry.name in SEVERAL:
        kind, addition = SEVERAL[entry.name]
        settings |= {"nargs": "+", "type": _whole_number if kind is int else kind}
        settings["help"] += addition
    elif first is bool:
        settings |= {"nargs": "?", "const": True, "type": _boolean}
    elif origin in (tuple, list):
        settings |= {"nargs": "+", "type": _NUMBERS.get(typing.get_args(first)[0], str)}
    elif origin is Literal or first is str:
        settings["type"] = str
    else:
        settings["type"] = _NUMBERS.get(first, str)
    if default not in (None, False, ()) and entry.name not in SEVERAL:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        settings["help"] += f" (default {shown})"
    group.add_argument(*_spellings(entry.name, *entry.metadata["aliases"]), **settings)
    if default is True:
        off = {"dest": entry.name, "action": "store_const", "const": False, "default": argparse.SUPPRESS}
        group.add_argument(*_spellings(f"no_{entry.name}"), **off, help=f"turn off: {doc}")


def _spellings(*names: str) -> list[str]:
    """Return the flags for these names, with underscores and with dashes."""
    flags = [f"--{name}" if len(name) > 1 else f"-{name}" for name in names]
    return [*dict.fromkeys([*flags, *(flag.replace("_", "-") for flag in flags)])]


def _boolean(word: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is not true or false")
    return values[word.lower()]


def _whole_number(word: str) -> int:
    if len(word) > MOST_DIGITS and word.lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"a number of {len(word)} digits is too large")
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{in_short(word)} is not a whole number") from None


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{in_short(word)} is not a number") from None


_NUMBERS: dict[Any, Any] = {int: _whole_number, float: _number}


def parse(argv: Sequence[str], prog: str = "hf-bsopt find", description: str = "") -> Arguments:
    """Parse the command line. Raises UsageError for what is misspelled or missing; exits only for --help."""
    made = parser(prog, description)
    _check_spelling(argv, made)
    values, rest = made.parse_known_args(list(argv))
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no flag; the model is named with --model")
    given = vars(values)
    if given.get("training_args") is not None:
        given = {**_from_file(given), **given}
    arguments = _arguments(given, argv, made)
    _check(arguments)
    return arguments


def refuse(arguments: Arguments, names: Set[str], why: str) -> None:
    """Raise UsageError for the first of these options and flags that was given."""
    for name in sorted(arguments.given & names):
        raise UsageError(f"--{name} {why}")


def _check_spelling(argv: Sequence[str], made: argparse.ArgumentParser) -> None:
    known = {option for action in made._actions for option in action.option_strings}
    for word in argv:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; --help shows all"
            raise UsageError(f"{name} is not a flag{hint}")


def _arguments(given: dict[str, Any], argv: Sequence[str], made: argparse.ArgumentParser) -> Arguments:
    groups = [
        kind(**{entry.name: given[entry.name] for entry in dataclasses.fields(kind) if entry.name in given})
        for kind in FLAG_CLASSES
    ]
    model, table, dataset, output = groups
    option_names = {entry.name for kind in OPTION_CLASSES for entry in dataclasses.fields(kind)}
    asked = {name: value for name, value in given.items() if name in option_names}
    lengths = asked.pop("max_length", [])
    precision = _precision(given)
    if precision is not None:
        asked["precision"] = precision
    try:
        for length in lengths:
            Options.of({"max_length": length}, "name")
        options = Options.of(asked, "name")
    except InvalidOptionError as error:
        raise UsageError(str(error.spelled(_as_typed(error.option, argv, made)))) from None
    return Arguments(options, tuple(lengths), model, table, dataset, output, frozenset(given))


def _as_typed(name: str, argv: Sequence[str], made: argparse.ArgumentParser) -> str:
    """Return an option as the user spelled it: the flag that they typed, else its name."""
    flags = {word.split("=")[0] for word in argv}
    for action in made._actions:
        if action.dest == name:
            return next((option for option in action.option_strings if option in flags), f"--{name}")
    return f"--{name}"


def _precision(given: dict[str, Any]) -> str | None:
    named = [name for name in ("fp16", "bf16") if given.get(name)]
    asked: str | None = given.get("precision")
    if len(named) == 2:
        raise UsageError("--fp16 and --bf16 are two precisions; give one")
    if named and asked not in (None, *named):
        raise UsageError(f"--{named[0]} and --precision {asked} contradict each other; give one")
    return named[0] if named else asked


def _from_file(given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of --training_args for what was not given, under this or another of its names."""
    values = read_training_arguments(Path(given["training_args"]), given.get("gradient_accumulation_steps"))
    if {"effective_batch_size", "total_tokens"} & given.keys():
        values.pop("effective_batch_size", None)
        values.pop("gradient_accumulation_steps", None)
    elif "effective_batch_size" in values:
        given.pop("gradient_accumulation_steps", None)  # the file's effective batch was made with it
    if "precision" in given or any(given.get(name) for name in ("fp16", "bf16")):
        for name in ("precision", "fp16", "bf16"):
            values.pop(name, None)
    elif not any(values.get(name) for name in ("fp16", "bf16") if name not in given):
        values["precision"] = "fp32"
    if given.get("evaluation") is False:
        values.pop("check_evaluation", None)
    return values


def _check(arguments: Arguments) -> None:
    """Raise UsageError for flags that contradict each other."""
    given, output, search = arguments.given, arguments.output, arguments.options.search
    if not arguments.model.model and not arguments.table.models:
        raise UsageError("which model? For example --model dmis-lab/biobert-v1.1")
    if arguments.model.torch_compile:
        raise UsageError(
            "torch.compile fuses operations as it runs, and what it then keeps cannot be predicted: predict without "
            "it, which needs about as much memory or more"
        )
    if arguments.model.use_liger_kernel:
        raise UsageError(
            "Liger kernels are Triton programs, which cannot be traced: predict without them, an upper bound (they "
            "save most with a large vocabulary, since the logits are never whole)"
        )
    if not arguments.dataset.dataset:
        for name in ("tokenizer", "text_column", "split", "sample"):
            if name in given:
                raise UsageError(f"--{name} goes with --dataset")
    if search.check_evaluation is not None and not search.evaluation:
        raise UsageError("--per_device_eval_batch_size asks about an evaluation, and --evaluation False turns it off")
    if arguments.table.format != "text" and not arguments.is_table:
        raise UsageError("--format is that of a table: name several --models or --gpus")
    _check_output(output, has_dataset=bool(arguments.dataset.dataset), lengths=len(arguments.max_lengths))
    _check_files(output, is_table=arguments.is_table)


def _check_output(output: OutputFlags, *, has_dataset: bool, lengths: int) -> None:
    if output.quiet and has_dataset and not output.json:
        raise UsageError("--dataset is a table, and --quiet prints none: add --json FILE for it")
    if output.quiet and output.advise and not (output.json or output.html):
        raise UsageError("--advise is a table, and --quiet prints none: add --json FILE or --html FILE for it")
    if output.quiet and output.verbose:
        raise UsageError("--quiet and --verbose contradict each other; give one")
    if output.patch is None and (output.key or output.dry_run):
        raise UsageError("--key and --dry_run go with --patch FILE")
    if output.patch is not None and lengths > 1:
        raise UsageError("--patch writes one answer: give one --max_length")
    if output.dry_run and output.quiet:
        raise UsageError("--dry_run shows what would change, and --quiet shows nothing; give one")


def _check_files(output: OutputFlags, *, is_table: bool) -> None:
    """Raise UsageError if a file cannot be written: before a search that may take minutes, not after it."""
    from .._utils.files import check_writable

    named = {name: Path(getattr(output, name)) for name in WRITTEN if getattr(output, name) is not None}
    for (name, path), (other, same) in itertools.combinations(named.items(), 2):
        if _is_same_file(path, same):
            raise UsageError(f"--{name} and --{other} name one file, {path}: one would replace what the other writes")
    for name in ("json", "html"):
        if name in named:
            check_writable(named[name])
    if "plot" in named:
        from ..report.plots import check_file

        check_file(named["plot"])
    if "patch" in named and not is_table:  # a table refuses it
        from ..patching import check_patchable, parse_keys

        check_patchable(named["patch"], parse_keys(output.key))
        if not output.dry_run:
            check_writable(named["patch"])


def _is_same_file(path: Path, other: Path) -> bool:
    try:
        return path.resolve() == other.resolve()
    except (OSError, ValueError, RuntimeError):  # each is refused with its own name
        return False
