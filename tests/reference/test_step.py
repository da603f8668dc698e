"""The optimizer equals its slow twin, for the released step and for the corrected one."""

import pytest
import torch
from slow_step import SlowAdamW

from manifold_cl import EBLoRALinear, RiemannianAdamW, param_groups

STEPS = 30
STEP_RULES = ("corrected", "official")


def problem(seed=0):
    """Adapters of three shapes with complements of different widths, one of them none, and a regression target."""
    draw = torch.Generator().manual_seed(seed)
    model = torch.nn.ModuleList()
    for m, n, k in [(12, 20, 7), (12, 20, 3), (12, 20, 0), (15, 9, 2)]:
        basis = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=draw))[0]
        base = torch.nn.Linear(n, m, bias=False)
        layer = EBLoRALinear(base, 4, complement=basis if k else None, initial_scale=-0.1, generator=draw).double()
        with torch.no_grad():  # float32 frames, made points of float64
            layer.left.copy_(layer.left_manifold.projx(layer.left))
            layer.right.copy_(layer.right_manifold.projx(layer.right))
        model.append(layer)
    data = [(torch.randn(32, layer.base.in_features, dtype=torch.float64, generator=draw), layer) for layer in model]
    goals = [torch.randn(32, layer.base.out_features, dtype=torch.float64, generator=draw) for layer in model]
    return model, lambda: sum(((layer(x) - y) ** 2).mean() for (x, layer), y in zip(data, goals, strict=True))


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_thirty_steps_equal_the_slow_twin(step_rule):
    model, loss = problem()
    optimizer = RiemannianAdamW(param_groups(model, lr=2e-3, scale_lr=5e-3), step_rule=step_rule)
    twins = {
        p: SlowAdamW(p.detach(), manifold.complement, lr=2e-3, official=step_rule == "official")
        for layer in model
        for _, p, manifold in layer.manifold_parameters()
    }
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        gradients = {p: p.grad.clone() for p in twins}
        optimizer.step()
        for p, twin in twins.items():
            twin.step(gradients[p])
            # Two orders of summation in float64, amplified over 30 steps; the issue asks for 1e-12.
            torch.testing.assert_close(p.detach(), twin.x, rtol=0, atol=1e-12)


def test_step_rules_differ_where_the_released_code_errs():
    ends = {}
    for step_rule in STEP_RULES:
        model, loss = problem()
        optimizer = RiemannianAdamW(param_groups(model, lr=2e-3), step_rule=step_rule)
        start = model[0].left.detach().clone()
        loss().backward()
        optimizer.step()
        ends[step_rule] = float((model[0].left.detach() - start).norm())
    # The first Adam step is about lr an entry; the released code enlarges it by sqrt(4096 / 4) = 32.
    assert ends["official"] > 10 * ends["corrected"]


def test_the_doubled_map_doubles_the_rotation_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64, generator=draw))[0]
    z = torch.randn(10, 3, dtype=torch.float64, generator=draw)
    twin = SlowAdamW(x, None, lr=1.0, official=True)
    difference = twin.canonical(twin.tangent(z)) - twin.tangent(z)
    rotation = x @ (x.T @ z - z.T @ x) / 2
    torch.testing.assert_close(difference, rotation, rtol=0, atol=1e-14)  # a dozen float64 roundings
