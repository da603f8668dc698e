"""Forward and backward passes with hooks on each layer's inputs and output gradients, without weight gradients."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from manifold_cl.continual.losses import nonfinite_remedy
from manifold_cl.continual.subspaces.shared_inputs import SharedCall, SharedInputs
from manifold_cl.continual.subspaces.statistic import Statistic
from manifold_cl.linalg import full_precision, is_finite
from manifold_cl.lists import listed

PIECE = 2**24
"""Numbers of X and D per call of a statistic: 64 MB in float32, a few percent of a large model's sketches."""

OnNonfinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class PassReport:
    """Batches of a pass over the data.

    Args:
        batches: number of batches.
        skipped: indices of batches that were left out because their loss was not finite.
        excluded: index of a batch → layers for which it was left out because its values there were not finite.
    """

    batches: int = 0
    skipped: tuple[int, ...] = ()
    excluded: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


class _Kept(torch.autograd.Function):
    """Saves a tensor as autograd saves its own: checkpointing recomputes it, and changes in place raise."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:  # pragma: no cover - nothing depends on the output
        return None, None


Take = Callable[[str, Tensor, Tensor, SharedCall | None], None]


@contextmanager
def hooked(layers: Mapping[str, nn.Module], take: Take, *, shared: SharedInputs | None = None) -> Iterator[None]:
    """A context in which every backward pass calls ``take(name, x, d, call)`` for every call of every layer.

    ``call`` is what `SharedInputs.enter` returned for the input in the forward pass; None without ``shared``.

    No weight needs a gradient: where nothing upstream has one, the layer's own output starts the graph. Each output
    keeps its own input, so a layer may be called several times per forward pass. Inputs are saved as autograd saves
    tensors, so gradient checkpointing saves its memory here too. Calls without gradients, as in the first pass of
    re-entrant checkpointing, are ignored.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def on_forward(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # a copy: a leaf cannot be changed in place, as a ReLU does
                output = output.requires_grad_(True).clone()
            x = inputs[0] if inputs else next(iter(named.values()))
            call = None if shared is None else shared.enter(name, x)
            # The tensor is held, not its node alone: a node without a tensor may drop what it has saved.
            kept: Any = _Kept.apply(torch.zeros((), requires_grad=True), x.detach())  # type: ignore[no-untyped-call]

            def on_backward(d: Tensor) -> None:
                try:
                    (x,) = kept.grad_fn.saved_tensors
                except RuntimeError as error:
                    if "inplace" not in str(error):
                        raise
                    raise RuntimeError(
                        f"the input of {name} was changed in place after the call: it cannot be observed"
                    ) from None
                take(name, x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1]), call)

            output.register_hook(on_backward)  # type: ignore[no-untyped-call]
            return output

        return on_forward

    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_hook(hook(name), with_kwargs=True))
        yield


