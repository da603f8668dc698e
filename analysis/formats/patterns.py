"""Regular expressions from files and options, matched against layer names within a time limit.

Python's matcher takes exponential time for some expressions and cannot be interrupted from a thread. Expressions
without repetition, groups or alternatives are matched here; all others are matched in a process of their own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

from analysis.names import listed

SECONDS = 5.0
"""Time limit for all patterns of one file and all its layers; ordinary ones take milliseconds."""
_PLAIN = re.compile(r"\^?(?:[\w\-/ ]|\.|\\[^\w\s])*")
_TOKEN = re.compile(r"\\(.)|(.)")
_PROCESS = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
form, patterns, names = json.load(sys.stdin)
try:
    matchers = [re.compile(pattern).search for pattern in patterns]
    if form:
        matchers = [re.compile(form.format(pattern)).match for pattern in patterns]
except (re.error, RecursionError, OverflowError, ValueError) as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([next((i for i, match in enumerate(matchers) if match(name)), None) for name in names]))
"""
SUFFIX = r"(.*\.)?({})$"
"""PEFT's form of a pattern: it matches a complete name, or the part after a dot."""


def matching_names(pattern: str, names: Sequence[str]) -> list[str]:
    """The `names` in which the pattern occurs; ValueError if it is no regular expression, or exceeds the time limit."""
    if _PLAIN.fullmatch(pattern):
        compiled = re.compile(pattern)
        return [name for name in names if compiled.search(name)]
    indices = _in_process("", [pattern], names)
    return [name for name, index in zip(names, indices, strict=True) if index is not None]


def first_suffix_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The index of the first pattern that PEFT would match to each name, or None; errors as in `matching_names`."""
    others: list[int] = []
    table: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
    for index, pattern in enumerate(patterns):
        if not _PLAIN.fullmatch(pattern):
            others.append(index)
            continue
        anchored, text, dots = _plain_parts(pattern)
        table.setdefault((anchored, len(text), dots), {}).setdefault(text, index)
    matches = [min(_plain_matches(table, name), default=None) for name in names]
    if others:
        for position, match in enumerate(_in_process(SUFFIX, [patterns[index] for index in others], names)):
            if match is not None:
                plain_match = matches[position]
                matches[position] = others[match] if plain_match is None else min(plain_match, others[match])
    return matches


def _plain_parts(pattern: str) -> tuple[bool, str, tuple[int, ...]]:
    """Whether a plain pattern is anchored at the start, its characters, and the positions of its dots."""
    anchored = pattern.startswith("^")
    tokens = _TOKEN.findall(pattern[anchored:])
    dots = tuple(position for position, (_, char) in enumerate(tokens) if char == ".")
    return anchored, "".join(escaped or char for escaped, char in tokens), dots


def _plain_matches(table: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]], name: str) -> Iterator[int]:
    for (anchored, length, dots), indices in table.items():
        start = len(name) - length
        if start == 0 or (start > 0 and not anchored and name[start - 1] == "."):
            text = name[start:]
            for dot in dots:
                text = f"{text[:dot]}.{text[dot + 1 :]}"
            if text in indices:
                yield indices[text]


def _in_process(form: str, patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The index of the first pattern that matches each name in a form; without a form, that occurs in the name."""
    shown = listed([f"{pattern[:80]!r}" for pattern in patterns])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROCESS],
            input=json.dumps([form, list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"matching {shown} against {len(names)} layer names does not end within {SECONDS:g} s"
        raise ValueError(f"{problem}: write the pattern without a repetition inside a repetition") from None
    if done.returncode != 0:
        raise ValueError(f"{shown} cannot be matched: {done.stderr.strip().rpartition(chr(10))[2] or done.returncode}")
    result = json.loads(done.stdout)
    if isinstance(result, str):
        raise ValueError(f"{shown} is no regular expression: {result}")
    return list(result)
