"""The start of adapters that are in a model already: along the gradient of the task that they will learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from manifold_cl.adapters.adapter_geometry import eblora_layers
from manifold_cl.adapters.frames import FrameLayer
from manifold_cl.adapters.layers import require_linear
from manifold_cl.continual.losses import task_losses
from manifold_cl.continual.subspaces import Passes, leading_directions
from manifold_cl.continual.task import Task
from manifold_cl.geometry import ProtectedSubspace, RestrictedStiefel


def start_from_task(
    model: nn.Module,
    task: Task | Iterable[Any],
    *,
    examples: int = 160,
    batch_size: int = 16,
    seed: int = 0,
    passes: Passes | None = None,
    adapter: str | None = None,
) -> None:
    """Point the frames of EBLoRA adapters along the task's gradient, outside what they protect.

    The start of the method `EBLoRA`, for adapters of PEFT or `inject_adapters`. The gradient is that of the model
    without the adapter. Protect first, start second, then make the optimizer.

    Args:
        model: with adapters, in wrappers of PEFT or torch.compile or not.
        task: a task or its batches, as in `task_losses`.
        examples: number of training examples, at least one batch.
        batch_size: examples per batch of a task.
        seed: of the draw of examples, and of the test matrices unless ``passes`` is given.
        passes: options of the pass over the data.
        adapter: name of the adapter; the active one by default.

    Raises:
        ValueError: for a model without EBLoRA adapters, no data, or layers that no gradient reaches.
        TypeError: for batches that are no dictionaries of tensors.
    """
    adapters = eblora_layers(model)
    if not adapters:
        raise ValueError("the model has no EBLoRA adapters to start: use inject_adapters or get_peft_model first")
    names = {name: adapter or layer.active()[0] for name, layer in adapters.items()}
    points = {name: list(layer.points(names[name])) for name, layer in adapters.items()}
    ranks = {name: right.shape[-1] for name, (_, (_, right, _)) in points.items()}
    protected = {name: _protected(right, manifold) for name, (_, (_, right, manifold)) in points.items()}
    layers = {name: require_linear(name, layer) for name, layer in adapters.items()}
    losses = task_losses(model, task, examples=examples, batch_size=batch_size, seed=seed)
    with _without_update(adapters, names):
        starts = leading_directions(layers, losses, max(ranks.values()), protected, passes=passes or Passes(seed=seed))
    for name, layer in adapters.items():
        left, _, right = starts[name]
        layer.point_along(left[:, : ranks[name]], right[:, : ranks[name]], adapter=names[name])


@contextmanager
def _without_update(adapters: dict[str, FrameLayer], names: dict[str, str]) -> Iterator[None]:
    """A context in which the adapters of these names change nothing, and may be passed through before they start."""
    scales = [
        scale
        for name, layer in adapters.items()
        for key, scale in layer.scale_parameters()
        if key in ("scale", f"eblora_scale.{names[name]}") and not _is_compensated(layer, names[name])
    ]
    kept = [scale.detach().clone() for scale in scales]
    due = {name: layer.starts_due for name, layer in adapters.items()}
    try:
        for layer in adapters.values():
            layer.starts_due = frozenset()
        for scale in scales:
            scale.detach().zero_()
        yield
    finally:
        for scale, value in zip(scales, kept, strict=True):
            scale.detach().copy_(value)
        for name, layer in adapters.items():
            layer.starts_due = due[name]


def _is_compensated(layer: FrameLayer, adapter: str) -> bool:
    """Whether a new adapter changes nothing as it is: its start is subtracted."""
    return bool(getattr(layer, "compensated", False)) or adapter in getattr(layer, "eblora_start", ())


def _protected(frame: Tensor, manifold: RestrictedStiefel) -> ProtectedSubspace:
    """What a frame avoids, without the columns of zeros that fill up a basis."""
    basis = manifold.complement
    if basis is None:
        return ProtectedSubspace.empty(len(frame), device=frame.device)
    return ProtectedSubspace(basis[:, (basis != 0).any(dim=0)])
