"""Rules for answers of language models: cases decided by hand, published values, and their libraries."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_cl.streams import RULES, text_scorers
from manifold_cl.streams.scorers import SARI, credit
from manifold_cl.streams.text_scorers import edit_similarity, literals, sari

for library in ("rouge_score", "rapidfuzz", "sacrebleu"):
    pytest.importorskip(library)

WORDS = st.text(alphabet="abcdef ", min_size=1).filter(str.strip)


@pytest.mark.parametrize(
    ("rule", "answer", "reference", "expected"),
    [
        ("exact_text", " 42\n", "42", 1),
        ("exact_text", "a", "A", 0),
        ("exact_words", "Sci-Fi,  films!", "scifi films", 1),
        ("exact_words", "the world", "world", 0),  # articles are kept
        ("first_letter", "\n C: since", "C", 1),
        ("first_letter", "", "", 0),
        ("rouge_l", "a b c d", "a x c", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("rouge_l", "观察", "观察", 0),  # the library's words are Latin
        ("rouge_l_stemmed", "classified items", "classifying item", 1),
        ("edit_similarity", "ab", "ac", 0.5),  # one deletion and one insertion of four characters
        ("edit_similarity", "", "", 0),
    ],
)
def test_a_rule_gives_the_credit_decided_by_hand(rule: str, answer: str, reference: str, expected: float) -> None:
    assert RULES[rule](answer, reference) == pytest.approx(expected, abs=1e-12)


def test_placeholders_of_literals_are_replaced_as_in_the_published_script() -> None:
    code = "f(<NUM_LIT>, <NUM_LIT:3.5>, '<STR_LIT>', '<STR_LIT:a b>', <CHAR_LIT>, <CHAR_LIT:c>)"
    assert literals(code) == "f(0, 3.5, '', 'a b', , c)"
    assert edit_similarity("f(<NUM_LIT:1>)", "f(1)") == 1


def test_sari_equals_the_value_that_the_hubs_metric_documents() -> None:
    references = ["About 95 species are currently known .", "About 95 species are now accepted ."]
    found = sari(
        "About 95 species are currently accepted .",
        "About 95 you now get in .",
        [*references, "95 species are now accepted ."],
    )
    assert 100 * found == pytest.approx(26.953601953601954, rel=1e-12)


@settings(deadline=None)  # the first call loads a library
@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_sari_is_a_share_and_the_only_reference_gets_full_credit(source: str, answer: str, known: list[str]) -> None:
    assert 0 <= sari(source, answer, known) <= 1
    assert sari(source, known[0], known[:1]) == pytest.approx(1, abs=1e-12)


def test_words_of_sari_have_no_case_and_punctuation_stands_apart() -> None:
    assert sari("The cat, sat.", "the cat , sat .", ["The cat, sat."]) == 1


def test_credit_takes_the_best_reference_and_gives_sari_its_source() -> None:
    assert credit("exact_text", "b", ["a", "b"]) == 1
    assert credit(SARI, "a", ["a"], "a b") == sari("a b", "a", ["a"]) == 1
    with pytest.raises(ValueError, match=r"unknown rule 'rogue_l'.*rouge_l"):
        credit("rogue_l", "a", ["a"])
    with pytest.raises(ValueError, match="at least one reference"):
        credit(SARI, "a", [])


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(text_scorers)
    assert (found.attempted, found.failed) == (7, 0)
