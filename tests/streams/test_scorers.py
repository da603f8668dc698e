"""Scorers: the published rules on cases decided by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_cl.streams import RULES, score


@pytest.mark.parametrize(
    ("rule", "answer", "reference", "credit"),
    [
        ("exact", "Goldfish\n", "goldfish", 1),
        ("exact", "a goldfish", "goldfish", 0),
        ("exact", "", "goldfish", 0),
        ("exact", "Unanswerable", "unanswerable", 1),  # UCIT's rule knows no refusals
        ("exact_answered", "Unanswerable", "unanswerable", 0),
        ("exact_answered", "Leaf", "leaf", 1),
        ("contained", "the Left Ventricle, I think", "left ventricle", 1),
        ("contained", "leftventricle", "left ventricle", 0),
        ("contained", "yes; unanswerable otherwise", "yes", 0),
        ("contained_word", "It is an urban area.", "urban", 1),
        ("contained_word", "suburbanisation", "urban", 0),
        ("contained_word", "yes.", "Yes", 1),
        ("contained_word", "a c++ file", "c++", 1),
        ("contained_word", "They keep going  at the same speed", "Going at the same speed.", 1),
        ("compact", " B. ", "B", 1),
        ("compact", "3. 5 %", "35%", 1),
        ("compact", "BC", "B", 0),
        ("listed", "Ohio, Utah, Texas", "utah, ohio", 1),
        ("listed", "Ohio", "Utah, Ohio", 0.5),
        ("listed", "It is Ohio.", "Ohio", 1),
        ("listed", "unanswerable, Ohio", "Utah, Ohio", 0),
    ],
)
def test_a_rule_gives_the_credit_decided_by_hand(rule: str, answer: str, reference: str, credit: float) -> None:
    assert RULES[rule](answer, reference) == credit


@settings(deadline=None)  # the first call loads a library
@given(st.sampled_from(sorted(RULES)), st.text(), st.text(min_size=1))
def test_credit_is_a_share_and_agreement_is_full_credit(rule: str, answer: str, reference: str) -> None:
    assert 0 <= RULES[rule](answer, reference) <= 1
    known = any(c.isascii() and c.isalnum() for c in reference)  # ROUGE-L has no words of other letters
    if "unanswerable" not in reference.lower() and known and "," not in reference:
        assert RULES[rule](reference, reference) == 1


def test_a_score_is_the_mean_credit_in_percent_and_the_best_reference_counts() -> None:
    found = score({"": "exact"}, ["a", "b", "c", "x"], [["a"], ["z", "B"], ["d"], ["y"]], [""] * 4)
    assert found == {"score": 50.0}


def test_subsets_of_a_mixed_task_have_their_own_rule() -> None:
    rules = {"mapqa": "listed", "": "exact_answered"}
    answers, references = ["Ohio, Utah", "Ohio, Utah"], [["Utah, Ohio"], ["Utah, Ohio"]]
    assert score(rules, answers, references, ["Sci/MapQA/1.png", "Sci/ai2d/1.png"]) == {"score": 50.0}


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are no answers to score"):
        score({"": "exact"}, [], [], [])
