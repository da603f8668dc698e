"""What the base optimizer keeps, in its groups and in its state, is kept; what somebody changes there counts."""

import geoopt
import pytest
import torch
from problems import Net, train

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups, riemannian


class Counting(torch.optim.Optimizer):
    """Keeps its count of steps in the group, as many optimizers outside torch do, and how much decay it has seen."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, note_decay=False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "note_decay": note_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            if group["note_decay"]:
                group["seen"] = group.get("seen", 0.0) + group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad, alpha=group["lr"] / group["k"])


def test_what_a_base_optimizer_keeps_in_its_group_is_kept_once_a_step():
    weights = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    ours, theirs = riemannian(Counting)([weights[0]]), Counting([weights[1]])
    for _ in range(5):
        for w, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (w**2).sum().backward()
            optimizer.step()
    assert torch.equal(*weights)
    net = Net()
    optimizer = riemannian(Counting)(param_groups(net, lr=1e-2))
    train(net, optimizer, 3)  # points of several shapes, in several buckets: one count
    assert [group["k"] for group in optimizer.param_groups] == [3] * len(optimizer.param_groups)
    assert net.worst() <= 2e-6


def mixed(generator, **options):
    """A point and a plain weight in one group, with gradients, and an optimizer that decays."""
    manifold = RestrictedStiefel()
    point = geoopt.ManifoldParameter(manifold.random(6, 2, generator=generator).detach(), manifold=manifold)
    weight = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match="points are stepped without it"):
        optimizer = riemannian(Counting)([point, weight], lr=0.5, weight_decay=0.5, **options)
    point.grad, weight.grad = torch.zeros(6, 2), torch.zeros(3)
    return optimizer, point, weight


def test_decay_reaches_the_plain_parameters_of_a_group_and_not_its_points(generator):
    optimizer, point, weight = mixed(generator)
    before = point.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert torch.equal(point, before)
    assert torch.equal(weight, torch.full((3,), 0.75**2))
    (group,) = optimizer.param_groups
    assert (group["k"], group["weight_decay"]) == (2, 0.5)
    assert [id(p) for p in group["params"]] == [id(point), id(weight)]


def test_a_base_optimizer_that_writes_otherwise_for_points_is_refused_and_they_stay(generator):
    optimizer, point, _ = mixed(generator, note_decay=True)
    point.grad = torch.ones(6, 2)
    before = point.detach().clone()
    with pytest.raises(ValueError, match="Counting writes 'seen' into a group"):
        optimizer.step()
    assert torch.equal(point, before)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@pytest.mark.parametrize("change", ["replaced", "cleared"])
def test_a_state_that_somebody_changes_is_the_state_of_the_next_step(change):
    nets = [Net(), Net()]
    optimizers = [RiemannianSGD(param_groups(net, lr=1e-2), momentum=0.9) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 3)
    for net, optimizer in zip(nets, optimizers, strict=True):
        state = optimizer.state[net.first.right]
        if optimizer is optimizers[0]:
            state["momentum_buffer"].zero_()
        elif change == "replaced":
            state["momentum_buffer"] = torch.zeros_like(net.first.right)
        else:
            state.clear()
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 1)
    assert torch.equal(nets[0].first.right, nets[1].first.right)
    assert torch.equal(nets[0].second.left, nets[1].second.left)


def test_a_saved_state_holds_a_count_for_each_parameter():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 2)
    counts = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert len({count.data_ptr() for count in counts}) == len(counts)
    assert {float(count) for count in counts} == {2.0}
    counts[0].add_(1)
    train(net, optimizer, 1)
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {3.0}
