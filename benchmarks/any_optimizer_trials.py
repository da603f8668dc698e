"""What ``any_optimizer.py`` asks of one class: a small problem, a slow twin, and the trials."""

from __future__ import annotations

import inspect
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl import RestrictedStiefel, riemannian
from manifold_cl.linalg import sym

SHAPES = ((20, 3, 6), (20, 3, 7), (14, 2, 4), (20, 3, 0))
"""(n, p, k) of the points: two that batch, another shape, and one that protects nothing."""
RATES = (None, 1.0, 0.1, 0.01, 1e-3)
"""None is the default of the class."""
CONSTRAINT = 2e-6
"""Bound on both errors of a float32 point, at every step."""
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Largest difference to the twin: rounding. Some classes compute in float32 inside; those that refuse float64 are
compared in float32."""
AMPLIFIED = 20
"""Beyond `AGREEMENT`, at most so many times what the twin differs from itself when it starts a rounding away: bases of
eigenvectors and signs amplify rounding."""
STEPS, TWIN_STEPS = 30, 10
ARGUMENTS: dict[str, dict[str, Any]] = {"Ranger21": {"num_iterations": 100}, "CAME": {"lr": 2e-4}}
"""Arguments of classes that have no default for them."""
MUON = ("AdaGO", "AdaMuon", "DistributedMuon", "MuonClip", "NorMuon")
"""Classes whose groups must say ``use_muon``."""


class Problem:
    """Dominant subspaces off protected ones, and a regression with a plain weight and bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)
        wide = {"generator": draw, "dtype": torch.float64}
        self.points, self.manifolds, self.matrices, self.best = [], [], [], []
        for n, p, k in SHAPES:
            basis = torch.linalg.qr(torch.randn(n, k, **wide))[0]
            root = torch.randn(n, n, **wide)
            matrix = root @ root.T / n
            free = torch.eye(n, dtype=torch.float64) - basis @ basis.T
            point = torch.linalg.qr(free @ torch.randn(n, p, **wide))[0]
            self.matrices.append(matrix.to(dtype))
            self.best.append(torch.linalg.eigvalsh(free @ matrix @ free)[-p:].sum().to(dtype))
            self.manifolds.append(RestrictedStiefel(basis.to(dtype) if k else None))
            self.points.append(nn.Parameter(point.to(dtype).contiguous()))
        self.plain = [nn.Parameter(torch.randn(*shape, **wide).to(dtype)) for shape in ((6, 5), (5,))]
        self.goals = [torch.randn(p.shape, **wide).to(dtype) for p in self.plain]

    @property
    def parameters(self) -> list[Tensor]:
        """The points, then the plain parameters."""
        return [*self.points, *self.plain]

    def groups(self, name: str, *, on_manifolds: bool) -> list[dict[str, Any]]:
        """Points and plain parameters, without weight decay, which the Riemannian form hides from points."""
        points = {"params": list(self.points), **({"manifolds": list(self.manifolds)} if on_manifolds else {})}
        groups = [points, {"params": list(self.plain)}]
        muon = [{"use_muon": True}, {"use_muon": False}] if name in MUON else [{}, {}]
        return [{**group, **more, "weight_decay": 0.0} for group, more in zip(groups, muon, strict=True)]

    def flat(self, *, on_manifolds: bool) -> list[Tensor]:
        """All parameters in one list, for classes that take no groups."""
        for p, manifold in zip(self.points, self.manifolds, strict=True) if on_manifolds else ():
            p.manifold = manifold
        return self.parameters

    def gap(self) -> float:
        """The relative distance to the dominant subspaces, summed."""
        with torch.no_grad():
            return sum(float(gap) for gap in self._gaps())

    def _gaps(self) -> list[Tensor]:
        rows = zip(self.points, self.matrices, self.best, strict=True)
        return [1 - (x.T @ matrix @ x).trace() / best for x, matrix, best in rows]

    def backward(self, *, without: int | None = None) -> None:
        """Fresh gradients of all parameters, but of the point ``without``."""
        for p in self.parameters:
            p.grad = None
        fit = sum(((p - goal) ** 2).sum() for p, goal in zip(self.plain, self.goals, strict=True))
        (sum(self._gaps()) + 0.05 * fit).backward()
        if without is not None:
            self.points[without].grad = None

    def error(self) -> float:
        """The larger constraint error of all points; NaN where one holds NaN."""
        errors = [torch.tensor(m.constraint_error(p)) for p, m in zip(self.points, self.manifolds, strict=True)]
        return float(torch.stack(errors).max())

    def difference(self, other: Problem) -> float:
        """The largest difference between parameters of two problems."""
        pairs = zip(self.parameters, other.parameters, strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


class Twin:
    """The plain class with a Riemannian step written out around it."""

    def __init__(self, problem: Problem, optimizer: Any) -> None:
        self.problem, self.optimizer = problem, optimizer

    @torch.no_grad()
    def step(self) -> None:
        """One ordinary step, retracted."""
        before = [p.detach().clone() for p in self.problem.points]
        for x, p, manifold in zip(before, self.problem.points, self.problem.manifolds, strict=True):
            p.grad = self._tangent(x, p.grad, manifold)
        self.optimizer.step()
        for x, p, manifold in zip(before, self.problem.points, self.problem.manifolds, strict=True):
            u, _, v = torch.linalg.svd(x + self._tangent(x, p - x, manifold), full_matrices=False)
            p.copy_(u @ v)

    @staticmethod
    def _tangent(x: Tensor, d: Tensor, manifold: RestrictedStiefel) -> Tensor:
        basis = manifold.complement
        d = d if basis is None else d - basis @ (basis.T @ d)
        return d - x @ sym(x.T @ d)


def examine(cls: type[Any]) -> dict[str, Any]:
    """The verdict on one class, with what was measured."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        made = riemannian(cls)
        _made(made, cls, Problem(), None)
    except (TypeError, ValueError) as error:
        if "cannot be made Riemannian" in str(error) and " raises " not in str(error):
            return {"verdict": "refused", "reason": str(error).split(": ", 1)[1]}
        refusal: Exception | None = error
    except Exception as error:
        refusal = error
    else:
        refusal = None
    try:
        problem = Problem()
        optimizer = _made(cls, cls, problem, None)
        for step in range(3):
            _advance(problem, optimizer, step)
    except Exception as error:
        if refusal is None:
            return {"verdict": "wrong", "reason": f"the plain class fails where this one does not: {_line(error)}"}
        if "cannot be made Riemannian" in str(refusal):
            return {"verdict": "refused", "reason": _line(refusal).split(": ", 2)[2]}
        return {"verdict": "plain fails", "reason": _line(error)}
    if refusal is not None:
        return {"verdict": "crash", "reason": f"at construction: {_line(refusal)}"}
    try:
        measured = _measured(made, cls)
    except Exception as error:
        return {"verdict": "crash", "reason": _line(error)}
    faults = [f"{name}: {value}" for name, value in measured.items() if name in FAULTS and FAULTS[name](value)]
    return {"verdict": "wrong" if faults else "works", "reason": "; ".join(faults), **measured}


SAME = ("exact", "to rounding", "as plain")
ROUNDING = 1e-6
"""A few units of float32 after six steps: some plain classes depend on where their tensors lie in memory."""
FAULTS: dict[str, Callable[[Any], bool]] = {
    "constraint": lambda error: not error <= CONSTRAINT,
    "constraint_in_eval": lambda error: not error <= CONSTRAINT,
    "twin": lambda excess: not excess <= 1,
    "resume": lambda outcome: outcome not in SAME,
    "pickle": lambda outcome: outcome not in SAME,
    "exact_at_rate_zero": lambda exact: not exact,
    "exact_after_eval": lambda exact: not exact,
    "rests_without_gradient": lambda rests: not rests,
}
"""What counts as wrong."""


def _measured(made: type[Any], cls: type[Any]) -> dict[str, Any]:
    best, rate, worst = float("inf"), None, 0.0
    start = Problem().gap()
    for lr in RATES if "lr" in inspect.signature(cls.__init__).parameters else RATES[:1]:
        problem, error = Problem(), 0.0
        try:
            optimizer = _made(made, cls, problem, lr)
        except Exception:
            if _raises(lambda lr=lr: _made(cls, cls, Problem(), lr)):
                continue
            raise
        for step in range(STEPS):
            _advance(problem, optimizer, step)
            error = max(error, problem.error()) if error == error else error
        if lr is None or lr <= 0.1:
            worst = error if not error <= worst else worst
        if problem.gap() < best:
            best, rate = problem.gap(), lr
    found = {"rate": rate, "gap": best / start, "constraint": worst}
    narrow = _raises(lambda: _run(cls, cls, Problem(torch.float64), rate, 2))
    found["twin_dtype"] = "float32" if narrow else "float64"
    found["twin_difference"], found["twin"] = _twin(made, cls, rate, torch.float32 if narrow else torch.float64)
    found["resume"] = _compare(_resumed(made, cls, rate), lambda: _resumed(cls, cls, rate))
    found["pickle"] = _compare(_pickled(made, cls, rate), lambda: _pickled(cls, cls, rate))
    found["rests_without_gradient"] = _rests(made, cls, rate)
    if not _raises(lambda: _at_rate_zero(cls, cls)):
        found["exact_at_rate_zero"] = _at_rate_zero(made, cls)
    if callable(getattr(cls, "eval", None)):
        problem = Problem()
        optimizer = _run(made, cls, problem, rate, STEPS)
        before = [p.detach().clone() for p in problem.points]
        optimizer.eval()
        found["constraint_in_eval"], found["gap_in_eval"] = problem.error(), problem.gap() / start
        optimizer.train()
        found["exact_after_eval"] = all(torch.equal(a, b) for a, b in zip(before, problem.points, strict=True))
    return found


def _at_rate_zero(kind: type[Any], cls: type[Any]) -> bool:
    """Whether three steps at rate 0 leave every point as it is, to the bit."""
    problem = Problem()
    optimizer = _made(kind, cls, problem, None)
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise ValueError("no rate to set")
        group["lr"] = 0.0
    before = [p.detach().clone() for p in problem.points]
    for step in range(3):
        _advance(problem, optimizer, step)
    return all(torch.equal(a, b) for a, b in zip(before, problem.points, strict=True))


def _made(kind: type[Any], cls: type[Any], problem: Problem, lr: float | None) -> Any:
    """An optimizer of this kind, ``cls`` or its Riemannian form, in training mode."""
    _seed(0)
    options = dict(ARGUMENTS.get(cls.__name__, {}))
    if lr is not None:
        options["lr"] = lr
    try:
        optimizer = kind(problem.groups(cls.__name__, on_manifolds=kind is not cls), **options)
    except AttributeError:
        optimizer = kind(problem.flat(on_manifolds=kind is not cls), weight_decay=0.0, **options)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def _advance(problem: Problem, optimizer: Any, step: int, **options: Any) -> None:
    problem.backward(**options)
    _seed(step)
    optimizer.step()


def _run(kind: type[Any], cls: type[Any], problem: Problem, lr: float | None, steps: int) -> Any:
    optimizer = _made(kind, cls, problem, lr)
    for step in range(steps):
        _advance(problem, optimizer, step)
    return optimizer


def _raises(call: Callable[[], Any]) -> bool:
    """Whether the plain class fails too."""
    try:
        call()
    except Exception:
        return True
    return False


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def _twin(made: type[Any], cls: type[Any], lr: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference to the twin, and the largest share of what is allowed at a step."""
    ours, theirs, other = Problem(dtype), Problem(dtype), Problem(dtype)
    with torch.no_grad():
        for p in other.parameters:
            p.mul_(1 + torch.finfo(dtype).eps)
    runs: list[tuple[Problem, Any]] = [(ours, _made(made, cls, ours, lr))]
    runs += [(problem, Twin(problem, _made(cls, cls, problem, lr))) for problem in (theirs, other)]
    largest = excess = amplified = 0.0
    for step in range(TWIN_STEPS):
        for problem, optimizer in runs:
            _advance(problem, optimizer, step)
        difference = ours.difference(theirs)
        amplified = max(amplified, other.difference(theirs))
        largest = max(largest, difference)
        share = difference / max(AGREEMENT[dtype], AMPLIFIED * amplified)
        excess = share if not share <= excess else excess
    return largest, excess


def _resumed(kind: type[Any], cls: type[Any], lr: float | None) -> float | str:
    """The difference that saving, loading into a new optimizer and going on makes."""
    straight = Problem()
    optimizer = _run(kind, cls, straight, lr, 6)
    try:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        later = Problem()
        with torch.no_grad():
            for p, q in zip(later.parameters, straight.parameters, strict=True):
                p.copy_(q)
        second = _made(kind, cls, later, lr)
        second.load_state_dict(torch.load(file, weights_only=False))
        if callable(getattr(second, "train", None)):
            second.train()
        return _both(straight, optimizer, later, second)
    except Exception as error:
        return _line(error)


def _pickled(kind: type[Any], cls: type[Any], lr: float | None) -> float | str:
    """The difference that going through pickle makes."""
    straight = Problem()
    optimizer = _made(kind, cls, straight, lr)
    for step in range(6):
        _advance(straight, optimizer, step)
    try:
        second = pickle.loads(pickle.dumps(optimizer))
        later = Problem()
        loaded = [p for group in second.param_groups for p in group["params"]]
        later.points, later.plain = loaded[: len(SHAPES)], loaded[len(SHAPES) :]
        return _both(straight, optimizer, later, second)
    except Exception as error:
        return _line(error)


def _both(straight: Problem, optimizer: Any, later: Problem, second: Any) -> float:
    for step in range(6, 12):
        _advance(straight, optimizer, step)
        _advance(later, second, step)
    return straight.difference(later)


def _compare(ours: float | str, plain: Callable[[], float | str]) -> str:
    """``exact`` or ``to rounding``; ``as plain`` where the plain class is no better; else what happened."""
    if isinstance(ours, float) and ours <= ROUNDING:
        return "exact" if ours == 0.0 else "to rounding"
    theirs = plain()
    if isinstance(theirs, str) or (isinstance(ours, float) and ours <= 10 * theirs):
        return "as plain"
    return ours if isinstance(ours, str) else f"differs by {ours:.1e}, the plain class by {theirs:.1e}"


def _rests(made: type[Any], cls: type[Any], lr: float | None) -> bool:
    """Whether a point without a gradient stays where it is, and the others go on holding the constraint."""
    problem = Problem()
    optimizer = _made(made, cls, problem, lr)
    before = problem.points[1].detach().clone()
    for step in range(3):
        _advance(problem, optimizer, step, without=1)
    rests = torch.equal(before, problem.points[1])
    _advance(problem, optimizer, 3)
    return rests and problem.error() <= CONSTRAINT


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
