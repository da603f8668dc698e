"""The counts on the page about reliability are those of the committed results, and enough."""

import json

import pytest

import manifold_cl


def test_the_page_shows_the_counts_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(f"{manifold_cl.__path__[0]}/../benchmarks")
    import reliability

    assert reliability.counts() in reliability.PAGE.read_text(encoding="utf-8")
    content = json.loads(reliability.RESULTS.read_text(encoding="utf-8"))
    assert content["complete"]
    assert content["counts"]["wrong results"] == 0
    assert content["counts"]["kills"] >= 200
    assert content["counts"]["mutations"] >= 500
