"""Second moments of layers' inputs, kept in the coordinates of updates: small whatever the width of a layer."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analysis.activations.calls import Forward, call_model, evaluating, example_count
from analysis.adapters.adapter_set import AdapterSet
from analysis.names import matched_names

Inputs = nn.Linear | nn.Embedding


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Second moments of layers' inputs x on some data, in the coordinates ``Rᵀx`` of the updates' right factors.

    R (n, R) holds the right factors of all tasks side by side. The moments suffice for the effect of any update of
    the form ``A Rᵀ`` on the layer's outputs, ``Σ |A Rᵀ x|²``, and take R² numbers where a covariance takes n².
    Examples are divided among groups, so that intervals follow from resampling groups.
    """

    blocks: Mapping[str, Tensor]
    """Layer to (groups, R, R), float64: sums over tokens of ``(Rᵀx)(Rᵀx)ᵀ``."""
    energies: Mapping[str, Tensor]
    """Layer to (groups,): sums over tokens of ``|x|²``."""
    outputs: Mapping[str, Tensor]
    """Layer to (groups,): sums over tokens of ``|W x|²``, W the model's own weight, without the bias."""
    counts: Mapping[str, Tensor]
    """Layer to (groups,): numbers of tokens."""
    columns: Mapping[str, Mapping[str, slice]]
    """Task to layer to the update's columns of R."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Layer without moments to the reason."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with moments."""
        return tuple(self.blocks)

    def block(self, layer: str, task: str, other: str | None = None) -> Tensor:
        """(groups, r, r'): sums over tokens of ``(R_taskᵀ x)(R_otherᵀ x)ᵀ``; `other` is `task` if not given."""
        rows, columns = self.columns[task][layer], self.columns[task if other is None else other][layer]
        return self.blocks[layer][:, rows, columns]

    def change(self, layer: str, task: str, left: Tensor) -> Tensor:
        """(groups,): sums over tokens of ``|A R_taskᵀ x|²`` for A = `left` (m, r).

        With the update's own left factor, and divided by `outputs`, it is the relative functional drift of the layer.
        """
        core = left.double().mT @ left.double()
        return (self.block(layer, task) * core).sum((-2, -1)).clamp(min=0.0)


@torch.no_grad()
def input_moments(
    model: nn.Module,
    adapters: AdapterSet,
    batches: Iterable[Any],
    *,
    groups: int = 32,
    forward: Forward | None = None,
    progress: Callable[[int], None] | None = None,
) -> InputMoments:
    """The moments of the inputs of all adapted layers, from forward passes of the model with its present weights.

    Positions where a batch's ``attention_mask`` (examples, tokens) is 0 do not count. Layers are found by name, also
    where a vision-language model has another name for them. Layers that are no linear layer or embedding of the
    model, and those that no batch reaches, are in `left_out`.

    Args:
        model: any torch model; it holds the base weights.
        adapters: the updates.
        batches: what `forward` takes: a tensor, a mapping of keywords, or a tuple of arguments.
        groups: example i belongs to group ``i % groups``; empty groups are not returned.
        forward: (model, batch) to outputs; by default the model is called with the batch.
        progress: called with the number of finished batches.

    Raises:
        ValueError: no layer has moments, an input does not fit its update, or padding cannot be told from tokens.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> adapters = AdapterSet.from_factors({"a": {"0": (torch.ones(1, 1), torch.tensor([[1.0], [0.0]]))}})
    >>> moments = input_moments(model, adapters, [torch.tensor([[3.0, 4.0], [1.0, 0.0]])])
    >>> moments.block("0", "a").flatten().tolist(), moments.energies["0"].tolist()  # two examples, two groups
    ([9.0, 1.0], [25.0, 1.0])
    """
    if groups < 1:
        raise ValueError(f"groups is {groups}, at least 1 was expected")
    modules, left_out = _adapted(model, adapters.layers)
    sums = {layer: _Sums(layer, adapters, module, groups) for layer, module in modules.items()}
    place = _Place(groups)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer, module in modules.items():
            add = partial(sums[layer].add, place)
            stack.callback(module.register_forward_hook(add, with_kwargs=True).remove)
        for done, batch in enumerate(batches, start=1):
            place.enter(batch)
            (forward or call_model)(model, batch)
            if progress is not None:
                progress(done)
    left_out |= {layer: "no batch reached it" for layer, each in sums.items() if not each.counts.any()}
    kept = {layer: each for layer, each in sums.items() if layer not in left_out}
    if not kept:
        layer, reason = next(iter(left_out.items()))
        raise ValueError(f"none of {len(left_out)} layers has inputs to measure; {layer}: {reason}")
    used = torch.stack([each.counts > 0 for each in kept.values()]).any(0).cpu()
    return InputMoments(
        blocks={layer: each.blocks.cpu()[used] for layer, each in kept.items()},
        energies={layer: each.energies.cpu()[used] for layer, each in kept.items()},
        outputs={layer: each.outputs.cpu()[used] for layer, each in kept.items()},
        counts={layer: each.counts.cpu()[used] for layer, each in kept.items()},
        columns=_columns(adapters),
        left_out=left_out,
    )


