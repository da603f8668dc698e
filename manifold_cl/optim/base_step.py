"""The base optimizer's own step, with its state stacked per bucket where it is element-wise, and how to undo it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.layouts import Layout
from manifold_cl.optim.own_bases import OwnBase
from manifold_cl.optim.validation import AVERAGES

ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers of torch.optim whose step treats every entry of a parameter alike, so that B parameters may be one."""
MADE_BY_TORCH = ("step", "_opt_called", "_zero_grad_profile_name")
"""Attributes that torch makes anew: ``step`` where a scheduler counts its calls."""
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
TRAINED, WRITTEN = "riemannian_trained", "riemannian_written"
"""Keys in a point's state: the point before a swap, and what the base optimizer made of it."""
ROUNDING = 256
"""Units of rounding within which values count as those before the swap: schedule-free bases compute their way back."""

State = dict[str, Any]


def is_elementwise(base: type[Optimizer]) -> bool:
    """Whether B parameters may step as one tensor: torch's element-wise optimizers and our own bases."""
    return issubclass(base, OwnBase) or (base.__name__ in ELEMENTWISE and base.__module__.startswith("torch.optim."))


# The state of a bucket ------------------------------------------------------------------------------


class Bank:
    """The states of B parameters, stacked, so that the base optimizer steps once instead of B times.

    ``state`` is the state that the base optimizer sees. Each parameter's own state holds views into it.
    """

    def __init__(self, states: Sequence[State], layout: Layout, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.layout = parameters, layout
        self.state: State = {
            key: _stacked([layout.local(state[key]) for state in states]) if isinstance(value, Tensor) else value
            for key, value in states[0].items()
        }
        self.views: list[State] = list(states)
        self._contents = [dict(view) for view in self.views]
        self._shared: State = {}

    def write_views(self, states: MutableMapping[Tensor, State]) -> None:
        """Give every parameter a state of views, if the base optimizer has made new tensors since the last call."""
        if len(self.state) == len(self._shared) and all(self.state[k] is v for k, v in self._shared.items()):
            return
        self._shared = dict(self.state)
        self.views = [{key: self._view(v, i) for key, v in self.state.items()} for i in range(len(self.parameters))]
        self._contents = [dict(view) for view in self.views]
        states.update(zip(self.parameters, self.views, strict=True))

    def is_current(self, states: Mapping[Tensor, State]) -> bool:
        """Whether these states are the views of this bank: none loaded, dropped, cleared or replaced in part."""
        for p, view, content in zip(self.parameters, self.views, self._contents, strict=True):
            state = states.get(p)
            if state is not view and (state or view):
                return False
            if len(view) != len(content) or any(view.get(key) is not value for key, value in content.items()):
                return False
        return True

    def _view(self, value: Any, i: int) -> Any:
        if not (isinstance(value, Tensor) and value.ndim and value.shape[0] == len(self.parameters)):
            return value
        view, p = value[i], self.parameters[i]
        return self.layout.like(p, view) if view.shape == self.layout.local(p).shape else view


def bank_key(state: Mapping[str, Any] | None) -> Hashable:
    """Equal for states that may share a bank: the same kinds of tensors and the same numbers per parameter."""
    return tuple(sorted((str(key), _kind(value)) for key, value in (state or {}).items()))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{value.dtype} {tuple(value.shape)}"
    if value is None or isinstance(value, Tensor | int | float):
        return str(value if value is None else float(value))
    return f"object {id(value)}"  # shared by no other parameter


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One tensor of all; for a number that is the same for all, a copy, which other banks do not advance."""
    return torch.stack(list(values)) if values[0].ndim else values[0].clone()


# The step -------------------------------------------------------------------------------------------


class BaseStep:
    """Steps a Riemannian ``optimizer`` by its ``base`` class; ``manifolds`` are those of the points."""

    def __init__(self, optimizer: Any, base: type[Optimizer], manifolds: Mapping[Tensor, Any]) -> None:
        self.optimizer, self.base, self.manifolds = optimizer, base, manifolds

    def step(self, buckets: Sequence[tuple[State, Any]], starts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The results y of the base optimizer's own step: of one bucket with a bank, or of all parameters at once.

        ``starts`` are the points x and the gradients g of each bucket; g may be overwritten.
        """
        if len(buckets) == 1 and buckets[0][1].bank is not None:
            ((group, bucket),), ((x, g),) = buckets, starts
            return [self._on_bank(group, bucket.bank, bucket.slab("y").copy_(x), g)]
        slabs = [(bucket, g) for (_, bucket), (_, g) in zip(buckets, starts, strict=True)]
        self.at_once({p: row for bucket, g in slabs for p, row in zip(bucket.parameters, g.unbind(0), strict=True)})
        for bucket, g in slabs:
            bucket.refresh()
            bucket.gather_(g)
        return [g for _, g in slabs]

    def _on_bank(self, group: State, bank: Bank, y: Tensor, g: Tensor) -> Tensor:
        """Step y, all points of a bucket as one tensor, along g."""
        states = self.optimizer.state
        y.grad, states[y] = g, bank.state
        try:
            self.on_parameters({**group, "layout": bank.layout}, [y], weight_decay=0.0)
        finally:
            bank.state = states.pop(y)
            y.grad = None
        bank.write_views(states)
        return y

    def on_parameters(self, group: State, params: Sequence[Tensor], **options: Any) -> None:
        """Step these parameters alone, with the group's options; ``options`` replace those that the group has."""
        options = {key: value for key, value in options.items() if key in group}
        groups, self.optimizer.param_groups = self.optimizer.param_groups, [{**group, **options, "params": params}]
        try:
            self._run()
        finally:
            self.optimizer.param_groups = groups

    def at_once(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """One ordinary step of all groups, with these gradients in place of the points' own.

        Points step without weight decay, which is radial there; those without a gradient stay where they are. A
        gradient that the base optimizer removes stays removed; others are put back.
        """
        points = [p for group in self.optimizer.param_groups for p in group["params"] if p in self.manifolds]
        resting = {p: p.detach().clone() for p in points if p.grad is None}
        raw = {p: p.grad for p in gradients}
        try:
            for p, gradient in gradients.items():
                p.grad = gradient
            with self._points_without_decay():
                self._run()
        finally:
            for p, gradient in gradients.items():
                if p.grad is gradient:
                    p.grad = raw[p]
            for p, x in resting.items():
                p.detach().copy_(x)
        for p in gradients:
            _forget_swap(self.optimizer.state.get(p, {}))

    @contextmanager
    def moments(self, bank: Bank | None, points: Sequence[Tensor], *, carried: bool) -> Iterator[list[Tensor]]:
        """The averages of gradients of these points, (B, …) each, none unless ``carried``; writes to them are kept."""
        if not carried:
            yield []
            return
        if bank is not None:
            yield [bank.state[key] for key in AVERAGES if isinstance(bank.state.get(key), Tensor)]
            return
        states = [self.optimizer.state.get(p, {}) for p in points]
        averages = [
            [state[key] for state in states]
            for key in AVERAGES
            if all(
                isinstance(state.get(key), Tensor) and state[key].shape == p.shape
                for state, p in zip(states, points, strict=True)
            )
        ]
        stacks = [torch.stack(average) for average in averages]
        yield stacks
        for average, stack in zip(averages, stacks, strict=True):
            torch._foreach_copy_(average, list(stack.unbind(0)))

    def _run(self) -> None:
        """One step of the base class on the groups as they are; the user's step hooks do not run."""
        step: Any = self.base.step
        plain = step.__wrapped__ if getattr(step, "hooked", False) else step
        # A base that calls its own parent's step would run the hooks, which torch wraps around each class's step.
        hooks = {name: getattr(self.optimizer, name) for name in HOOKS}
        for name in HOOKS:
            setattr(self.optimizer, name, {})
        try:
            plain(self.optimizer)
        finally:
            for name, kept in hooks.items():
                setattr(self.optimizer, name, kept)

    @contextmanager
    def _points_without_decay(self) -> Iterator[None]:
        """Inside, groups with points have no weight decay; Euclidean parameters beside them are groups of their own."""
        groups: list[State] = self.optimizer.param_groups
        hidden = [
            (group, group["weight_decay"], group["params"])
            for group in groups
            if group.get("weight_decay") and any(p in self.manifolds for p in group["params"])
        ]
        beside: list[tuple[State, State]] = []
        for group, _, params in hidden:
            if rest := [p for p in params if p not in self.manifolds]:
                beside.append((group, {**group, "params": rest}))
                group["params"] = [p for p in params if p in self.manifolds]
            group["weight_decay"] = 0.0
        self.optimizer.param_groups = [*groups, *(other for _, other in beside)]
        try:
            yield
            for group, other in beside:
                for key in (group.keys() | other.keys()) - {"params", "weight_decay"}:
                    if not _equal(group.get(key), other.get(key)):
                        raise ValueError(
                            f"{self.base.__name__} writes {key!r} into a group, and another value for points, which "
                            "step without weight decay, than for other parameters: give these a group of their own"
                        )
        finally:
            self.optimizer.param_groups = groups
            for group, decay, params in hidden:
                group["weight_decay"], group["params"] = decay, params


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


@contextmanager
def undone_on_failure(optimizer: Any, copies: Mapping[Tensor, Tensor], *, completely: bool) -> Iterator[None]:
    """Put parameters back to their ``copies`` if the step inside raises.

    With ``completely``, also the states, the options of groups and the plain numbers of the optimizer.
    """
    groups, state, numbers = [], {}, {}
    if completely:
        groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        numbers = {key: value for key, value in vars(optimizer).items() if isinstance(value, int | float | str)}
    try:
        yield
    except BaseException:
        for p, before in copies.items():
            p.detach().copy_(before)
        if completely:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                for key in group.keys() - options.keys() - {"params"}:
                    del group[key]
                group.update(options)
            vars(optimizer).update(numbers)
        raise


@contextmanager
def unmoved_where(bad: Tensor, params: Sequence[Tensor]) -> Iterator[None]:
    """Where ``bad`` is true, step these parameters with gradients of zero and put them back; without reading it."""
    before, raw = [p.detach().clone() for p in params], [p.grad for p in params]
    for p, grad in zip(params, raw, strict=True):
        p.grad = None if grad is None else torch.where(bad, 0, grad)
    try:
        yield
    finally:
        for p, grad, start in zip(params, raw, before, strict=True):
            p.grad = grad
            p.detach().copy_(torch.where(bad, start, p.detach()))


# Methods that replace parameters outside of a step, such as ``eval()`` of schedule-free optimizers ---------


def swapping_methods(base: type[Optimizer], step: type[Any]) -> dict[str, Callable[..., Any]]:
    """Public methods that ``base`` has beyond those of torch and ``step``, wrapped so that points stay on manifolds.

    Each point that a method writes is replaced by the nearest one. Its state keeps what leads back: the point that was
    trained and the base optimizer's own values.
    """
    wrapped = {}
    for name in dir(base):
        method = inspect.getattr_static(base, name)
        inherited = hasattr(step, name) or hasattr(Optimizer, name)  # zero_grad comes between forward and backward
        if not name.startswith("_") and inspect.isfunction(method) and not inherited:
            wrapped[name] = _retracting(name, method)
    return wrapped


def _retracting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepper = self.__dict__.get("_riemannian")
        if stepper is None or stepper.stepping or not stepper.points.manifolds:
            return method(self, *args, **kwargs)
        stepper.stepping = True
        try:
            with torch.no_grad():
                points = [(p, stepper.points.manifolds[p]) for p in stepper.points.within(self.param_groups)]
                before = [p.detach().clone() for p, _ in points]
                for p, manifold in points:
                    _restore_written(p, manifold, self.state.get(p, {}))
                seen = [p.detach().clone() for p, _ in points]
            back = name == "train" and all((*args, *kwargs.values()))
            try:
                return method(self, *args, **kwargs)
            finally:
                with torch.no_grad():
                    for (p, manifold), start, shown in zip(points, before, seen, strict=True):
                        _put_on_manifold(p, manifold, self.state.get(p, {}), start, shown, back=back)
        finally:
            stepper.stepping = False

    return call


def _restore_written(p: Tensor, manifold: Any, state: State) -> None:
    """Give p the base optimizer's own values back, if it still is the point that was made of them."""
    if WRITTEN in state:
        if torch.equal(p.detach(), _nearest(state[WRITTEN], manifold)):
            p.detach().copy_(state[WRITTEN])
        else:  # another point has been loaded since
            _forget_swap(state)


def _put_on_manifold(p: Tensor, manifold: Any, state: State, start: Tensor, shown: Tensor, *, back: bool) -> None:
    """Put p on its manifold after a method that saw the value ``shown`` and may have written another.

    ``start`` is the point before the call. ``back``: the method leads back to the point that was trained.
    """
    new = p.detach()
    if torch.equal(new, shown):
        new.copy_(start)
    elif TRAINED in state and (back or _near(new, state[TRAINED])):
        new.copy_(state[TRAINED])
        _forget_swap(state)
    else:
        if state:  # base optimizers test for empty states
            state.setdefault(TRAINED, start)
            state[WRITTEN] = new.clone()
        new.copy_(_nearest(new, manifold))


def _forget_swap(state: State) -> None:
    for key in (TRAINED, WRITTEN):
        state.pop(key, None)


def _near(a: Tensor, b: Tensor) -> bool:
    scale = max(1.0, float(b.abs().max()))
    return float((a - b).abs().max()) <= ROUNDING * torch.finfo(a.dtype).eps * scale


def _nearest(values: Tensor, manifold: Any) -> Tensor:
    nearest: Tensor = manifold.projx(values.double()).to(values.dtype)
    return nearest


def plain_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes that a copy or a pickle of an optimizer keeps, beside what torch saves and makes anew."""
    return {k: v for k, v in vars(optimizer).items() if not (k.startswith("_optimizer_") or k in MADE_BY_TORCH)}
