"""The layer: low-rank adapters, their injection into a model, their files, and their export."""

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.adapter_files import load_adapters, read_adapters, save_adapters
from manifold_cl.adapters.adapter_geometry import geometry_metrics, retract_adapters
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.export import export_lora
from manifold_cl.adapters.inject import adapters_of, eblora_adapters, inject_adapters, merge_adapters
from manifold_cl.adapters.lora import LoRALinear
from manifold_cl.adapters.low_rank import Factors

__all__ = [
    "Adapter",
    "EBLoRALinear",
    "Factors",
    "LoRALinear",
    "adapters_of",
    "eblora_adapters",
    "export_lora",
    "geometry_metrics",
    "inject_adapters",
    "load_adapters",
    "merge_adapters",
    "read_adapters",
    "retract_adapters",
    "save_adapters",
]
