r"""
Balanced adapters in PEFT
=========================

For users of PEFT. No geometry is needed. Two tasks learned one after the other through
``get_peft_model``, the second outside the input directions of the first. Then the
files: saved, read again to the same bits, and exported as plain LoRA for other
programs. A tiny language model with random weights takes the place of yours, so nothing
is downloaded and the page runs in seconds. :doc:`/adapters` is the reference.
"""

# %%
# A model that can count
# ----------------------
# The vocabulary has three blocks of twenty words. As pre-training, the model learns to
# count by one in each block.

import copy
import warnings

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# PEFT asks transformers 5 for a property under its old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
WORDS, BLOCKS = 20, 3


def counting(block, stride):
    """Sixty sentences that count by ``stride`` in one block, from anywhere."""
    words = torch.arange(60)[:, None] + stride * torch.arange(12)
    return block * WORDS + words % WORDS


def loss(model, sentences):
    with torch.no_grad():
        return float(model(input_ids=sentences, labels=sentences).loss)


def fit(model, sentences, optimizer, steps, watch=None):
    """Train; return the losses on the sentences in ``watch``, before every step."""
    random = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    watched = []
    for _ in range(steps):
        if watch is not None:
            watched.append([loss(model, sentences) for sentences in watch])
        batch = sentences[torch.randint(len(sentences), (16,), generator=random)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    return torch.tensor(watched)


with torch.random.fork_rng():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS * BLOCKS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
everything = torch.cat([counting(block, 1) for block in range(BLOCKS)])
fit(base, everything, torch.optim.AdamW(base.parameters(), lr=3e-3), 250)
print(f"counting by one: loss {loss(base, everything):.3f}")

# %%
# The first task
# --------------
# Importing :mod:`manifold_cl.adapters.peft` registers the method with PEFT. It is then
# used like other configurations. The update of a layer is one magnitude and two
# *frames*, matrices with orthonormal columns. The optimizer is ours: it keeps the
# frames orthonormal. `param_groups` finds them in the PEFT model.

from peft import LoraConfig, PeftModel, get_peft_model

from manifold_cl import RiemannianAdamW, SubspaceMemory, export_lora, param_groups
from manifold_cl.adapters import geometry_metrics, protect, target_linears
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.continual import grow_memory, task_losses

TARGETS = "all-linear"
by_three, by_seven = counting(0, 3), counting(1, 7)


def balanced(model, seed):
    config = EBLoraConfig(
        r=8, alpha=16, target_modules=TARGETS, initial_scale=-0.05, seed=seed
    )
    return get_peft_model(copy.deepcopy(model), config)


def riemannian(model):
    groups = param_groups(model, lr=6e-3, scale_lr=2e-2)
    return RiemannianAdamW(groups, weight_decay=0.0)


first = balanced(base, seed=0)
first.print_trainable_parameters()
print(f"counting by three, before: loss {loss(first, by_three):.3f}")
fit(first, by_three, riemannian(first), 80)
print(f"counting by three, after:  loss {loss(first, by_three):.3f}")

# %%
# Protected directions
# --------------------
# A *memory* holds the directions of each layer's inputs that are protected from later
# tasks. `grow_memory` adds the leading directions of a task, until they hold 97 % of
# the *energy*: the squared length of the inputs, weighted by how much the loss depends
# on them. It needs no more of a task than a list or ``DataLoader`` of batches. All
# words are in the :doc:`/glossary`.

layers = target_linears(first, TARGETS)
batches = [{"input_ids": by_three, "labels": by_three}]
memory = grow_memory(
    SubspaceMemory.empty(layers),
    layers,
    task_losses(first, batches, examples=60),
    energy=0.97,
    rank=8,
    task="by three",
)
print("directions protected:", sorted({space.k for space in memory.values()}))

# %%
# The second task, three ways
# ---------------------------
# The first adapter is merged, and the next task counts by seven in another block of
# words: with LoRA and AdamW from stock PEFT, with balanced adapters, and with balanced
# adapters outside the protected directions. `protect` gives every layer its subspace.

merged = first.merge_and_unload()
models = {
    "LoRA": get_peft_model(
        copy.deepcopy(merged), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    ),
    "balanced": balanced(merged, seed=1),
    "balanced, protected": balanced(merged, seed=1),
}
protect(models["balanced, protected"], memory)
curves = {}
for name, model in models.items():
    if name == "LoRA":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0)
    else:
        optimizer = riemannian(model)
    curves[name] = fit(model, by_seven, optimizer, 80, watch=(by_three, by_seven))

# %%
# All three learn the second task. Only the protected one keeps the first.

COLOURS = ("#999999", "#E69F00", "#0072B2")
plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
titles = ("First task, while the second is learned", "Second task")
for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=True):
        ax.semilogy(curve[:, i], color=colour, label=name)
    ax.set(title=title, xlabel="step", ylabel="loss", ylim=(5e-3, 20))
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3)
plt.show()

# %%
# The price of protection is capacity: the share of free directions left in the tightest
# layer. The two constraint errors are of the order of one float32 rounding.

for name, value in geometry_metrics(models["balanced, protected"]).items():
    print(f"{name:26} {value:.2g}")

# %%
# Files
# -----
# ``save_pretrained`` writes PEFT's usual folder. Read again, the logits are the same to
# the last bit, on a bfloat16 base too, because the frames are kept in float32 and no
# loader rounds them.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
tuned = models["balanced, protected"].eval()
tuned.save_pretrained(folder / "adapter")
print(sorted(path.name for path in (folder / "adapter").iterdir()))

again = PeftModel.from_pretrained(copy.deepcopy(merged), folder / "adapter").eval()
with torch.no_grad():
    expected = tuned(by_seven).logits
    print("identical:", torch.equal(again(by_seven).logits, expected))

# %%
# The adapter belongs to the *merged* model of the first task. Loading it onto another
# model, here the original, is refused with the layer that differs:

try:
    PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
except ValueError as error:
    print(error)

# %%
# Export
# ------
# `export_lora` writes the same update as plain LoRA: :math:`A = V^\top` and :math:`B =
# s U`. Nothing is decomposed, so nothing is lost. Stock PEFT, or a server that reads
# its files, loads the result without this library. On the command line it is
# ``manifold-cl export``.

export_lora(folder / "adapter", folder / "lora")
lora = PeftModel.from_pretrained(copy.deepcopy(merged), folder / "lora").eval()
with torch.no_grad():
    difference = float((lora(by_seven).logits - expected).abs().max())
print(
    f"largest difference {difference:.0e}, of logits up to {expected.abs().max():.0f}"
)
