"""Plain LoRA under spectral steps: Muon on each factor, and the pairwise step whose length is that of the product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.adapters import adapters_of
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.methods.bases import AdapterMethod, ProtectingMethod
from manifold_cl.continual.methods.factor_optimizers import MuonOnFactors, PairMuon
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import parse_sources
from manifold_cl.continual.validation import one_of, option
from manifold_cl.rules import validate_number, validate_share


@dataclass
class LoRAMuon(SequentialMerge):
    """`SequentialMerge` under `torch.optim.Muon`: every step of a factor has nearly equal singular values.

    Nothing is protected. The output factor starts at zero, so that the first step moves it alone. Both factors are
    tall here, (m, r) and (n, r), and ``adjust_lr_fn`` depends on the shape. ``"match_rms_adamw"`` multiplies ``lr`` by
    0.2 √m and 0.2 √n, whatever the orientation. ``"original"`` multiplies it by √(m/r) and √(n/r); for an input factor
    that is stored as (r, n) the second one would be 1.

    Source: jordan2024muon for the optimizer, liu2025muon for the adjustment. arXiv 2609.24678 reports the method. Its
    settings are not known to us, so orientation, momentum and rates are ours (docs/method.md, "Spectral steps").

    Args:
        rank: r.
        alpha: numerator of the scaling alpha / r.
        lr: before the adjustment.
        momentum: decay of the average of gradients, with Nesterov's correction.
        adjust_lr_fn: ``"match_rms_adamw"`` or ``"original"``, as in `torch.optim.Muon`.
    """

    name = "lora_muon"

    lr: float = 1.4e-3
    momentum: float = option(0.95, partial(validate_share, zero=True, one=False))
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = option(
        "match_rms_adamw", one_of("match_rms_adamw", "original")
    )

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Muon without weight decay over all factors; AdamW for groups that are added."""
        factors = [factor for adapter in adapters_of(model).values() for factor in (adapter.left, adapter.right)]
        options = {"momentum": self.momentum, "adjust_lr_fn": self.adjust_lr_fn, "weight_decay": 0.0}
        return MuonOnFactors(factors, lr=self.lr, **options)


@dataclass
class LoRAMuonOGD(ProtectingMethod, AdapterMethod):
    """Plain LoRA under `PairMuon`, the input factor outside the protected directions: ``ΔW F = 0`` at every step.

    Each task starts from a random input factor off the memory and a zero output factor. It is merged at its end, and
    the memory grows by the energy rule, as that of `EBLoRA`.

    Source: cesista2026loramuonogd poses the problem with protected directions on both sides and solves it by
    multipliers. With input directions alone it has the closed form of `PairMuon`. That form is ours, and so are all
    settings (docs/method.md, "Spectral steps").

    Args:
        rank: r.
        alpha: numerator of the scaling alpha / r.
        lr: spectral length of a step of the product of the factors; ΔW moves by alpha / r times that.
        energy: share of each task's energy that the memory must hold, in (0, 1].
        statistic_examples: training examples for the memory.
        source: what the memory protects, as in `EBLoRA`.
        momentum: decay of the average of gradients.
        weight_decay: of the product of the factors, decoupled.
    """

    name = "lora_muon_ogd"

    lr: float = 1.3e-3
    source: str = option("sensitivity", lambda _, source: parse_sources(source))
    momentum: float = option(0.95, partial(validate_share, zero=True, one=False))
    weight_decay: float = option(0.0, partial(validate_number, least=0.0))

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that start at ``ΔW = 0``, their input factors outside the memory."""
        memory = self.open_memory(target_linears(model, stage.targets))
        for name, adapter in self.inject_lora(model, stage).items():
            adapter.right.copy_(memory[name].project_out(adapter.right))

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`PairMuon` over all adapters; AdamW for groups that are added."""
        assert self.memory is not None
        adapters = adapters_of(model)
        return PairMuon(
            [(adapter.left, adapter.right) for adapter in adapters.values()],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            protected=[self.memory[name] for name in adapters],
        )

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the protected directions of this task."""
        super().end_task(model, stage)
        self.grow_memory(model, stage)
