"""Selection of the texts of a task: few, balanced over classes, and the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")

Evaluated = Literal["test", "validation"]
"""The part of a corpus in a stream's test split."""
Pairs = Sequence[tuple[str, str]]
"""Texts with the key of their class."""

HELD_OUT = 200
"""Training items held out for evaluation if requested; at most a fifth of them."""
SEED = 0
"""Seed of the selection; never varied, so that every run of every method sees the same texts."""
TEST, TRAIN, VALIDATION = 200, 960, 160
"""Sizes of the three parts of a full task."""
LEADING_WORDS = 16
"""Texts that agree in this many words count as one: truncated, they are one text to the model."""
KEPT_BACK = 5
"""A class stops giving test texts when it has this many left."""


@dataclass(frozen=True)
class Selection:
    """Three disjoint parts of a corpus as (text, class key) pairs, each in a balanced order.

    A part takes one text per class in turn, as long as the class has some. Its first texts are therefore balanced too.
    """

    train: Pairs
    validation: Pairs
    test: Pairs

    def cut(self, *, train: int, validation: int, test: int) -> Selection:
        """The leading texts of each part: smaller selections are nested in larger ones."""
        return Selection(self.train[:train], self.validation[:validation], self.test[:test])


def select(
    task: str,
    pool: Iterable[tuple[str, str]],
    official_test: Iterable[tuple[str, str]] = (),
    *,
    test_size: int = TEST,
) -> Selection:
    """The test part, then the training part, then the validation part of what remains of ``pool``.

    Rules: docs/data.md, "Selection". With an ``official_test`` the test part comes from it, and its texts are dropped
    from the pool. The draw depends only on ``task`` and on the order of the texts. Test texts beyond `TEST` are drawn
    last, so that the other parts do not depend on ``test_size``.

    Raises:
        ValueError: too few texts for the three parts.
    """
    rng = random.Random(f"{task}-{SEED}")
    seen: set[str] = set()
    leads: set[str] = set()
    held_out = _shuffle_classes(official_test, seen, leads, rng)
    classes = _shuffle_classes(pool, seen, leads, rng)
    test = _take(held_out or classes, TEST, leave=KEPT_BACK)
    train = _take(classes, TRAIN)
    validation = _take(classes, VALIDATION)
    test = (*test, *_take(held_out or classes, test_size - TEST))
    sizes = {"test": max(test_size, TEST), "train": TRAIN, "validation": VALIDATION}
    for (part, needed), texts in zip(sizes.items(), (test, train, validation), strict=True):
        if len(texts) < needed:
            raise ValueError(f"corpus of task {task!r} has {len(texts)} texts for its {part} part, {needed} needed")
    return Selection(train, validation, test)


def validate_selection(tasks: Sequence[str] | None, evaluate_on: str) -> None:
    """Raise TypeError for tasks given as one string, ValueError for a part that is not `Evaluated`."""
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, got the string {tasks!r}: write [{tasks!r}]")
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")


def spaced(items: Sequence[T], count: int | None) -> list[T]:
    """``count`` items evenly spaced over their order; all if there are no more than that.

    >>> spaced(range(10), 3)
    [0, 3, 6]
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def drawn(items: Sequence[T], count: int | None, *, key: str) -> list[T]:
    """``count`` items by a draw that depends on ``key`` alone, in their order; all if there are no more than that.

    Unlike evenly spaced items, they do not follow a period in the data, such as one class after the other.
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(f"{key}-{SEED}").sample(range(len(items)), count))]


def hold_out(items: Sequence[T], *, key: str | None = None) -> tuple[list[T], list[T]]:
    """The items that stay, and those held out: `HELD_OUT` of them, at most a fifth; drawn by ``key``, or evenly spaced.

    Raises:
        ValueError: for fewer than two items.
    """
    count = min(HELD_OUT, max(1, len(items) // 5))
    held = spaced(range(len(items)), count) if key is None else drawn(range(len(items)), count, key=key)
    aside = set(held)
    rest = [item for i, item in enumerate(items) if i not in aside]
    if not rest:
        raise ValueError(f"{len(items)} training items are too few to hold some out")
    return rest, [items[i] for i in held]


def shuffled(task: str, part: str, pairs: Pairs) -> list[tuple[str, str]]:
    """The pairs in an order that mixes the classes and depends only on ``task`` and ``part``."""
    mixed = list(pairs)
    random.Random(f"{task}-{part}-{SEED}").shuffle(mixed)
    return mixed


def _shuffle_classes(
    pairs: Iterable[tuple[str, str]], seen: set[str], leads: set[str], rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """The texts of each class, shuffled, without those in ``seen`` or ``leads``, to which the others are added."""
    classes: dict[str, list[tuple[str, str]]] = {}
    for text, key in pairs:
        if len(text.split()) >= 2 and _add(seen, text.casefold()):
            classes.setdefault(key, []).append((text, key))
    for key in sorted(classes):
        rng.shuffle(classes[key])
        # After the shuffle, so that chance decides which of two similar texts stays.
        classes[key] = [
            (text, key) for text, _ in classes[key] if _add(leads, " ".join(text.casefold().split()[:LEADING_WORDS]))
        ]
    return dict(sorted(classes.items()))


def _add(known: set[str], item: str) -> bool:
    """Whether ``item`` was not in ``known`` before it is added."""
    size = len(known)
    known.add(item)
    return len(known) > size


def _take(classes: Mapping[str, list[tuple[str, str]]], count: int, *, leave: int = 0) -> Pairs:
    """Up to ``count`` pairs, removed from the front of each class in turn."""
    taken: list[tuple[str, str]] = []
    while len(taken) < count and (giving := [texts for texts in classes.values() if len(texts) > leave]):
        taken.extend(texts.pop(0) for texts in giving[: count - len(taken)])
    return tuple(taken)