def _adapted(model: nn.Module, layers: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layer to its module, and layers without one, or with one of another kind, to the reason."""
    named = dict(model.named_modules())
    names = matched_names(layers, named)
    modules = {layer: named[names[layer]] for layer in layers if layer in names}
    left_out = {layer: "no module of the model has this name" for layer in layers if layer not in names}
    for layer, module in modules.items():
        linear = isinstance(module, Inputs) or type(module).__name__.startswith(("Conv1D", "Linear"))
        if not linear:
            left_out[layer] = f"a {type(module).__name__} is no linear layer and no embedding"
    return {layer: module for layer, module in modules.items() if layer not in left_out}, left_out


def _columns(adapters: AdapterSet) -> dict[str, dict[str, slice]]:
    columns: dict[str, dict[str, slice]] = {task: {} for task in adapters.tasks}
    for layer in adapters.layers:
        start = 0
        for task in adapters.tasks:
            rank = adapters.shape(task, layer)[2]
            columns[task][layer] = slice(start, start + rank)
            start += rank
    return columns


class _Place:
    """Examples, groups and padding of the batch that the model is called with."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.first = 0
        """Number of examples in earlier batches."""
        self.size = 0
        self.mask: Tensor | None = None

    def enter(self, batch: Any) -> None:
        """Begin the next batch."""
        self.first += self.size
        self.size = example_count(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def by_example(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """The rows of an input by example (examples, tokens, ...), and which of them count (examples, tokens).

        Rows that were rearranged, such as those of an expert, count as one example: the first of the batch.
        """
        mask, size = self.mask, self.size
        if x.shape[0] != size and mask is not None and x.shape[0] == mask.numel():
            x = x.reshape(*mask.shape, *x.shape[1:])
        if x.shape[0] != size:
            if mask is not None and not mask.all():
                raise ValueError(
                    f"{layer} receives {x.shape[0]} rows for {size} examples, some of them padding: "
                    "give batches without padding, such as one example each"
                )
            x = x[None]
        tokens = x.shape[1:-1].numel()
        x = x.reshape(x.shape[0], tokens, x.shape[-1])
        if mask is not None and mask.shape == x.shape[:2]:
            return x, mask.to(x.device)
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def group_of(self, examples: int, device: torch.device) -> Tensor:
        """The group of each example."""
        return (self.first + torch.arange(examples, device=device)) % self.groups


class _Sums:
    """The sums of one layer; a forward hook adds to them."""

    def __init__(self, layer: str, adapters: AdapterSet, module: nn.Module, groups: int) -> None:
        self.layer = layer
        device = next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        self.right = torch.cat([adapters.factors(task, layer)[1] for task in adapters.tasks], dim=1).to(device)
        width = self.right.shape[1]
        kind: Any = {"dtype": torch.float64, "device": device}
        self.blocks = torch.zeros(groups, width, width, **kind)
        self.energies, self.outputs, self.counts = (torch.zeros(groups, **kind) for _ in range(3))

    def add(self, place: _Place, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        """Add the inputs and outputs of one call."""
        x = next(iter((*inputs, *named.values()))).detach()
        embedding = isinstance(module, nn.Embedding)
        x, counted = place.by_example(x[..., None] if embedding else x, self.layer)
        if not embedding and x.shape[-1] != self.right.shape[0]:
            raise ValueError(f"{self.layer} has inputs of width {x.shape[-1]}, its update has {self.right.shape[0]}")
        group = place.group_of(x.shape[0], x.device)
        projected = self.right[x[..., 0]] if embedding else x.to(self.right) @ self.right
        projected = (projected * counted[..., None]).double()
        tokens = counted.double()
        squares = tokens if embedding else (x.to(self.right).square().sum(-1) * counted).double()
        bias = getattr(module, "bias", None)
        y = (out.detach() if bias is None else out.detach() - bias).to(self.right)
        y = y.reshape(*x.shape[:2], -1).square().sum(-1) * counted
        self.blocks.index_add_(0, group, projected.mT @ projected)
        for sums, values in ((self.energies, squares), (self.outputs, y.double()), (self.counts, tokens)):
            sums.index_add_(0, group, values.sum(1))
