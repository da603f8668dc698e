"""Names that tensors of adapters have, so that factors are never taken for weights."""

import re

_KINDS = {
    "lora_": "the factors of a LoRA",
    "lora.": "the factors of a LoRA",
    "_lora.": "the factors of a LoRA",
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
}
_PART = re.compile(
    r"(?:^|\.)(?P<kind>lora_|hada_|lokr_|b?oft_|vera_|eblora_|stella_|osf_svd_params|ia3_|dora_scale|randlora_"
    r"|fourierft_|hra_|miss_|bone_)|\.(?P<dotted>lora\.)(?:up|down)\.|(?P<tail>_lora\.)(?:up|down)\."
)


def adapter_kind(name: str) -> str | None:
    """What a tensor of an adapter is part of, by its name; None for names that weights have.

    >>> adapter_kind("h.0.q.lora_A.weight"), adapter_kind("lora_unet_c.hada_w1_a"), adapter_kind("h.0.q.weight")
    ('the factors of a LoRA', 'the factors of a LoHa', None)
    """
    kind = None
    for match in _PART.finditer(name):  # the last: names of Kohya files start with lora_, whatever the factors are
        kind = _KINDS[next(found for found in match.groups() if found)]
    return kind
