"""Rules that compare an answer with its references, by name.

A rule returns the credit of one answer in [0, 1]. A task's score is the mean credit in percent. Captions are scored
together (`captions`). The rules are those of the published evaluation scripts, reimplemented (docs/method.md,
"Scores").
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from manifold_cl.streams.captions import caption_metrics

Rule = Callable[[str, str], float]

REFUSAL = "unanswerable"
"""An answer with this word in it is wrong under the rules of MLLM-DCL, whatever else it says."""
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
    """1 if the reference occurs in the answer, both normalised; a single word counts only where a word begins and ends.

    >>> contained_word("A urban area", "urban"), contained_word("suburban", "urban")
    (1.0, 0.0)
    >>> contained_word("keep going at the same speed", "going at the same speed")
    1.0
    """
    if _refuses(answer):
        return 0.0
    said, wanted = normalised(answer), normalised(reference)
    if " " in wanted:
        return float(wanted in said)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None)


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
    """Share of the reference's comma-separated elements among the answer's; one element only has to be contained.

    >>> listed("Texas, Ohio", "Ohio, Utah"), listed("The state of Ohio", "Ohio")
    (0.5, 1.0)
    """
    if _refuses(answer):
        return 0.0
    wanted = {normalised(part) for part in reference.split(",")} - {""}
    if len(wanted) < 2:
        return contained(answer, reference)
    return len(wanted & {normalised(part) for part in answer.split(",")}) / len(wanted)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "exact": exact,
        "exact_answered": exact_answered,
        "contained": contained,
        "contained_word": contained_word,
        "compact": compact,
        "listed": listed,
    }
)
"""Rules by name: how one answer is compared with one reference."""
CAPTIONS = "captions"
"""The name of the scorer that is no rule: the mean of seven corpus metrics."""


def score(
    rules: Mapping[str, str], answers: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
) -> dict[str, float]:
    """Scores in percent, ``score`` first; captions add their seven metrics.

    Args:
        rules: a part of an item's image path (apart from case) → name of its rule; ``""`` is for all others. A stream
            with one rule has only that entry.
        answers: what the model said.
        references: for each answer the references that count as right; the best one counts.
        sources: for each answer the image path of its item, which tells the subset of mixed tasks.

    Raises:
        ValueError: when there are no answers.
    """
    if not answers:
        raise ValueError("there are no answers to score")
    if rules[""] == CAPTIONS:
        metrics = caption_metrics(answers, references)
        return {"score": sum(metrics.values()) / len(metrics), **metrics}
    total = 0.0
    for answer, known, source in zip(answers, references, sources, strict=True):
        rule = RULES[_rule(rules, source)]
        total += max(rule(answer, reference) for reference in known)
    return {"score": 100 * total / len(answers)}


def _rule(rules: Mapping[str, str], source: str) -> str:
    for part, rule in rules.items():
        if part and part.lower() in source.lower():
            return rule
    return rules[""]


def _refuses(answer: str) -> bool:
    return REFUSAL in answer.lower()
