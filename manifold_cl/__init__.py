"""Geometry-first low-rank continual adaptation.

Updates ``ΔW = s · U Vᵀ`` with orthonormal directions and one magnitude, whose input side stays orthogonal to what
earlier tasks rely on: the restricted Stiefel manifold ``{V : VᵀV = I, FᵀV = 0}``.
"""

__version__ = "0.1.0"

from manifold_cl.adapters import (
    EBLoRALinear,
    LoRALinear,
    adapters_of,
    eblora_adapters,
    export_lora,
    geometry_metrics,
    inject_adapters,
    load_adapters,
    merge_adapters,
    read_adapters,
    save_adapters,
)
from manifold_cl.continual import (
    METHODS,
    ContinualRunner,
    Method,
    RunRecord,
    SubspaceMemory,
    Task,
    TaskStream,
    Training,
    make_method,
    register_method,
)
from manifold_cl.geometry import (
    RETRACTIONS,
    ProtectedSubspace,
    RestrictedStiefel,
    Retraction,
    available_retractions,
    check_projection,
    check_retraction,
    register_retraction,
)
from manifold_cl.optim import (
    RiemannianAdamW,
    RiemannianSGD,
    TrainerOptimizer,
    corrected,
    official,
    param_groups,
    riemannian,
)

__all__ = [
    "METHODS",
    "RETRACTIONS",
    "ContinualRunner",
    "EBLoRALinear",
    "LoRALinear",
    "Method",
    "ProtectedSubspace",
    "RestrictedStiefel",
    "Retraction",
    "RiemannianAdamW",
    "RiemannianSGD",
    "RunRecord",
    "SubspaceMemory",
    "Task",
    "TaskStream",
    "TrainerOptimizer",
    "Training",
    "adapters_of",
    "available_retractions",
    "check_projection",
    "check_retraction",
    "corrected",
    "eblora_adapters",
    "export_lora",
    "geometry_metrics",
    "inject_adapters",
    "load_adapters",
    "make_method",
    "merge_adapters",
    "official",
    "param_groups",
    "read_adapters",
    "register_method",
    "register_retraction",
    "riemannian",
    "save_adapters",
]
