r"""
Spectra and interference of LoRA folders
========================================

Four tasks, one LoRA folder each, and every figure of `analysis`: what the updates look
like, how they meet, what chance would do, and an intervention that tests a cause.
What each number means is on :doc:`/analysis`.
"""

# %%
# Some adapters to look at
# ------------------------
# Any PEFT folders will do. To have some with known scores, we train a small residual
# network on four classification tasks, one after the other, with plain LoRA. The tasks
# share the classes but live in different directions of the input. Three seeds.

# sphinx_gallery_thumbnail_number = 1
import tempfile
from pathlib import Path

import torch
from torch import nn

from manifold_cl import inject_adapters, merge_adapters
from manifold_cl.adapters import LoRALinear

TASKS = ("north", "east", "south", "west")
WIDTH, CLASSES, RANK, STEPS = 48, 6, 8, 120


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [
            nn.ModuleDict({"up": nn.Linear(WIDTH, 96), "down": nn.Linear(96, WIDTH)})
            for _ in range(4)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


def data(task, seed, count=400, split=0):
    """Inputs in twelve directions of the task's own, classes around centres."""
    fixed = torch.Generator().manual_seed(1000 * seed + task)
    frame = torch.linalg.qr(torch.randn(WIDTH, 12, generator=fixed)).Q
    centres = 2.0 * torch.randn(CLASSES, 12, generator=fixed)
    draw = torch.Generator().manual_seed(10_000 * seed + 10 * task + split)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    inside = centres[labels] + 0.8 * torch.randn(count, 12, generator=draw)
    noise = 0.1 * torch.randn(count, WIDTH, generator=draw)
    return inside @ frame.T + noise, labels


def scores(model, seed):
    model.eval()
    found = []
    for task in range(len(TASKS)):
        x, labels = data(task, seed, split=1)
        found.append(100 * (model(x).argmax(-1) == labels).float().mean().item())
    return found


def learn(seed):
    """The updates of every task, and scores before and after each of them."""
    torch.manual_seed(seed)
    model, updates = Net(), {}
    table = [scores(model, seed)]
    for number, task in enumerate(TASKS):
        inject_adapters(
            model, ["up", "down"], lambda name, linear: LoRALinear(linear, RANK)
        )
        for name, parameter in model.named_parameters():
            if name.endswith("right"):
                nn.init.normal_(parameter, std=WIDTH**-0.5)
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(chosen, lr=1e-2)
        x, labels = data(number, seed)
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        updates[task] = merge_adapters(model)
        table.append(scores(model, seed))
    return model, updates, table


runs = [learn(seed) for seed in range(3)]

# %%
# Write the first run's updates as PEFT folders, one a task. From here on only files are
# read: lazily, without a model.

from analysis import AdapterSet

folder = Path(tempfile.mkdtemp()) / "adapters"
AdapterSet.from_factors(runs[0][1]).save(folder)
print(*sorted(path.name for path in folder.iterdir()))
adapters = AdapterSet.load(folder)
print(adapters)

# %%
# Spectra
# -------
# One line a task: singular values, median over layers with a band from the 10th to the
# 90th percentile, over the height that a flat spectrum of the same norm would have.

from analysis import plot_spectra, singular_values

values = singular_values(adapters)
spectra = plot_spectra(values)

# %%
# One task as a fan of all its layers:

fan = plot_spectra(values, task="east", label="east")

# %%
# Where in the model are spectra balanced? Entropy over ln r, blocks by modules:

from analysis import plot_entropy_map, spectrum_table

table = spectrum_table(adapters)
entropy = plot_entropy_map(table)

# %%
# The table is tidy, and names say which convention they follow:

of_east = table[(table["task"] == "east") & (table["update"] == "task")]
print(of_east.groupby("metric", sort=False)["value"].mean().round(3).to_string())

# %%
# Interference, and chance
# ------------------------
# Every pair of tasks, every layer. The scale marks what random subspaces of these
# dimensions would share.

from analysis import against_chance, interference_table, plot_interference

meetings = interference_table(adapters)
alignment = plot_interference(meetings, metric="alignment")

# %%
# What a later update (row) puts on the inputs of an earlier one (column):

backward = plot_interference(meetings, metric="backward")

# %%
# z-scores and p-values against updates with the same spectra in random directions,
# corrected over the layers:

tested = against_chance(meetings)
total = tested[tested["layer"] == "total"].groupby("metric", sort=False)
print(total[["value", "chance", "z"]].mean().round(3).to_string())
layers = tested[tested["layer"] != "total"]
share = (layers["p_holm"] < 0.05).groupby(layers["metric"], sort=False).mean()
print("\nshare of layers and pairs that stand out\n" + share.round(2).to_string())

# %%
# The principal angles behind the overlap, on the band of random subspaces. The first
# angles below the band are directions that pairs of tasks share.

from analysis import plot_principal_angles

angles = plot_principal_angles(adapters, side="output")

# %%
# A protected subspace
# --------------------
# Which part of later updates acts on what the first task needs? Take the leading
# directions of the inputs that each layer sees on its data. They are no part of the
# training, so the answer is not zero by construction.

from analysis import input_covariances, plot_leakage

model, _, _ = runs[0]
seen = input_covariances(model, adapters.layers, [data(0, 0)[0]])
protected = {
    layer: torch.linalg.eigh(moment).eigenvectors[:, -8:].float()
    for layer, moment in seen.items()
}
leaks = interference_table(adapters, protected=protected)
leakage = plot_leakage(leaks)

# %%
# The same with whole second moments, not a cut at eight directions:

drifts = interference_table(adapters, covariances={"north": seen})
drift = drifts[(drifts["metric"] == "activation_drift") & (drifts["layer"] == "total")]
print(drift[["task_a", "task_b", "value", "chance"]].round(2).to_string(index=False))

# %%
# Scores
# ------
# A run of ``manifold-cl run`` leaves a record that `Record.load` reads. Here we make
# one from the scores above.

import numpy as np

from analysis import Record, plot_accuracy_matrix, plot_forgetting, plot_imbalance
from analysis.plots import plot_capacity


def as_record(seed, table):
    capacity = [{"mean_fraction": 8 * k / 96, "max_fraction": 8 * k / WIDTH} for k in
                range(1, 5)]  # fmt: skip
    return Record(
        folder=folder,
        name=f"seed {seed}",
        method="LoRA",
        stream="toy",
        status="complete",
        tasks=TASKS,
        zero_shot={"accuracy": np.array(table[0])},
        accuracy={"accuracy": np.array(table[1:])},
        primary="accuracy",
        metrics={},
        config={},
        capacity=tuple(capacity),
    )


records = [as_record(seed, table) for seed, (_, _, table) in enumerate(runs)]
matrix = plot_accuracy_matrix(records[0].matrix, TASKS, zero_shot=records[0].baseline)

# %%
# What later tasks did to earlier ones, a line a seed:

forgetting = plot_forgetting(records)

# %%
# If eight new directions a task were closed to later ones, this is how the room for
# them would go:

capacity = plot_capacity({"eight a task": records[0]})

# %%
# Does imbalance predict forgetting?
# ----------------------------------
# One point a task and seed. The line is a fit, the band its bootstrap interval; ρ and p
# come from a permutation test that shuffles within seeds only.

import pandas as pd

rows = []
for record, (_, updates, _) in zip(records, runs, strict=True):
    spectrum = spectrum_table(AdapterSet.from_factors(updates))
    own = spectrum[spectrum["update"] == "task"]
    own = own[own["metric"] == "entropy_energy_normalized"]
    balance = own.groupby("task")["value"].mean()
    lost = record.matrix.diagonal() - record.matrix[-1]
    for task, points in zip(TASKS[:-1], lost[:-1], strict=True):
        rows.append((record.name, task, 1 - balance[task], points))
columns = ["run", "task", "imbalance", "forgetting"]
scatter = plot_imbalance(pd.DataFrame(rows, columns=columns))

# %%
# Nine points of one toy are no argument either way. An intervention is a better one.
#
# A test of the cause
# -------------------
# Take the last update off the final model, change its spectrum at the same norm, put it
# back, and see what the outputs for the first task do.

from analysis import flattened, functional_drift, rotated_away, sharpened

last = AdapterSet.from_factors({"west": runs[0][1]["west"]})
with torch.no_grad():
    for _, layer, left, right in last:
        model.get_submodule(layer).weight.sub_(left @ right.T)
versions = {
    "sharpened": sharpened(last, 1.0),
    "as trained": last,
    "flattened": flattened(last, 1.0),
    "rotated away": rotated_away(last, protected),
}
batches = {"north": [data(0, 0, split=1)[0]], "west": [data(3, 0, split=1)[0]]}
measured = {
    name: functional_drift(model, version, batches).pivot(
        index="data", columns="metric", values="value"
    )["kl"]
    for name, version in versions.items()
}
print(pd.DataFrame(measured).T.round(3).to_string())

# %%
# KL divergence in nats of the outputs from those before the last update: on the first
# task's data it is damage, on the last task's it is learning. Read the two columns
# together: a version that damages less but also teaches less has gained nothing.
#
# The same from the command line, with all figures in one page::
#
#     manifold-cl analyze adapters/ --out report/ --fail-if 'entropy_min<0.3'
