"""What a report found: relations beyond chance, scores, spectra, and the order of the first screen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from html_page import Page
from scipy import stats
from torch import Tensor

from analysis import AdapterSet, AdapterTables, Record
from analysis.plots import plot_against_chance
from analysis.report import Finding, Subject, find, write_subjects_report
from analysis.report.findings.answers import answer_findings
from analysis.statistics import holm, relations
from analysis.statistics.nulls import alignment_p_value
from analysis.statistics.pairs import chance_interval


def frame(size: int, rank: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=draw)).Q


def drawn(*, shared: float = 0.0, tasks: int = 2, layers: int = 6, seed: int = 0, decay: float = 0.0) -> AdapterSet:
    """Random updates of rank 4 in 48 × 40; inputs of the second task lean towards the first one's by `shared`."""
    draw = torch.Generator().manual_seed(seed)
    sigma = torch.arange(1.0, 5.0) ** -decay
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for task in range(tasks):
        held = {f"h.{i}.q": (frame(48, 4, draw) * sigma, frame(40, 4, draw)) for i in range(layers)}
        if task == 1:
            first = factors["task 0"]
            held = {k: (u, torch.linalg.qr(v + shared * first[k][1]).Q) for k, (u, v) in held.items()}
        factors[f"task {task}"] = held
    return AdapterSet.from_factors(factors)


def found(adapters: AdapterSet, **options: Any) -> list[Finding]:
    return find([Subject("mine", None, AdapterTables(adapters, **options))])


def by_kind(findings: list[Finding]) -> dict[str, Finding]:
    return {one.kind: one for one in findings}


def test_relations_are_adjusted_for_all_pairs_metrics_and_layers() -> None:
    tested = AdapterTables(drawn(shared=0.5, tasks=3)).against_chance
    table = relations(tested).set_index(["metric", "task_a", "task_b"])
    raw = {}
    for key in table.index:
        metric, a, b = key
        rows = tested[(tested["metric"] == metric) & (tested["task_a"] == a) & (tested["task_b"] == b)]
        total = rows[rows["layer"] == "total"].iloc[0]
        single = rows[rows["layer"] != "total"]["p"].to_numpy()
        raw[key] = min(1.0, 2 * min(total["p"], len(single) * single.min()))  # Holm's least p is Bonferroni's
        assert table.loc[key, "value"] == total["value"]
        assert table.loc[key, "layers"] == 6
    assert table["p"].to_numpy() == pytest.approx(holm(list(raw.values())), rel=1e-12)
    assert table.loc[("input_overlap", "task 0", "task 1"), "p"] < 1e-6
    assert table.loc[("input_overlap", "task 0", "task 2"), "p"] > 0.05


def test_the_interval_of_chance_holds_the_stated_share() -> None:
    mean, std = 0.1, 0.02
    strength = mean * (1 - mean) / std**2 - 1
    law = stats.beta(mean * strength, (1 - mean) * strength)
    low, high = chance_interval("input_overlap", mean, std, np.nan)
    assert (low, high) == (0.0, pytest.approx(law.ppf(0.95), rel=1e-9))
    low, high = chance_interval("alignment", 0.0, 0.01, 3.0)
    assert low == -high
    assert float(alignment_p_value(high / 0.01, 3.0)) == pytest.approx(0.05, rel=2e-3)  # linear between 116 points
    assert chance_interval("alignment", 0.0, 1.0, 1e9)[1] == pytest.approx(1.96, abs=1e-2)
    assert chance_interval("backward", 1.0, 0.0, np.nan) == (0.0, 1.0)  # nothing varies


def test_random_updates_raise_no_finding_and_the_page_says_what_weights_do_not_show() -> None:
    findings = found(drawn())
    assert [one.kind for one in findings] == ["unknown", "relations", "spike", "spectrum"]
    assert [one.level for one in findings] == ["unknown", "fine", "fine", "fine"]
    assert not any(one.beyond_chance for one in findings)
    assert "--data" in findings[0].action
    assert "cannot be judged from weights" in findings[0].headline


