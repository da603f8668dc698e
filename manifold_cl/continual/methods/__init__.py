"""Methods: one file per method and its variants, and the registry of them all."""

from typing import TYPE_CHECKING

from manifold_cl.continual.methods.registry import METHODS, make_method, register_method
from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.continual.methods.eblora import Balanced, Best, EBLoRA, Restricted
    from manifold_cl.continual.methods.factorial import Factorial
    from manifold_cl.continual.methods.gpm import GPM
    from manifold_cl.continual.methods.inflora import InfLoRA
    from manifold_cl.continual.methods.joint import Joint, ZeroShot
    from manifold_cl.continual.methods.keeplora import KeepLoRA
    from manifold_cl.continual.methods.lora_muon import LoRAMuon, LoRAMuonOGD
    from manifold_cl.continual.methods.olora import OLoRA
    from manifold_cl.continual.methods.sequential import Sequential, SequentialMerge
    from manifold_cl.continual.methods.stella_merge import StellaMerge
    from manifold_cl.continual.methods.svd_eq import SVDEq
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "GPM",
    "METHODS",
    "Balanced",
    "Best",
    "EBLoRA",
    "Factorial",
    "InfLoRA",
    "Joint",
    "KeepLoRA",
    "LoRAMuon",
    "LoRAMuonOGD",
    "OLoRA",
    "Restricted",
    "SVDEq",
    "Sequential",
    "SequentialMerge",
    "StellaMerge",
    "ZeroShot",
    "make_method",
    "register_method",
]
