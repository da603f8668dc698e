"""One file a method; importing this package registers them all."""

from manifold_cl.continual.methods.eblora import EBLoRA
from manifold_cl.continual.methods.sequential import Sequential
from manifold_cl.continual.methods.zero_shot import ZeroShot

__all__ = ["EBLoRA", "Sequential", "ZeroShot"]
