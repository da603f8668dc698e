"""Files of LyCORIS: LoKr, LoHa, LoCon with a core, OFT, BOFT, IA3, GLoRA, full differences, and DoRA of each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats import products, rotations, scalings
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import NUMBERS, TensorFile, open_file, stored_shapes
from analysis.formats.sources import LeftOut
from analysis.formats.structured import (
    Factors,
    Stored,
    StructuredAdapter,
    StructuredLayer,
    Tensors,
    base_shape,
    full,
    grouped_parts,
    needed,
    needed_base,
    structured_adapter,
    unequal,
)
from analysis.formats.tensor_names import adapter_contents, has_own_rule
from analysis.names import listed, natural_key

_KINDS: Mapping[str, tuple[str, ...]] = {
    "lokr": tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    "loha": tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "locon": ("lora_up.weight", "lora_mid.weight", "lora_down.weight"),
    "oft": ("oft_blocks", "rescale"),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "ia3": ("on_input", "weight"),
    "full": ("diff",),
}
"""Kind of a layer's update to the ends of its tensors' names."""
_SHARED = {"weight", "rescale"}
"""Ends that do not decide the kind."""
_ASIDE = ("diff_b", "w_norm", "b_norm")
"""Ends of tensors that are no part of an update: differences of biases and of norms."""
_ENDS = {
    **{end: end for ends in (*_KINDS.values(), ("alpha", "dora_scale"), _ASIDE) for end in ends},
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
}
_MARKS = {
    *_KINDS["lokr"],
    *_KINDS["loha"],
    "oft_blocks",
    "on_input",
    "diff",
    "lora_mid.weight",
    "dora_scale",
    "a1.weight",
}


def is_lycoris(path: Path) -> bool:
    """Whether a file holds updates that only LyCORIS writes, by the ends of its tensors' names."""
    return any(end in _MARKS for name in stored_shapes(path) for end in _ends(name))


def _ends(name: str) -> list[str]:
    components = name.split(".")
    return [".".join(components[-count:]) for count in (1, 2) if len(components) > count]


Parts = Mapping[str, str]
"""End of a tensor's name to its name in the file."""


@dataclass(frozen=True)
class _File:
    """A file of LyCORIS, the base model, and the number that stands in for a missing alpha."""

    path: Path
    stored: Stored
    opened: TensorFile
    base: Checkpoint | None
    alpha: float | str | None
    assumed: list[str] = field(default_factory=list)
    """Layers that have no alpha of their own, where one is given."""
    usual: list[str] = field(default_factory=list)
    """Layers without alpha in files of tools that take it to be the rank."""

    def number(self, name: str) -> float:
        """A stored number, which may be an integer."""
        tensor = self.opened.stored(name)
        real = tensor.dtype in NUMBERS or tensor.dtype in (torch.int64, torch.int32, torch.uint8)
        if tensor.numel() != 1 or not real or not math.isfinite(value := float(tensor.item())):
            raise ValueError(f"{self.path}: {name} is no finite number: shape {tuple(tensor.shape)}, {tensor.dtype}")
        return value

    def scaling(self, parts: Mapping[str, str], rank: int) -> float:
        """``alpha / r`` with the stored alpha, or the one given."""
        if "alpha" in parts:
            return self.number(parts["alpha"]) / rank
        first = next(iter(parts.values()))
        if self.alpha is None and has_own_rule(first):
            self.usual.append(first)
            return 1.0
        if self.alpha is None:
            remedy = "give alpha= a number, or 'rank' for scaling 1"
            raise ValueError(f"{self.path}: alpha is missing beside {first}: {remedy}")
        self.assumed.append(first)
        return 1.0 if self.alpha == "rank" else float(self.alpha) / rank

    def shape(self, layer: str, kind: str) -> tuple[int, int]:
        """(m, n) of a layer's base weight."""
        return base_shape(needed_base(self.path, kind, self.base), layer)


def read_lycoris(path: Path, *, base: Checkpoint | None = None, alpha: float | str | None = None) -> StructuredAdapter:
    """The update in a file of LyCORIS, whose layers may be of different kinds.

    Scalings are ``alpha / r``, as in LyCORIS' forward pass. Differences of biases and norms are named in the notices;
    any other tensor that is not read is an error, since it would be part of the update. Rotations, scalings and
    weight-decomposed updates depend on the base weight and need `base`.
    """
    file = _File(path, stored_shapes(path), open_file(path), base, alpha)
    layers, read, aside, kinds = {}, set(), [], set()
    for name, (_, parts) in grouped_parts(path, file.stored, _ENDS).items():
        aside += [parts[end] for end in _ASIDE if end in parts]
        kind = next((kind for kind, ends in _KINDS.items() if parts.keys() & {*ends} - _SHARED), None)
        if kind == "full" and len(file.stored[parts["diff"]]) < 2:  # of a norm
            aside.append(parts["diff"])
        elif kind is not None:
            own = {end: parts[end] for end in (*_KINDS[kind], "alpha") if end in parts}
            layer = _BUILD[kind](file, name, own)
            if "dora_scale" in parts:
                needed_base(path, "DoRA", base)
                layer = scalings.decomposed(layer, parts["dora_scale"], file.stored, path)
            layers[name] = layer
            kinds.add(kind)
            read |= {*layer.parts.values(), *own.values()}
    if others := sorted(file.stored.keys() - read - {*aside}, key=natural_key):
        holds = next((f" holds {contents}" for name in others if (contents := adapter_contents(name))), "")
        raise ValueError(f"{path}{holds}: not supported: {listed(others, 1)}; {', '.join(_KINDS)} of LyCORIS are read")
    if not layers:
        raise ValueError(f"{path} holds no update of a matrix, only {listed(aside)}")
    notices = [f"differences of biases and norms, so not part of the update: {listed(aside)}"] if aside else []
    if file.assumed:
        notices.append(f"alpha is missing for {len(file.assumed)} of {len(layers)} layers and taken to be {alpha}")
    if file.usual:
        missing = f"alpha is missing for {len(file.usual)} of {len(layers)} layers"
        notices.append(f"{missing}: scaling 1, as diffusers and ComfyUI read them")
    kind = kinds.pop() if len(kinds) == 1 else "lycoris"
    left_out = [LeftOut(str(path), name, "difference of a bias or a norm") for name in aside]
    return structured_adapter(path.stem, kind, path, layers, checkpoint=base).noting(notices, left_out)