def collect_statistics(
    layers: Mapping[str, nn.Module],
    losses: Iterable[Callable[[], Tensor]],
    statistics: Mapping[str, Statistic],
    *,
    on_nonfinite: OnNonfinite = "raise",
    on_batch: Callable[[int], None] | None = None,
    shared: SharedInputs | None = None,
) -> PassReport:
    """Run every loss forward and backward, and add the tokens to each layer's statistic.

    Args:
        layers: the modules by name.
        losses: one function per batch that returns a 0-d loss with a graph. For a `functools.partial`, an error about
            the loss inspects the batch among its arguments.
        statistics: one per name in ``layers``.
        on_nonfinite: ``"skip"`` leaves out a batch whose loss is not finite, and layers of a batch whose inputs or
            gradients are not; both are in the report.
        on_batch: called with the number of batches so far.
        shared: layers that receive the same input have one statistic, that of the group's first layer, and each token
            counts by the squared gradient norms of all of them. It gets the groups.

    Raises:
        FloatingPointError: for a value that is not finite, with batch and layer, or when skipping leaves no batch.
        ValueError: without any batch, for a batch whose loss has no graph, for layers that no gradient reached, and
            for a layer that shares its input with different layers from call to call.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"on_nonfinite is raise or skip, got {on_nonfinite!r}")
    collector = Collector(statistics, on_nonfinite, shared)
    skipped: list[int] = []
    with uncompiled(), hooked(layers, collector.take, shared=shared), torch.enable_grad():
        for loss in losses:
            collector.begin_batch()
            if not callable(loss):
                raise TypeError(
                    f"batch {collector.batch} is a {type(loss).__name__}, not a function that returns its loss: "
                    "give lambda: LOSS, which the pass calls itself"
                )
            value = loss()
            _validate_loss(value, collector.batch)
            if bool(value.isfinite()):
                value.backward()  # type: ignore[no-untyped-call]
                collector.end_batch()
            elif on_nonfinite == "raise":
                number, parameters = float(value.detach()), nn.ModuleList(layers.values()).parameters()
                remedy = nonfinite_remedy(number, getattr(loss, "args", ()), parameters)
                raise FloatingPointError(
                    f"the loss of batch {collector.batch} became {number} in a pass for statistics: {remedy}, or leave "
                    "the batch out with on_nonfinite='skip'"
                )
            else:
                skipped.append(collector.batch)
            if on_batch is not None:
                on_batch(collector.batch + 1)
    if not (count := collector.batch + 1):
        raise ValueError("there is no batch to collect statistics from: give at least one example")
    if len(skipped) == count:
        raise FloatingPointError(f"no batch of {count} has a finite loss: nothing was collected")
    collector.require_all(layers)
    return PassReport(count, tuple(skipped), collector.excluded)


class Collector:
    """Adds the tokens of every call to the statistics, layer by layer, or group by group where inputs are shared."""

    def __init__(
        self, statistics: Mapping[str, Statistic], on_nonfinite: OnNonfinite, shared: SharedInputs | None
    ) -> None:
        self.batch = -1
        self.excluded: dict[int, tuple[str, ...]] = {}
        self._statistics, self._on_nonfinite, self._shared = statistics, on_nonfinite, shared
        self._calls: Counter[str] = Counter()
        self._waiting: dict[int, SharedCall] = {}

    def begin_batch(self) -> None:
        """Count the batch, and forget what one without a backward pass left."""
        self.batch += 1
        if self._shared is not None:
            self._shared.close()

    def end_batch(self) -> None:
        """Add the calls in which some layers of a group had no gradient."""
        for call in list(self._waiting.values()):
            self._add_call(call)
        self._waiting.clear()

    def take(self, name: str, x: Tensor, d: Tensor, call: SharedCall | None) -> None:
        """The inputs (tokens, n) and output gradients (tokens, m) of one call of one layer."""
        self._calls[name] += 1
        if self._shared is None or call is None:
            self._add([name], x, d)
            return
        if len(self._shared.require_same(name, call, batch=self.batch)) == 1:
            self._add([name], x, d)
            return
        dtype = self._statistics[self._shared.leader(name)].dtype
        self._waiting[id(call)] = call
        if call.add(name, x, d.detach().to(dtype).square().sum(1)):
            self._add_call(self._waiting.pop(id(call)))

    def require_all(self, layers: Iterable[str]) -> None:
        """Raise ValueError for layers that no gradient reached."""
        names = list(layers)
        if missing := [name for name in names if not self._calls[name]]:
            raise ValueError(
                f"no gradient reached {len(missing)} of {len(names)} layers ({listed(missing, 5)}): "
                "the loss does not depend on them, or they were never called; "
                "leave them out of the targets"
            )

    def _add_call(self, call: SharedCall) -> None:
        assert call.x is not None
        assert call.sizes is not None
        self._add(call.layers, call.x, call.sizes.sqrt().unsqueeze(1))  # one column of the same norm as all gradients

    def _add(self, names: Sequence[str], x: Tensor, d: Tensor) -> None:
        statistic = self._statistics[names[0]]
        if not (is_finite(x) and is_finite(d)):
            if self._on_nonfinite == "raise":
                raise FloatingPointError(
                    f"batch {self.batch}: inputs or gradients at {names[0]} are NaN or infinite in a pass for "
                    "statistics: inspect the batch, or leave it out with on_nonfinite='skip'"
                )
            self.excluded[self.batch] = (*self.excluded.get(self.batch, ()), *names)
            return
        rows = max(1, PIECE // (x.shape[1] + d.shape[1]))
        with torch.no_grad(), full_precision(x.device):
            for part, gradient in zip(torch.split(x, rows), torch.split(d, rows), strict=True):
                statistic.add(part.to(statistic.dtype), gradient.to(statistic.dtype))


def uncompiled() -> AbstractContextManager[object]:
    """A context in which compiled models run eagerly: a compiled graph does not call hooks that were added later."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes a second
        return nullcontext()
    return cast(AbstractContextManager[object], torch.compiler.set_stance("force_eager"))


def _validate_loss(value: object, batch: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"batch {batch} has no loss: a tensor with one number is needed, got {got}")
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {batch} depends on none of the layers: they were not called, or without gradients "
            "(re-entrant checkpointing of a frozen model needs model.enable_input_require_grads())"
        )
