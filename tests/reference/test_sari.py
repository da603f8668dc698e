"""SARI equals its slow twin."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_sari import slow_sari

from manifold_cl.streams.text_scorers import sari

pytest.importorskip("sacrebleu")

TEXTS = st.lists(st.sampled_from("abcd"), max_size=9)


@settings(deadline=None)  # the first call loads a library
@given(TEXTS, TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_sari_equals_its_slow_twin(source: list[str], answer: list[str], references: list[list[str]]) -> None:
    found = sari(" ".join(source), " ".join(answer), [" ".join(words) for words in references])
    assert found == pytest.approx(slow_sari(source, answer, references), abs=1e-12)  # float64 against fractions
