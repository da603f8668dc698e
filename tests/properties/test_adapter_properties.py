"""Laws of adapters and of the metrics of a run: a merged update is the product of its factors; bounds of metrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from property_cases import cases, close, holds_for
from torch import nn

from manifold_cl import EBLoRALinear, ProtectedSubspace, inject_adapters, merge_adapters
from manifold_cl.adapters import LoRALinear
from manifold_cl.continual import metrics

flat = cases(batches=((),), dtypes=(torch.float32,), largest=10)
cores = st.sampled_from(["scalar", "diagonal", "full"])


def adapted(case, m, *, core="scalar", compensate=False):
    """A model of one linear layer (n → m) with an adapter whose parameters are random, on the manifold."""
    linear = nn.Linear(case.n, m)
    with torch.no_grad():
        linear.weight.copy_(case.gaussian(m, case.n))
    model = nn.Sequential(linear)
    before = linear.weight.detach().clone()

    def make(_, layer):
        return EBLoRALinear(
            layer,
            case.p,
            complement=case.bases(),
            core=core,
            compensate=compensate,
            initial_scale=0.3,
            alpha=2 * case.p,
            generator=case.generator,
        )

    (adapter,) = inject_adapters(model, ["0"], make).values()
    with torch.no_grad():
        adapter.scale.add_(case.gaussian(*adapter.scale.shape) * (1 if core != "scalar" else 0.1))
        for frame, manifold in ((adapter.left, adapter.left_manifold), (adapter.right, adapter.right_manifold)):
            frame.copy_(manifold.retr(frame, 0.3 * case.gaussian(*frame.shape)))
    return model, adapter, before


@holds_for(case=flat, extra=st.integers(0, 6), core=cores, compensate=st.booleans())
def test_a_merged_update_is_the_product_of_its_factors(case, extra, core, compensate):
    m = case.p + extra
    model, adapter, weight = adapted(case, m, core=core, compensate=compensate)
    x = case.gaussian(5, case.n)
    answer = model(x).detach()
    magnitude = adapter.magnitude().detach()
    middle = magnitude if magnitude.ndim == 2 else torch.diag(magnitude.expand(case.p))
    product = adapter.left.detach() @ middle @ adapter.right.detach().mT
    updates = merge_adapters(model)
    update = updates["0"].delta_weight()
    if not compensate:
        close(update, product, 2e-6 * (1 + float(magnitude.abs().max())))
    close(model[0].weight.detach() - weight, update, 3e-6)
    close(model(x).detach(), answer, 5e-5)
    assert type(model[0]) is nn.Linear


@holds_for(case=flat, extra=st.integers(0, 6))
def test_an_update_of_a_scalar_core_is_balanced_and_keeps_off_the_protected_inputs(case, extra):
    model, adapter, _ = adapted(case, case.p + extra)
    basis, size = adapter.right_manifold.complement, abs(float(adapter.magnitude().detach()))
    update = merge_adapters(model)["0"].delta_weight()
    sigma = torch.linalg.svdvals(update)[: case.p]
    close(sigma, torch.full_like(sigma, size), 5e-6)
    if case.k:
        assert float((update @ basis).abs().max()) <= 3e-6 * max(size, 1)


@holds_for(case=flat, extra=st.integers(0, 6))
def test_a_plain_lora_update_is_the_product_of_its_factors(case, extra):
    m = case.p + extra
    model = nn.Sequential(nn.Linear(case.n, m))
    (adapter,) = inject_adapters(model, ["0"], lambda _, layer: LoRALinear(layer, case.p, alpha=3.0)).values()
    with torch.no_grad():
        adapter.left.copy_(case.gaussian(m, case.p))
        adapter.right.copy_(case.gaussian(case.n, case.p))
    product = 3.0 / case.p * adapter.left.detach() @ adapter.right.detach().mT
    x = case.gaussian(4, case.n)
    answer = model(x).detach()
    update = merge_adapters(model)["0"].delta_weight()
    close(update, product, 2e-5)
    close(model(x).detach(), answer, 2e-4)


@holds_for(40, case=flat, wrong=st.sampled_from(["rank", "room", "alpha", "nan"]))
def test_wrong_adapters_are_refused(case, wrong):
    layer = nn.Linear(case.n, case.n)
    if wrong == "rank":
        with pytest.raises(ValueError, match=str(case.n + 1)):
            EBLoRALinear(layer, case.n + 1)
    elif wrong == "room":
        full = ProtectedSubspace(torch.eye(case.n)[:, : case.n - case.p + 1])
        with pytest.raises(ValueError, match=f"leaves {case.p - 1} free directions"):
            EBLoRALinear(layer, case.p, complement=full)
    elif wrong == "alpha":
        with pytest.raises(ValueError, match="alpha"):
            EBLoRALinear(layer, case.p, alpha=float("nan"))
        with pytest.raises(ValueError, match="alpha is 0"):
            EBLoRALinear(layer, case.p, alpha=0.0)
    else:
        model, adapter, weight = adapted(case, case.p)
        with torch.no_grad():
            adapter.right[0, 0] = float("nan")
        with pytest.raises(ValueError, match="right"):
            merge_adapters(model)
        assert torch.equal(adapter.base.weight, weight)


@st.composite
def matrices(draw):
    tasks = draw(st.integers(1, 6))
    cells = st.floats(0, 100).map(lambda x: round(x, 3))
    return np.array(draw(st.lists(cells, min_size=tasks**2, max_size=tasks**2))).reshape(tasks, tasks)


@holds_for(150, a=matrices(), shift=st.floats(-50, 50))
def test_metrics_obey_their_bounds_and_identities(a, shift):
    tasks = len(a)
    for name in ("mft", "mfn", "maa", "fwt", "fwt_flat"):
        value = metrics.METRICS[name](a)
        if not math.isnan(value):
            assert a.min() - 1e-9 <= value <= a.max() + 1e-9
            assert metrics.METRICS[name](a + shift) == pytest.approx(value + shift, abs=1e-9)
    for name in ("bwt", "bwt_over_all", "forgetting", "forgetting_just_learned"):
        value = metrics.METRICS[name](a)
        assert math.isnan(value) == (tasks == 1 and name != "bwt_over_all")
        if tasks > 1:
            assert metrics.METRICS[name](a + shift) == pytest.approx(value, abs=1e-9)
            assert -100 <= value <= 100
    assert metrics.bwt_over_all(a) == pytest.approx(metrics.mfn(a) - metrics.mft(a), abs=1e-9)
    if tasks > 1:
        assert metrics.forgetting(a) >= metrics.forgetting_just_learned(a) - 1e-9
        assert metrics.bwt(a) == pytest.approx((metrics.mfn(a) - metrics.mft(a)) * tasks / (tasks - 1), abs=1e-9)


@holds_for(100, a=matrices(), row=st.integers(0, 5), column=st.integers(0, 5))
def test_a_metric_that_needs_an_unknown_entry_is_unknown(a, row, column):
    tasks = len(a)
    row, column = row % tasks, column % tasks
    a[row, column] = float("nan")
    assert math.isnan(metrics.mft(a)) == (row == column)
    assert math.isnan(metrics.mfn(a)) == (row == tasks - 1)
    assert math.isnan(metrics.maa(a)) == (column <= row)
    assert math.isnan(metrics.fwt_flat(a)) == (tasks == 1 or column > row)
    with pytest.raises(ValueError, match="square"):
        metrics.mft(a[:, :-1] if tasks > 1 else a[0])
