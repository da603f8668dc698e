"""Names of tensors in adapter files: each name's layer, method and part."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from analysis.names import natural_key, unwrapped

_PARTS: Mapping[str, tuple[str, str]] = {
    "lora_A.weight": ("lora", "wide_right"),
    "lora_B.weight": ("lora", "left"),
    "lora_embedding_A": ("lora", "embedding_wide_right"),
    "lora_embedding_B": ("lora", "embedding_left"),
    "lora_magnitude_vector": ("lora", "magnitude"),
    "lora_magnitude_vector.weight": ("lora", "magnitude"),
    "lora_down.weight": ("kohya", "wide_right"),
    "lora_up.weight": ("kohya", "left"),
    "eblora_left": ("eblora", "left"),
    "eblora_right": ("eblora", "right"),
    "eblora_scale": ("eblora", "core"),
    "eblora_start.left": ("eblora", "start_left"),
    "eblora_start.right": ("eblora", "start_right"),
    "eblora_start.scale": ("eblora", "start_core"),
    "osf_svd_params.U_low": ("osf", "left"),
    "osf_svd_params.S_low": ("osf", "core"),
    "osf_svd_params.V_low": ("osf", "wide_right"),
    **{
        f"stella_{letter}{end}": ("stella", part)
        for letter, part in {"U": "left", "S": "core", "V": "right", "Vt": "wide_right"}.items()
        for end in ("", ".weight", ".default", ".default.weight")
    },
}
"""End of a tensor's name, one to three components, to the method and the part of a layer's update.

Left is (m, r), right (n, r), wide right (r, n).
"""
_CONTENTS = {
    "lora_": "the factors of a LoRA",
    "hada_": "the factors of a LoHa",
    "lokr_": "the factors of a LoKr",
    "oft_": "the factors of an OFT adapter",
    "boft_": "the factors of a BOFT adapter",
    "vera_": "the factors of a VeRA",
    "eblora_": "the factors of an EBLoRA",
    "stella_": "the factors of a StelLA",
    "osf_svd_params": "the factors of an OSF adapter",
    "ia3_": "the factors of an IA3 adapter",
    "dora_scale": "the magnitudes of a DoRA",
    "randlora_": "the factors of a RandLora",
    "fourierft_": "the spectrum of a FourierFT adapter",
    "hra_": "the factors of an HRA adapter",
    "miss_": "the factors of a MiSS adapter",
    "bone_": "the factors of a Bone adapter",
    "delora_": "the factors of a DeLoRA",
    "hira_": "the factors of a HiRA adapter",
    "gralora_": "the factors of a GraLoRA",
    "c3a_": "the kernels of a C3A adapter",
    "road_": "the rotations of a RoAd adapter",
    "lycoris_": "an update of LyCORIS",
    "on_input": "the scales of an IA3 adapter",
}
"""Start of a component of a tensor's name to the contents of the tensor."""
_MARKS = re.compile(rf"(?:^|\.)(?P<mark>{'|'.join(_CONTENTS)})|[._]lora\d*\.(?:up|down)\.")


_DIFFUSERS = re.compile(
    r"(?P<place>.+)\.(?:(?P<split>to_q|to_k|to_v|to_out)_lora|lora|lora_linear_layer)\.(?P<side>up|down)\.weight"
)
"""Names that older versions of diffusers wrote."""
_OWN_RULE = re.compile(
    r"(?:unet|transformer|transformer_2|text_encoder|text_encoder_\d|prior|diffusion_model)\.|.*\.processor\.|down_blocks\."
)
_NAMED = re.compile(
    r"(?P<stem>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(?P<adapter>[^.]+)(?P<end>\.weight)?"
)
"""Names in a training state of PEFT, where each adapter's name stands behind its factors."""


OUT_OF_ATTENTION = ".base_layer.out_proj"
"""End of a layer's name: the second pair of factors that PEFT gives a MultiheadAttention.

PEFT merges it twice, in its forward pass too (0.21). Its patterns name the attention.
"""


class TensorName(NamedTuple):
    """Parsed name of an adapter's tensor."""

    stem: str
    """The layer's name as the file has it, with the wrappers around the module."""
    method: str
    part: str


