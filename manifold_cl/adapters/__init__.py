"""Low-rank adapters: the layers, their way into and out of a model, their files, and their export."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.adapters.adapter import Adapter, LoRALinear
    from manifold_cl.adapters.adapter_files import load_adapters, read_adapters, save_adapters
    from manifold_cl.adapters.adapter_geometry import eblora_layers, geometry_metrics, protect, retract_adapters
    from manifold_cl.adapters.eblora import EBLoRALinear
    from manifold_cl.adapters.export import export_lora
    from manifold_cl.adapters.frames import complete, write_complete
    from manifold_cl.adapters.frozen_updates import keep_factors, kept_updates
    from manifold_cl.adapters.inject import (
        adapters_of,
        eblora_adapters,
        inject_adapters,
        keep_adapters,
        merge_adapters,
        merge_factors,
    )
    from manifold_cl.adapters.layers import target_linears
    from manifold_cl.adapters.low_rank import Factors
    from manifold_cl.adapters.options import EBLoRAOptions
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Adapter",
    "EBLoRALinear",
    "EBLoRAOptions",
    "Factors",
    "LoRALinear",
    "adapters_of",
    "complete",
    "eblora_adapters",
    "eblora_layers",
    "export_lora",
    "geometry_metrics",
    "inject_adapters",
    "keep_adapters",
    "keep_factors",
    "kept_updates",
    "load_adapters",
    "merge_adapters",
    "merge_factors",
    "protect",
    "read_adapters",
    "retract_adapters",
    "save_adapters",
    "target_linears",
    "write_complete",
]
