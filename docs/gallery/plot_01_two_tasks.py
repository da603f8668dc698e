r"""
Two tasks, one model
====================

For everyone who fine-tunes with torch and knows LoRA. No geometry is needed. A small
model learns two tasks, one after the other. Plain LoRA forgets the first task. An
adapter that avoids the inputs of the first task keeps it. The page needs one CPU core,
about half a minute, and no network.
"""

# %%
# The tasks
# ---------
# A network maps a wave of 64 samples to another wave. The first task is to
# *differentiate* slow waves, the second to *delay* faster waves by an eighth of a
# period. Both have exact answers. The inputs overlap: harmonics five and six occur in
# both tasks, with different answers.

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

SAMPLES, EXAMPLES = 64, 2000
TIME = torch.arange(SAMPLES) / SAMPLES


def waves(harmonics, seed):
    """Random waves of the given harmonics, and their derivatives."""
    random = torch.Generator().manual_seed(seed)
    h = torch.tensor(harmonics, dtype=torch.float32)
    phase = 2 * math.pi * h[:, None] * TIME
    a, b = torch.randn(2, EXAMPLES, len(h), generator=random) / math.sqrt(len(h))
    wave = a @ phase.sin() + b @ phase.cos()
    derivative = (a * h) @ phase.cos() - (b * h) @ phase.sin()
    return wave, derivative


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
        self.encode = nn.Linear(SAMPLES, 96, bias=False)
        self.decode = nn.Linear(96, SAMPLES, bias=False)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in (self.encode, self.decode):
                draws = torch.randn(layer.weight.shape, generator=random)
                layer.weight.copy_(draws / math.sqrt(layer.in_features))

    def forward(self, x):
        return x + self.decode(torch.tanh(self.encode(x)))


# %%
# A score is the share of the answers' squared length that the model gets right, in
# percent. 100 is perfect, 0 is no better than an answer of zeros, and a negative score
# is worse than that.


def score(model, task):
    inputs, answers = task(seed=99)  # not the training data
    with torch.no_grad():
        error = (model(inputs) - answers).square().sum() / answers.square().sum()
    return 100 * (1 - float(error))


def fit(model, optimizer, task, seed, steps=400):
    """An ordinary training loop."""
    inputs, answers = task(seed)
    random = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(EXAMPLES, (64,), generator=random)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[batch]), answers[batch]).backward()
        optimizer.step()
        schedule.step()


# %%
# Plain LoRA
# ----------
# One adapter per task: train it, then add it to the weights. `inject_adapters` freezes
# the model and puts an adapter around each named layer. `merge_adapters` adds the
# finished update to the weights, puts the plain layers back, and returns the update.

from manifold_cl import inject_adapters, merge_adapters
from manifold_cl.adapters import LoRALinear

LAYERS, RANK = ["encode", "decode"], 12