class StoredLayer(NamedTuple):
    """The tensors of one layer's update."""

    stem: str
    parts: Mapping[str, str]
    """Part, such as ``left``, to the tensor's name."""


@lru_cache(maxsize=2**16)  # the adapters of a sequence of tasks have the same names
def parse_name(name: str) -> TensorName | None:
    """Layer, method and part of an adapter's tensor; None for any other name.

    >>> parse_name("base_model.model.h.0.q.lora_A.weight")
    TensorName(stem='base_model.model.h.0.q', method='lora', part='wide_right')
    """
    components = name.split(".")
    for count in (1, 2, 3):
        known_end = _PARTS.get(".".join(components[-count:]))
        if known_end is not None and len(components) > count:
            return TensorName(".".join(components[:-count]), *known_end)
    return _diffusers_name(name) or _named(name)


def _diffusers_name(name: str) -> TensorName | None:
    """Layer and part of a tensor of older versions of diffusers, with the layer's name in the model.

    >>> _diffusers_name("unet.mid.attn1.processor.to_out_lora.up.weight")
    TensorName(stem='unet.mid.attn1.to_out.0', method='diffusers', part='left')
    """
    match = _DIFFUSERS.fullmatch(name)
    if match is None:
        return None
    stem = match["place"].removesuffix(".processor")
    if match["split"] is not None:
        letter = match["split"].removeprefix("to_")
        in_text_encoder = stem.endswith("self_attn")
        stem += f".{letter}_proj" if in_text_encoder else {"out": ".to_out.0"}.get(letter, f".to_{letter}")
    return TensorName(stem, "diffusers", "left" if match["side"] == "up" else "wide_right")


def _named(name: str) -> TensorName | None:
    """Layer and part of ``layer.lora_A.NAME.weight``."""
    match = _NAMED.fullmatch(name)
    known = None if match is None else _PARTS.get(f"{match['part']}{match['end'] or ''}")
    return None if match is None or known is None else TensorName(match["stem"], *known)


def adapter_names(names: Iterable[str]) -> list[str]:
    """The adapters' names that stand behind factors, as in ``layer.lora_A.NAME.weight``."""
    found = (_NAMED.fullmatch(name) for name in names if ".lora_" in name)
    return sorted({match["adapter"] for match in found if match is not None and match["adapter"] != "weight"})


def stored_layers(path: Path, names: Iterable[str], method: str) -> dict[str, StoredLayer]:
    """Layer to its tensors of a method, in the order of the model; ValueError for a layer or part that occurs twice."""
    layers: dict[str, tuple[str, dict[str, str]]] = {}
    for name in names:
        parsed = parse_name(name)
        if parsed is None or parsed.method != method:
            continue
        stem, parts = layers.setdefault(unwrapped(parsed.stem), (parsed.stem, {}))
        if stem != parsed.stem:
            raise ValueError(f"{path}: {parsed.stem} and {stem} are the same layer")
        if parts.setdefault(parsed.part, name) != name:
            raise ValueError(f"{path}: {name} and {parts[parsed.part]} are the same part of a layer")
    return {layer: StoredLayer(*layers[layer]) for layer in sorted(layers, key=natural_key)}


def has_own_rule(stem: str) -> bool:
    """Whether a layer is of diffusers' or ComfyUI's files, where a missing alpha is by their own rule the rank.

    >>> has_own_rule("unet.mid_block.attn.to_q"), has_own_rule("lora_unet_mid_block_attn_to_q")
    (True, False)
    """
    return _OWN_RULE.match(stem) is not None


def adapter_contents(name: str) -> str | None:
    """Contents of an adapter's tensor, by its name; None for names that weights have.

    >>> adapter_contents("h.0.q.lora_A.weight"), adapter_contents("lora_unet_c.hada_w1_a"), adapter_contents("q.weight")
    ('the factors of a LoRA', 'the factors of a LoHa', None)
    """
    contents = None
    for match in _MARKS.finditer(name):  # the last match: names of Kohya files start with lora_, whatever they hold
        contents = _CONTENTS[match["mark"] or "lora_"]
    return contents
