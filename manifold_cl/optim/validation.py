"""The options of the step, and everything from outside that is validated before a step changes anything."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import geoopt
import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.kinds import is_whole
from manifold_cl.rules import described, validate_number

Group = dict[str, Any]

STEP_RULES: Mapping[str, Mapping[str, Any]] = {
    "corrected": {"metric_pre": "euclidean", "tangent_post": "orthogonal", "step_scale": "none"},
    "official": {"metric_pre": "canonical", "tangent_post": "double", "step_scale": "official"},
}
"""Values of ``step_rule`` (docs/optimizers.md, "Options of the step"); ``"official"`` has deviations 1 and 2."""
DEFAULTS: Mapping[str, Any] = {
    **STEP_RULES["corrected"],
    "reference_width": 4096,
    "moments": "ambient",
    "polish_every": 0,
    "nonfinite": "refuse",
}
"""Every option of the step with its default; groups of old checkpoints are completed from here."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "metric_pre": ("none", "euclidean", "canonical"),
    "tangent_post": ("orthogonal", "double", "none"),
    "step_scale": ("none", "width", "official"),
    "moments": ("ambient", "transport"),
    "nonfinite": ("refuse", "skip"),
}
FLAGS = {"differentiable": "the step reads parameters outside autograd"}
VALIDATED = (*DEFAULTS, *FLAGS, "capturable", "step_rule")
"""Keys of a group that are validated when one of them changes."""
AVERAGES = ("exp_avg", "momentum_buffer")
"""Names of averages of gradients in optimizer states: vectors at the point, which a transport carries. The ``grad_avg``
of a centred RMSprop belongs to a variance and stays."""
WITHOUT_VECTORS = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Rprop")
"""Optimizers that keep no average of gradients, so that there is nothing to transport."""
FLATTENED = "an engine that flattens parameters (FSDP1, DeepSpeed ZeRO) does not fit; use DDP or FSDP2"

# Options ----------------------------------------------------------------------------------------------


def with_step_rule(options: Mapping[str, Any]) -> Group:
    """The options with ``step_rule`` replaced by the three that it stands for; those that are given beside it win."""
    if "step_rule" not in options:
        return dict(options)
    if (rule := options["step_rule"]) not in STEP_RULES:
        raise ValueError(f"step_rule is one of {', '.join(STEP_RULES)}, got {rule!r}")
    return {**STEP_RULES[rule], **{key: value for key, value in options.items() if key != "step_rule"}}


TEXT = "convert it with float(); YAML reads 1e-3 as a text, and 1.0e-3 as a number"
"""What to do about a rate that is a text, which is most likely of a YAML file."""


def listed_params(optimizer: type[Optimizer], params: Any) -> Tensor | list[Any]:
    """The parameters or groups as a list, a tensor as it is; TypeError for a model in their place."""
    if isinstance(params, nn.Module):
        name = optimizer.__name__
        raise TypeError(f"{name} takes parameters, got {described(params)}: give {name}(param_groups(model, lr=...))")
    return params if isinstance(params, Tensor) else list(params)


