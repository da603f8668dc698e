r"""
A language model learns three tasks
===================================

For users of transformers and TRL. No geometry is needed. A small language model learns
three sets of facts, one after the other, in transformers' ``Trainer``. Plain LoRA loses
the first facts while it learns the last. EBLoRA keeps them. Then a run is interrupted
in the middle of a task and resumed. The model has random weights, so nothing is
downloaded; :doc:`/language-models` has the script for a real one.
"""

# %%
# Tasks
# -----
# A task is a name and rows with ``prompt`` and ``completion``, here lists in place of
# JSONL files. The facts are drawn at random, so there is nothing to generalise: the
# test rows are the training rows.

import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from manifold_cl.integrations.transformers import ContinualTrainer
from manifold_cl.streams import causal_lm_tasks

logging.getLogger("transformers").setLevel(logging.ERROR)
NOUNS = ["apple", "rose", "tiger", "river", "stone", "cloud", "bread", "horse"]
NOUNS += ["lemon", "eagle", "piano", "sugar"]
ANSWERS = {
    "colour": ["red", "green", "blue"],
    "size": ["small", "large"],
    "place": ["home", "forest", "sea", "sky"],
}
draw = torch.Generator().manual_seed(0)
data = {}
for name, answers in ANSWERS.items():
    facts = torch.randint(len(answers), (len(NOUNS),), generator=draw).tolist()
    rows = [
        {"prompt": f"which {name} has {noun} ? ", "completion": answers[i]}
        for noun, i in zip(NOUNS, facts, strict=True)
    ]
    data[name] = {"train": rows * 4, "test": rows}
print(data["colour"]["test"][0])

# %%
# A tokenizer of some thirty words and a tiny Llama stand for yours. A function makes
# the model, so that every run starts from the same weights.

WORDS = ["<pad>", "<end>", "<unknown>", *NOUNS, *ANSWERS, "which", "has", "?"]
WORDS += [answer for answers in ANSWERS.values() for answer in answers]
core = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unknown>"))
core.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
)


def tiny_llama():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            num_attention_heads=4,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            **sizes,
        )
    )


# %%
# Two runs
# --------
# `ContinualTrainer` takes the place of ``Trainer``. Per task it prepares the adapters,
# lets the Trainer train them, merges the update, and evaluates all tasks. The answers
# are compared by their likelihood: the answer with the largest one counts. Epochs,
# batches, schedule and checkpoints come from ``TrainingArguments``. The learning rate
# is the method's own.

folder = Path(tempfile.mkdtemp())


def trainer(method, name=None):
    tasks = causal_lm_tasks(data, tokenizer, options=ANSWERS, score_by="likelihood")
    args = TrainingArguments(
        str(folder / (name or method)),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        save_steps=20,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return ContinualTrainer(tiny_llama, tasks, method, args)


records = {}
for method in ("sequential_merge", "eblora"):
    with torch.random.fork_rng():
        records[method] = trainer(method).train()
    metrics = records[method].metrics
    print(method, {key: round(metrics[key], 1) for key in ("mft", "mfn", "bwt")})

# %%
# MFT is the mean score right after learning, MFN the mean at the end, and BWT what the
# earlier tasks lost in between. Each row below is the model after one more task. In the
# column of a task, plain LoRA falls after its row.

plt.rcParams.update({"figure.dpi": 110})
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for ax, (method, record) in zip(axes, records.items(), strict=True):
    matrix = record.matrix()
    ax.imshow(matrix, vmin=0, vmax=100, cmap="Blues")
    for i in range(3):
        for j in range(3):
            shade = "white" if matrix[i, j] > 60 else "black"
            ax.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", color=shade)
    ax.set_xticks(range(3), record.tasks)
    ax.set_yticks(range(3), [f"after {task}" for task in record.tasks])
    ax.set_title(f"{method} (percent right)")
plt.show()

# %%
# Interrupted and resumed
# -----------------------
# A run is stopped in the middle of the second task. ``on_progress`` reports every
# step, and here it raises an error in place of a killed process. The Trainer's last
# checkpoint is in the folder of that task. ``train(resume=True)`` in a new object, as
# in a new process, continues from it. On a CPU in float32 all numbers are those of the
# run that was never interrupted.


def stop(progress):
    if (progress.task, progress.phase, progress.step) == ("size", "train", 30):
        raise KeyboardInterrupt


with torch.random.fork_rng():
    stopped = trainer("eblora", name="stopped")
    stopped.on_progress(stop)
    try:
        stopped.train()
    except KeyboardInterrupt:
        print([path.name for path in stopped.folder.glob("tasks/*/checkpoints/*")])
    resumed = trainer("eblora", name="stopped").train(resume=True)
print("the same losses:", resumed.losses == records["eblora"].losses)
print("the same scores:", resumed.accuracy == records["eblora"].accuracy)

# %%
# The folder is that of any run: ``manifold-cl compare``, ``analyze`` and ``export``
# read it. With ``trainer_class=SFTTrainer`` TRL's trainer does the same, and with
# ``merge="keep"`` the weights never change, as a quantised model needs.
# ``examples/trl_sft_continual.py`` has both.
