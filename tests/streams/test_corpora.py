"""Readers: what they take of each corpus, and what they leave out."""

from __future__ import annotations

from collections import Counter

import pytest

from manifold_cl.streams import corpora
from manifold_cl.streams.corpora import _synset


def test_a_wordnet_line_is_taken_apart() -> None:
    line = (
        "00001740 29 v 02 draw_in 0 inhale 1 003 * 00005041 v 0000 ;c 06037666 n 0000 ;u 07075172 n 0000 "
        '02 + 02 00 + 08 00 | take in air; "inhale; exhale"; "draw in breath"  '
    )
    synset = _synset(line)
    assert (synset.offset, synset.lexfile, synset.lemma) == ("00001740", "29", "draw in")
    assert synset.topics == ("06037666",)
    assert synset.definition == "take in air"


def test_word_counts_are_hexadecimal() -> None:
    words = " ".join(f"w{i} 0" for i in range(17))
    assert _synset(f"1 05 n 11 {words} 001 ;c 42 n 0000 | a gloss").topics == ("42",)


def test_labels_are_in_the_order_of_the_benchmark_and_distinct() -> None:
    sizes = {"NEWSGROUPS": 20, "NOUNS": 22, "REUTERS": 24, "OPINIONS": 2, "VERBS": 15, "AUTHORS": 2, "TOPICS": 21}
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


@pytest.mark.stream
def test_topics_are_frequent_and_not_given_away() -> None:
    counts = Counter(key for _, key in corpora.read_topics())
    assert set(counts) == set(corpora.TOPICS)
    assert min(counts.values()) >= 60
    assert not any(text.startswith("(") for text, _ in corpora.read_topics())
