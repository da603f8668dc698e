"""Which texts of a corpus a task uses: few, balanced over classes, the same ones on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Evaluated = Literal["test", "validation"]
"""The part of a corpus that a stream's test split holds."""
Pairs = Sequence[tuple[str, str]]
"""Texts with the key of their class."""

SEED = 0
"""Seed of the selection; never varied, so that every run of every method sees the same texts."""
TEST, TRAIN, VALIDATION = 200, 960, 160
"""Sizes of the three parts of a full task."""
LEADING_WORDS = 16
"""Texts that agree in this many words count as one: long texts are cut, so the model could not tell them apart."""
KEPT_BACK = 5
"""A class stops giving test texts when it has this many left."""


@dataclass(frozen=True)
class Selection:
    """Three disjoint parts of a corpus as (text, class key) pairs, each in a balanced order.

    Balanced: one text of each class in turn, as long as the class has some. The first texts of a part
    are therefore a smaller part of the same kind, which `cut` relies on.
    """

    train: Pairs
    validation: Pairs
    test: Pairs

    def cut(self, *, train: int, validation: int, test: int) -> Selection:
        """The leading texts of each part: smaller selections are nested in larger ones."""
        return Selection(self.train[:train], self.validation[:validation], self.test[:test])


def select(task: str, pool: Iterable[tuple[str, str]], official_test: Iterable[tuple[str, str]] = ()) -> Selection:
    """The test part, then the training part, then the validation part of what remains of ``pool``.

    Texts of fewer than two words are dropped. Of texts that differ only in case, or only after their
    sixteenth word, one is kept. With an ``official_test`` the test part comes from it, and what it
    contains is dropped from the pool. The draw depends on ``task`` and the order of the texts alone.

    Raises:
        ValueError: there are not enough texts for the three parts.
    """
    rng = random.Random(f"{task}-{SEED}")
    seen = _Seen(set(), set())
    held_out = _shuffled_classes(official_test, seen, rng)
    classes = _shuffled_classes(pool, seen, rng)
    test = _take(held_out or classes, TEST, leave=KEPT_BACK)
    train = _take(classes, TRAIN)
    validation = _take(classes, VALIDATION)
    for part, texts, needed in (("test", test, TEST), ("train", train, TRAIN), ("validation", validation, VALIDATION)):
        if len(texts) < needed:
            raise ValueError(f"corpus of task {task!r} has {len(texts)} texts for its {part} part, {needed} needed")
    return Selection(train, validation, test)


def validate_selection(tasks: Sequence[str] | None, evaluate_on: str) -> None:
    """Refuse tasks given as one string, and a part of the corpus that is not `Evaluated`."""
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, got the string {tasks!r}: write [{tasks!r}]")
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")


def shuffled(task: str, part: str, pairs: Pairs) -> list[tuple[str, str]]:
    """The pairs in an order that mixes the classes and depends on ``task`` and ``part`` alone."""
    mixed = list(pairs)
    random.Random(f"{task}-{part}-{SEED}").shuffle(mixed)
    return mixed


@dataclass(frozen=True)
class _Seen:
    """What earlier texts were, whole and by their first words, in lower case."""

    texts: set[str]
    leads: set[str]

    def is_new(self, text: str) -> bool:
        """Whether no earlier text was the same; from now on this one is an earlier text."""
        return _add(self.texts, text.casefold())

    def starts_anew(self, text: str) -> bool:
        """Whether no earlier text began the same; from now on this one is an earlier text."""
        return _add(self.leads, " ".join(text.casefold().split()[:LEADING_WORDS]))


def _add(known: set[str], item: str) -> bool:
    size = len(known)
    known.add(item)
    return len(known) > size


def _shuffled_classes(
    pairs: Iterable[tuple[str, str]], seen: _Seen, rng: random.Random
) -> Mapping[str, list[tuple[str, str]]]:
    classes: dict[str, list[tuple[str, str]]] = {}
    for text, key in pairs:
        if len(text.split()) >= 2 and seen.is_new(text):
            classes.setdefault(key, []).append((text, key))
    for key in sorted(classes):
        rng.shuffle(classes[key])
        # After the shuffle, so that which of two similar texts stays is left to chance.
        classes[key] = [pair for pair in classes[key] if seen.starts_anew(pair[0])]
    return {key: classes[key] for key in sorted(classes)}


def _take(classes: Mapping[str, list[tuple[str, str]]], count: int, *, leave: int = 0) -> Pairs:
    """Up to ``count`` pairs, removed from the front of each class in turn."""
    taken: list[tuple[str, str]] = []
    while len(taken) < count:
        giving = [texts for texts in classes.values() if len(texts) > leave]
        if not giving:
            break
        taken.extend(texts.pop(0) for texts in giving[: count - len(taken)])
    return tuple(taken)
