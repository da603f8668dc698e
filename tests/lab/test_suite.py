"""The suite: every contestant solves an easy problem, leaks are found, plug-ins join, and numbers repeat."""

import json
import math

import matplotlib.pyplot as plt
import pytest
import torch
from figure_layout import faults

from manifold_cl import RETRACTIONS
from manifold_cl.infeasible import INFEASIBLE_STEPS
from manifold_cl.lab import STEPS, Budget, Contestant, Meter, as_plugin, entrants, run_suite
from manifold_cl.lab.closed_forms import Nearest
from manifold_cl.lab.figures import plot_curves, plot_profiles
from manifold_cl.lab.meter import Limits, nearest_point
from manifold_cl.lab.runs import run, search
from manifold_cl.lab.steps import Setting
from manifold_cl.lab.suite import measure


class Easy(Nearest):
    name = "easy"


EASY = Easy(n=8, p=2, k=3)
"""The nearest point: one basin, condition number below 10."""
SHORT = Budget(evaluations=150, gap=1e-2, starts=1)


def leaky(x, gradient, rate, manifold):
    """Ignores F: the gradient pulls the point off the complement."""
    return torch.linalg.qr(x - rate * gradient)[0]


def careful(x, gradient, rate, manifold):
    return manifold.retr(x, -rate * manifold.egrad2rgrad(x, gradient))


def raising(x, u):
    raise RuntimeError("no such luck")


def shrinking(x, u):
    """No retraction: columns become shorter."""
    return (x + u) / 2


USUAL, ALL = entrants().contestants, entrants(everything=True).contestants


@pytest.mark.parametrize("contestant", USUAL, ids=[c.label.replace(" ", "") for c in USUAL])
def test_every_contestant_reaches_the_gap_on_an_easy_problem(contestant):
    result = measure(contestant, EASY, SHORT)
    assert result.failure == ""
    assert math.isfinite(result.costs(SHORT.gap, "evaluations")[0])
    assert result.leak < 1e-12  # float64
    assert contestant.step.infeasible or result.orthonormality < 1e-12


def test_the_suite_crosses_steps_and_retractions():
    short = [c.label for c in USUAL]
    assert len(set(short)) == len(short) == len(STEPS) + len(INFEASIBLE_STEPS) + len(RETRACTIONS) - 1
    crossed = sum(STEPS[name].takes_retraction for name in STEPS)
    assert len(ALL) == len(STEPS) + len(INFEASIBLE_STEPS) + crossed * (len(RETRACTIONS) - 1)


@pytest.fixture(scope="module")
def report():
    steps = ("sgd", "momentum", "trust_regions", "momentum + qr", "pogo")
    return run_suite(
        [leaky, careful, raising, EASY],
        problems=["procrustes"],
        budget=SHORT,
        only=steps,
    )


@pytest.mark.slow
def test_a_step_that_leaves_the_complement_is_named_with_its_leak(report):
    assert set(report.excluded) == {"leaky", "momentum + raising"}
    assert "leaves the complement" in report.excluded["leaky"]
    leak = max(result.leak for result in report.of("leaky"))
    assert leak > 1e-2
    assert any(f"{result.leak:.1e}" in report.excluded["leaky"] for result in report.of("leaky"))
    assert "RuntimeError: no such luck" in report.excluded["momentum + raising"]
    for unit in ("evaluations", "seconds"):
        assert set(report.ranking(unit)) == {"sgd", "momentum", "trust_regions", "momentum + qr", "careful", "pogo"}


