"""Lists of names in messages: the first ones, and the number of the others."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[object], shown: int = 3, *, separator: str = ", ", kind: str = "") -> str:
    """The first names, and how many more there are; ``kind`` is what they are, in the plural.

    >>> listed(["a", "b", "c", "d", "e"]), listed([1, 2, 3], 1, kind="tasks")
    ('a, b, c and 2 more', '1 and 2 more tasks')
    """
    words = [str(name) for name in names]
    more = len(words) - shown
    what = f" {kind}" if kind else ""
    return separator.join(words[:shown]) + (f" and {more} more{what}" if more > 0 else "")
