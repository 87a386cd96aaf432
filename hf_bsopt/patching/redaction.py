"""Show parts of a user's file: a long line around what matters, and nothing that looks like a credential.

    shown_line(text, start, end, at=120)  # '…"lr": 2e-5, "batch_size": 16, "hub_token": "***", …'

Diffs and error messages end up in logs and bug reports; a configuration on one line holds the keys of its user, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .setting_names import split_words

SURROUNDINGS = 60
"""Characters that are shown before and after what matters in a long line."""
LONGEST_SHOWN = 160
"""A longer line is shown around what matters only, or its beginning if nothing in it does."""
REACH = 10_000
"""Characters on both sides of what is shown in which the beginning and end of a credential are looked for."""
HIDDEN = "***"
_MASK = "\0"
"""Placeholder of each hidden character, which keeps positions; no file with a NUL is read."""

_PASSWORDS = frozenset(["password", "passwd", "passphrase", "pwd", "secret"])
"""Words whose value is never shown, not even a number."""
_SECRET_WORDS = frozenset(["token", "apikey", "credential", "credentials", "auth", "authorization", "bearer"])
_SECRET_KEYS = frozenset(
    [
        "api",
        "access",
        "secret",
        "private",
        "encryption",
        "signing",
        "license",
        "ssh",
        "aws",
        "azure",
        "gcp",
        "google",
        "hf",
        "hub",
        "openai",
        "wandb",
        "comet",
        "neptune",
        "kaggle",
        "github",
        "anthropic",
        "account",
        "client",
        "service",
    ]
)
"""Words that make a "key" one: the others are keys of a mapping."""
_SPECIAL_TOKENS = frozenset(
    ["pad", "eos", "bos", "unk", "mask", "sep", "cls", "image", "audio", "video", "special", "additional"]
)
_NAMED = re.compile(
    r"""(?<![\w-])(?P<name>-{0,2}[A-Za-z_][\w-]*)(?:\\?["'])?\]?(?P<sep>\s*(?:=|:(?!/)|,)\s*\(?\s*|[ \t]+)"""
    r"""(?P<value>[rbfuRBFU]{0,2}\\?(?P<quote>["']).*?(?<!\\)\\?(?P=quote)|[^\s"'(){}\[\],;]+)""",
    re.DOTALL,
)
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:hf|api_org|sk|pk|rk|ghp|gho|ghu|ghs|ghr|github_pat|glpat|xox[a-z]|npm|pypi|dckr_pat|ya29|SG|"
    r"nvapi|r8|gsk|tvly)[-_.](?=[\w.-]*[0-9])[\w.-]{8,}"
    r"|(?:AKIA|ASIA|AIza|eyJ)[\w.-]{12,}"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s\"'@]+(?=@)")
_PRIVATE_KEY = re.compile(r"-----BEGIN[^-]*PRIVATE KEY-----.*?(?:-----END[^-]*-----|\Z)", re.DOTALL)
_BEARER = re.compile(r"(?i)(?<=bearer )[^\s\"']+")
_RUN = re.compile(r"[A-Za-z0-9+/=]{20,}")
_PLAIN = re.compile(r"""[rbfuRBFU]{0,2}\\?["']?(?:[+-]?[0-9][0-9_.eE+-]*|true|false|none|null|auto|)\\?["']?""", re.I)


def mask_credentials(text: str) -> str:
    """Return the text with each character of what looks like a credential replaced by NUL, at the same length."""
    masked = [*text]
    for start, end in _credentials(text):
        for at in range(start, end):
            if masked[at] not in "\r\n":
                masked[at] = _MASK
    return "".join(masked)


def unmasked(text: str) -> str:
    """Return masked text for display, without the length of what is hidden."""
    return re.sub(f"{_MASK}+", HIDDEN, text)


def without_credentials(text: str) -> str:
    """Return the text with what looks like a credential replaced by :data:`HIDDEN`."""
    return unmasked(mask_credentials(text))


def shown_line(text: str, start: int, end: int, at: int) -> str:
    """Return the line from ``start`` to ``end`` of a text for a message: if it is long, the part around ``at``."""
    first, last = max(start, at - REACH), min(end, at + REACH)
    masked = masked_region(text, first, last)
    if last - first < end - start or len(masked.strip()) > LONGEST_SHOWN:
        left, right = max(0, at - first - SURROUNDINGS), at - first + SURROUNDINGS
        before, after = masked[:left].strip(), masked[right:].strip()
        masked = ("…" if before else "") + masked[left:right] + ("…" if after else "")
    return unmasked(masked).strip()


def masked_region(text: str, start: int, end: int) -> str:
    """Return a part of the text, masked with what is around it in view: a credential may begin before the part."""
    first = max(0, start - REACH)
    return mask_credentials(text[first : end + REACH])[start - first : end - first]


def _credentials(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_PREFIXED, _IN_ADDRESS, _PRIVATE_KEY, _BEARER):
        for found in pattern.finditer(text):
            yield found.span()
    for found in _RUN.finditer(text):
        if _looks_random(found.group()):
            yield found.span()
    at = 0
    while named := _NAMED.search(text, at):
        if _is_secret(named["name"], named["sep"], named["value"]):
            yield _inside_quotes(named)
            at = named.end()
        else:
            at = named.end("name")


def _inside_quotes(found: re.Match[str]) -> tuple[int, int]:
    start, end = found.span("value")
    if found["quote"] is None:
        return start, end
    inner = found["value"].index(found["quote"]) + 1
    return start + inner, max(start + inner, end - (2 if found["value"].endswith(f"\\{found['quote']}") else 1))


def _is_secret(name: str, separator: str, value: str) -> bool:
    """Return True if the name says that the value is a credential. Only a flag has its value after a space."""
    if not separator.strip(" \t\r\n(") and not name.startswith("--"):
        return False
    words = split_words(name)
    if not _PASSWORDS.isdisjoint(words):
        return bool(value)
    if _PLAIN.fullmatch(value) or not _SPECIAL_TOKENS.isdisjoint(words):
        return False
    if not _SECRET_WORDS.isdisjoint(words):
        return True
    return words[-1:] == ("key",) and not _SECRET_KEYS.isdisjoint(words[:-1])


def _looks_random(run: str) -> bool:
    """Return True for a long run of letters and digits that no word or path has."""
    if "/" in run and max(map(len, run.split("/"))) < 20:
        return False
    digits = sum(character.isdigit() for character in run)
    if len(run) >= 32 and re.fullmatch(r"[0-9a-fA-F]+", run):
        return True
    has_both_cases = run.lower() != run and run.upper() != run
    return digits >= (2 if has_both_cases else 5) and digits < len(run)
