"""One file a method; importing this package registers them all."""

from manifold_cl.continual.methods.balanced import Balanced
from manifold_cl.continual.methods.eblora import EBLoRA
from manifold_cl.continual.methods.gpm import GPM
from manifold_cl.continual.methods.inflora import InfLoRA
from manifold_cl.continual.methods.joint import Joint
from manifold_cl.continual.methods.keeplora import KeepLoRA
from manifold_cl.continual.methods.olora import OLoRA
from manifold_cl.continual.methods.restricted import Restricted
from manifold_cl.continual.methods.sequential import Sequential
from manifold_cl.continual.methods.sequential_merge import SequentialMerge
from manifold_cl.continual.methods.stella_merge import StellaMerge
from manifold_cl.continual.methods.svd_eq import SVDEq
from manifold_cl.continual.methods.zero_shot import ZeroShot

__all__ = [
    "GPM",
    "Balanced",
    "EBLoRA",
    "InfLoRA",
    "Joint",
    "KeepLoRA",
    "OLoRA",
    "Restricted",
    "SVDEq",
    "Sequential",
    "SequentialMerge",
    "StellaMerge",
    "ZeroShot",
]
