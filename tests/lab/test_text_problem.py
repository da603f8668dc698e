"""The task of text-three: trust regions from other starts end at the same cost, and none ends below."""

import pytest

from manifold_cl.lab import STEPS, Contestant
from manifold_cl.lab.meter import Limits, residuals
from manifold_cl.lab.runs import run
from manifold_cl.lab.steps import Setting
from manifold_cl.lab.text import TextTask


@pytest.mark.stream
@pytest.mark.slow
def test_conjugate_gradients_from_other_starts_end_at_the_optimum():
    problem = TextTask(examples=60, p=3, k=8)
    assert problem.shape == (384, 3, 8)
    assert max(residuals(problem.manifold(), problem.start(0))) < 1e-13
    solver = Contestant("conjugate_gradient", STEPS["conjugate_gradient"])
    for seed in (0, 1):
        ended = run(solver, problem, problem.start(seed), Setting(), Limits(600, gap=1e-8))
        assert ended.failure == ""
        assert ended.last_gap == pytest.approx(0, abs=1e-5)
