"""What happens when a layer fills up, and what the reports say."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifold_cl import ProtectedSubspace, SubspaceMemory
from manifold_cl.continual.subspaces.capacity import CapacityError, LayerGrowth, kept_columns
from manifold_cl.continual.subspaces.memory import Columns
from manifold_cl.continual.subspaces.statistic import Directions

EYE = torch.eye(6, dtype=torch.float64)


def along(*energies: float, first: int = 0) -> torch.Tensor:
    """The second moment with these energies along the unit vectors from ``first`` on."""
    moment = torch.zeros(6, 6)
    for place, energy in enumerate(energies):
        moment[first + place, first + place] = energy
    return moment


def directions_of(memory: SubspaceMemory) -> list[int]:
    """Which unit vectors a memory of them protects, in order."""
    return memory["q"].basis.abs().argmax(0).tolist()


@pytest.fixture
def half_full() -> SubspaceMemory:
    memory = SubspaceMemory.empty({"q": 6})
    return memory.extended({"q": along(0.7, 0.2, 0.1)}, energy=1.0, rank=2, task="first")


def test_growth_stops_at_capacity_and_says_so(half_full: SubspaceMemory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="manifold_cl"):
        memory = half_full.extended({"q": along(0.6, 0.4, first=3)}, energy=1.0, rank=2, task="second")
    assert directions_of(memory) == [0, 1, 2, 3]
    assert memory.full == ("q",)
    assert "second: 1 of 1 layers are full (q): growth stopped" in caplog.text
    growth = memory.growth["q"]
    assert (growth.added, growth.dropped, growth.k, growth.capacity_left, growth.full) == (1, 1, 4, 0, True)
    assert growth.explained == pytest.approx(0.6, abs=1e-6)  # float32
    assert growth.tasks_left == 0.0


def test_eviction_drops_the_columns_that_hold_least_over_all_tasks(
    half_full: SubspaceMemory, caplog: pytest.LogCaptureFixture
) -> None:
    moment = along(0.0, 0.15, 0.0, 0.45, 0.4)
    with caplog.at_level(logging.WARNING, logger="manifold_cl"):
        memory = half_full.extended({"q": moment}, energy=1.0, rank=2, policy="evict", task="second")
    assert directions_of(memory) == [0, 1, 3, 4]  # 2 held 0.1 of the first task and nothing of the second
    columns = memory.columns["q"]
    torch.testing.assert_close(
        columns.energies, torch.tensor([0.7, 0.35, 0.45, 0.4]).double(), rtol=0, atol=1e-6
    )  # float32
    assert columns.origins.tolist() == [0, 0, 1, 1]
    assert "1 of 1 layers are full (q)" in caplog.text
    growth = memory.growth["q"]
    assert (growth.added, growth.dropped, growth.full) == (2, 1, True)
    assert growth.before == pytest.approx(0.15, abs=1e-6)  # float32
    assert growth.explained == pytest.approx(1.0, abs=1e-6)  # what was dropped held nothing of this task
    assert memory.max_error() < 1e-6
    assert torch.equal(half_full["q"].basis, memory["q"].basis[:, :3].clone()) is False
    assert directions_of(half_full) == [0, 1, 2]  # a value: what it was


def test_raising_leaves_the_memory_as_it_was(half_full: SubspaceMemory) -> None:
    message = "q has room for 4 protected directions, not for 5"
    with pytest.raises(CapacityError, match=message):
        half_full.extended({"q": along(0.6, 0.4, first=3)}, energy=1.0, rank=2, policy="raise")
    assert directions_of(half_full) == [0, 1, 2]
    assert half_full.tasks == ("first",)


def test_eviction_needs_energies(half_full: SubspaceMemory) -> None:
    old = SubspaceMemory(half_full.subspaces)  # as from a file of an older version
    with pytest.raises(CapacityError, match="the energies of the columns of q are unknown"):
        old.extended({"q": along(0.6, 0.4, first=3)}, energy=1.0, rank=2, policy="evict")
    stopped = old.extended({"q": along(0.6, 0.4, first=3)}, energy=1.0, rank=2)
    assert stopped.columns["q"].energies.isnan().tolist() == [True, True, True, False]
    assert stopped.columns["q"].origins.tolist() == [-1, -1, -1, 0]


def test_a_rank_that_leaves_no_room_at_all_and_unknown_words_are_refused(half_full: SubspaceMemory) -> None:
    with pytest.raises(ValueError, match="q has 6 inputs, too few for rank 7: lower the rank"):
        half_full.extended({"q": along(1.0)}, energy=0.9, rank=7)
    with pytest.raises(ValueError, match=r"^rank, .*got -1"):
        half_full.extended({"q": along(1.0)}, energy=0.9, rank=-1)
    with pytest.raises(ValueError, match="the policy for full layers is stop, evict, raise, got 'shrink'"):
        half_full.extended({"q": along(1.0)}, energy=0.9, rank=2, policy="shrink")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the memory has no layer 'k': it holds q"):
        half_full.extended({"k": along(1.0)}, energy=0.9, rank=2)


@pytest.mark.parametrize("policy", ["stop", "evict"])
def test_no_manifold_is_ever_left_empty(policy: str, generator: torch.Generator) -> None:
    memory = SubspaceMemory.empty({"q": 12})
    for _ in range(8):
        a = torch.randn(12, 5, generator=generator)
        memory = memory.extended({"q": a @ a.T}, energy=0.99, rank=4, policy=policy)  # type: ignore[arg-type]
        assert memory["q"].k <= 12 - 4
        assert memory.max_error() < 1e-6  # float64 orthonormalisation, rounded once to float32
    assert memory["q"].k == 8
    if policy == "evict":
        assert len(set(memory.columns["q"].origins.tolist())) > 2  # later tasks found room


def test_both_conventions_for_the_crossing_column_have_a_name() -> None:
    """The spectrum 3, 2, 1, 1/2 at 0.97: three columns or two (docs/method.md, "The energy rule")."""
    a = torch.eye(6)[:, :4] * torch.tensor([3.0, 2.0, 1.0, 0.5])
    empty = ProtectedSubspace.empty(6)
    assert (empty.extended(a, energy=0.97).k, empty.extended(a, energy=0.97, threshold_rule="exclusive").k) == (3, 2)
    moment = a @ a.T
    memory = SubspaceMemory.empty({"q": 6})
    assert memory.extended({"q": moment}, energy=0.97, rank=1)["q"].k == 3
    assert memory.extended({"q": moment}, energy=0.97, rank=1, threshold_rule="exclusive")["q"].k == 2
    held = empty.extended(a, energy=0.97)
    assert held.extended(a, energy=0.97, threshold_rule="exclusive").k == 3  # nothing is wanted: nothing crosses


def test_a_crossing_column_is_dropped_only_where_nothing_is_protected_and_others_are_left() -> None:
    """The released codes of GPM and InfLoRA drop it at the first task; later tasks reach the threshold."""
    a = torch.eye(6)[:, :4] * torch.tensor([3.0, 2.0, 1.0, 0.5])
    other = torch.eye(6)[:, 4:] * torch.tensor([2.0, 1.0])
    first = ProtectedSubspace.empty(6).extended(a, energy=0.97, threshold_rule="exclusive")
    assert (
        first.extended(other, energy=0.9, threshold_rule="exclusive").k == first.k + 2
    )  # 0.8 of the energy alone is too little
    assert (
        ProtectedSubspace.empty(6).extended(other, energy=0.7, threshold_rule="exclusive").k == 1
    )  # the only one stays


def test_energy_that_the_directions_missed_counts_against_them() -> None:
    a = EYE[:, :3] * torch.tensor([3.0, 2.0, 1.0]).double()
    memory = SubspaceMemory.empty({"q": 6})
    whole = memory.extended({"q": Directions(a, 14.0)}, energy=0.9, rank=1)
    assert (whole["q"].k, whole.growth["q"].captured) == (2, 1.0)
    part = memory.extended({"q": Directions(a, 15.0)}, energy=0.9, rank=1)  # 13 / 15 = 0.87
    assert part["q"].k == 3
    assert part.growth["q"].explained == pytest.approx(14 / 15, abs=1e-6)  # float32 basis
    assert part.growth["q"].captured == pytest.approx(14 / 15, abs=1e-12)  # float64


def test_reports_say_what_a_task_added_and_how_many_more_fit(half_full: SubspaceMemory) -> None:
    growth = half_full.growth["q"]
    assert (growth.task, growth.n, growth.k, growth.rank, growth.threshold) == ("first", 6, 3, 2, 1.0)
    assert (growth.added, growth.dropped, growth.before, growth.full) == (3, 0, 0.0, False)
    assert growth.explained == pytest.approx(1.0, abs=1e-6)  # float32
    assert (growth.capacity_left, growth.pace) == (1, 3.0)
    assert growth.tasks_left == pytest.approx(1 / 3)
    second = half_full.extended({"q": along(0.5, 0.5)}, energy=0.99, rank=2, task="second").growth["q"]
    assert (second.added, second.before) == (0, pytest.approx(1.0, abs=1e-6))  # float32
    assert (second.pace, second.tasks_left) == (1.5, pytest.approx(2 / 3))
    quiet = SubspaceMemory.empty({"q": 6}).extended({"q": torch.zeros(6, 6)}, energy=0.99, rank=2)
    assert quiet.growth["q"].tasks_left == math.inf
    assert quiet.growth["q"].to_dict()["tasks_left"] is None
    assert LayerGrowth.from_dict(quiet.growth["q"].to_dict()) == quiet.growth["q"]


def test_two_sources_of_one_task_are_one_growth(half_full: SubspaceMemory) -> None:
    memory = half_full.extended({"q": along(1.0, first=3)}, energy=0.9, rank=1, task="second")
    memory = memory.extended({"q": along(0.5, 0.5, first=3)}, energy=0.9, rank=1, task="second")
    assert memory.tasks == ("first", "second")
    growth = memory.growth["q"]
    assert (growth.added, growth.before) == (2, 0.0)
    assert memory.columns["q"].origins.tolist() == [0, 0, 0, 1, 1]


@given(energies=st.lists(st.floats(0, 1), min_size=1, max_size=12), data=st.data())
def test_kept_columns_are_in_order_and_none_that_is_dropped_holds_more(
    energies: list[float], data: st.DataObject
) -> None:
    room = data.draw(st.integers(0, len(energies)))
    held = torch.tensor(energies, dtype=torch.float64)
    kept = kept_columns(held, room, "evict", layer="q")
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == room
    dropped = [e for place, e in enumerate(energies) if place not in kept.tolist()]
    assert not dropped or not room or max(dropped) <= min(energies[i] for i in kept.tolist())
    assert kept_columns(held, room, "stop", layer="q").tolist() == list(range(room))


def test_columns_without_a_history_are_unknown() -> None:
    columns = Columns.unknown(2)
    assert columns.energies.isnan().all()
    assert columns.origins.tolist() == [-1, -1]