def test_the_report_is_plain_data(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    entries = {entry["name"]: entry for entry in content["contestants"]}
    assert "evaluations" not in entries["leaky"]
    assert entries["careful"]["plugin"]
    assert not entries["sgd"]["plugin"]
    assert entries["momentum + qr"]["retraction"] == "qr"
    assert entries["sgd"]["evaluations"]["solved_share"] == 1.0
    assert content["budget"]["trials"] == 8
    curve = next(r["curve"] for r in content["results"] if r["contestant"] == "sgd")
    assert curve[0][2] == 1.0  # the gap at the start, relative to itself
    assert len(curve) <= 30
    assert [p["name"] for p in content["problems"]] == ["procrustes", "easy"]


@pytest.mark.slow
def test_figures_show_the_plug_in_and_have_room_for_their_words(report):
    for draw in (plot_profiles, plot_curves):
        figure = draw(report)
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert any("careful" in text.get_text() for legend in legends for text in legend.get_texts())
        assert faults(figure) == []
        plt.close(figure)


def test_steps_repeat_exactly_whatever_the_clock():
    contestant = Contestant("adamw", STEPS["adamw"])
    first, second = (measure(contestant, EASY, SHORT) for _ in range(2))
    assert first.rate == second.rate
    gaps = [[entry.gap for entry in result.runs[0].entries] for result in (first, second)]
    assert gaps[0] == gaps[1]
    assert len(gaps[0]) > 5


def test_a_search_has_as_many_runs_as_its_budget_states(monkeypatch):
    tried = []

    def counted(*args):
        tried.append(args[3])
        return run(*args)

    monkeypatch.setattr("manifold_cl.lab.runs.run", counted)
    for name, count in (("sgd", 8), ("trust_regions", 1)):
        tried.clear()
        best = search(Contestant(name, STEPS[name]), EASY, SHORT, seed=0)
        assert len(tried) == count
        assert best.setting in tried
    assert SHORT.trials == 8


def test_the_meter_counts_and_leaves_its_own_time_out():
    meter = Meter(EASY, EASY.start(0), Limits(10, gap=0.0))
    x = EASY.start(0)
    for _ in range(4):
        meter.gradient(x)
    meter.hessian(x, x)
    assert meter.evaluations == 5
    assert [entry.evaluations for entry in meter.entries] == [0, 1, 2, 3]
    assert meter.entries[0].seconds == 0
    assert meter.entries[0].gap == pytest.approx(1)


def test_the_gap_of_a_point_off_the_manifold_is_that_of_the_nearest_point():
    """Else a step could leave the manifold to get below the optimum."""
    meter = Meter(EASY, EASY.start(0), Limits(10))
    x = EASY.start(0)
    below = EASY.target + 0.0
    assert float(EASY.cost(below)) < EASY.optimum
    meter.record(0.5 * x + 0.0)
    assert meter.entries[0].gap == pytest.approx(1)
    assert meter.entries[0].orthonormality == pytest.approx(0.75)
    nearest = nearest_point(EASY.complement, below)
    assert float(EASY.cost(nearest)) == pytest.approx(EASY.optimum, rel=1e-12)


def test_a_run_that_diverges_ends():
    tried = run(Contestant("away", as_plugin(away)[1]), EASY, EASY.start(0), Setting(1.0, 50), Limits(50))
    assert len(tried.entries) < 50
    assert tried.last_gap == math.inf
    assert tried.failure == ""


def away(x, gradient, rate, manifold):
    return x * torch.nan


def test_a_step_that_grows_without_bound_has_diverged_and_does_not_leak():
    def growing(x, gradient, rate, manifold):
        return 3 * x

    tried = run(Contestant("growing", as_plugin(growing)[1]), EASY, EASY.start(0), Setting(1.0, 50), Limits(50))
    assert tried.last_gap == math.inf
    assert tried.worst("leak") < 1e-12


# -- plug-ins ---------------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("candidate", "kind", "name"),
    [
        (careful, "step", "careful"),
        (shrinking, "retraction", "shrinking"),
        (OwnSGD, "step", "OwnSGD"),
        (EASY, "problem", "easy"),
        (Nearest, "problem", "nearest"),
        (RETRACTIONS["qr"], "retraction", "qr"),
        (type(RETRACTIONS["qr"]), "retraction", "qr"),
        (STEPS["sgd"], "step", "sgd"),
    ],
)
def test_plug_ins_are_recognised(candidate, kind, name):
    found, entry = as_plugin(candidate)
    assert (found, entry.name) == (kind, name)


@pytest.mark.parametrize("candidate", [3, "text", lambda x: x, lambda x, y, z: x])
def test_what_is_no_plug_in_is_refused(candidate):
    with pytest.raises(TypeError, match="is neither a retraction"):
        as_plugin(candidate)


def test_a_plug_in_may_not_take_a_name():
    with pytest.raises(ValueError, match="'qr' has the name of another"):
        entrants(plugins=[RETRACTIONS["qr"]])


def test_several_jobs_need_plug_ins_by_path():
    with pytest.raises(ValueError, match="jobs is 2"):
        run_suite([careful], jobs=2)


def test_a_step_that_returns_another_shape_is_named():
    def short(x, gradient, rate, manifold):
        return x[:, :1]

    result = measure(Contestant("short", as_plugin(short)[1]), EASY, SHORT)
    assert "must return a tensor (8, 2), got (8, 1)" in result.failure


def test_an_optimizer_of_the_user_is_made_riemannian():
    result = measure(Contestant("own", as_plugin(OwnSGD)[1]), EASY, SHORT)
    assert result.failure == ""
    assert result.leak < 1e-12


def test_a_suite_whose_contestants_are_all_excluded_has_a_report():
    """A plug-in that runs alone and leaks: the report of its fault failed, with an error about lists of lengths."""
    report = run_suite(
        [leaky, EASY], problems=["nearest"], budget=Budget(evaluations=4, rates=1, starts=1), only=["leaky"]
    )
    assert "leaves the complement" in report.excluded["leaky"]
    assert report.profiles("evaluations") == {}
    assert report.ranking("seconds") == []
    assert report.to_dict()["excluded"] == report.excluded
