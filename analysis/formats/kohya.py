"""Reading LoRA files of the image-generation scripts: ``lora_down``, ``lora_up`` and ``alpha`` in one file."""

import math
from pathlib import Path

from analysis.formats.sources import Entry, StoredAdapter
from analysis.formats.tensor_files import open_tensors, read_tensor, stored_shapes
from analysis.names import natural_key

_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def read_kohya(path: Path, *, alpha: float | str | None = None) -> StoredAdapter:
    """The update in a Kohya file, ``(alpha / r) up down`` for each layer; kernels are flattened to matrices.

    Every tensor of the file is part of a layer that is read, or the file is refused: what is left out, such as DoRA's
    magnitudes, biases or LoHa factors, would be part of the update.

    `alpha` stands in for the tensors that a file lacks: a number, or ``"rank"``, which is the scripts' own
    reading of a file without them (scaling 1).

    Raises:
        ValueError: alpha is missing and not given, or a layer is of another kind.
    """
    stored = stored_shapes(path)
    stems = [name.removesuffix(".lora_down.weight") for name in stored if name.endswith(".lora_down.weight")]
    if not stems:
        raise ValueError(f"{path} holds no lora_down.weight tensors")
    known = {f"{stem}.{part}" for stem in stems for part in _PARTS}
    if odd := [name for name in sorted(stored, key=natural_key) if name not in known]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ValueError(f"{path}: not supported: {odd[0]}{more}; a layer is {', '.join(_PARTS)}")
    if alpha is None and (missing := [stem for stem in stems if f"{stem}.alpha" not in stored]):
        raise ValueError(
            f"{path}: alpha is missing for {len(missing)} of {len(stems)} layers, the first is {missing[0]}: "
            "give alpha= a number, or 'rank' for scaling 1"
        )
    entries = {}
    with open_tensors(path) as file:
        for stem in sorted(stems, key=natural_key):
            left, right = f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"
            up, down = stored.get(left), stored[right]
            if up is None or len(up) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
                raise ValueError(f"{path}: {stem} has lora_up {up} and lora_down {down}, ranks must agree")
            rank = down[0]
            if f"{stem}.alpha" in stored:
                scaling = float(read_tensor(file, path, f"{stem}.alpha")) / rank
            else:
                scaling = 1.0 if alpha == "rank" else float(alpha or 0.0) / rank
            entries[stem] = Entry(left, right, (up[0], math.prod(down[1:]), rank), scaling, right_is_wide=True)
    return StoredAdapter(path.stem, "kohya", path, entries)


def is_kohya(path: Path) -> bool:
    """Whether a file holds a LoRA with these names."""
    return any(name.endswith(".lora_down.weight") for name in stored_shapes(path))
