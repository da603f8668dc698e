r"""
Balanced adapters in the Trainer
================================

For users of transformers' ``Trainer``. No geometry is needed. Our optimizer in the
Trainer: accumulation, clipping, a cosine schedule, logging, a checkpoint in the middle,
and a resumed run that ends with the same bits. A tiny language model with random
weights takes the place of yours, so nothing is downloaded. Accelerate and Lightning are
at the end; :doc:`/adapters` is the reference.
"""

# %%
# Two lines
# ---------
# An update is a magnitude and two *frames*, matrices with orthonormal columns. Trainer
# would give every matrix weight decay and one learning rate. Frames need no weight
# decay, and magnitudes need a rate of their own. The first line is `TrainerOptimizer`,
# a factory that Trainer calls with the final model, wrapped and on its device. The
# second is `log_geometry`.

import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from manifold_cl import TrainerOptimizer
from manifold_cl.adapters import geometry_metrics, protect
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.integrations.transformers import log_geometry

# PEFT asks transformers 5 for a property under its old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
folder = Path(tempfile.mkdtemp())
LAYER = "model.layers.0.self_attn.q_proj"


class Counting(torch.utils.data.Dataset):
    """Counting from anywhere, modulo twenty."""

    sentences = (torch.arange(512)[:, None] * 7 + torch.arange(16)) % 20

    def __len__(self):
        return len(self.sentences)

    def __getitem__(self, index):
        return {"input_ids": self.sentences[index], "labels": self.sentences[index]}


def tuned(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    config = EBLoraConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(model, config)


def trainer(model, name, **arguments):
    made = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / name),
            max_steps=60,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_steps=2,
            save_steps=30,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 6e-3, "scale_lr": 2e-2}),
    )
    log_geometry(made)
    # the log is printed to the screen too; on this page it is drawn instead
    made.pop_callback(
        next(
            c for c in made.callback_handler.callbacks if "Printer" in type(c).__name__
        )
    )
    return made


# %%
# With ``report_to="tensorboard"`` (or any other reporter) the figures appear there
# beside the loss. They are also in ``trainer.state.log_history``, which is what is
# drawn below. The core is what stands between the two frames. One run has the balanced
# core, a single magnitude. The other has a diagonal one, with a magnitude per
# direction. Its spectral entropy, 1 if all magnitudes are equal, may fall; in these
# sixty steps it stays above 0.9. In one layer a quarter of the input directions is
# protected: 16 random ones, which stand for the inputs of an earlier task.

protected = {LAYER: torch.randn(64, 16, generator=torch.Generator().manual_seed(1))}
histories = {}
for core in ("scalar", "diagonal"):
    model = tuned(core=core)
    protect(model, protected, strict=False)
    run = trainer(model, core)
    run.train()
    histories[core] = [entry for entry in run.state.log_history if "loss" in entry]

COLOURS = ("#0072B2", "#D55E00")
PANELS = {
    "loss": "loss",
    "geometry/spectral_entropy": "spectral entropy",
    "geometry/protection": r"max $|F^\top x|$",
}
plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for ax, (key, title) in zip(axes, PANELS.items(), strict=True):
    for (core, history), colour in zip(histories.items(), COLOURS, strict=True):
        steps = [entry["step"] for entry in history]
        ax.plot(steps, [entry[key] for entry in history], color=colour, label=core)
    ax.set(title=title, xlabel="step")
axes[1].set_ylim(0, 1.05)
axes[2].set_yscale("log")
axes[2].set_ylim(1e-9, 1e-4)
axes[2].axhline(2e-6, color="#999999", linestyle="--", linewidth=1)
axes[2].annotate("guaranteed", (1, 2.4e-6), color="#666666")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=2, title="core")
plt.show()

# %%
# Killed and resumed
# ------------------
# The optimizer's state is plain tensors and numbers, so ``resume_from_checkpoint``
# works as for any other, and on a CPU the run ends with the same bits as the one that
# was never interrupted. The protected subspaces are in the adapter's file, not in the
# optimizer's.

model = tuned(core="diagonal")
protect(model, protected, strict=False)
resumed = trainer(model, "diagonal")
resumed.train(resume_from_checkpoint=str(folder / "diagonal" / "checkpoint-30"))
pairs = zip(resumed.model.parameters(), run.model.parameters(), strict=True)
print("the same bits:", all(torch.equal(a, b) for a, b in pairs))

# %%
# Accelerate and Lightning
# ------------------------
# In a loop of your own, or with Accelerate, the optimizer goes through ``prepare`` like
# any other, and the same figures go to ``accelerator.log``:

from accelerate import Accelerator

from manifold_cl import RiemannianAdamW, param_groups

accelerator = Accelerator(cpu=True)
model = tuned()
optimizer = RiemannianAdamW(
    param_groups(model, lr=6e-3, scale_lr=2e-2), weight_decay=0.0
)
batches = torch.utils.data.DataLoader(Counting(), batch_size=8)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
for batch in batches:
    accelerator.backward(model(**batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
accelerator.log(geometry_metrics(accelerator.unwrap_model(model)))
print({name: f"{value:.1e}" for name, value in geometry_metrics(model).items()})

# %%
# In Lightning, ``configure_optimizers`` returns that optimizer, and
# ``manifold_cl.integrations.lightning.GeometryCallback()`` in the trainer's
# ``callbacks`` logs the figures to its loggers.
