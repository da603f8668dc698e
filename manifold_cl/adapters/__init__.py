"""The layer: low-rank adapters, their injection into a model, and their files."""

from manifold_cl.adapters.adapter import Adapter, Factors
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.files import load_adapters, read_adapters, save_adapters
from manifold_cl.adapters.inject import adapters_of, inject_adapters, merge_adapters
from manifold_cl.adapters.lora import LoRALinear

__all__ = [
    "Adapter",
    "EBLoRALinear",
    "Factors",
    "LoRALinear",
    "adapters_of",
    "inject_adapters",
    "load_adapters",
    "merge_adapters",
    "read_adapters",
    "save_adapters",
]
