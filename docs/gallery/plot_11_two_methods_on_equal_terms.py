r"""
Two methods on equal terms
==========================

For everyone who compares methods of continual fine-tuning. No geometry is needed. Which
method forgets less? To answer, everything else has to be equal: data, order, layers,
rank, steps and precision. A *study* ensures that. This page runs one on real texts that
come with Python, interrupts it, resumes it, and reads the result with its intervals. It
downloads nothing and takes about a minute on two cores. The reference is
:doc:`/studies`.
"""

# %%
# The tasks
# ---------
# A small language model guesses the next byte of a line of text. It was pre-trained on
# Python's manual. It then learns three other kinds of text, one after the other: source
# code, the names of characters, and tables of encodings. A score is the percentage of
# bytes guessed right in held-out lines. The file ``examples/three_texts.py`` of the
# repository defines all this in a hundred lines; :doc:`/your-own` explains such a file.
# The study reads it from its own folder.

import shutil
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import manifold_cl
from analysis import StudyResults, plot_accuracy_matrix
from manifold_cl.study import Study, read_plan

folder = Path(tempfile.mkdtemp())
repository = Path(manifold_cl.__file__).parents[1]
shutil.copy(repository / "examples" / "three_texts.py", folder)

# %%
# One file
# --------
# EBLoRA is compared with plain LoRA: one adapter per task, added to the weights at the
# task's end. The rate of ``eblora`` (``lr=6e-3``, ``scale_lr=2e-2``) and that of
# ``lora`` (``lr=1.4e-3``) are the defaults of the two methods. Each won a search on
# other tasks and a larger model (:doc:`how </decisions/0013-equal-searches>`), and may
# be a poor choice here. ``lora-fast`` has EBLoRA's rate, so that the conclusion does
# not rest on one rate of LoRA.

config = folder / "small.toml"
config.write_text("""
stream = "three_texts.py:texts"   # a function in a file beside this one
reference = "eblora"              # the others are compared with it
rank = 8
seeds = [0, 1, 2]
examples = 400                    # lines per task
threads = 1                       # per run
processes = 2                     # runs at a time

[training]
batch_size = 8

[methods.eblora]

[methods.lora]
method = "sequential_merge"

[methods.lora-fast]
method = "sequential_merge"
lr = 6e-3
""")

plan = read_plan(config)
study = Study(plan, folder / "results")
print(*(cell.name for cell in study.pending()), sep="\n")

# %%
# Those are nine runs, called cells: three methods with three seeds each. A seed decides
# the random start of the adapters and the order of the lines. A wrong file is refused
# before anything runs. The message shows the nearest name.

wrong = folder / "wrong.toml"
wrong.write_text(config.read_text().replace("sequential_merge", "sequential_merged"))
try:
    read_plan(wrong)
except ValueError as error:
    message = str(error).replace(f"{folder}/", "")
    print(textwrap.fill(message, 80))

# %%
# Interruption
# ------------
# Each cell is a process of its own that writes a checkpoint after each task. Here the
# study is stopped as soon as one task has been learned, as Ctrl-C would stop the
# command ``manifold-cl study small.toml``.


def stop_after_one_task(event):
    """Behave like Ctrl-C once some cell is at its second task."""
    if event.kind == "progress" and event.task == 1:
        raise KeyboardInterrupt


try:
    study.run(on_event=stop_after_one_task)
except KeyboardInterrupt:
    print("stopped")
for cell, record in study.records().items():
    print(f"{cell.name}: {record.done} of {len(record.tasks)} tasks, {record.status}")

# %%
# The same call resumes the study. The numbers at the end are those of a study without
# an interruption.

failures = study.run()
assert not failures
complete = [record.status == "complete" for record in study.records().values()]
print(sum(complete), "of", len(plan.cells), "cells are complete")

# %%
# What was forgotten
# ------------------
# The results are files. `analysis` reads them without a model. MFT is the mean score of
# the tasks just after they were learned, MFN that of all tasks at the end, and BWT the
# mean change in between, over all tasks but the last. The interval covers the mean over
# more seeds with 95 % confidence.

results = StudyResults.load(folder / "results")
summary = results.summary().set_index(["label", "figure"])
for label in results.labels:
    print(f"{label:10}", end="")
    for figure in ("mft", "mfn", "bwt"):
        row = summary.loc[(label, figure)]
        half = (row["high"] - row["low"]) / 2
        print(f"  {figure.upper()} {row['mean']:5.1f} ±{half:4.1f}", end="")
    print()

# %%
# The means hide which task was forgotten. In the matrices below, each row is a stage
# and each column is a task, as a mean over the seeds. The first row is the pre-trained
# model. Above the diagonal a task was not yet learned; below the diagonal its score
# shows what was forgotten.

figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
for axes, label in zip(panels, results.labels, strict=True):
    runs = [run for cell, run in results.records.items() if cell.label == label]
    plot_accuracy_matrix(
        np.mean([run.matrix for run in runs], axis=0),
        runs[0].tasks,
        zero_shot=np.mean([run.baseline for run in runs], axis=0),
        limits=(0, 50),
        ax=axes,
    )
    axes.set_title(label)

# %%
# LoRA forgets source code while it learns names, and gets much of it back from the
# tables, because these are Python files too. The score at the end does not show that
# the model was useless for code in between.
#
# Is the difference more than chance?
# -----------------------------------
# Both methods ran with the same seeds, so their differences are compared seed by seed.
# Each row is another method minus EBLoRA, in percentage points.

paired = results.paired(figures=("mft", "mfn", "bwt"))
for row in paired.itertuples():
    decided = "beyond chance" if row.low > 0 or row.high < 0 else "may be chance"
    print(
        f"{row.label:10} {row.figure.upper()} {row.difference:6.1f}, "
        f"interval {row.low:6.1f} to {row.high:5.1f}: {decided}"
    )

# %%
# What protection costs: the directions of earlier tasks are no longer free. This is the
# share of protected input directions after each task, as a mean over layers, and the
# time of one run compared with LoRA's.

capacity = next(
    run.capacity for cell, run in results.records.items() if cell.label == "eblora"
)
print("protected:", *(f"{100 * entry['mean_fraction']:.0f} %" for entry in capacity))
minutes = results.fastest("train_minutes")
print(f"training time: {minutes['eblora'] / minutes['lora-fast']:.1f} times LoRA's")

# %%
# Conclusion and limits
# ---------------------
# On these texts EBLoRA ends with the higher mean score than LoRA at either rate. It
# pays with time, and with a memory that would be full after few further tasks of this
# kind: a layer of this model has only 64 input directions.
#
# The study is small. Three seeds find only large differences. All cells share the test
# lines and one order of the tasks, and no rate was searched for this model. Add seeds
# or an order to the file, and ``manifold-cl study small.toml --extend`` runs only the
# new cells. :doc:`/results` is a study of six tasks and thirteen methods whose options
# won equal searches.

print(textwrap.fill(results.note(), 80))
