"""Rules for answers of language models: exact match, ROUGE-L, edit similarity and SARI.

A rule returns the credit of one answer in [0, 1]. The libraries that compute ROUGE-L, edit similarity and SARI's words
are those of the extra ``llm``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ORDERS = (1, 2, 3, 4)
"""Lengths of SARI's n-grams."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PLACEHOLDER = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)

Gram = tuple[str, ...]


def exact_text(answer: str, reference: str) -> float:
    r"""1 if both are the same text apart from white space around them; case counts.

    TRACE compares without removing that white space.

    >>> exact_text(" A\n", "A"), exact_text("a", "A")
    (1.0, 0.0)
    """
    return float(answer.strip() == reference.strip())


def exact_words(answer: str, reference: str) -> float:
    """1 if both are the same in lower case, without punctuation, with white space as single blanks: O-LoRA's rule.

    Articles are kept. Source: wang2023olora.

    >>> exact_words("Very  negative.", "very negative"), exact_words("the world", "World")
    (1.0, 0.0)
    """
    return float(_words(answer) == _words(reference))


def first_letter(answer: str, reference: str) -> float:
    r"""1 if both begin with the same character, white space apart: TRACE's ScienceQA, whose rationale is not scored.

    >>> first_letter("B\nThe magnet ...", "B. Since ..."), first_letter("", "B")
    (1.0, 0.0)
    """
    return float(answer.strip()[:1] == reference.strip()[:1] != "")


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L as an F value, of the longest common subsequence of words (lin2004rouge), by ``rouge-score``.

    The library's words are runs of a to z and digits, so that other scripts get no credit.

    Raises:
        ImportError: without ``rouge-score``.

    >>> round(rouge_l("the cat sat", "the cat ran"), 3)
    0.667
    """
    return float(_rouge(stemmer=False).score(reference, answer)["rougeL"].fmeasure)


def rouge_l_stemmed(answer: str, reference: str) -> float:
    """`rouge_l` with Porter's stemmer, as SuperNI scores.

    >>> rouge_l_stemmed("runs", "running"), rouge_l("runs", "running")
    (1.0, 0.0)
    """
    return float(_rouge(stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity by insertions and deletions, ``fuzz.ratio`` of ``rapidfuzz``, after `literals`: TRACE's Py150.

    An empty text has similarity 0. TRACE rounds to percent.

    Raises:
        ImportError: without ``rapidfuzz``.

    >>> edit_similarity("x = <NUM_LIT:1>", "x = 1"), edit_similarity("", "x")
    (1.0, 0.0)
    """
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise ImportError("edit similarity is computed by rapidfuzz: pip install 'rapidfuzz>=3.10'") from error
    answer, reference = literals(answer).strip(), literals(reference).strip()
    return float(fuzz.ratio(answer, reference)) / 100 if answer and reference else 0.0


def literals(code: str) -> str:
    """Code with its placeholders of literals replaced: ``<NUM_LIT>`` is 0, others are empty or their own text.

    >>> literals("f(<NUM_LIT>, '<STR_LIT:a>', '<STR_LIT>')")
    "f(0, 'a', '')"
    """
    for mark, text in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(mark, text)
    return _PLACEHOLDER.sub(r"\1", code)


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI in [0, 1] for a simplification of ``source``: the mean of F of kept, precision of deleted, F of added words.

    Each is averaged over n-grams of length 1 to 4. Words are those of sacrebleu's tokenizer 13a in lower case, 0/0 is
    1, and the recall of kept n-grams counts n-grams (as in the hub's metric ``sari``) and not, as in the first release
    of its authors, kinds of them. Source: xu2016sari, section 4.

    Raises:
        ImportError: without ``sacrebleu``.
        ValueError: without references.
    """
    if not references:
        raise ValueError("SARI needs at least one reference, got none")
    tokens = _tokenizer()
    before, after, *known = (tokens(text.lower()).split() for text in (source, answer, *references))
    parts = [
        _kept_deleted_added(_grams(before, n), _grams(after, n), [_grams(words, n) for words in known]) for n in ORDERS
    ]
    return sum(sum(part) / 3 for part in parts) / len(ORDERS)


def _kept_deleted_added(
    source: Counter[Gram], answer: Counter[Gram], references: Sequence[Counter[Gram]]
) -> tuple[float, float, float]:
    wanted = sum(references, Counter())
    before, after = _times(source, len(references)), _times(answer, len(references))  # counts comparable with wanted
    kept, to_keep = before & after, before & wanted
    right = kept & wanted
    keep = _f(_mean_share(right, kept), right.total() / to_keep.total() if to_keep else 1.0)
    deleted = before - after
    delete = _mean_share(deleted - wanted, deleted)
    added, to_add = answer.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(added & to_add)
    add = _f(hits / len(added) if added else 1.0, hits / len(to_add) if to_add else 1.0)
    return keep, delete, add


def _mean_share(good: Counter[Gram], given: Counter[Gram]) -> float:
    """The share of each kind of n-gram in ``given`` that is good, averaged over kinds; 1 if there are none."""
    return sum(good[gram] / count for gram, count in given.items()) / len(given) if given else 1.0


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _grams(words: Sequence[str], n: int) -> Counter[Gram]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _times(grams: Counter[Gram], factor: int) -> Counter[Gram]:
    return Counter({gram: factor * count for gram, count in grams.items()})


def _words(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@cache
def _rouge(*, stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L is computed by rouge-score: pip install 'rouge-score>=0.1.2'") from error
    return RougeScorer(["rougeL"], use_stemmer=stemmer)


@cache
def _tokenizer() -> Any:
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise ImportError("SARI's words are those of sacrebleu: pip install 'sacrebleu>=2.4'") from error
    return Tokenizer13a()
