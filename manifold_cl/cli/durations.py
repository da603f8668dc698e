"""Expected time of runs, from times measured with all tasks and examples (``benchmarks/durations.py``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


@cache
def measured() -> dict[str, Any]:
    """Stream → its number of tasks and training examples, and seconds per method and part; the machine in words."""
    content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return content


def expected_seconds(
    stream: str, methods: Sequence[str], *, tasks: int | None = None, examples: int | None = None
) -> float | None:
    """Seconds of one run per method on a CPU; None for a stream or method without a measured time."""
    known = measured()["streams"].get(stream)
    if known is None or not set(methods) <= known["seconds"].keys():
        return None
    of_tasks = 1.0 if tasks is None else tasks / known["tasks"]
    of_examples = 1.0 if examples is None else min(1.0, examples / known["examples"])
    times = [known["seconds"][name] for name in methods]
    return of_tasks * float(sum(of_examples * each["train"] + each["other"] for each in times))


def in_words(seconds: float) -> str:
    """The time in whole minutes, in tens of seconds below two minutes, or in hours and minutes from two hours on.

    >>> in_words(4), in_words(87), in_words(530), in_words(7500)
    ('10 seconds', '90 seconds', '9 minutes', '2 hours 5 minutes')
    """
    if seconds < 115:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} hours {minutes % 60} minutes"
