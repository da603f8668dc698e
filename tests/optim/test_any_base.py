"""Optimizers outside torch: the same steps as one ordinary step that is then retracted, or a refusal by name."""

import importlib
import inspect
import io
import pickle

import geoopt
import pytest
import torch
from problems import Plain, backward, problem
from torch import nn

from manifold_cl import riemannian
from manifold_cl.optim import distributed
from manifold_cl.optim.base_step import TRAINED
from manifold_cl.optim.riemannian import RiemannianStep

PACKAGES = ("pytorch_optimizer", "heavyball", "schedulefree", "prodigyopt", "lion_pytorch")


class Across(Plain):
    """A rate that falls with a count on the optimizer, and clipping by the norm over all parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.state.setdefault("largest", torch.zeros(())).copy_(norm)  # belongs to no parameter
        for p in params:
            p.sub_(p.grad / norm, alpha=0.5 / self.count)


class Preconditioned(Plain):
    """Keeps a square matrix for the rows of each parameter."""

    def move(self, p, grad, lr):
        gram = self.state[p].setdefault("rows", torch.zeros(len(p), len(p), dtype=p.dtype))
        gram.add_(grad @ grad.T)
        p.sub_(grad / (1 + gram.trace().sqrt()), alpha=lr)


class Averaging(Plain):
    """Trains on one sequence, is evaluated on its average, and computes its way back."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["training"] = True

    def move(self, p, grad, lr):
        p.sub_(grad, alpha=lr)
        self.state[p].setdefault("far", p.clone()).sub_(grad, alpha=3 * lr)

    @torch.no_grad()
    def _swap(self, training, weight):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "far" in self.state[p]:
                        p.lerp_(self.state[p]["far"], weight)
                group["training"] = training

    def eval(self):
        self._swap(False, 0.5)

    def train(self):
        self._swap(True, -1.0)


class Interrupted(Plain):
    """Fails at its third step, when the first parameter has moved."""

    def _step(self, group):
        super()._step({**group, "params": group["params"][:1]})
        if self.count == 3:
            raise RuntimeError("out of memory")


class Sharpness(Plain):
    def first_step(self):
        """Climbs."""

    def second_step(self):
        """Comes back."""


class Asserting(Plain):
    def step(self, closure=None):
        assert closure is not None, "needs a closure"


class Closing(Plain):
    def step(self, closure):
        closure()


class Curvature(Plain):
    def move(self, p, grad, lr):
        torch.autograd.grad(grad.sum(), p)


class Wrapper(Plain):
    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups)


def worst(params):
    return max(max(p.manifold.constraint_error(p)) for p in params[:3])


def advance(params, optimizer, steps):
    for _ in range(steps):
        backward(params)
        optimizer.step()


@pytest.mark.parametrize("base", [Plain, Across, Preconditioned])
def test_one_ordinary_step_is_taken_and_then_retracted(base):
    ours, theirs = (problem(torch.Generator().manual_seed(0), torch.float64) for _ in range(2))
    optimizer = riemannian(base)(ours)
    twin = base([nn.Parameter(p.detach().as_subclass(torch.Tensor)) for p in theirs])
    copies = twin.param_groups[0]["params"]
    for _ in range(6):
        backward(ours)
        optimizer.step()
        backward(theirs)
        before = [p.detach().clone() for p in copies]
        for copy, p in zip(copies, theirs, strict=True):
            copy.grad = p.manifold.egrad2rgrad(copy.detach(), p.grad) if hasattr(p, "manifold") else p.grad
        twin.step()
        with torch.no_grad():
            for copy, x, p in zip(copies, before, theirs, strict=True):
                if hasattr(p, "manifold"):
                    u, _, v = torch.linalg.svd(x + p.manifold.proju(x, copy - x), full_matrices=False)
                    copy.copy_(u @ v)
                p.copy_(copy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)  # float64 rounding over six steps
    assert optimizer.count == 6


@pytest.mark.parametrize("base", [Plain, Across, Preconditioned, Averaging])
def test_state_of_any_kind_loads_and_goes_on_to_the_same_numbers(base, generator):
    params = problem(generator)
    optimizer = riemannian(base)(params)
    advance(params, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    later = [
        geoopt.ManifoldParameter(p.detach().clone(), manifold=p.manifold)
        if hasattr(p, "manifold")
        else p.detach().clone()
        for p in params
    ]
    later[-1].requires_grad_()
    second = riemannian(base)(later)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.count = optimizer.count
    advance(params, optimizer, 3)
    advance(later, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, later, strict=True))


def test_a_point_that_misses_a_step_stays_and_its_list_is_its_own(generator):
    params = problem(generator)
    optimizer = riemannian(Plain)(params)
    advance(params, optimizer, 2)
    before = params[1].detach().clone()
    backward(params, without=1)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert [len(optimizer.state[p]["history"]) for p in params] == [3, 2, 3, 3]