def _short(parts: Parts, start: str) -> dict[str, str]:
    return {end.removeprefix(start): name for end, name in parts.items() if end.startswith(start)}


def _lokr(file: _File, name: str, parts: Parts) -> StructuredLayer:
    own = _short(parts, "lokr_")
    factored = [own[part] for part in ("w2_b", "w1_b") if part in own]
    # LyCORIS ignores alpha where neither half has a rank
    scaling = file.scaling(parts, _rank(file.stored[factored[0]])) if factored else 1.0
    return products.kronecker(file.path, file.stored, own, scaling)


def _rank(shape: tuple[int, ...]) -> int:
    """The first size of a shape, at least 1: shapes are validated where the layer is built."""
    return shape[0] if shape and shape[0] else 1


def _loha(file: _File, name: str, parts: Parts) -> StructuredLayer:
    own = _short(parts, "hada_")
    needed(file.path, own, "w1_b")
    return products.hadamard(file.path, file.stored, own, file.scaling(parts, _rank(file.stored[own["w1_b"]])))


def _locon(file: _File, name: str, parts: Parts) -> StructuredLayer:
    own = {end.removeprefix("lora_").removesuffix(".weight"): each for end, each in parts.items() if end != "alpha"}
    needed(file.path, own, "up", "down")
    up, down = file.stored[own["up"]], file.stored[own["down"]]
    scaling = file.scaling(parts, _rank(down))
    if "mid" in own:
        return products.tucker(file.path, file.stored, own, scaling)
    if len(up) < 2 or len(down) < 2 or math.prod(up[2:]) != 1 or up[1] != down[0] or 0 in (*up, *down):
        raise unequal(file.path, f"the shape of {own['up']} times {own['down']}", (up, down), "(m, r) and (r, n)")
    shape = (up[0], math.prod(down[1:]), down[0])
    return StructuredLayer(own, shape, partial(_locon_factors, scaling))


def _locon_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    return tensors["up"].flatten(1) * scaling, tensors["down"].flatten(1).mT


def _oft(file: _File, name: str, parts: Parts) -> StructuredLayer:
    needed(file.path, parts, "oft_blocks", "alpha")
    own = {"blocks": parts["oft_blocks"], **({"rescale": parts["rescale"]} if "rescale" in parts else {})}
    shape, constraint = file.shape(name, "OFT"), file.number(parts["alpha"])
    return rotations.lycoris_oft(file.path, file.stored, own, shape, constraint)


def _ia3(file: _File, name: str, parts: Parts) -> StructuredLayer:
    needed(file.path, parts, "on_input", "weight")
    inputs = file.number(parts["on_input"]) != 0
    own, shape = {"scale": parts["weight"]}, file.shape(name, "IA3")
    return scalings.scaled_weight(file.path, file.stored, own, shape, inputs=inputs, start=0.0)


def _glora(file: _File, name: str, parts: Parts) -> StructuredLayer:
    """``s (W A₁ A₂ + B₁ B₂)``, of rank 2r."""
    own = {end.removesuffix(".weight"): each for end, each in parts.items() if end != "alpha"}
    needed(file.path, own, "a1", "a2", "b1", "b2")
    (m, n), shapes = file.shape(name, "GLoRA"), {part: file.stored[own[part]] for part in own}
    rank = shapes["a2"][0] if shapes["a2"] else 0
    if rank < 1 or shapes != {"a1": (n, rank), "a2": (rank, n), "b1": (m, rank), "b2": (rank, n)}:
        raise unequal(
            file.path, f"the shape of {own['a1']} and those beside it", shapes, f"factors of a matrix {(m, n)}"
        )
    rule = partial(_glora_factors, file.scaling(parts, rank))
    return StructuredLayer(own, (m, n, 2 * rank), rule, relative=True)


def _glora_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    left = torch.cat([weight @ tensors["a1"], tensors["b1"]], dim=1) * scaling
    return left, torch.cat([tensors["a2"], tensors["b2"]]).mT


def _full(file: _File, name: str, parts: Parts) -> StructuredLayer:
    shape = file.stored[parts["diff"]]
    m, n = shape[0], math.prod(shape[1:])
    if not m * n:
        raise unequal(file.path, f"the shape of {parts['diff']}", shape, "a matrix")
    return StructuredLayer({"diff": parts["diff"]}, (m, n, min(m, n)), _full_factors)


def _full_factors(tensors: Tensors, weight: Tensor) -> Factors:
    return full(tensors["diff"].flatten(1))


_BUILD: Mapping[str, Callable[[_File, str, Parts], StructuredLayer]] = {
    "full": _full,
    "glora": _glora,
    "ia3": _ia3,
    "locon": _locon,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
}