def test_a_shared_input_space_is_found_with_its_pair_and_number() -> None:
    adapters = drawn(shared=1.0, tasks=3)
    one = by_kind(found(adapters))["relations"]
    table = relations(AdapterTables(adapters).against_chance)
    value = table[(table["metric"] == "input_overlap") & (table["task_b"] == "task 1")]["value"].item()
    assert one.beyond_chance
    assert one.level == "act"
    assert f"{100 * value:.1f} %" in one.number
    assert one.headline.startswith("1 of 3 pairs of updates is related beyond chance: “task 0” and “task 1”")
    assert "6 of 6 layers" in one.alt


def test_opposite_updates_call_for_action() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = frame(48, 2, draw), frame(40, 2, draw)
    adapters = AdapterSet.from_factors({"a": {"h.0.q": (left, right)}, "b": {"h.0.q": (-0.5 * left, right)}})
    one = by_kind(found(adapters))["relations"]
    # all four numbers are as far from chance as possible: the largest of them leads
    assert one.level == "act"
    assert one.beyond_chance


def test_leakage_is_compared_with_a_random_update() -> None:
    adapters, draw = drawn(), torch.Generator().manual_seed(1)
    inputs = {name: adapters.factors("task 1", name)[1] for name in adapters.layers}
    one = by_kind(found(adapters, protected=inputs))["protection"]
    assert (one.level, one.beyond_chance) == ("act", True)
    assert one.number == "100.0 % (chance 10.0 %)"  # 4 of 40 directions
    free = {name: torch.linalg.qr(torch.cat([basis, frame(40, 3, draw)], 1)).Q[:, 4:] for name, basis in inputs.items()}
    both = AdapterSet.from_factors({"task 1": {name: adapters.factors("task 1", name) for name in adapters.layers}})
    kept = by_kind(found(both, protected=free))["protection"]
    assert (kept.level, kept.beyond_chance) == ("fine", False)


def test_the_spectrum_finding_has_the_mean_effective_rank() -> None:
    adapters = drawn(decay=2.0)
    table = AdapterTables(adapters).spectra
    rows = table[(table["update"] == "task") & (table["metric"] == "effective_rank_energy")]
    mean = rows[rows["task"] == "task 0"]["value"].mean()
    one = by_kind(found(adapters))["spectrum"]
    assert one.number == f"effective rank {mean:.1f} of 4"
    assert one.level == "note"
    assert by_kind(found(drawn(decay=0.0)))["spectrum"].level == "fine"
    alone = AdapterSet.from_factors({"a": {"x": (torch.ones(3, 1), torch.ones(3, 1))}})
    assert [finding.kind for finding in found(alone)] == ["unknown"]  # rank one has no spectrum to speak of


def spiked(times: float, *, layers: int = 6) -> AdapterSet:
    """Random factors of rank 4, whose first column is some times larger in one layer."""
    draw = torch.Generator().manual_seed(3)
    factors = {
        f"h.{i}.q": (torch.randn(48, 4, generator=draw), torch.randn(40, 4, generator=draw)) for i in range(layers)
    }
    factors["h.2.q"][0][:, 0] *= times
    return AdapterSet.from_factors({"a": factors})


def test_a_spike_is_compared_with_random_factors() -> None:
    adapters = spiked(4.0)
    one = by_kind(found(adapters))["spike"]
    left, right = adapters.factors("a", "h.2.q")
    sigma = torch.linalg.svdvals(left.double() @ right.double().T)[:4]
    share = float(sigma[0] ** 2 / sigma.square().sum())
    row = AdapterTables(adapters).noise.set_index("layer").loc["h.2.q"]
    assert one.number == f"{100 * share:.1f} % of the energy in σ₁ (chance {100 * row['chance'] / 4:.1f} %)"
    assert f"up to {100 * row['high'] / 4:.1f} %" in one.interval
    assert (one.beyond_chance, one.level) == (True, "note")
    assert "h.2.q" in one.headline
    assert "heavy spike" in one.headline  # more than half of the energy
    random = by_kind(found(spiked(1.0)))["spike"]
    assert (random.beyond_chance, random.level) == (False, "fine")


