"""Protected subspaces of a PEFT model's adapters, by the names that the base model gives its layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from manifold_cl.adapters.eblora import Protected
from manifold_cl.adapters.layers import named_layers, shells
from manifold_cl.adapters.named import NamedAdapters
from manifold_cl.geometry import RestrictedStiefel


def eblora_layers(model: nn.Module) -> dict[str, NamedAdapters]:
    """The tuner's layers, by the name of the module they replaced in the base model, compiled or not."""
    found = ((name, part) for name, layer in named_layers(model).items() for part in shells(layer))
    return {name: part for name, part in found if isinstance(part, NamedAdapters)}


def protect(
    model: nn.Module, memory: Mapping[str, Protected] | None = None, *,
    output_memory: Mapping[str, Protected] | None = None, adapter: str | None = None, strict: bool = True,
) -> None:  # fmt: skip
    """Keep an adapter off protected subspaces, such as a `SubspaceMemory`, by name of module in the base model.

    An optimizer that exists already steps on the new manifolds. A side that is not given stays as it is.

    Args:
        model: with the tuner's layers.
        memory: name → protected input subspace; None as a subspace leaves the layer free.
        output_memory: the same for output sides.
        adapter: which one; by default the first active one.
        strict: refuse a memory that lacks adapted layers; otherwise these stay as they are.

    Raises:
        ValueError: for a name that is no adapted layer, for adapted layers without an entry, and where no room is left
            for the rank, with the layer. Nothing is changed then.
    """
    layers = {n: layer for n, layer in eblora_layers(model).items() if (adapter or layer.acting()[:1])
              and (adapter is None or adapter in layer.r)}  # fmt: skip
    given = [mapping for mapping in (memory, output_memory) if mapping is not None]
    if strangers := sorted({name for mapping in given for name in mapping} - layers.keys()):
        raise ValueError(f"no adapted layer {strangers[0]!r}; there are {', '.join(list(layers)[:3])}, …")
    lacking = [name for mapping in given for name in layers if name not in mapping]
    if strict and lacking:
        raise ValueError(
            f"the memory has no entry for {len(lacking)} adapted layers, which would be free: "
            f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}. Grow the memory over all adapted layers, or "
            "pass strict=False"
        )
    prepared = []
    for name, layer in layers.items():
        sides = [
            mapping[name] if mapping is not None and name in mapping else _kept(manifold)
            for mapping, manifold in zip((memory, output_memory), layer.manifolds(adapter or layer.acting()[0])[::-1],
                                         strict=True)
        ]  # fmt: skip
        if not any(name in mapping for mapping in given):
            continue
        try:
            prepared.append(layer.prepared_protection(*sides, adapter=adapter))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for carry_out in prepared:
        carry_out()


def _kept(manifold: RestrictedStiefel) -> Tensor | None:
    """The subspace that a manifold protects, without zero columns."""
    basis = manifold.complement
    return None if basis is None or not manifold.k else basis[:, basis.detach().abs().sum(0) > 0]
