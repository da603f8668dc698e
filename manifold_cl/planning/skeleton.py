"""Models without weights: built from a configuration, with adapters, and run once on shapes alone."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from manifold_cl.adapters import Adapter, EBLoRALinear, LoRALinear, inject_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import Targets, target_linears
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.continual.method import Method
from manifold_cl.continual.methods.bases import AdapterMethod, FrameMethod, ProtectingMethod
from manifold_cl.files import is_missing_folder, library_errors
from manifold_cl.planning.live_bytes import LiveBytes, counting_saved

Protected = float | int | Mapping[str, int]
"""Protected directions per layer: a share of its inputs, a number, or a number per layer name."""


def open_config(model: Any) -> Any:
    """The transformers configuration of a model, or in a file, folder or repository.

    Raises:
        TypeError: for a model without one.
        FileError: for a file or folder that transformers cannot read.
    """
    if isinstance(model, str | Path):
        from transformers import AutoConfig

        if is_missing_folder(model) or (Path(model).suffix == ".json" and not Path(model).exists()):
            raise FileNotFoundError(f"{model} does not exist: give a config.json, its folder, or a model's name")
        with library_errors(model, "transformers"):
            return AutoConfig.from_pretrained(str(model))
    config = getattr(model, "config", model)
    if not hasattr(config, "model_type"):
        raise TypeError(
            f"a plan needs a transformers model, its configuration or a path to one, got {type(model).__name__}"
        )
    return copy.deepcopy(config)  # transformers writes a precision into the configuration that it builds from


def make_skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration on the meta device, in evaluation mode and frozen."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        auto = AutoModelForImageTextToText
        if type(config) not in auto._model_mapping:
            raise ValueError(f"a plan is for models that generate text, and {config.model_type!r} is none")
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return cast(nn.Module, model.eval().requires_grad_(False))


def protected_counts(layers: Mapping[str, nn.Module], protected: Protected, *, rank: int) -> dict[str, int]:
    """Protected directions of each layer, at most what the rank leaves.

    Raises:
        ValueError: for a share outside [0, 1), a negative number, or a layer without an entry.
    """
    counts = {}
    for name, layer in layers.items():
        n = sides(layer)[1]
        if isinstance(protected, Mapping) and name not in protected:
            raise ValueError(f"protected has no entry for {name}: give one for every adapted layer, 0 for none")
        given = protected[name] if isinstance(protected, Mapping) else protected
        if not given >= 0 or (isinstance(given, float) and given >= 1):  # NaN is neither
            raise ValueError(f"protected={given} is no share in [0, 1) and no number of directions")
        counts[name] = min(int(given * n) if isinstance(given, float) else given, n - rank)
    return counts


def add_adapters(
    model: nn.Module, targets: Targets, method: Method, protected: Protected
) -> tuple[dict[str, Adapter], dict[str, int]]:
    """Inject the method's adapters on the meta device; the adapters, and the protected directions per layer.

    Raises:
        ValueError: for a method that trains no adapters.
    """
    if not isinstance(method, AdapterMethod):
        raise ValueError(f"a plan is for methods that train adapters, and {method.name!r} trains none")
    layers = target_linears(model, targets)
    counts, rank = dict.fromkeys(layers, 0), method.first_rank(layers)
    if isinstance(method, ProtectingMethod):
        counts = protected_counts(layers, protected, rank=method.rank)

    def make(name: str, layer: nn.Module) -> Adapter:
        if not isinstance(method, FrameMethod):
            return LoRALinear(layer, rank, alpha=method.alpha)
        framed = EBLoRALinear(layer, method.rank, core=method.core, alpha=method.alpha)
        if counts[name]:
            framed.right_manifold.complement = torch.zeros(sides(layer)[1], counts[name], device="meta")
        return framed

    adapters = inject_adapters(model, targets, make)
    if method.frozen_inputs:
        for adapter in adapters.values():
            adapter.right.requires_grad_(False)
    return adapters, counts


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one forward and backward pass beside weights and gradients of parameters.

    ``saved`` are held for the backward pass; ``peak`` is the most that exists at once. ``shared`` groups the names of
    layers that receive the same tensor as input.
    """

    saved: int
    peak: int
    shared: list[list[str]]


def run_on_shapes(
    model: nn.Module, layers: Mapping[str, nn.Module], *, batch: int, tokens: int, checkpointing: Sequence[bool]
) -> list[PassBytes]:
    """Run the loss forward and backward on tensors without memory, as of a batch with padding.

    One result per entry of ``checkpointing``, which cannot be switched off again.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        return [measure_pass(model, inputs, layers, checkpointing=wanted) for wanted in checkpointing]


def measure_pass(
    model: nn.Module, inputs: Mapping[str, Tensor], layers: Mapping[str, nn.Module], *, checkpointing: bool
) -> PassBytes:
    """Bytes of one forward and backward pass of a transformers model; gradients are dropped as they arrive."""
    _set_checkpointing(model, checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks: list[Any] = []
    for p in trained:
        hooks.append(p.register_post_accumulate_grad_hook(_drop_gradient))  # type: ignore[no-untyped-call]
    readers: list[tuple[weakref.ref[Tensor], list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        if not readers or readers[-1][0]() is not x:
            readers.append((weakref.ref(x), []))
        readers[-1][1].append(name)

    hooks += [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    try:
        with LiveBytes(known) as live:
            with counting_saved(known) as saved:
                loss = model(**inputs, use_cache=False).loss
            kept = saved.nbytes
            saved.clear()
            shared = [names for _, names in readers]
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return PassBytes(kept, live.peak, shared)


def _set_checkpointing(model: nn.Module, wanted: bool) -> None:
    given: Any = model
    model.train()
    if wanted:
        checkpoint_activations(model)
        given.enable_input_require_grads()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