def with_rate_of_groups(
    base: type[Optimizer], params: Tensor | Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Group:
    """``kwargs`` for ``base``, with the first group's ``lr`` where all groups have one and none is given."""
    rates = [group["lr"] for group in params if isinstance(group, dict) and "lr" in group]
    for rate in (*rates, *([kwargs["lr"]] if "lr" in kwargs else [])):
        _refuse_text("lr", rate)
    takes_it = "lr" in inspect.signature(base.__init__).parameters
    if rates and len(rates) == len(params) and not args and takes_it:
        return {"lr": rates[0], **kwargs}
    return dict(kwargs)


def validate_rate(name: str, value: Any) -> None:
    """Refuse a rate of another kind, below 0 or not finite; a tensor, and None for a base that has its own, pass."""
    if value is None or isinstance(value, Tensor):
        return
    _refuse_text(name, value)
    validate_number(name, value, least=0)


def _refuse_text(name: str, rate: Any) -> None:
    if isinstance(rate, str):
        raise TypeError(f"{name} is a number, got {rate!r}, a text: {TEXT}")


def rate_of(group: Mapping[str, Any]) -> float | None:
    """The learning rate, 1 for a base that computes its own; None where reading it would wait for a device.

    Raises:
        ValueError: where it is not finite.
    """
    if (lr := group.get("lr")) is None:
        return 1.0
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return None
    if not math.isfinite(lr):
        raise ValueError(f"lr is {lr} in a group: nothing was changed; set a finite learning rate")
    return float(lr)


def scale_of(group: Mapping[str, Any], n: int, p: int) -> float:
    """Factor on the displacement: 1, sqrt(c / n) as in li2025stella, or sqrt(c / p) as released (deviation 1)."""
    width = group["reference_width"]
    side: int = {"none": width, "width": n, "official": p}[group["step_scale"]]
    return math.sqrt(width / side)


def validate_group(group: Mapping[str, Any], base: type[Optimizer]) -> None:
    """Refuse an unknown choice, an impossible number, or a flag of torch that the step cannot honour.

    Options that an own base has, and the group gives, are validated too.
    """
    own: Mapping[str, tuple[str, ...]] = getattr(base, "CHOICES", {})
    for flag, reason in FLAGS.items():
        if group.get(flag):
            raise ValueError(f"{flag}=True is not supported: {reason}")
    if group.get("capturable") and group["nonfinite"] != "skip":
        raise ValueError("capturable=True cannot refuse a step, since the host does not see it: pass nonfinite='skip'")
    if "step_rule" in group:
        raise ValueError("step_rule is an option at construction: set metric_pre, tangent_post and step_scale instead")
    for option, choices in {**CHOICES, **{key: own[key] for key in own if key in group}}.items():
        if group[option] not in choices:
            raise ValueError(f"{option} is one of {', '.join(choices)}, got {group[option]!r}")
    every, width = group["polish_every"], group["reference_width"]
    if not is_whole(every) or every < 0:
        raise ValueError(f"polish_every is a number of steps, 0 for never, got {every!r}")
    if not width > 0:
        raise ValueError(f"reference_width is a positive width, got {width!r}")
    if group["moments"] == "transport" and base.__name__ in WITHOUT_VECTORS:
        raise ValueError(f"moments='transport' has nothing to carry in {base.__name__}, which averages no gradients")


def validate_groups(groups: Sequence[Group], base: type[Optimizer], validated: list[list[Any]]) -> list[list[Any]]:
    """Validate the groups, unless their options are those that were ``validated`` last; returns the options."""
    keys = (*VALIDATED, *getattr(base, "CHOICES", ()))
    options = [[group.get(key) for key in keys] for group in groups]
    if options != validated:
        for group in groups:
            validate_group(group, base)
            if group.get("direction") == "spel" and "direction" in keys and group["tangent_post"] != "none":
                raise ValueError("direction='spel' goes to the nearest point: set tangent_post='none' in its group too")
    return options


def validate_state(
    groups: Sequence[Group], state_dict: Mapping[str, Any], base: type[Optimizer], *, shapes: bool
) -> None:
    """Refuse a saved state that belongs to other parameters, naming what differs, or that has impossible options.

    ``shapes``: tensors of a parameter's state have its shape, as in element-wise optimizers; others keep
    preconditioners of any shape.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the state has {len(saved)} parameter groups, this optimizer {len(groups)}")
    for i, (there, here) in enumerate(zip(saved, groups, strict=True)):
        name = f"group {i} ({here.get('role', 'no role')})"
        validate_group({**DEFAULTS, **there}, base)
        for key in ("role", "manifold"):
            if there.get(key) != here.get(key):
                raise ValueError(f"{name}: {key} is {there.get(key)!r} in the state and {here.get(key)!r} here")
        if len(there["params"]) != len(here["params"]):
            raise ValueError(f"{name}: {len(there['params'])} parameters in the state and {len(here['params'])} here")
        for index, p in zip(there["params"], here["params"], strict=True) if shapes else ():
            for key, value in state_dict["state"].get(index, {}).items():
                # Numbers and one-per-matrix moments have shapes of their own.
                like_p = isinstance(value, Tensor) and value.ndim == p.ndim and 1 not in value.shape[-2:]
                if like_p and p.ndim and value.shape != p.shape:
                    raise ValueError(
                        f"{name}, parameter {index}: {key} has shape {tuple(value.shape)} in the state, "
                        f"the parameter {tuple(p.shape)} here"
                    )


# Parameters -------------------------------------------------------------------------------------------


def validate_not_flattened(p: Tensor) -> None:
    """Refuse what FSDP1 and DeepSpeed ZeRO make of a matrix."""
    if getattr(p, "_is_flat_param", False) or hasattr(p, "ds_id"):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} holds pieces of several matrices: {FLATTENED}")


def validate_point(p: Tensor, manifold: Any) -> None:
    """Refuse a parameter that cannot be a point of ``manifold``: flattened, of a wrong shape or dtype."""
    validate_not_flattened(p)
    if p.ndim < 2 and isinstance(manifold, RestrictedStiefel):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} cannot lie on {kind_of(manifold)}: {FLATTENED}")
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a point on {kind_of(manifold)} is kept in float32 or float64, got {p.dtype}: rounding alone costs "
            "1e-3 of orthonormality; keep the factors in float32 and let autocast handle the products"
        )
    ok, reason = manifold._check_shape(tuple(p.shape), "parameter")
    if not ok:
        raise ValueError(str(reason))


def validate_direction(group: Mapping[str, Any], manifolds: Iterable[Any], base: type[Optimizer]) -> None:
    """Refuse points of other manifolds where the direction of the group is made for orthonormal columns."""
    direction = group.get("direction") if "direction" in getattr(base, "CHOICES", ()) else None
    for manifold in manifolds if direction not in (None, "projected") else ():
        if not isinstance(manifold, geoopt.Stiefel):  # ours are registered there
            raise TypeError(
                f"direction={direction!r} is computed at orthonormal columns, which points of {kind_of(manifold)} do "
                "not have: pass direction='projected' for their group, or use RiemannianAdamW"
            )


def validate_before_step(p: Tensor, manifold: Any) -> None:
    """Refuse a point that an engine has changed since construction, or whose gradient is sparse."""
    if p.ndim < 2 or hasattr(p, "ds_id") or p.dtype not in (torch.float32, torch.float64):
        validate_point(p, manifold)
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise TypeError(
            f"a point of shape {tuple(p.shape)} got a gradient of layout {p.grad.layout}: every entry of an "
            "orthonormal matrix moves, so it needs a dense gradient (nn.Embedding(sparse=False))"
        )


def validate_distinct(params: Sequence[Tensor]) -> None:
    """Refuse a parameter that a group lists twice: it would step twice."""
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        if (first := seen.setdefault(id(p), i)) != i:
            twice = f"is listed twice in a group, at {first} and {i}"
            raise ValueError(f"one parameter of shape {tuple(p.shape)} {twice}: a point steps once")


# Base optimizers --------------------------------------------------------------------------------------

TWICE = "it evaluates the loss several times inside one step, each time at a point off the manifold"
OTHERS = (
    "it takes the steps of another optimizer: make that one Riemannian and wrap the result; a wrapper that writes to "
    "no parameter itself then sets keeps_manifolds = True, and one that averages points leaves their manifolds"
)
REFUSED = {
    **dict.fromkeys(("LBFGS", "SAMWrapper"), TWICE),
    **dict.fromkeys(
        ("AdaHessian", "Adahessian", "SophiaH"),
        "it differentiates the gradient, and the Riemannian gradient has no graph",
    ),
    "SparseAdam": "a point of a manifold has no sparse gradient",
    "AliG": "its step length comes from the loss, which it evaluates itself",
}
LARGEST = 16
"""Rows and columns of the parameters that a trial step is taken on, at most."""


def validate_base(base: type[Optimizer]) -> None:
    """Refuse a class that cannot be made Riemannian, by its name or its methods, with the reason."""
    arguments = list(inspect.signature(base.__init__).parameters)[1:]
    closure = inspect.signature(base.step).parameters.get("closure")
    clash = sorted(set(arguments) & {*DEFAULTS, "step_rule"})
    reasons = [REFUSED[parent.__name__] for parent in base.__mro__ if parent.__name__ in REFUSED]
    if hasattr(base, "first_step") and hasattr(base, "second_step"):
        reasons.append(TWICE)
    if closure is not None and closure.default is inspect.Parameter.empty:
        reasons.append(f"its step needs a closure: {TWICE}")
    if arguments and arguments[0] in ("optimizer", "base_optimizer", "optimizers"):
        reasons.append(OTHERS)
    if getattr(base, "keeps_manifolds", False):
        reasons.append("it keeps points on manifolds already: pass its base class")
    if issubclass(base, OptimMixin):
        reasons.append(
            "it is geoopt's, and keeps points on manifolds itself: use it as it is, on geoopt.ManifoldParameter"
        )
    if clash:
        reasons.append(f"its option {clash[0]!r} has the name of one of the Riemannian step")
    if reasons:
        raise TypeError(f"{base.__name__} cannot be made Riemannian: {reasons[0]}")


def try_steps(
    base: type[Optimizer], groups: Sequence[Group], args: Sequence[Any], kwargs: Mapping[str, Any], *, flat: bool
) -> None:
    """Take two steps of the base class on small parameters of the same kinds, so that it fails here or not at all.

    Random state of torch and Python is left as it was. ``args`` and ``kwargs`` are those of the constructor after the
    parameters; ``flat``: it got parameters, not groups.
    """
    if any(p.device.type == "meta" for group in groups for p in group["params"]):
        return
    with _isolated(groups):
        trials = [
            {k: _stand_ins(v) if k == "params" else copy.deepcopy(v) for k, v in group.items() if k != "param_names"}
            for group in groups
        ]
        params = [p for group in trials for p in group["params"]]
        try:
            options = {name: _own(value) for name, value in kwargs.items()}
            trial: Any = base(params if flat else trials, *map(_own, args), **options)
            if callable(getattr(trial, "train", None)):
                trial.train()
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                trial.step()
            states = [state for state in trial.state.values() if isinstance(state, Mapping)]  # some hold a bare tensor
            averaged = any(key in state for state in states for key in AVERAGES)
        except Exception as error:
            raise TypeError(
                f"{base.__name__} cannot be made Riemannian: an ordinary step, without closure and on gradients "
                f"without a graph, raises {type(error).__name__}: {error}"
            ) from error
    if not averaged and any(group["moments"] == "transport" for group in groups):
        raise ValueError(
            f"moments='transport' has nothing to carry: the state of {base.__name__} has none of "
            f"{', '.join(map(repr, AVERAGES))}; leave moments out"
        )


@contextlib.contextmanager
def _isolated(groups: Sequence[Group]) -> Iterator[None]:
    """Inside, nothing is compiled, printed or warned of; random states are put back."""
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


def _stand_ins(params: Sequence[Tensor]) -> list[Tensor]:
    """A small parameter for each number of dimensions, dtype and device among these."""
    kinds = {(p.ndim, p.dtype, p.device): p for p in params if p.numel()}
    return [
        torch.randn([min(side, LARGEST) for side in p.shape], dtype=p.dtype, device=p.device).requires_grad_()
        for p in kinds.values()
    ]


def _own(value: Any) -> Any:
    """A copy that the trial may change; models are too large to copy and are handed on."""
    return value if isinstance(value, torch.nn.Module) else copy.deepcopy(value)
