r"""
Two tasks, one model
====================

A small network learns two tasks, one after the other: with plain LoRA, with balanced
adapters, and with balanced adapters that avoid the inputs of the first task. Then we
measure each model on both tasks, and analyse the updates. The page runs on one CPU core
in a few seconds and downloads nothing.
"""

# %%
# The tasks
# ---------
# A small network maps a wave of 64 samples to another. The first task is to
# *differentiate* slow waves, the second to *delay* faster ones by an eighth of the
# period. Both have exact answers. The inputs overlap: harmonics five and six occur in
# both tasks, with different answers. There, interference is unavoidable.

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

N, EXAMPLES, TRAINING_STEPS, RANK = 64, 2000, 400, 12
TIME = torch.arange(N) / N


def waves(harmonics, seed, count=EXAMPLES):
    """Random waves of the given harmonics, and their derivatives (per harmonic 1)."""
    random = torch.Generator().manual_seed(seed)
    h = torch.tensor(harmonics, dtype=torch.float32)
    phase = 2 * math.pi * h[:, None] * TIME
    a, b = torch.randn(2, count, len(h), generator=random) / math.sqrt(len(h))
    return a @ phase.sin() + b @ phase.cos(), (a * h) @ phase.cos() - (
        b * h
    ) @ phase.sin()


def differentiate(seed):
    slow, derivative = waves(range(1, 7), seed)
    return slow, derivative / 6


def delay(seed):
    fast, _ = waves(range(5, 15), seed)
    return fast, fast.roll(8, dims=-1)


TASKS = {"differentiate": differentiate, "delay": delay}


class Network(nn.Module):
    """``x + decode(tanh(encode(x)))``, in place of a pre-trained model."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.encode, self.decode = (
            nn.Linear(N, 96, bias=False),
            nn.Linear(96, N, bias=False),
        )
        with torch.no_grad():
            for layer in (self.encode, self.decode):
                draws = torch.randn(layer.weight.shape, generator=random)
                layer.weight.copy_(draws / math.sqrt(layer.in_features))

    def forward(self, x):
        return x + self.decode(torch.tanh(self.encode(x)))


def explained(model, task):
    """Share of the answers' energy that the model gets right, in percent."""
    inputs, answers = task(seed=99)
    with torch.no_grad():
        return 100 * (
            1 - float((model(inputs) - answers).square().sum() / answers.square().sum())
        )


# %%
# Three ways to learn them
# ------------------------
# The training loop is an ordinary one. `inject_adapters` freezes the model and puts an
# adapter around each named layer. `param_groups` pairs parameters with their manifolds.
# `merge_adapters` adds the finished update to the weights and puts the plain layers
# back.

from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RiemannianAdamW,
    inject_adapters,
    merge_adapters,
    param_groups,
)
from manifold_cl.adapters import LoRALinear

LAYERS = ["encode", "decode"]


def fit(model, optimizer, task, seed):
    inputs, answers = task(seed)
    random = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        batch = torch.randint(EXAMPLES, (64,), generator=random)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[batch]), answers[batch]).backward()
        optimizer.step()
        schedule.step()


def layer_inputs(model, task):
    """The inputs of each layer on a task, one column per example."""
    seen = {}
    watch = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.update({name: x[0].T})
        )
        for name in LAYERS
    ]
    with torch.no_grad():
        model(task(seed=1)[0])
    for handle in watch:
        handle.remove()
    return seen


# %%
# Plain LoRA is the baseline. The energy-balanced adapter is one magnitude and two
# orthonormal frames. Its input frame stays orthogonal to a memory, the protected
# directions of earlier tasks. After each task the memory grows until it holds 99 % of
# the energy (squared length) of the layer's inputs. The third run is the control:
# balanced frames without a memory.


