"""Members of a collection: the adapters of a folder, and what of the folder is left out, with the reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.agreement import layer_differences, matched_layers
from analysis.formats import Shape, Source, matching_names
from analysis.names import listed, natural_key

SETS = ("tasks.json", "record.json", "adapter_config.json", "adapter.json", "adapter.safetensors")
"""Files that make a folder one set of adapters, which is read as such."""
TENSORS = (".safetensors", ".bin", ".pt", ".pth")


class Omission(NamedTuple):
    """A part of the folder that is no member, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter of a collection."""

    name: str
    source: Source


def find_members(paths: Sequence[Path], options: Mapping[str, Any]) -> tuple[list[Member], list[Omission]]:
    """The adapters at `paths`, or in a single folder; `options` are those of `AdapterSet.load`.

    An adapter that cannot be read is left out with its error, and the others are read.
    """
    members: list[Member] = []
    left_out: list[Omission] = []
    # one search for the pattern instead of one per member; differences of checkpoints need it when they are made
    pattern = options["layers"] if options["base"] is None else None
    options = options if pattern is None else {**options, "layers": None}
    picked: dict[tuple[str, ...], list[str]] = {}
    tables: list[Tables] = []
    for name, path in _candidates(paths, left_out):
        try:
            sources = AdapterSet.load(path, **options).sources
            if pattern is not None:
                sources = tuple(_picked(source, pattern, picked) for source in sources)
        except (ValueError, OSError) as error:
            left_out.append(Omission(name, str(error)))
            continue
        for source in sources:
            source = _sharing(source, tables)
            members.append(Member(name if len(sources) == 1 else f"{name}/{source.task}", source))
    return members, left_out


Tables = tuple[Mapping[str, Shape], Mapping[str, object] | None]
"""Shapes of a source, and its names of tensors where it has them."""


def _sharing(source: Source, tables: list[Tables]) -> Source:
    """The source with the tables of an earlier member where they are equal: hundreds of copies take 100 MB."""
    own: Tables = (source.shapes, getattr(source, "layers", None))
    known = next((each for each in tables if each == own), own)
    if known is own:
        tables.append(own)
        return source
    changes: dict[str, Any] = {"shapes": known[0]} | ({} if known[1] is None else {"layers": known[1]})
    return replace(source, **changes)


def _picked(source: Source, pattern: str, picked: dict[tuple[str, ...], list[str]]) -> Source:
    """The update of the layers that the pattern finds; `picked` keeps what it found of each set of layers."""
    names = tuple(source.shapes)
    if names not in picked:
        picked[names] = matching_names(pattern, list(names))
    if not picked[names]:
        raise ValueError(f"layers={pattern!r} finds none of {len(names)} layers, such as {listed(list(names))}")
    return source.picked(picked[names])


def _candidates(paths: Sequence[Path], left_out: list[Omission]) -> Iterable[tuple[str, Path]]:
    """Name and path of everything that may be an adapter."""
    if len(paths) > 1 or not paths[0].is_dir() or any((paths[0] / name).exists() for name in SETS):
        return list(zip(_distinct(paths), paths, strict=True))
    children = [child for child in paths[0].iterdir() if not child.name.startswith(".")]
    children.sort(key=lambda child: natural_key(child.name))
    others = [child.name for child in children if not (child.is_dir() or child.suffix in TENSORS)]
    if others:
        left_out.append(Omission(listed(others), "no folder, and no file of tensors"))
    return [(child.name, child) for child in children if child.is_dir() or child.suffix in TENSORS]


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The last components of the paths, as many as make them differ."""
    parts = [path.absolute().parts for path in paths]
    count = 1
    while len({part[-count:] for part in parts}) < len(parts) and count < max(map(len, parts)):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


def narrowed(source: Source, layers: Sequence[str]) -> Source:
    """The update of some layers only, small enough to be sent to another process."""
    source = replace(source.picked(layers), notices=(), left_out=())
    stored = getattr(source, "layers", None)
    return source if stored is None else replace(source, layers={layer: stored[layer] for layer in layers})  # type: ignore[call-arg]


def agreeing(
    members: Sequence[Member], left_out: list[Omission], *, common: bool
) -> tuple[list[Member], tuple[str, ...], list[str]]:
    """The members that share layers, the names of these layers, and notices.

    The reference is the most frequent set of layers and shapes. Members without one of its layers are left out; with
    `common`, only the layers of all members that share any are read.
    """
    keys = [frozenset((layer, *shape[:2]) for layer, shape in each.source.shapes.items()) for each in members]
    ((usual, _),) = Counter(keys).most_common(1)
    first = members[keys.index(usual)].source
    kept: list[Member] = []
    surplus: list[str] = []
    for member, key in zip(members, keys, strict=True):
        source = member.source
        if key != usual and (names := matched_layers(first, source)):
            source = source.relabelled(names, "layers have other names than in most members")
        differing = layer_differences(first, source) if key != usual else []
        lacking = [layer for layer, shape in first.shapes.items() if source.shapes.get(layer, ())[:2] != shape[:2]]
        if lacking and (not common or len(lacking) == len(first.shapes)):
            which = f"differs from most members in {len(differing)} layers: {listed(differing, 3, '; ')}"
            remedy = "" if common else " (common=True reads only the layers of all members)"
            left_out.append(Omission(member.name, f"{which}{remedy}"))
            continue
        if differing and not lacking:
            surplus.append(member.name)
        kept.append(replace(member, source=source))
    sources = [member.source.shapes for member in kept]
    layers = tuple(
        layer
        for layer, shape in first.shapes.items()
        if all(other.get(layer, ())[:2] == shape[:2] for other in sources)
    )
    if not layers:
        raise ValueError("no layer is common to all members: read them in groups")
    return kept, layers, _notices(kept, surplus, len(first.shapes) - len(layers))


def _notices(members: Sequence[Member], surplus: Sequence[str], omitted: int) -> list[str]:
    notices = [f"{member.name}: {notice}" for member in members for notice in member.source.notices]
    for member in members:
        if parts := member.source.left_out:
            first = f"{parts[0].tensor or parts[0].file}: {parts[0].reason}"
            notices.append(f"{member.name}: {len(parts)} parts of its files are not read, the first is {first}")
    if surplus:
        notices.append(f"layers that most members lack are not read in {listed(surplus)}")
    if omitted:
        notices.append(f"{omitted} layers are not those of all members, so left out")
    bases = Counter(member.source.base for member in members if member.source.base)
    if len(bases) > 1:
        counts = ", ".join(f"{base} ({count})" for base, count in bases.most_common(4))
        notices.append(f"the members name {len(bases)} base models, and are compared all the same: {counts}")
    return notices
