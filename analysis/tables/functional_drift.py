"""Outputs of a model with and without updates, and the second moments of its layers' inputs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.activations.calls import Forward, call_model, evaluating, named_modules
from analysis.adapters.adapter_set import AdapterSet


@torch.no_grad()
def input_covariances(
    model: nn.Module, layers: Iterable[str], batches: Iterable[Any], *, forward: Forward | None = None
) -> dict[str, Tensor]:
    """Layer name to ``E[x xᵀ]`` (n, n) of the inputs of the model's modules, float64, over all positions.

    Raises:
        ValueError: a layer is no module of the model, or no batch reached it.
    """
    modules = named_modules(model, layers)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(iter((*inputs, *named.values()))).detach().flatten(0, -2).double()
        sums[name] = sums.get(name, 0.0) + x.mT @ x
        counts[name] += x.shape[0]

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(add, name), with_kwargs=True).remove)
        for batch in batches:
            (forward or call_model)(model, batch)
    if silent := [name for name, count in counts.items() if count == 0]:
        raise ValueError(f"no batch reached {silent[0]}: no batches, or a module that the model does not call")
    return {name: sums[name] / counts[name] for name in modules}


@torch.no_grad()
def functional_drift(
    model: nn.Module,
    adapters: AdapterSet,
    batches: Mapping[str, Sequence[Any]],
    *,
    update: str = "task",
    forward: Forward | None = None,
) -> pd.DataFrame:
    """Tidy task, data, metric, value: the effect of updates on a model's outputs.

    The model holds the base weights. For every task its update (``"task"``), or the sum of all up to it
    (``"accumulated"``), is added, and outputs are compared with those of the base model: ``kl``, ``logit_rms`` and
    ``top1_change`` of docs/analysis.md, "Interference". Weights are put back bit by bit, also after an error.

    Args:
        model: any torch model in which every layer of `adapters` is a module with a ``weight``.
        adapters: the updates.
        batches: name to a list of batches; what `forward` takes.
        update: ``"task"`` or ``"accumulated"``.
        forward: (model, batch) to outputs (..., classes); by default the model is called with the batch, its
            mapping's keywords or its tuple's items, and ``.logits`` is taken where there is one.

    Raises:
        ValueError: a layer is missing or of another shape, or there are no batches.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> _ = nn.init.zeros_(model[0].weight)  # both answers have probability 1/2
    >>> to_three = AdapterSet.from_factors({"a": {"0": (torch.tensor([[3.0], [1.0]]).log(), torch.ones(1, 1))}})
    >>> table = functional_drift(model, to_three, {"data": [torch.ones(5, 1)]})  # 3/4 and 1/4
    >>> [round(value, 4) for value in table["value"]]  # ln(4/3) / 2, ln 3 / √2, the same answer
    [0.1438, 0.7768, 0.0]
    """
    if update not in ("task", "accumulated"):
        raise ValueError(f"update is {update!r}, choose 'task' or 'accumulated'")
    if not batches or not all(map(len, batches.values())):
        raise ValueError("functional_drift needs at least one batch under every name")
    modules = named_modules(model, adapters.layers)
    for layer, module in modules.items():
        _is_transposed(layer, module, adapters.shape(adapters.tasks[0], layer)[:2])
    run = forward or call_model
    saved = {layer: module.get_parameter("weight").detach().clone() for layer, module in modules.items()}
    rows: list[tuple[str, str, str, float]] = []
    try:
        with evaluating(model):
            before = {name: [run(model, batch).float() for batch in data] for name, data in batches.items()}
            for task in adapters.tasks:
                if update == "task":
                    _restore(modules, saved)
                for _, layer, left, right in adapters.read(task, adapters.layers):
                    weight = modules[layer].get_parameter("weight")
                    change = (left @ right.mT).to(weight.device)
                    transposed = _is_transposed(layer, modules[layer], tuple(change.shape))
                    weight.copy_(weight.float() + (change.mT if transposed else change))
                for name, data in batches.items():
                    after = [run(model, batch).float() for batch in data]
                    rows += [(task, name, metric, value) for metric, value in _drift(before[name], after).items()]
    finally:
        _restore(modules, saved)
    return pd.DataFrame(rows, columns=["task", "data", "metric", "value"])


def _drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    old, new = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double() for parts in (before, after))
    log_old, log_new = old.log_softmax(-1), new.log_softmax(-1)
    return {
        # rounding can leave −1e-17 where nothing changed
        "kl": max(0.0, (log_old.exp() * (log_old - log_new)).sum(-1).mean().item()),
        "logit_rms": (new - old).square().mean().sqrt().item(),
        "top1_change": (new.argmax(-1) != old.argmax(-1)).double().mean().item(),
    }


def _is_transposed(layer: str, module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the module stores its weight as (inputs, outputs), as transformers' Conv1D does."""
    weight = getattr(module, "weight", None)
    own = tuple(weight.shape) if isinstance(weight, Tensor) else None
    transposed = type(module).__name__ == "Conv1D" or own != shape
    if own != (shape[::-1] if transposed else shape):
        raise ValueError(f"{layer}: the update is {shape}, the module's weight is {own}")
    return transposed


def _restore(modules: Mapping[str, nn.Module], saved: Mapping[str, Tensor]) -> None:
    for layer, module in modules.items():
        module.get_parameter("weight").copy_(saved[layer])
