r"""Find the sites in shell scripts: `--per_device_train_batch_size 8 \`, `BATCH_SIZE=8`, `--batch_size $BATCH_SIZE`.

The script is read, not run. What only a run could tell (`$1`, `$(…)`, loops) is a computed value.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator

from .config_files import Found
from .python_values import as_number
from .sites import (
    COMMAND_LINE,
    Chunk,
    Computed,
    Container,
    Kind,
    NonNumber,
    Number,
    Operation,
    Path,
    Reference,
    Site,
    Value,
    line_starts,
)

OWN_COMMAND = re.compile(r"find[-_]optimal[-_]batch[-_]size|hf[-_]bsopt")
_SKIPPED = re.compile(r"[ \t]*(?:echo|printf|grep|sed|awk|cat|git|pip|cd)\b")
"""Commands whose arguments are text, not settings."""
_TOKEN = re.compile(
    r"""(?P<comment>(?<![^\s;&|(])\#[^\r\n]*)|(?P<escape>\\(?:\r\n|.))|(?P<single>'[^']*')"""
    r"""|(?P<double>"(?:\\.|[^"\\])*")|(?P<end>\r\n|\r|\n|;;?|&&|\|\|?|&(?!>))"""
    r"""|(?P<heredoc><<-?[ \t]*['"]?(?P<word>\w+)['"]?)"""
    r"""|(?P<dollar>\$\(\([^\r\n]*?\)\)|\$\{[^}\r\n]*\}|\$\((?:[^()]|\([^()]*\))*\))""",
    re.DOTALL,
)
_KEYWORD = re.compile(
    r"[ \t]*(?:\\\r?\n[ \t]*)*(if|then|elif|else|do|while|until|for|case|fi|done|esac|\{|\}|!|time)(?=[\s;]|$)"
)
_FUNCTION = re.compile(r"[ \t]*(?:function[ \t]+)?([\w-]+)[ \t]*\(\)[ \t]*\{?")
_FOR = re.compile(r"[ \t]*(\w+)[ \t]+in\b")
_PREFIX = re.compile(r"[ \t]*(?:export|local|readonly|declare|typeset|env|set)(?:[ \t]+-\w+)*(?=[ \t])")
_ASSIGNMENT = re.compile(r"[ \t]*(?P<name>[A-Za-z_]\w*)(?P<plus>\+?)=(?P<list>\()?")
_WORD = re.compile(
    r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\$\(\([^\r\n]*?\)\)|\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}|\\.|[^\s;&|"'()])*""",
    re.DOTALL,
)
_FLAG = re.compile(
    r"""(?<![\w$.{-])(?P<dashes>--?)?(?P<name>[A-Za-z_][\w.-]*)(?P<sep>=|[ \t]+(?:\\\r?\n[ \t]*)*|(?:\\\r?\n[ \t]*)+)"""
    r"""(?P<value>"[^"\r\n]*"|'[^'\r\n]*'|\$\(\([^\r\n]*?\)\)|\$\([^)\r\n]*\)|\$\{[^}\r\n]*\}|\$\w+|[+-]?[0-9.][\w.+-]*)(?=[\s\\;&|)"']|$)"""
)
_NAME = re.compile(r"\$\{?([A-Za-z_]\w*)")
_REFERENCE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_ARITHMETIC = re.compile(r"\$\(\(\s*\$?\{?(\w+)\}?\s*([-+*/%])\s*\$?\{?(\w+)\}?\s*\)\)")
_OPENING, _CLOSING = ("if", "while", "until", "for", "case"), ("fi", "done", "esac")


def shell_sites(chunk: Chunk, source: str) -> Found:
    """Return the sites of a shell script, and the variables that it reads."""
    reader = _ShellReader(chunk)
    for start, end, text in _commands(source):
        reader.command(start, end, text)
    return Found(tuple(reader.sites), tuple(reader.reads))


def _commands(source: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, the source with comments and here-documents blanked) of each simple command."""
    text = source
    start = at = 0
    heredocs: list[str] = []
    while found := _TOKEN.search(text, at):
        at = found.end()
        if found["comment"]:
            text = text[: found.start()] + " " * len(found.group()) + text[at:]
        elif found["heredoc"]:
            heredocs.append(found["word"])
        elif found["end"]:
            yield start, found.start(), text
            start = at
            if found["end"][-1] in "\r\n" and heredocs:
                at = start = _after_heredocs(text, at, heredocs)
                heredocs = []
    yield start, len(text), text


def _after_heredocs(text: str, at: int, words: list[str]) -> int:
    for word in words:
        found = re.compile(rf"^[ \t]*{re.escape(word)}[ \t\r]*$", re.MULTILINE).search(text, at)
        at = found.end() if found else len(text)
    return at


class _ShellReader:
    def __init__(self, chunk: Chunk) -> None:
        self.sites: list[Site] = []
        self.reads: list[tuple[int, Path]] = []
        self._chunk = chunk
        self._starts = line_starts(chunk.text)
        self._open: list[str] = []
        """The conditions, loops and functions that the command is in."""

    def command(self, start: int, end: int, text: str) -> None:
        """Add the sites of one simple command."""
        start = self._after_keywords(start, end, text)
        command = text[start:end]
        if OWN_COMMAND.search(command):
            return
        order = len(self.sites)
        self.reads += [(order, (name,)) for name in _NAME.findall(command)]
        prefix = _PREFIX.match(text, start, end)
        at = prefix.end() if prefix else start
        while found := _ASSIGNMENT.match(text, at, end):
            at = self._assignment(found, end, text)
            if at < 0:
                return
        if not _SKIPPED.match(text, at, end):
            self._flags(at, end, text)

    def _after_keywords(self, start: int, end: int, text: str) -> int:
        while found := _FUNCTION.match(text, start, end) or _KEYWORD.match(text, start, end):
            word = found.group(1)
            line = bisect.bisect_right(self._starts, found.start(1))
            start = found.end()
            if found.re is _FUNCTION or word in (*_OPENING, "{"):
                self._open.append(f"{word} (line {line})")
            elif word in (*_CLOSING, "}") and self._open:
                self._open.pop()
            if word == "for" and (loop := _FOR.match(text, start, end)):
                self._add((loop.group(1),), "variable", Computed(frozenset()), Container(0), loop.start(1), loop.end(1))
                return end
        return start

    def _assignment(self, found: re.Match[str], end: int, text: str) -> int:
        """Add NAME=value, and return where it ends; -1 for a list NAME=(…), whose flags are added."""
        if found["list"]:
            self._flags(found.end(), end, text)
            return -1
        word = _WORD.match(text, found.end(), end)
        stop = word.end() if word else found.end()
        value = self._value(text, found.end(), stop)
        if found["plus"]:
            value = Computed(frozenset({found["name"]}), uses_old_value=True)
        holds_flags = isinstance(value, NonNumber) and "-" in value.text
        value = NonNumber("flags") if holds_flags else value
        self._add((found["name"],), "variable", value, Container(0), found.start("name"), stop)
        if holds_flags:
            self._flags(found.end(), stop, text)
        return stop

    def _flags(self, start: int, end: int, text: str) -> None:
        found = [*_FLAG.finditer(text, start, end)]
        names = frozenset(flag["name"].replace("-", "_") for flag in found)
        container = Container(start + 1, "flags", names)
        for flag in found:
            value = self._value(text, flag.start("value"), flag.end("value"))
            if isinstance(value, NonNumber) or (flag["sep"] != "=" and flag["dashes"] != "--"):
                continue
            path = (COMMAND_LINE, *flag["name"].replace("-", "_").split("."))
            self._add(path, "flag", value, container, flag.start(), flag.end())

    def _value(self, text: str, start: int, end: int) -> Value:
        """Return the value of a word: a number, another variable, or what only a run could tell."""
        word = text[start:end]
        if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":
            start, word = start + 1, word[1:-1]
        number = as_number(word)
        if number is not None:
            return Number(number, start, start + len(word))
        if found := _REFERENCE.fullmatch(word):
            return Reference((found.group(1) or found.group(2),))
        if found := _ARITHMETIC.fullmatch(word):
            operator = "//" if found.group(2) == "/" else found.group(2)
            operands = tuple(_operand(found.group(place)) for place in (1, 3))
            return Computed(frozenset(_names(operands)), operation=Operation(operator, operands))
        if "$" in word or "`" in word:
            return Computed(frozenset())
        return NonNumber(word)

    def _add(self, path: Path, kind: Kind, value: Value, container: Container, start: int, end: int) -> None:
        guard = ", ".join(self._open)
        order = len(self.sites) + 1
        self.sites.append(Site(path, kind, value, self._chunk, container, start, end, order, guard))


def _operand(word: str) -> Value:
    return Number(int(word), -1, -1) if word.isdigit() else Reference((word,))


def _names(operands: tuple[Value, ...]) -> Iterator[str]:
    for operand in operands:
        if isinstance(operand, Reference):
            yield operand.path[0]
