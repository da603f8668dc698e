"""Rules that compare an answer with its references, by name.

A rule returns the credit of one answer in [0, 1]. A task's score is the mean credit in percent. Captions are scored
together (`captions`), and a simplification against its source (`text_scorers.sari`). The rules equal those of the
published evaluation scripts (docs/method.md, "Scores").
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from manifold_cl.plugins import unknown
from manifold_cl.streams.captions import caption_metrics
from manifold_cl.streams.text_scorers import (
    edit_similarity,
    exact_text,
    exact_words,
    first_letter,
    rouge_l,
    rouge_l_stemmed,
    sari,
)

Rule = Callable[[str, str], float]

REFUSAL = "unanswerable"
"""An answer with this word is wrong under the rules of MLLM-DCL."""
_EDGES = string.punctuation + string.whitespace


def normalised(text: str) -> str:
    """Lower case, white space as single blanks, no punctuation or blanks at the ends.

    >>> normalised("  The  Red-brick House. ")
    'the red-brick house'
    """
    return " ".join(text.lower().split()).strip(_EDGES)


def exact(answer: str, reference: str) -> float:
    """1 if both are the same text apart from case and surrounding white space.

    >>> exact(" Yes ", "yes"), exact("yes.", "yes")
    (1.0, 0.0)
    """
    return float(answer.strip().lower() == reference.strip().lower())


def contained(answer: str, reference: str) -> float:
    """1 if the reference occurs in the answer, apart from case.

    >>> contained("It is the left ventricle.", "Left Ventricle"), contained("unanswerable: no", "no")
    (1.0, 0.0)
    """
    return float(not _refuses(answer) and reference.strip().lower() in answer.lower())


def contained_word(answer: str, reference: str) -> float:
    """1 if the reference occurs in the answer, both normalised; a single word must be a complete word there.

    >>> contained_word("A urban area", "urban"), contained_word("suburban", "urban")
    (1.0, 0.0)
    >>> contained_word("keep going at the same speed", "going at the same speed")
    1.0
    """
    if _refuses(answer):
        return 0.0
    text, wanted = normalised(answer), normalised(reference)
    if " " in wanted:
        return float(wanted in text)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None)


def compact(answer: str, reference: str) -> float:
    """1 if both are the same once blanks and dots are removed.

    >>> compact("B.", " B"), compact("b", "B")
    (1.0, 0.0)
    """
    drop = str.maketrans("", "", " .")
    return float(not _refuses(answer) and answer.strip().translate(drop) == reference.strip().translate(drop))


def exact_answered(answer: str, reference: str) -> float:
    """As `exact`, but an answer that refuses is wrong."""
    return 0.0 if _refuses(answer) else exact(answer, reference)


def listed(answer: str, reference: str) -> float:
    """Share of the reference's comma-separated elements among the answer's; a single element must be contained.

    >>> listed("Texas, Ohio", "Ohio, Utah"), listed("The state of Ohio", "Ohio")
    (0.5, 1.0)
    """
    if _refuses(answer):
        return 0.0
    wanted = {normalised(part) for part in reference.split(",")} - {""}
    if len(wanted) < 2:
        return contained(answer, reference)
    return len(wanted & {normalised(part) for part in answer.split(",")}) / len(wanted)


_VISUAL = (exact, exact_answered, contained, contained_word, compact, listed)
_TEXTUAL = (exact_text, exact_words, first_letter, rouge_l, rouge_l_stemmed, edit_similarity)
RULES: Mapping[str, Rule] = MappingProxyType({rule.__name__: rule for rule in (*_VISUAL, *_TEXTUAL)})
"""Rules by name; each compares one answer with one reference."""
CAPTIONS = "captions"
"""Name of the scorer that is no rule: the mean of seven corpus metrics."""
SARI = "sari"
"""Name of the scorer that also needs the text to simplify."""


def credit(rule: str, answer: str, references: Sequence[str], source: str = "") -> float:
    """The credit of one answer in [0, 1], by its best reference.

    Args:
        rule: a name of `RULES`, or ``"sari"``.
        answer: of the model.
        references: accepted answers, at least one.
        source: the text to simplify, for ``"sari"`` only.

    Raises:
        ValueError: an unknown rule.

    >>> credit("exact", "Yes", ["no", "yes"])
    1.0
    """
    if rule == SARI:
        return sari(source, answer, references)
    validate_rule(rule)
    return max(RULES[rule](answer, reference) for reference in references)


def validate_rule(rule: str, where: str = "") -> None:
    """Raise ValueError for a rule that `credit` lacks, with the nearest names; ``where`` begins the message."""
    if rule not in (*RULES, SARI):
        raise ValueError(where + unknown("rule", rule, [*RULES, SARI]))


def score(
    rules: Mapping[str, str], answers: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> dict[str, float]:
    """Scores in percent, ``score`` first; captions add their seven metrics.

    Args:
        rules: part of an item's image path (apart from case) → name of its rule; ``""`` for all others.
        answers: of the model.
        references: correct answers per answer; the best credit counts.
        sources: image path per answer; it determines the subset in mixed tasks. For ``"sari"`` the text to simplify.

    Raises:
        ValueError: without answers.
    """
    if not answers:
        raise ValueError("there are no answers to score")
    if rules[""] == CAPTIONS:
        metrics = caption_metrics(answers, references)
        return {"score": sum(metrics.values()) / len(metrics), **metrics}
    total = 0.0
    for answer, known, source in zip(answers, references, sources, strict=True):
        subsets = (rule for part, rule in rules.items() if part and part.lower() in source.lower())
        total += credit(next(subsets, rules[""]), answer, known, source)
    return {"score": 100 * total / len(answers)}


def _refuses(answer: str) -> bool:
    return REFUSAL in answer.lower()
