"""Updates added to a model's layers by hooks, without a change of its weights."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from analysis.activations.calls import evaluating
from analysis.adapters.adapter_set import AdapterSet
from analysis.names import matched_names


class AddedUpdates:
    """Adds the first `count` updates of a sequence to the outputs of a model's layers, or `only` one of them.

    A layer's output becomes ``y + Σ left (rightᵀ x)``, so quantised weights and weights of any precision stay as they
    are, and ``count = 0`` is the base model. Factors are kept in float32 on the layers' devices.
    """

    def __init__(self, model: nn.Module, adapters: AdapterSet) -> None:
        """Raise ValueError for a layer that is no module of the model, or of another shape or kind."""
        self.count = 0
        self.only: int | None = None
        """The index of the one update that is added; with None the first `count` are."""
        self._model = model
        self._modules = adapted_modules(model, adapters)
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self._modules}
        for _, layer, left, right in adapters:
            device = next(self._modules[layer].parameters()).device
            self._factors[layer].append((left.to(device), right.to(device)))

    @contextmanager
    def attached(self) -> Iterator["AddedUpdates"]:
        """Hooks on the model while the block runs; the model is in evaluation mode, and back in its own afterwards."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            for layer, module in self._modules.items():
                stack.callback(module.register_forward_hook(partial(self._add, layer), with_kwargs=True).remove)
            yield self

    def _add(
        self, layer: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        x = next(iter((*inputs, *named.values())))
        factors = self._factors[layer]
        for left, right in factors[: self.count] if self.only is None else factors[self.only : self.only + 1]:
            inner = right[x] if isinstance(module, nn.Embedding) else x.to(right.dtype) @ right
            output = output + (inner @ left.mT).to(output.dtype)
        return output


def adapted_modules(model: nn.Module, adapters: AdapterSet) -> dict[str, nn.Module]:
    """Layer name of the adapters to the model's module, also where versions of transformers name it differently.

    Raises:
        ValueError: a layer is no module of the model, or the module is no Linear, Conv1D or Embedding of its shape.
    """
    named = dict(model.named_modules())
    names = matched_names(adapters.layers, named)
    if missing := [layer for layer in adapters.layers if layer not in names]:
        raise ValueError(
            f"{len(missing)} of {len(adapters.layers)} layers are no modules of the model, the first is {missing[0]}; "
            f"its modules are called like {next((name for name in reversed(named) if name), 'nothing')}: "
            "give the model that was adapted"
        )
    modules = {layer: named[names[layer]] for layer in adapters.layers}
    for layer, module in modules.items():
        m, n, _ = adapters.shape(adapters.tasks[0], layer)
        if (sizes := _sizes(module)) != (m, n):
            kind = type(module).__name__
            has = f"a {kind}" if sizes is None else f"a {kind} with {sizes[1]} inputs and {sizes[0]} outputs"
            raise ValueError(f"{layer}: the update has {n} inputs and {m} outputs, the model has {has} there")
    return modules


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Outputs and inputs of a module, None for other kinds than Linear, Conv1D and Embedding."""
    if isinstance(module, nn.Linear):  # not the shape of its weight: quantised ones are packed
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if type(module).__name__ == "Conv1D":
        inputs, outputs = module.get_parameter("weight").shape
        return outputs, inputs
    return None
