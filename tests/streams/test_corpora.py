"""Readers: what they take of each corpus, and what they leave out."""

from __future__ import annotations

from collections import Counter

import pytest

from manifold_cl.streams import corpora


def test_labels_are_in_the_order_of_the_benchmark_and_distinct() -> None:
    sizes = {"NEWSGROUPS": 20, "NOUNS": 22, "REUTERS": 24, "OPINIONS": 2, "VERBS": 15, "AUTHORS": 2, "TOPICS": 21}
    sizes |= {"ANIMALS": 14, "PLANTS": 8, "MESSAGES": 8, "ACTS": 9, "ARTIFACTS": 15, "BOOKS": 2}
    for name, size in sizes.items():
        labels = getattr(corpora, name)
        assert len(labels) == len(set(labels.values())) == size
    assert list(corpora.REUTERS.values())[:3] == ["company earnings", "corporate acquisitions and mergers", "crude oil"]


@pytest.mark.stream
def test_newsgroups_have_the_official_sizes_and_only_letters() -> None:
    train, test = corpora.read_newsgroups("train"), corpora.read_newsgroups("test")
    assert (len(train), len(test)) == (11293, 7528)
    assert {key for _, key in train} == {key for _, key in test} == set(corpora.NEWSGROUPS)
    assert all(text.replace(" ", "").isalpha() and text.islower() for text, _ in test if text)


@pytest.mark.stream
def test_reuters_has_the_topics_with_at_least_22_training_texts() -> None:
    train, test = corpora.read_reuters("train"), corpora.read_reuters("test")
    assert (len(train), len(test)) == (6295, 2440)
    counts = Counter(key for _, key in train)
    assert set(counts) == set(corpora.REUTERS)
    assert min(counts.values()) == 22
    assert all(text for text, _ in train + test)


@pytest.mark.slow
@pytest.mark.stream
def test_noun_and_verb_glosses_have_no_examples() -> None:
    nouns, verbs = corpora.read_nouns(), corpora.read_verbs()
    assert (len(nouns), len(verbs)) == (81244, 13767)
    assert ("an action", "04") in nouns
    assert ("breathe: draw air into, and expel out of, the lungs", "29") in verbs
    assert not any('; "' in text for text, _ in nouns + verbs)


@pytest.mark.stream
def test_authors_are_two_accounts_without_links_or_retweets() -> None:
    authors = corpora.read_authors()
    assert Counter(key for _, key in authors) == {"realDonaldTrump": 3093, "HillaryClinton": 2629}
    assert not any("://" in text for text, _ in authors)


@pytest.mark.stream
@pytest.mark.parametrize(
    ("read", "negative", "positive"),
    [
        (corpora.read_movies, 4822, 4790),
        (corpora.read_amazon, 1080, 1610),
        (corpora.read_tweets, 931, 2042),
        (corpora.read_nyt, 1305, 784),
    ],
)
def test_opinions_are_the_clear_cut_ones(read, negative: int, positive: int) -> None:
    pairs = read()
    assert Counter(key for _, key in pairs) == {"negative": negative, "positive": positive}


@pytest.mark.stream
def test_accents_and_links_are_read_right() -> None:
    assert any("clichés" in text for text, _ in corpora.read_movies())
    assert not any("://" in text for text, _ in corpora.read_tweets())


@pytest.mark.slow
@pytest.mark.stream
def test_topics_are_frequent_and_not_given_away() -> None:
    counts = Counter(key for _, key in corpora.read_topics())
    assert set(counts) == set(corpora.TOPICS)
    assert min(counts.values()) >= 60
    assert not any(text.startswith("(") for text, _ in corpora.read_topics())


@pytest.mark.stream
@pytest.mark.parametrize(
    ("name", "lexfile", "count", "smallest"),
    [
        ("ANIMALS", "05", 3635, 42),
        ("PLANTS", "20", 4836, 117),
        ("MESSAGES", "10", 3276, 115),
        ("ACTS", "04", 3370, 135),
        ("ARTIFACTS", "06", 5748, 155),
    ],
)
def test_kinds_have_texts_for_every_label(name: str, lexfile: str, count: int, smallest: int) -> None:
    labels = getattr(corpora, name)
    pairs = corpora.read_kinds(lexfile, labels)
    counts = Counter(key for _, key in pairs)
    assert (len(pairs), min(counts.values())) == (count, smallest)
    assert set(counts) == set(labels)


@pytest.mark.stream
def test_passages_of_books_for_tests_are_from_other_excerpts() -> None:
    train, test = corpora.read_books("train"), corpora.read_books("test")
    assert Counter(key for _, key in train) == {"adult": 1271, "children": 1045}
    assert Counter(key for _, key in test) == {"adult": 453, "children": 339}
    assert {len(text.split()) for text, _ in train + test} == {28}
    assert not {text for text, _ in train} & {text for text, _ in test}
