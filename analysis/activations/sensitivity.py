"""Effects of an update's rank-one components on a loss, to first order, example by example."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analysis.activations.calls import evaluating, example_count
from analysis.adapters.adapter_set import AdapterSet
from analysis.names import matched_names
from analysis.numerics.decomposition import triples

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) to one loss per example (examples,)."""


def component_effects(
    model: nn.Module, adapters: AdapterSet, task: str, batches: Iterable[Any], *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Layer to (examples, r): ``σ_i ∂L/∂σ_i`` of each component of a task's update, of every example's loss L.

    The model holds the base weights, and computes with the update added. To first order, the loss changes by
    ``ε σ_i ∂L/∂σ_i`` where σ_i grows by the share ε, and falls by ``σ_i ∂L/∂σ_i`` where the component is removed. The
    size of this number is the sensitivity of AdaLoRA (zhang2023adalora, eq. 8) for singular values.

    Args:
        model: any torch model.
        adapters: the updates.
        task: whose update is measured.
        batches: what `loss` takes.
        loss: by default the mean cross-entropy of each example's labels: those of a causal language model (examples,
            tokens), or classes (examples,), from a batch with ``labels``.

    Raises:
        ValueError: no layer is a module of the model, there is no batch, or a batch has no labels.
    """
    measured = loss or label_losses
    collected: dict[str, list[Tensor]] = {}
    with evaluating(model), _components(model, adapters, task) as gates:
        for batch in batches:
            size = example_count(batch)
            for gate in gates.values():
                gate.open(size)
            with torch.enable_grad():
                losses = measured(model, batch)
                sizes = [gate.sizes for gate in gates.values()]
                slopes = torch.autograd.grad(losses.sum(), sizes, allow_unused=True)
            for (layer, gate), slope in zip(gates.items(), slopes, strict=True):
                effect = torch.zeros_like(gate.sizes) if slope is None else slope * gate.sizes
                collected.setdefault(layer, []).append(effect.detach().flatten(1).double().cpu())
    if not collected:
        raise ValueError("no batches: sensitivities need at least one")
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


@torch.no_grad()
def example_losses(
    model: nn.Module, adapters: AdapterSet, task: str, batches: Iterable[Any], *, loss: Loss | None = None
) -> Tensor:
    """Losses (examples,) of the model with a task's update added to its layers' outputs; weights stay as they are.

    Arguments and errors are those of `component_effects`.
    """
    losses: list[Tensor] = []
    with evaluating(model), _components(model, adapters, task) as gates:
        for batch in batches:
            for gate in gates.values():
                gate.open(example_count(batch))
            losses.append((loss or label_losses)(model, batch).double().cpu())
    if not losses:
        raise ValueError("no batches: losses need at least one")
    return torch.cat(losses)


def label_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each example's labels (examples,); negative labels do not count."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError("a batch has no 'labels', so there is no loss: give loss=, or examples with answers")
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
    if labels.ndim == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
    each = nn.functional.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")
    counted = labels >= 0
    return (each * counted).sum(-1) / counted.sum(-1).clamp(min=1)


class _Gate:
    """One layer's update as components with sizes of their own per example."""

    def __init__(self, left: Tensor, right: Tensor, device: torch.device) -> None:
        update = triples(left.double()[None], right.double()[None])
        self.u, self.v = (side[0].float().to(device) for side in (update.left, update.right))
        self.sigma = update.values[0].float().to(device)
        self.sizes = self.sigma

    def open(self, examples: int) -> None:
        """Begin a batch."""
        self.sizes = self.sigma.expand(examples, 1, -1).clone().requires_grad_()

    def add(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], out: Tensor) -> Tensor:
        """The layer's output with the update, as a forward hook."""
        x = next(iter((*inputs, *named.values())))
        inner = self.v[x] if isinstance(module, nn.Embedding) else x.to(self.v) @ self.v
        examples = self.sizes.shape[0]
        rows = inner.reshape(examples, -1, inner.shape[-1])
        return out + ((rows * self.sizes) @ self.u.mT).reshape(out.shape).to(out)


@contextmanager
def _components(model: nn.Module, adapters: AdapterSet, task: str) -> Iterator[dict[str, _Gate]]:
    """Adds the update of a task to the outputs of its layers; yields the gates of the components."""
    modules = dict(model.named_modules())
    names = matched_names(adapters.layers, modules)
    if missing := [layer for layer in adapters.layers if layer not in names]:
        raise ValueError(
            f"{len(missing)} of {len(adapters.layers)} layers are no modules of the model, such as {missing[0]}: "
            "the loss would be that of another update. Give the model that was adapted, or leave them out (layers=)"
        )
    gates: dict[str, _Gate] = {}
    with ExitStack() as stack:
        for layer, name in names.items():
            module = modules[name]
            device = next((each.device for each in module.parameters()), torch.device("cpu"))
            gates[layer] = _Gate(*adapters.factors(task, layer), device)
            stack.callback(module.register_forward_hook(gates[layer].add, with_kwargs=True).remove)
        yield gates