def test_spikes_and_relations_are_adjusted_together() -> None:
    tables = AdapterTables(drawn(shared=0.2, decay=1.0))
    alone, together = relations(tables.against_chance), relations(tables.against_chance, tables.noise)
    spikes = together[together["metric"] == "spike"]
    assert spikes["task_b"].tolist() == ["task 0", "task 1"]
    raw = [tables.noise[tables.noise["task"] == task]["p_holm"].min() for task in spikes["task_b"]]
    single = [min(1.0, 2 * min(row["p_total"], _least(tables, row))) for _, row in alone.iterrows()]
    assert together["p"].tolist() == pytest.approx(holm([*single, *raw]).tolist())


def _least(tables: AdapterTables, row: pd.Series) -> float:
    table = tables.against_chance
    chosen = table[(table["metric"] == row["metric"]) & (table["layer"] != "total")]
    return float(chosen["p_holm"].min())


def test_scores_lead_and_name_the_task_that_lost_most(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    record = Record.load(write_run(tmp_path / "run"))
    first, *_ = find([Subject("ours", record, None)])
    assert (first.kind, first.level, first.number) == ("scores", "act", "−10.0 points")
    assert "“news” lost 10.0 points (60.0 after “films”, 70.0 when it was learned)" in first.headline
    kept = write_run(tmp_path / "kept", accuracy={"accuracy": [[70.0, 1, 1], [70.0, 80.0, 1], [69.5, 80.0, 90.0]]})
    findings = find([Subject("ours", record, None), Subject("kept", Record.load(kept), None)])
    assert [(one.subject, one.level) for one in findings] == [("ours", "act"), ("kept", "fine")]


def test_one_finding_of_each_kind_comes_first() -> None:
    random, related = AdapterTables(drawn()), AdapterTables(drawn(shared=1.0))
    findings = find([Subject("random", None, random), Subject("related", None, related)])
    assert [one.kind for one in findings[:4]] == ["unknown", "relations", "spike", "spectrum"]
    assert findings[1].subject == "related"
    assert len(findings) == 8


@pytest.mark.slow
def test_every_figure_has_a_text_with_numbers_and_every_heading_an_explanation(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path / "run")
    tables = AdapterTables(AdapterSet.load(run))
    page = Page(write_subjects_report(tmp_path / "page.html", [Subject("ours", Record.load(run), tables)]))
    texts = [image["alt"] or "" for image in [*page.evidence, *page.images]]
    assert len(texts) > 10
    assert [text for text in texts if not any(letter.isdigit() for letter in text)] == []
    from analysis.report import terms

    for term in terms.SPECTRUM.values():
        assert term.meaning in page.text  # in the glossary
        assert term.meaning in page.tips[term.heading]


def test_a_figure_against_chance_needs_the_pair() -> None:
    tested = AdapterTables(drawn(shared=1.0)).against_chance
    axes = plot_against_chance(tested, metric="backward")
    assert axes.lines[0].get_ydata()[0] == pytest.approx(
        tested[(tested["metric"] == "backward") & (tested["layer"] == "total")]["value"].item()
    )
    with pytest.raises(ValueError, match="'backward' of 'a' and 'b'"):
        plot_against_chance(tested, metric="backward", task_a="a", task_b="b")


def test_an_empty_table_has_no_relations() -> None:
    alone = AdapterTables(AdapterSet.from_factors({"a": {"x": (torch.eye(3), torch.eye(3))}}))
    assert relations(alone.against_chance).empty
    assert isinstance(relations(alone.against_chance), pd.DataFrame)


@pytest.mark.parametrize(
    ("low", "high", "level"),
    [
        (0.2, 1.8, "act"),
        (-0.1, 2.1, "note"),  # too few examples to tell: never reassures
        (float("nan"), float("nan"), "note"),
        (-1.1, -0.9, "fine"),
    ],
)
def test_only_a_loss_that_surely_does_not_rise_is_fine(low: float, high: float, level: str) -> None:
    value = -1.0 if level == "fine" else 1.0
    rows = [
        {"data": "news", "task_a": "news", "task_b": "code", "metric": metric, "value": number}
        | {"ci_low": low if metric == "loss_change" else 0.1, "ci_high": high if metric == "loss_change" else 0.3}
        | {"examples": 9}
        for metric, number in (("top1_change", 0.2), ("loss_change", value), ("loss_before", 2.0), ("loss_after", 3.0))
    ]
    (finding,) = answer_findings("run", pd.DataFrame(rows))
    assert finding.level == level
    assert ("Nothing to do" in finding.action) is (level == "fine")
