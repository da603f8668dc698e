"""Optimizers that cannot be made Riemannian: found by name, by their methods, or by a trial step."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.optim.options import DEFAULTS, Group

TWICE = "it evaluates the loss several times inside one step, each time at a point off the manifold"
GRAPH = "it differentiates the gradient, and the Riemannian gradient has no graph"
OTHERS = (
    "it takes the steps of another optimizer: make that one Riemannian and wrap the result; a wrapper that writes to "
    "no parameter itself then sets keeps_manifolds = True"
)
REFUSED = {
    "LBFGS": TWICE,
    "SparseAdam": "a point of a manifold has no sparse gradient",
    "Muon": "it orthogonalises the step itself, which makes its length meaningless on a Stiefel manifold",
    "AliG": "its step length comes from the loss, which it evaluates itself",
    "AdaHessian": GRAPH,
    "Adahessian": GRAPH,
    "SophiaH": GRAPH,
    "SAMWrapper": TWICE,
}
LARGEST = 16
"""Rows and columns of the parameters that a trial step is taken on, at most."""


def refuse_base(base: type[Optimizer]) -> None:
    """Refuse a class that does not fit by its name or its methods.

    Raises:
        TypeError: with the reason.
    """
    for parent in base.__mro__:
        if parent.__name__ in REFUSED:
            _refuse(base, REFUSED[parent.__name__])
    if hasattr(base, "first_step") and hasattr(base, "second_step"):
        _refuse(base, TWICE)
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        _refuse(base, f"its step needs a closure: {TWICE}")
    arguments = list(inspect.signature(base.__init__).parameters)[1:]
    if arguments and arguments[0] in ("optimizer", "base_optimizer", "optimizers"):
        _refuse(base, OTHERS)
    if clash := sorted(set(arguments) & set(DEFAULTS)):
        _refuse(base, f"its option {clash[0]!r} has the name of one of the Riemannian step")


def try_steps(
    base: type[Optimizer], groups: Sequence[Group], args: Sequence[Any], kwargs: Mapping[str, Any], *, flat: bool
) -> None:
    """Take two steps of the base class on small parameters of the same kinds, so that it fails here or not at all.

    Random state of torch and Python is left as it was.

    Args:
        base: the class.
        groups: of the optimizer that was made.
        args: what its constructor was given after the parameters.
        kwargs: the same, by name.
        flat: whether it was given parameters, not groups.

    Raises:
        TypeError: naming the class and what its step raised.
    """
    if any(p.device.type == "meta" for group in groups for p in group["params"]):
        return
    with _apart(groups):
        stand_ins = [{**_options(group), "params": _stand_ins(group["params"])} for group in groups]
        params = [p for group in stand_ins for p in group["params"]]
        try:
            trial: Any = base(
                params if flat else stand_ins, *map(_own, args), **{name: _own(value) for name, value in kwargs.items()}
            )
            if callable(getattr(trial, "train", None)):
                trial.train()
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                trial.step()
        except Exception as error:
            raise TypeError(
                f"{base.__name__} cannot be made Riemannian: an ordinary step, without closure and on gradients "
                f"without a graph, raises {type(error).__name__}: {error}"
            ) from error


@contextlib.contextmanager
def _apart(groups: Sequence[Group]) -> Iterator[None]:
    """Inside, nothing is compiled, printed or warned of, and random draws are put back."""
    devices = {p.device.index for group in groups for p in group["params"] if p.device.type == "cuda"}
    python = random.getstate()
    try:
        with (
            torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)),
            torch.compiler.set_stance("force_eager"),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)


def _options(group: Group) -> Group:
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}


def _stand_ins(params: Sequence[Tensor]) -> list[Tensor]:
    """A small parameter for each number of dimensions, dtype and device among these."""
    kinds = {(p.ndim, p.dtype, p.device): [min(side, LARGEST) for side in p.shape] for p in params if p.numel()}
    return [
        torch.randn(sides, dtype=dtype, device=device).requires_grad_() for (_, dtype, device), sides in kinds.items()
    ]


def _own(value: Any) -> Any:
    """A copy that the trial may change; models are too large to copy and are handed on."""
    return value if isinstance(value, torch.nn.Module) else copy.deepcopy(value)


def _refuse(base: type[Optimizer], reason: str) -> None:
    raise TypeError(f"{base.__name__} cannot be made Riemannian: {reason}")
