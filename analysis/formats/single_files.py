"""LoRA files without a configuration beside them: ``lora_down`` and ``lora_up``, or ``lora_A`` and ``lora_B``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.formats.base_updates import dora_adapter
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import NUMBERS, TensorFile, open_file, parse_json, stored_shapes
from analysis.formats.lycoris import is_lycoris, read_lycoris
from analysis.formats.peft_config import lora_scalings, validate_lora
from analysis.formats.sources import LayerTensors, LeftOut, Source, StoredAdapter, kernels_of, shapes_of
from analysis.formats.tensor_names import adapter_contents, adapter_names, has_own_rule, stored_layers
from analysis.names import listed, natural_key

METADATA = "lora_adapter_metadata"
"""Key of a safetensors header under which diffusers keeps PEFT's configuration."""
_PAIRS = ({"left", "wide_right"}, {"embedding_left", "embedding_wide_right"})
"""Parts of a layer that is read."""
_BIASES = (".bias", ".diff_b", ".w_norm", ".b_norm")
"""Ends of tensors that are no part of an update: biases, and differences of biases and norms."""
_PARTS = "lora_down.weight, lora_up.weight, alpha (or lora_A.weight, lora_B.weight, alpha)"


def holds_factors(path: Path) -> bool:
    """Whether a file holds an adapter, of a method that is read or of one that is refused by name."""
    return any(adapter_contents(name) is not None for name in stored_shapes(path))


def read_single(path: Path, *, alpha: float | str | None = None, base: Checkpoint | None = None) -> Source:
    """The update in one file, ``(alpha / r) up down`` for each layer; kernels are flattened to matrices.

    Beside ``lora_A`` and ``lora_B``, tensors that belong to no method of adapters are named in the notices, as those
    of a PEFT folder. All other tensors of a file would be part of the update, so the file is refused. Files of
    LyCORIS are those of `read_lycoris`; these and DoRA's magnitudes may need `base`.

    Without tensors ``alpha``, the scalings are those of the PEFT configuration that diffusers writes into the
    file's header. Without one, `alpha` is used: a number, or ``"rank"`` for the scripts' own reading (scaling 1).
    ValueError if alpha is missing and not given.
    """
    if is_lycoris(path):
        return read_lycoris(path, base=base, alpha=alpha)
    stored = stored_shapes(path)
    if len(names := adapter_names(stored)) > 1:
        raise ValueError(f"{path} holds several adapters, {listed(names)}: save each of them to a file of its own")
    found = {
        layer: (method, *stored_layer)
        for method in ("kohya", "lora", "diffusers")
        for layer, stored_layer in stored_layers(path, stored, method).items()
        if stored_layer.parts.keys() - {"magnitude"} in _PAIRS
    }
    methods = {method for method, _, _ in found.values()}
    left_out = _left_out(path, stored, found, full=methods == {"lora"})
    scalings, notices = _scalings(path, stored, [stem for _, stem, _ in found.values()], alpha)
    layers: dict[str, LayerTensors] = {}
    for layer, (_, stem, parts) in sorted(found.items(), key=lambda item: natural_key(item[1][1])):
        parts = {part.removeprefix("embedding_"): name for part, name in parts.items()}
        scaling, own = scalings[stem]
        layers[layer] = LayerTensors.find(path, stored, parts, scaling=scaling, alpha=own, kernels=True)
    adapter = StoredAdapter(
        task=path.stem,
        kind="kohya" if "kohya" in methods else "lora",
        shapes=shapes_of(layers),
        kernels=kernels_of(layers, stored),
        embeddings=frozenset(layer for layer, (_, _, parts) in found.items() if "embedding_left" in parts),
        path=path,
        layers=layers,
    )
    adapter = replace(adapter, transposed=adapter.embeddings)
    magnitudes = {layer: parts["magnitude"] for layer, (_, _, parts) in found.items() if "magnitude" in parts}
    return _decomposed(adapter, magnitudes, stored, base).noting([*notices, *_notices(left_out)], left_out)


def _left_out(
    path: Path,
    stored: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[str, str, Mapping[str, str]]],
    full: bool,
) -> list[LeftOut]:
    """The tensors that are not read, each with its reason; ValueError for those that would be part of the update."""
    read = {name for _, stem, parts in found.values() for name in (*parts.values(), f"{stem}.alpha")}
    left_out, others = [], []
    for name in sorted(stored.keys() - read, key=natural_key):
        if len(stored[name]) <= 1 and name.endswith(_BIASES):
            left_out.append(LeftOut(str(path), name, "bias or norm"))
        elif full and adapter_contents(name) is None and not name.endswith(".alpha"):
            left_out.append(LeftOut(str(path), name, "saved in full beside the factors"))
        else:
            others.append(name)
    if others:
        holds = next((f" holds {contents}" for name in others if (contents := adapter_contents(name))), "")
        raise ValueError(f"{path}{holds}: not supported: {listed(others, 1)}; a layer is {_PARTS}")
    return left_out


