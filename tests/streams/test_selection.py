"""Selection: disjoint, balanced, nested, and the same every time."""

from __future__ import annotations

from collections import Counter

import pytest

from manifold_cl.streams.selection import TEST, TRAIN, VALIDATION, select, shuffled


def corpus(**sizes: int) -> list[tuple[str, str]]:
    return [(f"{key} text number {i}", key) for key, size in sizes.items() for i in range(size)]


LARGE = corpus(b=900, a=900, c=900)


def texts(pairs) -> set[str]:
    return {text for text, _ in pairs}


def test_parts_have_their_sizes_and_share_no_text() -> None:
    selection = select("task", LARGE)
    assert [len(p) for p in (selection.train, selection.validation, selection.test)] == [TRAIN, VALIDATION, TEST]
    assert len(texts(selection.train) | texts(selection.validation) | texts(selection.test)) == 1320


def test_classes_are_balanced_to_within_one_text() -> None:
    selection = select("task", LARGE)
    for part in (selection.train, selection.validation, selection.test):
        counts = Counter(key for _, key in part).values()
        assert max(counts) - min(counts) <= 1


def test_further_test_texts_change_no_other_part() -> None:
    small, large = select("task", LARGE), select("task", LARGE, test_size=2 * TEST)
    assert (large.train, large.validation, large.test[:TEST]) == (small.train, small.validation, small.test)
    assert len(texts(large.test)) == 2 * TEST
    assert not texts(large.test) & (texts(large.train) | texts(large.validation))
    with pytest.raises(ValueError, match="for its test part, 2000 needed"):
        select("task", LARGE, test_size=2000)


def test_a_small_class_keeps_five_texts_for_training() -> None:
    selection = select("task", corpus(large=2000, small=8))
    assert Counter(key for _, key in selection.test) == {"large": 197, "small": 3}
    assert Counter(key for _, key in selection.train)["small"] == 5


def test_the_draw_depends_on_the_task_alone() -> None:
    assert select("task", LARGE) == select("task", list(LARGE))
    assert select("task", LARGE) != select("other", LARGE)


def test_the_test_part_comes_from_the_official_one_which_leaves_the_pool() -> None:
    official = corpus(b=150, a=150, c=150)
    selection = select("task", LARGE, official)
    assert texts(selection.test) <= texts(official)
    assert not texts(official) & (texts(selection.train) | texts(selection.validation))


@pytest.mark.parametrize(
    "twin",
    [
        pytest.param(lambda text: text.upper(), id="other case"),
        pytest.param(lambda text: text + " and a new end", id="other end"),
    ],
)
def test_texts_that_the_model_could_not_tell_apart_count_once(twin) -> None:
    long = [(f"{text} " + "of the same words " * 4, key) for text, key in LARGE[:1700]]
    selection = select("task", [*long, *((twin(text), key) for text, key in long)])
    chosen = [text for part in (selection.train, selection.validation, selection.test) for text, _ in part]
    assert len({text.casefold()[:60] for text in chosen}) == 1320


def test_texts_of_one_word_are_dropped() -> None:
    selection = select("task", [*LARGE, *((f"word{i}", "a") for i in range(500))])
    assert all(len(text.split()) > 1 for text in texts(selection.train))


def test_smaller_selections_are_nested_and_balanced() -> None:
    full = select("task", LARGE)
    small = full.cut(train=30, validation=6, test=9)
    assert texts(small.train) < texts(full.train)
    assert Counter(key for _, key in small.train) == {"a": 10, "b": 10, "c": 10}
    assert (len(small.validation), len(small.test)) == (6, 9)


def test_the_order_mixes_classes_and_is_repeatable() -> None:
    train = select("task", LARGE).train
    mixed = shuffled("task", "train", train)
    assert mixed == shuffled("task", "train", train)
    assert mixed != list(train)
    assert sorted(mixed) == sorted(train)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, "has 95 texts for its test part, 200 needed"),
        (1000, "has 800 texts for its train part, 960 needed"),
        (1300, "has 140 texts for its validation part, 160 needed"),
    ],
)
def test_too_small_a_corpus_is_refused(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"corpus of task 'task' {message}"):
        select("task", corpus(a=size))
