r"""
Spectra and interference of LoRA folders
========================================

For readers who have adapters, of any origin, and questions about them. No geometry is
needed. Every figure of `analysis`, for four tasks with one LoRA folder each: the
spectra of the updates (their singular values), their interference, its comparison with
chance, and an intervention that tests a cause. :doc:`/which-number` says which number
answers which question, :doc:`/analysis` defines each.
"""

# %%
# The adapters
# ------------
# Any PEFT folders can be analysed. To have some with known scores, we train a small
# residual network on four classification tasks, one after the other, with plain LoRA,
# and repeat this with three seeds. The tasks share the classes, and their inputs have
# different directions. The rate of LoRA, 1e-2, is one that learns each task in 120
# steps; it is no recommendation.

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
    percent = []
    for task in range(len(TASKS)):
        x, labels = data(task, seed, split=1)
        percent.append(100 * (model(x).argmax(-1) == labels).float().mean().item())
    return percent


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
# Write the first run's updates as PEFT folders, one per task. The analysis then reads
# only these files, without a model, and each tensor when it is needed.

from analysis import AdapterSet

folder = Path(tempfile.mkdtemp()) / "adapters"
AdapterSet.from_factors(runs[0][1]).save(folder)
print(*sorted(path.name for path in folder.iterdir()))
adapters = AdapterSet.load(folder)
print(adapters)

# %%
# Spectra
# -------
# One line per task: singular values relative to a flat spectrum of the same norm. The
# line is the median over layers, the band goes from the 10th to the 90th percentile.

from analysis import plot_spectra, singular_values

values = singular_values(adapters)
spectra = plot_spectra(values)

# %%
# One task, with one line per layer:

fan = plot_spectra(values, task="east", label="east")

# %%
# Where in the model are spectra balanced? The entropy of the squared singular values,
# divided by ln r, is 1 if all are equal and 0 if one carries everything. Blocks by
# modules:

from analysis import plot_entropy_map, spectrum_table

table = spectrum_table(adapters)
entropy = plot_entropy_map(table)

# %%
# The table has one number per row, and the names state their convention:

of_east = table[(table["task"] == "east") & (table["update"] == "task")]
print(of_east.groupby("metric", sort=False)["value"].mean().round(3).to_string())

# %%
# Interference, and chance
# ------------------------
# Every pair of tasks, in every layer. The alignment is the cosine of two updates: below
# 0 the later one undoes the earlier one, above 0 it adds to it.

from analysis import against_chance, interference_table, plot_interference

interference = interference_table(adapters)
alignment = plot_interference(interference, metric="alignment")

# %%
# The share of a later update's energy, its squared singular values, that acts on input
# directions of an earlier update (row: later, column: earlier). The colour scale marks
# the value for random subspaces of the same dimensions.

backward = plot_interference(interference, metric="backward")

# %%
# Is that more than chance? Each number is compared with that of updates with the same
# spectra in random directions. The z-score is the distance from chance in standard
# deviations. The p-values are corrected over the layers.

tested = against_chance(interference)
total = tested[tested["layer"] == "total"].groupby("metric", sort=False)
print(total[["value", "chance", "z"]].mean().round(3).to_string())
layers = tested[tested["layer"] != "total"]
share = (layers["p_holm"] < 0.05).groupby(layers["metric"], sort=False).mean()
print("\nshare of layers and pairs with p below 0.05\n" + share.round(2).to_string())

# %%
# The principal angles between the subspaces of two updates, the smallest first, on the
# band of random subspaces. Angles below the band are directions that pairs of tasks
# share.

from analysis import plot_principal_angles

angles = plot_principal_angles(adapters, side="output")

# %%
# A protected subspace
# --------------------
# Which part of later updates acts on the inputs of the first task? We protect, for the
# measurement only, the leading directions of each layer's inputs on its data. Training
# did not use them, so the result is not zero by construction.

from analysis import input_covariances, plot_leakage

model, _, _ = runs[0]
moments = input_covariances(model, adapters.layers, [data(0, 0)[0]])
protected = {
    layer: torch.linalg.eigh(moment).eigenvectors[:, -8:].float()
    for layer, moment in moments.items()
}
leaks = interference_table(adapters, protected=protected)
leakage = plot_leakage(leaks)

# %%
# The same for all input directions, each weighted by its energy in the data of the
# first task. The drift is 1 for an update that treats these inputs like white noise.

drifts = interference_table(adapters, covariances={"north": moments})
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
# The change of earlier tasks by later ones, one line per seed:

forgetting = plot_forgetting(records)

# %%
# If eight new directions per task were protected, this share of all directions would be
# protected after each task:

capacity = plot_capacity({"eight per task": records[0]})

# %%
# Does imbalance predict forgetting?
# ----------------------------------
# One point per task and seed. The line is a fit, and the band is Student's band of the
# line. ρ and p come from a permutation test that shuffles within seeds only.

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
# Nine points of one small model prove nothing. An intervention is a better test.
#
# A test of the cause
# -------------------
# Subtract the last update from the final model, change its spectrum at the same norm,
# add it again, and measure how the outputs for the first task change.

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
# The numbers are KL divergences in nats of the outputs from those before the last
# update. On the first task's data this is forgetting, on the last task's data it is
# learning. Read the two columns together: a version that forgets less but also learns
# less has gained nothing.
#
# The same from the command line, with all figures in one page::
#
#     manifold-cl analyze adapters/ --out report/ --fail-if 'entropy_min<0.3'