def _notices(left_out: Sequence[LeftOut]) -> list[str]:
    names: dict[str, list[str]] = {}
    for each in left_out:
        names.setdefault(each.reason, []).append(each.tensor)
    start = {"bias or norm": "biases and norms are not part of the update"}
    return [
        f"{start.get(reason, f'{reason}, so not part of the update')}: {listed(tensors)}"
        for reason, tensors in names.items()
    ]


def _scalings(
    path: Path, stored: Mapping[str, tuple[int, ...]], stems: Sequence[str], alpha: float | str | None
) -> tuple[dict[str, tuple[float, float | None]], list[str]]:
    """Stem to its scaling and its alpha, which counts if it is there, and what was assumed for those without."""
    header = _metadata_scalings(path, stems)
    alone = [stem for stem in stems if f"{stem}.alpha" not in stored and stem not in header]
    usual = [stem for stem in alone if alpha is None and has_own_rule(stem)]
    assumed = [stem for stem in alone if stem not in set(usual)]
    missing = f"alpha is missing for {len(assumed)} of {len(stems)} layers"
    if alpha is None and assumed:
        remedy = "give alpha= a number, or 'rank' for scaling 1"
        raise ValueError(f"{path}: {missing}, the first is {assumed[0]}: {remedy}")
    given = None if alpha in ("rank", None) else float(alpha or 0.0)
    file = open_file(path)
    alphas = {stem: _number(file, f"{stem}.alpha") for stem in stems if f"{stem}.alpha" in stored}
    if given is not None:
        alphas |= dict.fromkeys(assumed, given)
    notices = [f"{missing} and taken to be {alpha}"] if assumed else []
    if usual:
        notices.append(
            f"alpha is missing for {len(usual)} of {len(stems)} layers: scaling 1, as diffusers and ComfyUI read them"
        )
    return {stem: (header.get(stem, 1.0), alphas.get(stem)) for stem in stems}, notices


def _decomposed(
    adapter: StoredAdapter,
    magnitudes: Mapping[str, str],
    stored: Mapping[str, tuple[int, ...]],
    base: Checkpoint | None,
) -> Source:
    """The update with DoRA's magnitudes, if a file has any."""
    if not magnitudes:
        return adapter
    if missing := [layer for layer in adapter.shapes if layer not in magnitudes]:
        raise ValueError(
            f"{adapter.path}: {missing[0]} has no lora_magnitude_vector, {len(magnitudes)} layers have one"
        )
    for layer, name in magnitudes.items():
        if math.prod(stored[name]) != adapter.shapes[layer][0]:
            rows = adapter.shapes[layer][0]
            raise ValueError(f"{adapter.path}: {name} has shape {stored[name]}, {rows} rows need one number each")
    if base is None:
        remedy = "give the base checkpoint (base=)"
        raise ValueError(f"{adapter.path}: DoRA's update depends on the base weight: {remedy}")
    return dora_adapter(adapter, magnitudes, base)


def _metadata_scalings(path: Path, stems: Iterable[str]) -> dict[str, float]:
    """Stem to scaling by the configurations of a header, one per component: ``unet``, ``transformer``, ..."""
    metadata = open_file(path).metadata
    if METADATA not in metadata:
        return {}
    source = path.with_name(f"{path.name} ({METADATA})")
    options = parse_json(source, metadata[METADATA])
    components: dict[str, list[str]] = {}
    for stem in stems:
        components.setdefault(stem.partition(".")[0], []).append(stem)
    scalings: dict[str, float] = {}
    for component, members in components.items():
        start = f"{component}."
        config = {key.removeprefix(start): value for key, value in options.items() if key.startswith(start)}
        if config:
            validate_lora(source, config)
            ranked = lora_scalings(source, config, [stem.removeprefix(start) for stem in members])
            scalings |= {stem: scaling for stem, (_, scaling) in zip(members, ranked, strict=True)}
    return scalings


def _number(file: TensorFile, name: str) -> float:
    """A stored number, which may be an integer."""
    tensor = file.stored(name)
    integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    if tensor.numel() != 1 or not (tensor.dtype in NUMBERS or integer) or not math.isfinite(value := tensor.item()):
        raise ValueError(f"{file.path}: {name} is no finite number: shape {tuple(tensor.shape)}, type {tensor.dtype}")
    return float(value)
