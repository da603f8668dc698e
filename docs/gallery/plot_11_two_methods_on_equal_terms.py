r"""
Two methods on equal terms
==========================

Which method forgets less? To answer, everything else has to be equal: data, order,
layers, rank, steps, precision, and the search for the rates. A *study* ensures that.
This page runs one on three real tasks, interrupts it, resumes it, and shows what two
methods forgot, task by task. The reference is :doc:`/studies`.
"""

# %%
# One file
# --------
# Three short tasks on a real sentence encoder: kinds of nouns, topics of newswire, and
# authors of tweets. The first method is EBLoRA, the second its control: one plain LoRA
# adapter per task, merged. Nothing else differs, and no option is given, so both use
# their defaults, which won searches on other tasks
# (:doc:`how </decisions/0013-equal-searches>`).

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from analysis import StudyResults, plot_accuracy_matrix
from manifold_cl.study import Study, read_plan

folder = Path(tempfile.mkdtemp())
config = folder / "small.toml"
config.write_text("""
stream = "text-three"
reference = "eblora"
rank = 16
seeds = [0]
threads = 1
processes = 2

[methods.eblora]

[methods.sequential_merge]
""")

plan = read_plan(config)
study = Study(plan, folder / "results")
for cell in study.pending():
    print(cell.name)

# %%
# A wrong file is refused before anything runs. The message shows the nearest name.

wrong = folder / "wrong.toml"
wrong.write_text(config.read_text().replace("sequential_merge", "sequential_merged"))
try:
    read_plan(wrong)
except ValueError as error:
    print(error)

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
for cell, record in study.records().items():
    print(f"{cell.name}: {record.done} of {len(record.tasks)} tasks, {record.status}")

# %%
# What was forgotten
# ------------------
# The results are files. `analysis` reads them without a model.

results = StudyResults.load(folder / "results")
table = results.summary().pivot(index="label", columns="figure", values="mean")
shown = ["zero_shot", "mft", "mfn", "bwt", "forgetting"]
print(table.loc[list(results.labels), shown].round(1).to_string())

# %%
# MFT is the mean score of each task just after it was learned, MFN that of all tasks at
# the end. A method that forgets has the second below the first. BWT is the mean
# difference over all tasks but the last.
#
# The means hide which task was forgotten. In the matrices below, each row is a stage
# and each column is a task. Above the diagonal the task was not yet learned; below the
# diagonal its score shows what was forgotten.

figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
for axes, label in zip(panels, results.labels, strict=True):
    record = next(run for cell, run in results.records.items() if cell.label == label)
    plot_accuracy_matrix(
        record.matrix, record.tasks, zero_shot=record.baseline, limits=(0, 100), ax=axes
    )
    axes.set_title(label)

# %%
# The same as a table: what each earlier task lost between the moment it was learned and
# the end.

tasks = list(plan.orders["default"])
scores = results.accuracy().query("score == 'known'")
learned = scores[scores["after"] == scores["position"]]
at_the_end = scores[scores["after"] == len(tasks)]
lost = learned.set_index(["label", "task"])["value"].sub(
    at_the_end.set_index(["label", "task"])["value"]
)
print(lost.unstack().loc[list(results.labels), tasks[:-1]].round(1).to_string())

# %%
# Limits
# ------
# This is one seed with a hundred test texts per task, so one score has a standard error
# of up to five points. It proves nothing. Add seeds to the file, and ``manifold-cl
# study --extend`` runs only those; the report then has intervals and paired tests.
# :doc:`/results` is a study of six tasks and all methods with three seeds.

print(results.note())