def attach(model, kind, memory, seed):
    """Put adapters into the model; return the optimizer that trains them."""
    draws = torch.Generator().manual_seed(seed)
    if kind == "LoRA":
        inject_adapters(
            model,
            LAYERS,
            lambda _, linear: LoRALinear(linear, RANK, generator=draws),
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    inject_adapters(
        model,
        LAYERS,
        lambda name, linear: EBLoRALinear(
            linear,
            RANK,
            complement=memory[name],
            initial_scale=0.1,
            generator=draws,
        ),
    )
    groups = param_groups(model, lr=1e-2, scale_lr=2e-2)
    return RiemannianAdamW(groups, lr=1e-2, weight_decay=0.0)


slow_wave, slow_derivative = (each[:1] for each in differentiate(seed=99))


def learn(kind):
    """Learn both tasks in order; return scores, answers and updates."""
    model = Network()
    memory = {
        name: ProtectedSubspace.empty(model.get_submodule(name).in_features)
        for name in LAYERS
    }
    run = {"scores": [], "answers": [], "updates": {}, "protected": {}}
    for seed, (name, task) in enumerate(TASKS.items()):
        optimizer = attach(model, kind, memory, seed)
        fit(model, optimizer, task, seed=100 + seed)
        run["updates"][name] = merge_adapters(model)
        run["protected"][name] = {layer: space.k for layer, space in memory.items()}
        if kind == "EBLoRA":
            for layer, seen in layer_inputs(model, task).items():
                memory[layer] = memory[layer].extended(seen, energy=0.99)
        run["scores"].append([explained(model, each) for each in TASKS.values()])
        with torch.no_grad():
            run["answers"].append(model(slow_wave)[0])
    return run


runs = {kind: learn(kind) for kind in ("LoRA", "balanced, no memory", "EBLoRA")}

# %%
# While the second task was learned, this many directions of each layer's inputs were
# protected:

print(runs["EBLoRA"]["protected"]["delay"])

# %%
# For the first layer that is 12 of 64, as it must be: sine and cosine of six harmonics.
# The memory found this number from the data. Now we ask each final model for the
# derivative of a slow wave, the task that it learned first:

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)

figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True, layout="constrained")
for panel, (kind, run) in zip(panels, runs.items(), strict=True):
    panel.plot(
        TIME, slow_derivative[0], color="black", linewidth=5, alpha=0.15, label="exact"
    )
    panel.plot(
        TIME, run["answers"][0], color="#0072B2", linewidth=1.4, label="just learned"
    )
    panel.plot(
        TIME,
        run["answers"][1],
        color="#D55E00",
        linewidth=1.4,
        label="after the second task",
    )
    kept, learned = run["scores"][1]
    scores = f"first task {kept:.0f} %, second {learned:.0f} %".replace("-", "−")
    panel.set_title(f"{kind}\n{scores}", loc="left")
    panel.set_xlabel("time (periods)")
panels[0].set_ylabel("derivative (1/6 per period)")
figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
)
figure.suptitle(
    "The first task, before and after learning the second",
    x=0.01,
    ha="left",
    fontweight="bold",
)
plt.show()

# %%
# The protected run keeps its first task. It also shows the price: it learns the second
# a little less well, because the harmonics that both tasks share are protected. Report
# both sides of this trade. MFT is the mean score of tasks just learned, MFN the mean at
# the end, BWT the mean change in between, in percentage points.

from manifold_cl.continual.metrics import bwt, mfn, mft

for kind, run in runs.items():
    a = run["scores"]
    print(f"{kind:20s} MFT {mft(a):5.1f}   MFN {mfn(a):5.1f}   BWT {bwt(a):6.1f}")

# %%
# The updates
# -----------
# The package `analysis` reads adapters as factors, from our folders, from PEFT's, or as
# here from memory. The spectrum of the balanced update is flat by construction. That of
# LoRA falls by a factor of more than two, although the inputs of both tasks have at
# least twelve directions.

from analysis import AdapterSet, interference_table, spectra_panels, spectrum_table

# the factors that ``merge_adapters`` returned
sets = {
    kind: AdapterSet.from_factors(runs[kind]["updates"]) for kind in ("LoRA", "EBLoRA")
}
spectra = spectra_panels(sets)

# %%
# Tables are data frames with one number per row:

tables = {kind: spectrum_table(found) for kind, found in sets.items()}
for kind, table in tables.items():
    chosen = table[
        (table["metric"] == "effective_rank_energy") & (table["update"] == "task")
    ]
    print(
        kind,
        chosen.pivot(index="layer", columns="task", values="value").round(2),
        sep="\n",
        end="\n\n",
    )

# %%
# Of the twelve directions of each adapter, how many are the same in both tasks? The
# overlap is the mean squared cosine of the principal angles between the input
# subspaces; `chance` is its mean for random subspaces.

for kind, found in sets.items():
    rows = interference_table(found)
    rows = rows[(rows["metric"] == "input_overlap") & (rows["layer"] != "total")]
    rows = rows[["layer", "value", "chance"]].round(3)
    print(kind, rows.to_string(index=False), sep="\n", end="\n\n")

# %%
# LoRA's adapters overlap about as much as random subspaces would. Ours overlap far
# less: the directions of the first task are closed to the second.

# %%
# Where to go next
# ----------------
# * The same on a real pre-trained encoder and six real text tasks: ``manifold-cl run
#   --quick``, then open the report.
# * How the method works in full, and how it differs from released code: :doc:`/method`.
# * Where the protected directions come from in a larger model:
#   :doc:`plot_07_growing_memory`.
