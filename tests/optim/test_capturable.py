"""A step that asks the host nothing: as a CUDA graph records it, here on the CPU, and replayed on a CUDA device."""

import sys

import pytest
import torch
from problems import Net, train
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_cl import RETRACTIONS, RiemannianAdamW, RiemannianSGD, param_groups, riemannian
from manifold_cl.optim import RiemannianAdam, RiemannianMuon

ASKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_cpu")
PATCHED = ("manifold_cl.linalg", "manifold_cl.optim.polar", "manifold_cl.optim.buckets", "manifold_cl.optim.stepper")
SGD = {"momentum": 0.9, "nonfinite": "skip"}


class Silence(TorchDispatchMode):
    """Refuses every operation that waits for values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKS:
            raise AssertionError(f"the step asks the host: {name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch):
    """Call it to make every later step one that is captured."""

    def begin():
        for name in (*PATCHED, "manifold_cl.optim.riemannian"):
            monkeypatch.setattr(sys.modules[name], "is_capturing", lambda: True)

    return begin


@pytest.fixture
def adam_on_cpu(monkeypatch):
    """Lets torch's AdamW be capturable on the CPU, where it needs no graph."""
    for name in ("torch.optim.adam", "torch.optim.adamw"):
        module = sys.modules[name]
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


def sgd(net, **options):
    return RiemannianSGD(param_groups(net, lr=0.05), **{**SGD, **options})


def gradients(net, optimizer):
    optimizer.zero_grad()
    net.loss().backward()


def content(net, optimizer):
    """Parameters and averages, copied."""
    averages = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [t.detach().clone() for t in (*net.parameters(), *averages)]


@pytest.mark.parametrize("moments", ["ambient", "transport"])
def test_a_captured_step_asks_nothing_and_is_the_ordinary_step(capturing, moments):
    nets = [Net(), Net()]
    optimizers = [sgd(net, moments=moments) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2)
    train(nets[0], optimizers[0], 5)
    capturing()
    for _ in range(5):
        gradients(nets[1], optimizers[1])
        with Silence():
            optimizers[1].step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # one is computed in float64, the other in float32
    assert nets[1].worst() <= 2e-6  # float32 bound
    assert optimizers[1].skipped_steps == 0


def test_an_ordinary_step_asks():
    net = Net()
    optimizer = sgd(net)
    gradients(net, optimizer)
    with Silence(), pytest.raises(AssertionError, match="asks the host"):
        optimizer.step()


def test_a_capturable_adamw_trains_as_the_ordinary_one(capturing, adam_on_cpu):
    nets = [Net(), Net()]
    train(nets[0], RiemannianAdamW(param_groups(nets[0], lr=1e-2)), 6)
    optimizer = RiemannianAdamW(param_groups(nets[1], lr=1e-2), capturable=True, nonfinite="skip")
    train(nets[1], optimizer, 3)
    capturing()
    for _ in range(3):
        gradients(nets[1], optimizer)
        with Silence():
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # Adam turns the rounding of small gradients into steps
    assert nets[1].worst() <= 2e-6  # float32 bound


@pytest.mark.parametrize("broken", ["point", "head", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(capturing, broken, value):
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 2)
    capturing()
    gradients(net, optimizer)
    chosen = {"point": [net.first.left], "head": [net.head.weight], "all": list(net.parameters())}[broken]
    for p in chosen:
        if p.grad is not None:
            p.grad.fill_(value)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))
    assert optimizer.skipped_steps == 1
    assert all(bool(t.isfinite().all()) for t in content(net, optimizer))
    gradients(net, optimizer)
    optimizer.step()
    assert not torch.equal(before[0], next(iter(net.parameters())))
    assert optimizer.skipped_steps == 1


def test_a_step_without_gradients_moves_nothing():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2), capturable=True, nonfinite="skip")
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


def test_skipped_steps_are_counted_in_the_same_memory(capturing):
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 1)
    place = optimizer._riemannian.plan.skipped.data_ptr()
    capturing()
    for _ in range(2):
        gradients(net, optimizer)
        net.head.weight.grad.fill_(float("nan"))
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer._riemannian.plan.skipped.data_ptr() == place


def test_a_step_that_overflows_moves_nothing(capturing):
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 1)
    capturing()
    gradients(net, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e38
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))
    assert optimizer.skipped_steps == 1


def test_long_steps_stay_on_the_manifold(capturing):
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 1)
    capturing()
    for rate in (1e2, 1e4, 1e6):
        for group in optimizer.param_groups:
            group["lr"] = rate if group["role"] == "points" else 0.0
        gradients(net, optimizer)
        optimizer.step()
        assert net.worst() <= 2e-6, rate  # float32 bound


def refused(make, net, pattern, capturing, error=ValueError):
    optimizer = make(net)
    train(net, optimizer, 1)
    before = [p.detach().clone() for p in net.parameters()]
    gradients(net, optimizer)
    capturing()
    with pytest.raises(error, match=pattern):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


REFUSED = {
    "refuse": (lambda net: sgd(net, nonfinite="refuse"), "nonfinite='skip'"),
    "polish": (lambda net: sgd(net, polish_every=3), "polish_every"),
    "matrix": (lambda net: RiemannianAdam(param_groups(net, lr=1e-2), nonfinite="skip"), "MatrixAdam"),
    "muon": (lambda net: RiemannianMuon(param_groups(net, lr=1e-2), nonfinite="skip"), "MatrixMuon"),
    "adafactor": (
        lambda net: riemannian(torch.optim.Adafactor)(param_groups(net, lr=1e-2), nonfinite="skip"),
        "Adafactor",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_captured_is_refused_and_changes_nothing(name, capturing):
    make, pattern = REFUSED[name]
    refused(make, Net(), pattern, capturing)


def test_other_retractions_are_refused(capturing):
    net = Net()
    for layer in (net.first, net.second):
        layer.right_manifold.retraction = layer.left_manifold.retraction = RETRACTIONS["qr"]
    refused(sgd, net, "retraction 'polar'", capturing)


def test_the_first_step_is_not_captured(capturing):
    net = Net()
    optimizer = sgd(net)
    gradients(net, optimizer)
    capturing()
    with pytest.raises(RuntimeError, match="ordinary steps first"):
        optimizer.step()


def test_capturable_needs_skip():
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        RiemannianAdamW(param_groups(Net(), lr=1e-2), capturable=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_graph_replays_the_step(kind):
    nets = [Net().cuda(), Net().cuda()]
    for net in nets:
        net.x, net.y = net.x.cuda(), net.y.cuda()
    adamw = {"capturable": True, "nonfinite": "skip"}
    makers = {"adamw": lambda net: RiemannianAdamW(param_groups(net, lr=1e-2), **adamw), "sgd": sgd}
    optimizers = [makers[kind](net) for net in nets]
    train(nets[0], optimizers[0], 8)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(nets[1], optimizers[1], 3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[1].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        nets[1].loss().backward()
        optimizers[1].step()
    for _ in range(5):
        graph.replay()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # as for a GPU beside a CPU
    assert nets[1].worst() <= 2e-6  # float32 bound
    assert optimizers[1].skipped_steps == 0
    with torch.no_grad():
        nets[1].x.fill_(float("nan"))
    before = [p.detach().clone() for p in nets[1].parameters()]
    graph.replay()
    assert all(map(torch.equal, before, nets[1].parameters()))
    assert optimizers[1].skipped_steps == 1
