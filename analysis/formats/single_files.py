"""LoRA files without a configuration beside them: ``lora_down`` and ``lora_up``, or ``lora_A`` and ``lora_B``."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import NUMBERS, TensorFile, open_file, parse_json, stored_shapes
from analysis.formats.lycoris import is_lycoris, read_lycoris
from analysis.formats.peft_config import lora_scalings, validate_lora
from analysis.formats.sources import LayerTensors, LeftOut, Source, StoredAdapter, shapes_of
from analysis.formats.tensor_names import adapter_contents, adapter_names, stored_layers
from analysis.names import listed, natural_key

METADATA = "lora_adapter_metadata"
"""Key of a safetensors header under which diffusers keeps PEFT's configuration."""
_OWN_RULE = re.compile(
    r"(?:unet|transformer|transformer_2|text_encoder|text_encoder_\d|prior|diffusion_model)\.|.*\.processor\.|down_blocks\."
)
"""Layers of diffusers' and ComfyUI's files, where a missing alpha is by their own rule the rank: scaling 1."""
_PARTS = "lora_down.weight, lora_up.weight, alpha (or lora_A.weight, lora_B.weight, alpha)"


def holds_factors(path: Path) -> bool:
    """Whether a file holds an adapter, of a method that is read or of one that is refused by name."""
    return any(adapter_contents(name) is not None for name in stored_shapes(path))


def read_single(path: Path, *, alpha: float | str | None = None, base: Checkpoint | None = None) -> Source:
    """The update in one file, ``(alpha / r) up down`` for each layer; kernels are flattened to matrices.

    Every tensor of the file must be part of a layer that is read. Other tensors would be part of the update, so the
    file is refused. Files of LyCORIS are those of `read_lycoris`, which may need `base`.

    Without tensors ``alpha``, the scalings are those of the PEFT configuration that diffusers writes into the
    file's header. Without one, `alpha` is used: a number, or ``"rank"`` for the scripts' own reading (scaling 1).
    ValueError if alpha is missing and not given.
    """
    if is_lycoris(path):
        return read_lycoris(path, base=base, alpha=alpha)
    stored = stored_shapes(path)
    if len(names := adapter_names(stored)) > 1:
        raise ValueError(f"{path} holds several adapters, {listed(names)}: save each of them to a file of its own")
    stems = {
        layer: (method, stem, parts)
        for method in ("kohya", "lora", "diffusers")
        for layer, (stem, parts) in stored_layers(path, stored, method).items()
        if parts.keys() == {"left", "wide_right"}
    }
    read = {name for _, stem, parts in stems.values() for name in (*parts.values(), f"{stem}.alpha")}
    biases = [name for name in sorted(stored.keys() - read, key=natural_key) if _is_bias(name, stored[name])]
    if others := sorted(stored.keys() - read - set(biases), key=natural_key):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        holds = next((f" holds {contents}" for name in others if (contents := adapter_contents(name))), "")
        raise ValueError(f"{path}{holds}: not supported: {others[0]}{more}; a layer is {_PARTS}")
    scalings = _metadata_scalings(path, [stem for _, stem, _ in stems.values()])
    alone = [stem for _, stem, _ in stems.values() if f"{stem}.alpha" not in stored and stem not in scalings]
    usual = [stem for stem in alone if alpha is None and _OWN_RULE.match(stem)]
    assumed = [stem for stem in alone if stem not in set(usual)]
    missing = f"alpha is missing for {len(assumed)} of {len(stems)} layers"
    if alpha is None and assumed:
        remedy = "give alpha= a number, or 'rank' for scaling 1"
        raise ValueError(f"{path}: {missing}, the first is {assumed[0]}: {remedy}")
    file = open_file(path)
    layers = {}
    for layer, (_, stem, parts) in sorted(stems.items(), key=lambda item: natural_key(item[1][1])):
        own = _number(file, f"{stem}.alpha") if f"{stem}.alpha" in stored else None
        if own is None and stem not in scalings and alpha not in ("rank", None):
            own = float(alpha or 0.0)
        layers[layer] = LayerTensors.find(path, stored, parts, scaling=scalings.get(stem, 1.0), alpha=own, kernels=True)
    notices = [f"{missing} and taken to be {alpha}"] if assumed else []
    if usual:
        notices.append(f"alpha is missing for {len(usual)} of {len(stems)} layers: scaling 1, as diffusers reads them")
    if biases:
        notices.append(f"biases and norms are not part of the update: {listed(biases)}")
    return StoredAdapter(
        task=path.stem,
        kind="kohya" if "kohya" in {method for method, _, _ in stems.values()} else "lora",
        shapes=shapes_of(layers),
        notices=tuple(notices),
        left_out=tuple(LeftOut(str(path), name, "bias or norm") for name in biases),
        path=path,
        layers=layers,
    )


def _is_bias(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the change of a bias, which is no matrix."""
    return len(shape) <= 1 and name.endswith((".bias", ".diff_b"))


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
