r"""
A memory that grows
===================

For everyone who protects earlier tasks and wonders how much room is left. No geometry
is needed. A *memory* holds the protected directions of every layer: the input
directions that matter for the loss of earlier tasks. This page lets one grow over three
kinds of text, in a small language model. It shows how much *energy* (squared length of
the inputs) the memory holds, how many directions are left free, how accurate a sketch
is, and what happens when a layer is full. The background is in :doc:`/subspaces`, all
words are in the :doc:`/glossary`.
"""

# %%
# Three kinds of text, one small model
# ------------------------------------
# The texts come with Python: documentation in prose, source code, and the names of all
# characters. A byte-level transformer with two blocks learns a little of each in a few
# seconds.

import argparse
import inspect
import tempfile
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import nn

from manifold_cl import SubspaceMemory, Task
from manifold_cl.adapters import target_linears
from manifold_cl.continual import (
    Passes,
    grow_memory,
    measure_importance,
    task_losses,
)

names = (unicodedata.name(chr(i), "") for i in range(0x100, 0x3000))
TEXTS = {
    "prose": "\n".join(topics.values()),
    "code": inspect.getsource(argparse),
    "names": "\n".join(filter(None, names)),
}
LENGTH, WIDTH = 64, 64


class TextTask(Task):
    """Guess the next byte of one text; the last tenth of it is held out."""

    def __init__(self, name):
        self.name = name
        data = torch.frombuffer(bytearray(TEXTS[name].encode()), dtype=torch.uint8)
        lines = data[: len(data) // LENGTH * LENGTH].long().reshape(-1, LENGTH)
        cut = len(lines) * 9 // 10
        self.parts = {"train": lines[:cut], "test": lines[cut:]}

    def size(self, split):
        return len(self.parts[split])

    def batches(self, split, *, batch_size, generator=None):
        lines = self.parts[split]
        order = torch.arange(len(lines))
        if generator is not None:
            order = torch.randperm(len(lines), generator=generator)
        yield from lines[order].split(batch_size)

    def loss(self, model, batch):
        logits = model(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def scores(self, model, split="test"):
        with torch.no_grad():
            loss = self.loss(model, self.parts[split][:64])
        return {"certainty": 100 * float((-loss).exp())}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        parts = self.qkv(nn.functional.layer_norm(x, (WIDTH,)))
        q, k, v = (p.unflatten(-1, (4, -1)).transpose(1, 2) for p in parts.chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        inner = self.up(nn.functional.layer_norm(x, (WIDTH,)))
        return x + self.down(nn.functional.gelu(inner))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x):
        hidden = self.byte(x) + self.position.weight[: x.shape[1]]
        return self.head(nn.functional.layer_norm(self.blocks(hidden), (WIDTH,)))


def draw(seed):
    return torch.Generator().manual_seed(seed)


tasks = [TextTask(name) for name in TEXTS]
with torch.random.fork_rng():
    torch.manual_seed(0)
    model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for batches in zip(
    *(task.batches("train", batch_size=8, generator=draw(1)) for task in tasks),
    strict=False,
):
    optimizer.zero_grad()
    sum(t.loss(model, b) for t, b in zip(tasks, batches, strict=True)).backward()
    optimizer.step()
model.requires_grad_(False)
for task in tasks:
    print("{}: {certainty:.0f} % per byte".format(task.name, **task.scores(model)))

# %%
# Importance of input directions
# ------------------------------
# Hooks on the layers collect inputs and output gradients of each batch. The energy of
# the inputs, each weighted by its loss gradient, is concentrated: a part of the
# directions holds nearly all of it. How large that part is differs between layers.

TARGETS = ["qkv", "out", "up", "down"]
layers = target_linears(model, TARGETS)
losses = task_losses(model, tasks[0], examples=128)
importance = dict(measure_importance(layers, losses, source="sensitivity", energy=0.9))

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for colour, short in zip(COLOURS, TARGETS, strict=True):
    for dashes, block in (("-", 0), ("--", 1)):
        energies = torch.linalg.eigvalsh(importance[f"blocks.{block}.{short}"]).flip(0)
        shares = energies.cumsum(0) / energies.sum()
        columns = torch.arange(1, len(shares) + 1) / len(shares)
        label = f"{short}, block {block}"
        axes.plot(columns, shares, dashes, color=colour, label=label)
axes.axhline(0.9, color="#999999", linewidth=0.8)
axes.text(0.99, 0.89, "threshold 0.9", ha="right", va="top", color="#666666")
axes.set(
    title="Energy that the leading directions hold (prose)",
    xlabel="share of the input directions",
    ylabel="share of the energy",
    xlim=(0, 1),
    ylim=(0.4, 1.005),
)
axes.legend(ncols=2, fontsize="small", loc="lower right")
plt.show()

# %%
# Three tasks, one memory
# -----------------------
# `SubspaceMemory` does not change: `grow_memory` returns a new one. It reads a task and
# adds to each layer the fewest columns that bring the held share of the task's energy
# to the threshold. Energy that earlier columns hold counts. The threshold is 0.9 here,
# below the default of 0.97, because a layer of this model has only 64 input directions.
# (A run of ``eblora`` trains and merges adapters in between. Here the model stays the
# same, so that only the memory changes.)

RANK, ENERGY = 8, 0.9
memory = SubspaceMemory.empty({name: la.in_features for name, la in layers.items()})
history = [memory]
for task in tasks:
    memory = grow_memory(
        memory,
        layers,
        task_losses(model, task, examples=128),
        energy=ENERGY,
        rank=RANK,
        task=task.name,
    )
    history.append(memory)
    growth = memory.growth["blocks.1.up"]
    print(
        f"{task.name:>5}, blocks.1.up: {growth.before:.3f} of its energy was held, "
        f"{growth.explained:.3f} after adding {growth.added}; "
        f"{growth.capacity_left} left, {growth.tasks_left:.1f} tasks until full"
    )
print(f"columns are orthonormal to {memory.max_error():.0e}")

# %%
# Left: the share of each text's energy that the memory holds after each task, measured
# on *other* examples than it was built from. The later texts are partly held before
# they are learned, since they share directions with the earlier ones. Right: the share
# of directions that is protected. Each task adds to it; the forecast above estimates
# how many more tasks fit.


def held_energy(memory, task):
    """Mean over layers of the held share, on held-out text."""
    task.parts["train"], rest = task.parts["test"], task.parts["train"]
    batches = task_losses(model, task, examples=64)
    moments = measure_importance(layers, batches, source="sensitivity", energy=1.0)
    shares = [
        float(((m @ memory[name].basis) * memory[name].basis).sum() / m.trace())
        for name, m in moments
    ]
    task.parts["train"] = rest
    return sum(shares) / len(shares)


stages = ["start", *(f"after\n{task.name}" for task in tasks)]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for colour, task in zip(COLOURS, tasks, strict=False):
    shares = [held_energy(memory, task) for memory in history]
    left.plot(stages, shares, "o-", color=colour, label=task.name)
left.axhline(ENERGY, color="#999999", linewidth=0.8)
left.set(title="Energy held, on held-out text", ylabel="share", ylim=(-0.02, 1.02))
for colour, short in zip(COLOURS, TARGETS, strict=True):
    for dashes, block in (("o-", 0), ("s--", 1)):
        shares = [memory.fractions()[f"blocks.{block}.{short}"] for memory in history]
        label = f"{short}, block {block}"
        right.plot(stages, shares, dashes, color=colour, markersize=4, label=label)
right.axhline(1 - RANK / WIDTH, color="#999999", linewidth=0.8)
right.text(0, 1 - RANK / WIDTH + 0.01, "limit for rank 8 (width 64)", color="#666")
right.set(title="Directions protected", ylabel="share", ylim=(-0.02, 1.02))
below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "fontsize": "small"}
left.legend(ncols=3, **below)
right.legend(ncols=4, **below)
plt.show()

# %%
# What a sketch misses
# --------------------
# In a large model, the gradient of a layer's weight is too large to keep. A *sketch* is
# a small matrix in its place: a sum of random projections of the gradient, from which
# its leading directions are found. Further projections measure the energy outside the
# sketch, which is reported. A second pass over the data squares the error. This layer
# is small, so the report can be compared with the complete gradient.

layer = layers["blocks.1.down"]
layer.weight.requires_grad_(True)
total = sum(loss() for loss in losses())
gradient = torch.autograd.grad(total, layer.weight)[0].double()
layer.weight.requires_grad_(False)
exact = torch.linalg.svdvals(gradient).square()
exact = exact.cumsum(0) / exact.sum()

sizes = [2, 4, 8, 16, 32, 60]
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axes.semilogy(sizes, [1 - exact[s - 1] for s in sizes], "k-", label="best possible")
for count, colour in ((1, COLOURS[1]), (2, COLOURS[0])):
    reported, missed = [], []
    for size in sizes:
        passes = Passes(per_sketch=count, size=size, max_size=size)
        ((_, sketch),) = measure_importance(
            {"down": layer},
            losses,
            source="gradient",
            energy=0.01,
            passes=passes,
        )
        basis = torch.linalg.qr(sketch.columns).Q
        held = (gradient @ basis).square().sum() / gradient.square().sum()
        missed.append(1 - float(held))
        reported.append(1 - sketch.captured)
    label = "one pass" if count == 1 else "two passes"
    axes.semilogy(sizes, missed, "-", color=colour, label=f"{label}: missed")
    axes.semilogy(sizes, reported, "o", color=colour, label=f"{label}: reported")
axes.set(
    title="Share of a gradient's energy outside its sketch",
    xlabel="size of the sketch (64 would be all)",
    ylabel="share missed",
)
axes.legend(fontsize="small")
plt.show()

# %%
# A sketch reports a larger error than its directions have. It therefore protects too
# much: far too much with one pass, a little with two. Two passes also come close to the
# best possible sketch of the same size.
#
# A full layer
# ------------
# An adapter of rank 20 needs 20 free input directions, so at most 44 directions of a
# layer of width 64 can be protected. At a threshold of 0.98 the texts need more. With
# ``stop`` the oldest columns stay. With ``evict`` the columns that hold least energy,
# over all tasks, are removed. In both cases the memory lists its full layers, and a
# warning is logged.


def filled(policy):
    memory = SubspaceMemory.empty({name: la.in_features for name, la in layers.items()})
    for task in tasks:
        memory = grow_memory(
            memory,
            layers,
            task_losses(model, task, examples=128),
            energy=0.98,
            rank=20,
            policy=policy,
            task=task.name,
        )
    return memory


for policy in ("stop", "evict"):
    memory = filled(policy)
    growth = memory.growth["blocks.1.up"]
    owners = torch.bincount(memory.columns["blocks.1.up"].origins, minlength=3)
    print(
        f"{policy:>5}: {len(memory.full)} of {len(memory)} layers full; blocks.1.up "
        f"holds {growth.explained:.3f} of the last text, columns of each text: "
        f"{owners.tolist()}"
    )

# %%
# On disk
# -------
# A memory is one file, with its manifest and checksums. It contains the identity of its
# model: names, shapes and a few numbers of every weight. Another model is refused.

with tempfile.TemporaryDirectory() as folder:
    memory.save(folder, energy=0.98)
    print(sorted(path.name for path in Path(folder).iterdir()))
    lazy = SubspaceMemory.load(folder, lazy=True)
    print(lazy.tasks, lazy.shapes()["blocks.0.down"])  # from the header alone
    try:
        SubspaceMemory.load(folder, model=nn.Sequential(nn.Linear(64, 64)))
    except ValueError as error:
        print(str(error)[:88], "…")
