"""PEFT's methods besides LoRA: products (LoKr, LoHa), rotations (OFT, BOFT, ...) and scalings (IA3, VeRA, ...)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.formats import blocks, products, rotations, scalings
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import number, value_of
from analysis.formats.patterns import matching_names
from analysis.formats.peft_config import by_pattern, flag
from analysis.formats.sources import LeftOut
from analysis.formats.structured import (
    Stored,
    StructuredAdapter,
    StructuredLayer,
    base_shape,
    grouped_parts,
    needed,
    needed_base,
    sizes,
    structured_adapter,
)
from analysis.formats.tensor_names import StoredLayer
from analysis.names import listed

Build = Callable[[str, Mapping[str, str]], StructuredLayer]
"""The update of a layer from its name and the names of its tensors by part."""


@dataclass(frozen=True)
class PeftFiles:
    """A PEFT folder: its task, its configuration, names and shapes of its tensors, and the base model."""

    task: str
    source: Path
    config: Mapping[str, Any]
    path: Path
    stored: Stored
    base: Checkpoint | None

    def flag(self, key: str) -> bool:
        """An option that is true or false."""
        return flag(self.source, self.config, key)

    def number(self, key: str) -> float:
        """An option that is a finite number."""
        return number(self.source, key, self.config.get(key))

    def layers(self, method: str, ends: Mapping[str, str], *wanted: str) -> dict[str, StoredLayer]:
        """Layer to its tensors, by the ends of their names; ValueError for a file without them."""
        layers = grouped_parts(self.path, self.stored, ends)
        if not layers:
            raise ValueError(f"{self.path} holds no tensors of {method}: looked for {', '.join(ends)}")
        for each in layers.values():
            needed(self.path, each.parts, *wanted)
        return layers

    def shape(self, layer: str, method: str, *, outputs: int = 0, inputs: int = 0) -> tuple[int, int]:
        """(m, n) of a layer's base weight."""
        checkpoint = needed_base(self.source, method, self.base)
        flipped = self.flag("fan_in_fan_out")
        return base_shape(checkpoint, layer, outputs=outputs, inputs=inputs, transposed=flipped)

    def scalings(self, layers: Mapping[str, StoredLayer]) -> list[float]:
        """``alpha / r`` of each layer, both by pattern."""
        stems = [each.stem for each in layers.values()]
        values = [
            by_pattern(self.source, self.config, f"{key}_pattern", stems, self.number(option))
            for key, option in (("alpha", "alpha"), ("rank", "r"))
        ]
        if invalid := [rank for rank in values[1] if not rank > 0]:
            raise ValueError(f"{self.source}: a rank is {invalid[0]:g}, at least 1 was expected")
        return [alpha / rank for alpha, rank in zip(*values, strict=True)]

    def adapter(
        self,
        kind: str,
        layers: Mapping[str, StoredLayer],
        build: Build,
        embeddings: frozenset[str] = frozenset(),
    ) -> StructuredAdapter:
        """The update of these layers, each built from its name and its tensors."""
        built = {name: build(name, each.parts) for name, each in layers.items()}
        return structured_adapter(self.task, kind, self.path, built, checkpoint=self.base, embeddings=embeddings)


_BIASES = "biases of these layers are scaled or rotated with the outputs, which is not part of the update"