def test_evaluation_is_on_the_manifold_and_training_goes_on_where_it_was(generator):
    params = problem(generator)
    optimizer = riemannian(Averaging)(params)
    advance(params, optimizer, 4)
    trained = [p.detach().clone() for p in params[:3]]
    for _ in range(2):
        optimizer.eval()
        assert worst(params) <= 2e-6  # float32 bound
        assert all(float((p.detach() - x).abs().max()) > 1e-3 for p, x in zip(params, trained, strict=False))
        optimizer.train()
        assert all(torch.equal(p, x) for p, x in zip(params, trained, strict=False))
    assert TRAINED not in optimizer.state[params[0]]


def test_a_state_saved_in_evaluation_leads_back_to_the_trained_point(generator):
    params = problem(generator)
    optimizer = riemannian(Averaging)(params)
    advance(params, optimizer, 4)
    trained = params[0].detach().clone()
    optimizer.eval()
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    with torch.no_grad():
        params[0].zero_()
        params[0][:3] = torch.eye(3)  # other values, not those that were saved
        evaluated = saved["state"][0][TRAINED]
    assert torch.equal(evaluated, trained)
    optimizer.train()
    assert not torch.equal(params[0], trained)
    assert max(params[0].manifold.constraint_error(params[0])) <= 2e-6


def test_points_stay_on_the_manifold_when_the_base_fails_in_the_middle_of_a_step(generator):
    params = problem(generator)
    optimizer = riemannian(Interrupted)(params)
    advance(params, optimizer, 2)
    before = [p.detach().clone() for p in params[:3]]
    with pytest.raises(RuntimeError, match="out of memory"):
        advance(params, optimizer, 1)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=False))


@pytest.mark.parametrize("base", [Plain, Across, torch.optim.Adafactor, torch.optim.ASGD, torch.optim.Adam])
def test_a_rate_of_zero_leaves_points_alone_whatever_the_base(base, generator):
    params = problem(generator)
    optimizer = riemannian(base)(params, lr=0.1)
    advance(params, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params[:3]]
    advance(params, optimizer, 3)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=False))


def test_a_base_may_work_out_its_own_rate(generator):
    params = problem(generator)
    optimizer = riemannian(Across)(params, lr=None)
    advance(params, optimizer, 2)
    assert worst(params) <= 2e-6  # float32 bound


def test_classes_outside_torch_pickle_and_step_alike(generator):
    params = problem(generator)
    optimizer = riemannian(Across)(params)
    advance(params, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(optimizer)), torch.load(file, weights_only=False)):
        assert type(twin) is riemannian(Across)
        copies = twin.param_groups[0]["params"]
        for p, copy in zip(params, copies, strict=True):
            copy.grad = torch.full_like(p.detach().as_subclass(torch.Tensor), 0.1)
        twin.step()
        assert twin.count == 3
        assert max(twin.constraint_error()) <= 2e-6


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (Sharpness, "Sharpness cannot be made Riemannian: it evaluates the loss several times"),
        (Closing, "Closing cannot be made Riemannian: its step needs a closure"),
        (Wrapper, "Wrapper cannot be made Riemannian: it takes the steps of another optimizer"),
        (Asserting, "Asserting cannot be made Riemannian: .* raises AssertionError: needs a closure"),
        (Curvature, "Curvature cannot be made Riemannian: .* raises RuntimeError"),
    ],
)
def test_a_base_that_cannot_be_stepped_is_refused_before_the_first_step(base, match, generator):
    params = problem(generator)
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=match):
        riemannian(base)(params)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_is_not_lost_among_the_errors_of_other_points(generator):
    params = problem(generator)
    optimizer = riemannian(torch.optim.SGD)(params, lr=0.1)
    with torch.no_grad():
        params[1][0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left their manifold"):
        error = optimizer.constraint_error()
    assert error.orthonormality != error.orthonormality


def test_ranks_use_their_groups_in_the_order_of_the_parameters(monkeypatch):
    class Rows(distributed.RowSharded):
        @property
        def group(self):
            return self.mesh

    meshes = [f"mesh {i}" for i in range(20)]
    monkeypatch.setattr(distributed, "layout_of", lambda name: Rows(name, (), 0, 4))
    assert distributed.sharding_groups(meshes + meshes[:3]) == meshes


def test_no_name_of_ours_hides_one_of_a_base_class():
    torchs = set(dir(torch.optim.Optimizer))
    ours = {name for name in vars(RiemannianStep) if name not in torchs and not name.startswith("__")} | {"_riemannian"}
    ours -= {"__module__", "__doc__", "__reduce_ex__", "__annotations__"}
    assert {name for name in ours if name.startswith("_")} == {"_riemannian"}
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        for name, base in vars(module).items():
            if isinstance(base, type) and issubclass(base, torch.optim.Optimizer):
                assert not ours & (set(dir(base)) - torchs), name
                source = inspect.getsource(base)
                assert not [own for own in ours if f"self.{own}" in source], name