def learn_with_lora(model, task, seed, lr=6e-3):
    draws = torch.Generator().manual_seed(seed)
    inject_adapters(
        model, LAYERS, lambda name, layer: LoRALinear(layer, RANK, generator=draws)
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    fit(model, optimizer, task, seed)
    return merge_adapters(model)


for lr in (6e-3, 1.4e-3):
    model = Network()
    print(f"lr={lr}")
    for seed, (name, task) in enumerate(TASKS.items(), start=1):
        learn_with_lora(model, task, seed, lr)
        scores = [f"{each} {score(model, TASKS[each]):.0f} %" for each in TASKS]
        print(f"  after {name!r}:", ", ".join(scores))

# %%
# At both rates the second task overwrites most of the first. The first rate is that of
# all runs below. The second is LoRA's own default in this library, found by a search on
# real tasks.
#
# An update that leaves old answers as they are
# ---------------------------------------------
# A layer with weight :math:`W` maps an input :math:`x` to :math:`(W + \Delta W)\,x`.
# The old answer remains if :math:`\Delta W x = 0` for the inputs of the first task.
# Those inputs fill few of the 64 input directions: sine and cosine of six harmonics.
# Let the columns of a matrix :math:`F` be these *protected directions*. An adapter with
#
# .. math::
#
#    \Delta W = s\, U V^\top, \qquad V^\top F = 0
#
# then has :math:`\Delta W F = s\, U V^\top F = 0`, whatever it learns. Here :math:`s`
# is one number, the magnitude. :math:`U` and :math:`V` are *frames*: matrices whose
# columns have length one and are orthogonal to each other. So the update has the same
# strength in each of its directions.
#
# The library keeps both properties at every step: `RiemannianAdamW` is AdamW whose step
# stays inside :math:`V^\top V = I, V^\top F = 0`. How it does that is not needed here;
# :doc:`plot_02_the_manifold` shows it.
#
# The memory
# ----------
# A *memory* holds the protected directions of every layer. It starts empty.
# `grow_memory` runs the model over examples of a task and adds directions to each layer
# until they hold a share of the task's *energy*, the squared length of its inputs
# (weighted by how much the loss depends on them). The share is 0.97 here, the default
# of ``manifold-cl run``. A function gives it the losses of a few batches.

from manifold_cl import (
    RiemannianAdamW,
    SubspaceMemory,
    eblora_adapters,
    param_groups,
)
from manifold_cl.adapters import target_linears
from manifold_cl.continual import grow_memory


def batch_losses(model, task, seed):
    """A function that starts a pass over 512 examples: one loss per batch."""
    inputs, answers = (each[:512].split(64) for each in task(seed))

    def one_pass():
        for x, y in zip(inputs, answers, strict=True):
            yield lambda x=x, y=y: nn.functional.mse_loss(model(x), y)

    return one_pass


def learn_with_eblora(model, task, seed, memory):
    draws = torch.Generator().manual_seed(seed)
    make = eblora_adapters(rank=RANK, memory=memory, generator=draws)
    inject_adapters(model, LAYERS, make)
    optimizer = RiemannianAdamW(
        param_groups(model, lr=6e-3, scale_lr=2e-2), weight_decay=0.0
    )
    fit(model, optimizer, task, seed)
    return merge_adapters(model)


model = Network()
memory = SubspaceMemory.empty(target_linears(model, LAYERS))
for seed, (name, task) in enumerate(TASKS.items(), start=1):
    learn_with_eblora(model, task, seed, memory)
    memory = grow_memory(
        memory,
        target_linears(model, LAYERS),
        batch_losses(model, task, seed),
        energy=0.97,
        rank=RANK,
        task=name,
    )
    scores = [f"{each} {score(model, TASKS[each]):.0f} %" for each in TASKS]
    print(f"after {name!r}:", ", ".join(scores))
    print("  protected directions:", {layer: memory[layer].k for layer in LAYERS})

# %%
# The first task is kept, and the second is learned almost as well. The first layer
# protects 12 directions after the first task. That is the exact number, sine and cosine
# of six harmonics, and the memory found it from the data.
#
# Three ways, side by side
# ------------------------
# Is it the frames or the memory that helps? The third run decides: the same adapters,
# with a memory that stays empty. All runs use the same rank, steps, data and learning
# rate. (``lr=6e-3`` for the frames and ``scale_lr=2e-2`` for the magnitudes are
# EBLoRA's defaults: :doc:`/choosing`.)

slow_wave, slow_derivative = (each[:1] for each in differentiate(seed=99))


def learn_both(kind):
    """Scores and answers after each task, and the two updates."""
    model = Network()
    memory = SubspaceMemory.empty(target_linears(model, LAYERS))
    run = {"scores": [], "answers": [], "updates": {}}
    for seed, (name, task) in enumerate(TASKS.items(), start=1):
        if kind == "LoRA":
            update = learn_with_lora(model, task, seed)
        else:
            update = learn_with_eblora(model, task, seed, memory)
        if kind == "EBLoRA":
            layers = target_linears(model, LAYERS)
            losses = batch_losses(model, task, seed)
            memory = grow_memory(
                memory, layers, losses, energy=0.97, rank=RANK, task=name
            )
        run["updates"][name] = update
        run["scores"].append([score(model, each) for each in TASKS.values()])
        with torch.no_grad():
            run["answers"].append(model(slow_wave)[0])
    return run


runs = {kind: learn_both(kind) for kind in ("LoRA", "EBLoRA, no memory", "EBLoRA")}

# %%
# We ask each final model for the derivative of a slow wave, the task that it learned
# first.

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
    first, second = run["scores"][1]
    panel.set_title(
        f"{kind}\nfirst task {first:.0f} %, second {second:.0f} %", loc="left"
    )
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
# Only the run with a memory keeps its first task. It also shows the price: it learns
# the second a little less well, because the harmonics that both tasks share are
# protected. Report both sides of this trade with three numbers. MFT is the mean score
# of the tasks just after they were learned, MFN the mean at the end, and BWT the mean
# change in between, in percentage points.

from manifold_cl.continual.metrics import bwt, mfn, mft

print(f"{'':18} {'MFT':>6} {'MFN':>6} {'BWT':>6}")
for kind, run in runs.items():
    a = run["scores"]  # row: after which task; column: score of which task
    print(f"{kind:18} {mft(a):6.1f} {mfn(a):6.1f} {bwt(a):6.1f}")

# %%
# The updates
# -----------
# How much does the second update change what the first layer answers to old inputs?

inputs = differentiate(seed=99)[0]
weight = Network().encode.weight.detach()
for kind, run in runs.items():
    change = inputs @ run["updates"]["delay"]["encode"].delta_weight().T
    share = float(change.norm() / (inputs @ weight.T).norm())
    print(f"{kind:18} {100 * share:.2g} % of the layer's output")

# %%
# The package `analysis` reads updates as factors, here from memory, usually from files
# of any LoRA library. `interference_table` compares the updates of two tasks. Of the
# twelve input directions of each adapter, how many are the same in both tasks? The
# overlap is 1 if all are the same and 0 if none is; ``chance`` is its mean for random
# directions.

from analysis import AdapterSet, interference_table, spectra_panels

sets = {kind: AdapterSet.from_factors(run["updates"]) for kind, run in runs.items()}
for kind, updates in sets.items():
    rows = interference_table(updates)
    rows = rows[(rows["metric"] == "input_overlap") & (rows["layer"] != "total")]
    rows = rows[["layer", "value", "chance"]].round(3)
    print(kind, rows.to_string(index=False), sep="\n", end="\n\n")

# %%
# LoRA's updates overlap about as much as random directions would. Those of EBLoRA
# overlap far less: the input directions of the first task are closed to the second. The
# small rest is where the first update has directions that its task does not use.
#
# The strengths of an update's directions are its singular values. EBLoRA's are equal by
# construction. LoRA's fall by a factor of two and more, although the inputs of both
# tasks have at least twelve directions.

spectra = spectra_panels({kind: sets[kind] for kind in ("LoRA", "EBLoRA")})

# %%
# Where to go next
# ----------------
# * The same with your model and your tasks: :doc:`/your-own`.
# * The same on a real pre-trained encoder and real text tasks: ``manifold-cl run
#   --quick``, then open the report.
# * What a memory of a larger model holds: :doc:`plot_07_growing_memory`.
# * Every word of this page with its letter and picture: :doc:`/glossary`.
