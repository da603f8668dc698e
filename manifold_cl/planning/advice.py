"""Changes that need less memory, with what each saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from manifold_cl.continual.methods.registry import option_names
from manifold_cl.planning.lines import MemoryPlan

SMALL = 0.01
"""Share of the peak below which a saving is not worth a line."""
SHARDED = ("base weights", "factors", "gradients", "moments", "step scratch")
"""Lines that devices share."""
OF_THE_RANK = ("factors", "gradients", "moments")


@dataclass(frozen=True)
class Saving:
    """A change, how to make it, and about how many bytes of the training total it saves per device."""

    change: str
    how: str
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"change": self.change, "how": self.how, "bytes": self.nbytes}


def savings(
    plan: MemoryPlan, *, recomputed: int | None, shared: int, widest: tuple[int, int, int], stacked: int
) -> list[Saving]:
    """The changes worth making, the largest saving first.

    Args:
        plan: of the present setup.
        recomputed: activations with checkpointing; None where it is on already.
        shared: bytes of the bases where layers that receive one input share theirs.
        widest: the largest number of inputs of a layer, the number of such layers, and bytes of their bases.
        stacked: bytes of the copies of bases in the optimizer.
    """
    setup: Mapping[str, Any] = plan.setup
    activations, bases = plan["activations"], plan["protected bases"]
    found = [
        Saving("halve the batch, and accumulate two", "--batch · gradient_accumulation_steps=2", activations // 2),
        Saving(
            "twice as many devices",
            "--devices · processes of accelerate launch",
            sum(plan[name] for name in SHARDED) // 2 - plan["gathered weights"],
        ),
        Saving("halve the rank", "--rank · rank=", sum(plan[name] for name in OF_THE_RANK) // 2),
        Saving("protect half as many directions", "--protected · a lower energy=", (bases + stacked) // 2),
    ]
    if recomputed is not None:
        found.append(
            Saving("recompute activations", "--checkpointing · gradient_checkpointing=True", activations - recomputed)
        )
    if "shared_inputs" in option_names(setup["method"]):
        found.append(
            Saving(
                "one basis per input, not per layer", "--set shared_inputs=true · shared_inputs=True", bases - shared
            )
        )
    if setup["dtype"] == str(torch.float32).removeprefix("torch."):
        found.append(
            Saving("load the base in bfloat16", "--dtype bfloat16 · dtype=torch.bfloat16", plan["base weights"] // 2)
        )
    n, count, nbytes = widest
    if nbytes < bases:  # layers of one width leave nothing to choose
        own = nbytes + stacked * nbytes // max(bases, 1)
        found.append(
            Saving(f"leave out the {count} layers with {n} inputs", "--targets · targets, target_modules", own)
        )
    worth = [saving for saving in found if saving.nbytes > SMALL * plan.peak]
    return sorted(worth, key=lambda saving: -saving.nbytes)
