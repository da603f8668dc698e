"""Reading LoRA files without a configuration: ``lora_down`` and ``lora_up``, or ``lora_A`` and ``lora_B``."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from analysis.formats.files import NUMBERS, OpenFile, open_tensors, stored_shapes, stored_tensor
from analysis.formats.own import require_sizes
from analysis.formats.peft_folder import by_pattern, check_lora
from analysis.formats.sources import Entry, StoredAdapter
from analysis.formats.tensor_names import adapter_kind
from analysis.names import natural_key, unwrapped

_PAIRS = {"kohya": ("lora_down.weight", "lora_up.weight"), "lora": ("lora_A.weight", "lora_B.weight")}
"""By kind the names of the factors: that of the inputs, that of the outputs."""
METADATA = "lora_adapter_metadata"
"""Key of a safetensors header under which diffusers keeps PEFT's configuration."""
_PARTS = "lora_down.weight, lora_up.weight, alpha (or lora_A.weight, lora_B.weight, alpha)"


def holds_factors(path: Path) -> bool:
    """Whether a file holds an adapter, of a kind that is read or of one that is refused by name."""
    return any(adapter_kind(name) is not None for name in stored_shapes(path))


def read_single(path: Path, *, alpha: float | str | None = None) -> StoredAdapter:
    """The update in one file, ``(alpha / r) up down`` for each layer; kernels are flattened to matrices.

    Every tensor of the file is part of a layer that is read, or the file is refused: what is left out, such as DoRA's
    magnitudes, biases or LoHa factors, would be part of the update.

    Where the tensors ``alpha`` are missing, scalings are those of the PEFT configuration that diffusers writes into the
    file's header. `alpha` stands in where there is none either: a number, or ``"rank"``, which is the scripts' own
    reading of such a file (scaling 1).

    Raises:
        ValueError: alpha is missing and not given, or a layer is of another kind.
    """
    stored = stored_shapes(path)
    kinds = {
        name.removesuffix(f".{down}"): kind
        for kind, (down, _) in _PAIRS.items()
        for name in stored
        if name.endswith(f".{down}") and f"{name.removesuffix(down)}{_PAIRS[kind][1]}" in stored
    }
    known = {f"{stem}.{part}" for stem, kind in kinds.items() for part in (*_PAIRS[kind], "alpha")}
    if odd := [name for name in sorted(stored, key=natural_key) if name not in known]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        holds = next((f" holds {kind}" for name in odd if (kind := adapter_kind(name))), "")
        raise ValueError(f"{path}{holds}: not supported: {odd[0]}{more}; a layer is {_PARTS}")
    described = _described_scalings(path, kinds)
    without = [stem for stem in kinds if f"{stem}.alpha" not in stored]
    if alpha is None and (missing := [stem for stem in without if stem not in described]):
        raise ValueError(
            f"{path}: alpha is missing for {len(missing)} of {len(kinds)} layers, the first is {missing[0]}: "
            "give alpha= a number, or 'rank' for scaling 1"
        )
    entries: dict[str, Entry] = {}
    with open_tensors(path) as file:
        for stem in sorted(kinds, key=natural_key):
            right, left = (f"{stem}.{part}" for part in _PAIRS[kinds[stem]])
            up, down = stored[left], stored[right]
            if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
                raise ValueError(f"{path}: {stem} has {left} {up} and {right} {down}, ranks must agree")
            shape = (up[0], math.prod(down[1:]), down[0])
            require_sizes(path, stem, shape)
            if f"{stem}.alpha" in stored:
                scaling = _number(file, path, f"{stem}.alpha") / shape[2]
            elif stem in described:
                scaling = described[stem]
            else:
                scaling = 1.0 if alpha == "rank" else float(alpha or 0.0) / shape[2]
            entry = Entry(left, right, shape, scaling, right_is_wide=True)
            if entries.setdefault(unwrapped(stem), entry) is not entry:
                raise ValueError(f"{path}: {stem} is the same layer as another one: {unwrapped(stem)}")
    kind = "kohya" if "kohya" in kinds.values() else "lora"
    assumed = [stem for stem in without if stem not in described]
    notices = (
        (f"alpha is missing for {len(assumed)} of {len(kinds)} layers and taken to be {alpha}",) if assumed else ()
    )
    return StoredAdapter(path.stem, kind, path, entries, notices=notices)


def _described_scalings(path: Path, stems: Iterable[str]) -> dict[str, float]:
    """Layer to scaling by the configurations of a header, one per component: ``unet``, ``transformer``, ..."""
    with open_tensors(path) as file:
        metadata: dict[str, str] = getattr(file, "metadata", dict)() or {}
    if METADATA not in metadata:
        return {}
    source = path.with_name(f"{path.name} ({METADATA})")
    try:
        options = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{source} holds a {type(options).__name__}, not an object")
    components: dict[str, list[str]] = {}
    for stem in stems:
        components.setdefault(stem.partition(".")[0], []).append(stem)
    found: dict[str, float] = {}
    for component, members in components.items():
        start = f"{component}."
        config = {key.removeprefix(start): value for key, value in options.items() if key.startswith(start)}
        if config:
            check_lora(source, config)
            names = [stem.removeprefix(start) for stem in members]
            alphas = by_pattern(source, config, "alpha_pattern", names, config["lora_alpha"])
            ranks = by_pattern(source, config, "rank_pattern", names, config["r"])
            power = 0.5 if config.get("use_rslora") else 1.0
            found |= {stem: a / r**power for stem, a, r in zip(members, alphas, ranks, strict=True)}
    return found


def _number(file: OpenFile, path: Path, name: str) -> float:
    """A stored number, which may be an integer."""
    tensor = stored_tensor(file, path, name)
    integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    if tensor.numel() != 1 or not (tensor.dtype in NUMBERS or integer) or not math.isfinite(value := tensor.item()):
        raise ValueError(f"{path}: {name} is no finite number: shape {tuple(tensor.shape)}, type {tensor.dtype}")
    return float(value)
