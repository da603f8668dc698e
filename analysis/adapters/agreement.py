"""Agreement of the tasks of a set: their names, layers, shapes and base models."""

from collections.abc import Mapping, Sequence

from analysis.formats import Located, Shape, Source
from analysis.names import common_name, listed, matched_names

_QKV = (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("query", "key", "value"))
FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("qkv", "qkv_proj", "to_qkv", "Wqkv", "c_attn", "in_proj"), _QKV),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}
"""Last component of a layer that computes several outputs, one block after the other, to names of the blocks."""


def distinct_names(located: Sequence[Located]) -> list[str]:
    """Names of the tasks. Folders of one name in different places take the names of the folders around them too."""
    names = [adapter.source.task for adapter in located]
    for name in {name for name in names if names.count(name) > 1}:
        paths = [adapter.path.absolute() for adapter in located if adapter.source.task == name]
        if len(set(paths)) < len(paths) or any(name not in (path.name, path.stem) for path in paths):
            continue  # the same folder twice, or names that the files themselves give
        count = 2
        while len({path.parts[-count:] for path in paths}) < len(paths):
            count += 1
        longer = iter("/".join([*path.parts[-count:-1], name]) for path in paths)
        names = [next(longer) if present == name else present for present in names]
    return names


def matched_layers(first: Source, other: Source) -> dict[str, str] | None:
    """The first source's name of each layer to the other's; None where all names agree."""
    matches = matched_names(other.shapes, first.shapes)
    if all(own == name for own, name in matches.items()):
        return None
    own_names = {name: own for own, name in matches.items()}
    common = {name: own_names[name] for name in first.shapes if name in own_names}
    return common | {own: own for own in other.shapes if own not in matches}


def split_layers(located: Sequence[Located]) -> list[Source]:
    """The updates, with queries, keys and values split in all tasks where they are split in one.

    Updates with protected bases stay as they are: the bases have the names of their layers.
    """
    sources = [each.source for each in located]
    fused = [[layer for layer in source.shapes if layer.rpartition(".")[2] in FUSED] for source in sources]
    if not any(fused) or all(source.shapes.keys() == sources[0].shapes.keys() for source in sources):
        return sources
    others = {common_name(layer): shape for source in reversed(sources) for layer, shape in source.shapes.items()}
    for position, (source, layers) in enumerate(zip(sources, fused, strict=True)):
        blocks = {layer: parts for layer in layers if (parts := _blocks(layer, source.shapes[layer], others))}
        if located[position].memory is None and blocks and not source.parameters:
            sources[position] = source.split(blocks)
    return sources


def _blocks(layer: str, shape: Shape, others: Mapping[str, Shape]) -> list[tuple[str, int]]:
    """Names and outputs of the blocks of a layer's rows, if layers of other tasks fit; empty otherwise."""
    parent, _, last = layer.rpartition(".")
    m, n, _ = shape
    for parts in FUSED[last]:
        names = [f"{parent}.{part}" if parent else part for part in parts]
        found = [others[key] for key in map(common_name, names) if key in others]
        if len(found) == len(parts) and {each[1] for each in found} == {n} and sum(each[0] for each in found) == m:
            return [(name, each[0]) for name, each in zip(names, found, strict=True)]
    return []


def layer_differences(first: Source, other: Source) -> list[str]:
    """The differences between the layers of two tasks, one phrase per layer."""
    ours, theirs = first.shapes, other.shapes
    differences = []
    for layer in dict.fromkeys([*ours, *theirs]):
        if layer not in ours or layer not in theirs:
            differences.append(f"{layer} is in {(first if layer in ours else other).task!r} only")
        elif ours[layer][:2] != theirs[layer][:2]:
            (m, n), (k, j) = ours[layer][:2], theirs[layer][:2]
            differences.append(f"{layer} is {m} × {n} in {first.task!r} and {k} × {j} in {other.task!r}")
    return differences


def validate_bases(sources: Sequence[Source]) -> None:
    """Raise if adapters were made for different base models."""
    bases = {source.base: source.task for source in sources if source.base and source.kind != "dense"}
    if len(bases) > 1:
        differences = "; ".join(f"{task!r} on {base}" for base, task in bases.items())
        differences += " (common=True reads them all the same)"
        raise ValueError(f"the adapters belong to different base models: {differences}")


def shared_layers(sources: Sequence[Source]) -> list[Source]:
    """The sources restricted to the layers that agree in all of them."""
    shapes = [source.shapes for source in sources]
    layers = tuple(
        layer for layer, shape in shapes[0].items() if all(other.get(layer, ())[:2] == shape[:2] for other in shapes)
    )
    if not layers:
        raise ValueError(f"no layer is shared by all of {', '.join(source.task for source in sources)}")
    restricted = []
    for source in sources:
        lone = [layer for layer in source.shapes if layer not in set(layers)]
        notice = [f"{len(lone)} layers are not those of all tasks, so left out: {listed(lone)}"] if lone else []
        restricted.append(source.picked(layers, *notice, reason="not a layer of all tasks"))
    return restricted