def _lokr(files: PeftFiles) -> StructuredAdapter:
    ends = {f"lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    return _products(files, "lokr", ends, products.peft_kronecker)


def _loha(files: PeftFiles) -> StructuredAdapter:
    ends = {f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    return _products(files, "loha", ends, products.hadamard)


def _products(
    files: PeftFiles, kind: str, ends: Mapping[str, str], product: Callable[..., StructuredLayer]
) -> StructuredAdapter:
    layers = files.layers(kind, ends)
    scalings = dict(zip(layers, files.scalings(layers), strict=True))
    return files.adapter(kind, layers, lambda name, parts: product(files.path, files.stored, parts, scalings[name]))


def _oft(files: PeftFiles) -> StructuredAdapter:
    ends = {"oft_R.weight": "rotation", "oft_embedding_R.weight": "embedding"}
    layers = files.layers("OFT of PEFT 0.16 or later", ends)
    if "use_cayley_neumann" not in files.config:
        raise ValueError(f"{files.source}: 'use_cayley_neumann' is missing, which decides what the rotation is")
    terms = int(value_of(files.source, files.config, "num_cayley_neumann_terms", int))
    neumann = terms if files.flag("use_cayley_neumann") else None
    bound, shared = files.number("eps") if files.flag("coft") else None, files.flag("block_share")
    embeddings = frozenset(name for name, each in layers.items() if "embedding" in each.parts)

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        if len(parts) > 1:
            raise ValueError(f"{files.path}: {' and '.join(parts.values())} are the same layer")
        options = rotations.OftOptions(neumann, bound, shared, name in embeddings)
        m, n = files.shape(name, "OFT")
        shape = (n, m) if name in embeddings else (m, n)
        return rotations.oft(files.path, files.stored, {"rotation": next(iter(parts.values()))}, shape, options)

    return files.adapter("oft", layers, build, embeddings=embeddings)


def _boft(files: PeftFiles) -> StructuredAdapter:
    layers = files.layers("BOFT", {"boft_R": "rotation", "boft_s": "scale"}, "rotation", "scale")
    return files.adapter(
        "boft",
        layers,
        lambda name, parts: rotations.boft(files.path, files.stored, parts, files.shape(name, "BOFT")),
    )


def _hra(files: PeftFiles) -> StructuredAdapter:
    orthogonal = files.flag("apply_GS")
    return files.adapter(
        "hra",
        files.layers("HRA", {"hra_u": "u"}),
        lambda name, parts: rotations.householder(
            files.path, files.stored, parts, files.shape(name, "HRA"), orthogonal
        ),
    )


def _road(files: PeftFiles) -> StructuredAdapter:
    layers = files.layers("RoAd", {"road_theta": "theta", "road_alpha": "alpha"}, "theta", "alpha")
    variant = str(value_of(files.source, files.config, "variant", str))
    group = int(value_of(files.source, files.config, "group_size", int))

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        return rotations.road(files.path, files.stored, parts, files.shape(name, "RoAd"), variant, group)

    return files.adapter("road", layers, build).noting([_BIASES])


def _ia3(files: PeftFiles) -> StructuredAdapter:
    layers = files.layers("IA3", {"ia3_l": "scale"})
    kernels = {name: each.stem for name, each in layers.items() if len(files.stored[each.parts["scale"]]) > 2}
    scaled = _feedforward(files, kernels) if kernels else set()
    on_inputs = {
        name: name in scaled if name in kernels else files.stored[each.parts["scale"]][:1] == (1,)
        for name, each in layers.items()
    }

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        stored = files.stored[parts["scale"]]
        rows, columns = stored[:2] if len(stored) > 1 else (0, 0)
        if (1 not in (rows, columns) if name not in kernels else rows != 1) or math.prod(stored) != rows * columns:
            raise ValueError(f"{files.path}: {parts['scale']} has shape {stored}, (m, 1) or (1, n) is read")
        sides = {"inputs" if on_inputs[name] else "outputs": max(rows, columns)} if name not in kernels else {}
        shape = files.shape(name, "IA3", **sides)
        return scalings.scaled_weight(files.path, files.stored, parts, shape, inputs=on_inputs[name], start=1.0)

    return files.adapter("ia3", layers, build).noting([] if all(on_inputs.values()) else [_BIASES])


def _feedforward(files: PeftFiles, stems: Mapping[str, str]) -> set[str]:
    """The layers whose inputs are scaled, as PEFT finds them: names that end with one of a list, or match a pattern."""
    wanted = files.config.get("feedforward_modules")
    names = {name: stem.removeprefix("base_model.model.") for name, stem in stems.items()}
    if isinstance(wanted, str):
        found = set(matching_names(rf"^(?:{wanted})\Z", list(names.values())))
        return {name for name, own in names.items() if own in found}
    if not isinstance(wanted, list) or not all(isinstance(each, str) for each in wanted):
        raise ValueError(
            f"{files.source}: 'feedforward_modules' is {wanted!r:.80}, names or a pattern were expected: the file "
            "does not say whether the inputs or the outputs of a convolution are scaled"
        )
    return {name for name, own in names.items() if own.endswith(tuple(wanted))}


def _vera(files: PeftFiles) -> StructuredAdapter:
    ends = {"vera_lambda_b": "scale_b", "vera_lambda_d": "scale_d"}
    layers = files.layers("VeRA", ends, "scale_b", "scale_d")
    shared = _shared_factors(files, "vera")

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        (outputs,) = sizes(files.path, files.stored, parts["scale_b"], 1)
        shape = files.shape(name, "VeRA", outputs=outputs)
        return scalings.vera(files.path, files.stored, {**parts, **shared}, shape)

    return files.adapter("vera", layers, build)


def _shared_factors(files: PeftFiles, method: str) -> dict[str, str]:
    """Names of the random factors that all layers share; ValueError for a file without them."""
    shared = {part: f"base_model.{method}_{part.upper()}" for part in "ab"}
    if missing := [name for name in shared.values() if name not in files.stored]:
        remedy = "save the adapter with save_projection=True"
        raise ValueError(f"{files.path} holds no {missing[0]}, the random factors that all layers share: {remedy}")
    return shared


def _adalora(files: PeftFiles) -> StructuredAdapter:
    layers = files.layers("AdaLoRA", {"lora_A": "a", "lora_B": "b", "lora_E": "e"}, "a", "b", "e")
    alpha, rank = files.number("lora_alpha"), files.number("init_r")
    scaling = (alpha if alpha > 0 else rank) / (rank + 1e-5)  # PEFT's numbers, for layers of any rank
    pruned = [name for name, each in layers.items() if files.stored[each.parts["e"]][:1] == (0,)]
    kept = {name: each for name, each in layers.items() if name not in pruned}
    if not kept:
        raise ValueError(f"{files.path}: all layers were pruned to rank 0, so there is no update")
    notices = [f"pruned to rank 0, so without an update: {listed(pruned)}"] if pruned else []
    left_out = [LeftOut(str(files.path), name, "pruned to rank 0") for name in pruned]
    adapter = files.adapter(
        "adalora", kept, lambda name, parts: scalings.adalora(files.path, files.stored, parts, scaling)
    )
    copies = frozenset(tensor for name in pruned for tensor in layers[name].parts.values())
    return replace(adapter, copies=copies).noting(notices, left_out)


def _delora(files: PeftFiles) -> StructuredAdapter:
    ends = {f"delora_{end}": part for end, part in {"A": "a", "B": "b", "lambda": "lambda", "w_norm": "norms"}.items()}
    return files.adapter(
        "delora",
        files.layers("DeLoRA", ends),
        lambda name, parts: scalings.delora(files.path, files.stored, parts),
    )


def _hira(files: PeftFiles) -> StructuredAdapter:
    layers = files.layers("HiRA", {"hira_A": "a", "hira_B": "b"}, "a", "b")

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        (outputs, _), (_, inputs) = (sizes(files.path, files.stored, parts[part], 2) for part in "ba")
        shape = files.shape(name, "HiRA", outputs=outputs, inputs=inputs)
        return scalings.hira(files.path, files.stored, parts, shape)

    return files.adapter("hira", layers, build)


def _miss(files: PeftFiles) -> StructuredAdapter:
    start = files.config.get("init_weights")
    return files.adapter(
        "miss",
        files.layers("MiSS", {"miss_block": "block"}),
        lambda name, parts: blocks.miss(files.path, files.stored, parts, files.shape(name, "MiSS"), start),
    )


def _gralora(files: PeftFiles) -> StructuredAdapter:
    ends = {"gralora_A": "a", "gralora_B": "b"}
    hybrid = {"gralora_A_general.weight": "right", "gralora_B_general.weight": "left"}
    rank = files.number("r") + files.number("hybrid_r")
    if not rank > 0:
        raise ValueError(f"{files.source}: 'r' and 'hybrid_r' are {rank:g} together, at least 1 was expected")
    scaling = files.number("alpha") / rank
    return files.adapter(
        "gralora",
        files.layers("GraLoRA", ends | hybrid),
        lambda name, parts: blocks.gralora(files.path, files.stored, parts, scaling),
    )


def _c3a(files: PeftFiles) -> StructuredAdapter:
    return files.adapter(
        "c3a",
        files.layers("C3A", {"c3a_kernel": "kernel"}),
        lambda name, parts: blocks.circulant(files.path, files.stored, parts),
    )


def _randlora(files: PeftFiles) -> StructuredAdapter:
    ends = {"randlora_lambda": "lambda", "randlora_gamma": "gamma"}
    layers = files.layers("RandLora", ends, "lambda", "gamma")
    shared = _shared_factors(files, "randlora")
    if not files.number("r") > 0:
        raise ValueError(f"{files.source}: 'r' is {files.config['r']!r}, at least 1 was expected")
    scaling = files.number("randlora_alpha") / files.number("r")

    def build(name: str, parts: Mapping[str, str]) -> StructuredLayer:
        shape = files.shape(name, "RandLora")
        return scalings.randlora(files.path, files.stored, {**parts, **shared}, shape, scaling)

    copies = frozenset(name for name in files.stored if name.endswith((".randlora_A", ".randlora_B")))
    return replace(files.adapter("randlora", layers, build), copies=copies)


METHODS: Mapping[str, Callable[[PeftFiles], StructuredAdapter]] = {
    "ADALORA": _adalora,
    "BOFT": _boft,
    "C3A": _c3a,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "HIRA": _hira,
    "HRA": _hra,
    "IA3": _ia3,
    "LOHA": _loha,
    "LOKR": _lokr,
    "MISS": _miss,
    "OFT": _oft,
    "RANDLORA": _randlora,
    "ROAD": _road,
    "VERA": _vera,
}
"""PEFT's name of a method to its reader."""
