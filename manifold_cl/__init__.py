"""Geometry-first low-rank continual adaptation.

Updates ``ΔW = s · U Vᵀ`` with orthonormal directions and one magnitude, whose input side stays orthogonal to what
earlier tasks use: the restricted Stiefel manifold ``{V : VᵀV = I, FᵀV = 0}``.
"""

from typing import TYPE_CHECKING

from manifold_cl._version import __version__ as __version__
from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.adapters import (
        EBLoRALinear,
        adapters_of,
        eblora_adapters,
        export_lora,
        inject_adapters,
        load_adapters,
        merge_adapters,
        protect,
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
        grow_memory,
        register_method,
        searched_rates,
        start_from_task,
        task_losses,
    )
    from manifold_cl.geometry import (
        RETRACTIONS,
        ProtectedSubspace,
        RestrictedStiefel,
        Retraction,
        check_retraction,
        register_retraction,
    )
    from manifold_cl.optim import (
        RiemannianAdamW,
        RiemannianSGD,
        TrainerOptimizer,
        param_groups,
        riemannian,
    )
    from manifold_cl.planning import memory_plan
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "METHODS",
    "RETRACTIONS",
    "ContinualRunner",
    "EBLoRALinear",
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
    "adapters_of",
    "check_retraction",
    "eblora_adapters",
    "export_lora",
    "grow_memory",
    "inject_adapters",
    "load_adapters",
    "memory_plan",
    "merge_adapters",
    "param_groups",
    "protect",
    "register_method",
    "register_retraction",
    "riemannian",
    "save_adapters",
    "searched_rates",
    "start_from_task",
    "task_losses",
]
