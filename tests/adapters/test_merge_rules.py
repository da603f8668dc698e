"""PEFT's rules for entries, against their definitions written out."""

import sys

import pytest
import torch
from torch import Tensor

from manifold_cl.adapters.merge_rules import entry_rule

pytest.importorskip("peft")


def updates() -> Tensor:
    return torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0))


def largest(update: Tensor, density: float) -> Tensor:
    bound = update.abs().flatten().sort(descending=True).values[int(density * update.numel()) - 1]
    return torch.where(update.abs() >= bound, update, 0.0)


def test_ties_averages_the_largest_entries_with_the_sign_of_their_sum() -> None:
    given, expected = updates(), torch.zeros(8, 10)
    kept = torch.stack([largest(update, 0.5) for update in given])
    for row in range(8):
        for column in range(10):
            values = kept[:, row, column]
            agreeing = values[values.sign() == (1 if values.sum() >= 0 else -1)]
            expected[row, column] = agreeing.mean() if len(agreeing) else 0.0
    torch.testing.assert_close(entry_rule("ties", [1.0] * 3, density=0.5)("h.0", given), expected)


def test_magnitude_adds_the_largest_entries() -> None:
    given, weights = updates(), [0.5, 1.0, 2.0]
    expected = sum(weight * largest(update, 0.25) for weight, update in zip(weights, given, strict=True))
    torch.testing.assert_close(entry_rule("magnitude", weights, density=0.25)("h.0", given), expected)


def test_dare_keeps_entries_at_random_and_scales_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = updates()[:1]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("another device was seeded"))
    state = torch.random.get_rng_state()
    rule = entry_rule("dare", [1.0], density=0.25, seed=3)
    first = rule("h.0", given)
    assert torch.equal(torch.random.get_rng_state(), state)
    kept = first != 0
    torch.testing.assert_close(first[kept], 4 * given[0][kept])
    assert kept.double().mean() == pytest.approx(0.25, abs=0.2)  # 80 entries: four standard errors
    assert torch.equal(rule("h.0", given), first)
    assert not torch.equal(rule("h.1", given), first)
    assert not torch.equal(entry_rule("dare", [1.0], density=0.25, seed=4)("h.0", given), first)


def test_wrong_rules_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rule is 'median', choose one of ties, dare"):
        entry_rule("median", [1.0], density=0.5)
    for density in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"density is .*, got {density}"):
            entry_rule("ties", [1.0], density=density)
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    with pytest.raises(ImportError, match=r"'ties' needs PEFT: pip install 'peft>=0.21,<0.22'"):
        entry_rule("ties", [1.0], density=0.5)
