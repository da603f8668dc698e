r"""
Three optimizers, one loop
==========================

For everyone who wants another optimizer than the default. No geometry is needed to use
one. Any torch optimizer, an ordinary training loop, and frames that keep their two
conditions at every step: orthonormal columns, orthogonal to the protected directions.
We train the same small network with AdamW, with SGD, and with an Adam that treats each
matrix as one, and compare losses and constraint errors.
"""

# %%
# A network with adapters
# -----------------------
# Two frozen layers with adapters of rank 4, whose input frames avoid eight protected
# directions each, and a head that trains freely. (A *frame* is a matrix with
# orthonormal columns. *Protected directions* are the inputs of earlier tasks; here they
# are random. More words: :doc:`/glossary`.) The task: follow a network of the same kind
# with other frames.

import matplotlib.pyplot as plt
import torch
from torch import nn

from manifold_cl import (
    EBLoRALinear,
    RiemannianAdamW,
    RiemannianSGD,
    param_groups,
    riemannian,
)
from manifold_cl.optim import RiemannianAdam, clip_riemannian_grad_norm_

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 110,
        "legend.frameon": False,
    }
)
WIDTH, RANK, PROTECTED = 48, 4, 8


def network(seed):
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(0)  # base weights are the same for all
    layers = []
    for _ in range(2):
        base = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            base.weight.copy_(torch.randn(WIDTH, WIDTH, generator=fixed) / WIDTH**0.5)
        protected = torch.randn(WIDTH, PROTECTED, generator=fixed)
        adapter = EBLoRALinear(
            base, RANK, complement=protected, initial_scale=1.0, generator=draw
        )
        layers += [adapter, nn.Tanh()]
    head = nn.Linear(WIDTH, 2)
    with torch.no_grad():
        head.weight.copy_(torch.randn(2, WIDTH, generator=fixed) / 4)
        head.bias.zero_()
    return nn.Sequential(*layers, head)


draw = torch.Generator().manual_seed(1)
x = torch.randn(512, WIDTH, generator=draw)
with torch.no_grad():
    y = network(seed=1)(x)

# %%
# The loop
# --------
# Only one line is ours: clipping uses the norm of the gradient's *tangent* part, the
# part along which the conditions hold to first order. The schedule is torch's.
#
# The rates of AdamW are EBLoRA's defaults. The other two optimizers need others: the
# step of SGD is proportional to the gradient, and `RiemannianAdam` keeps one second
# moment per matrix, so its rate is the length of the step.


def train(make, steps=300):
    model = network(seed=2)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, errors = [], []
    batches = torch.Generator().manual_seed(3)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=batches)
        loss = nn.functional.mse_loss(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        clip_riemannian_grad_norm_(optimizer, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            losses.append(float(nn.functional.mse_loss(model(x), y)))
        errors.append(max(optimizer.constraint_error()))
    return losses, errors


runs = {
    "RiemannianAdamW": lambda model: RiemannianAdamW(
        param_groups(model, lr=6e-3, scale_lr=2e-2)
    ),
    "RiemannianSGD, momentum": lambda model: RiemannianSGD(
        param_groups(model, lr=0.2), momentum=0.9
    ),
    "RiemannianAdam, one second moment per matrix": lambda model: RiemannianAdam(
        param_groups(model, lr=1e-2)
    ),
}
results = {name: train(make) for name, make in runs.items()}

# %%
# The loss falls with every optimizer. The constraint error stays near one float32
# rounding of 1, which is 1.2e-7. Every step takes the tangent part of the base
# optimizer's displacement, brings the frame back onto its manifold (a *retraction*),
# and so corrects the errors of the last step.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
colours = ("#0072B2", "#D55E00", "#009E73")
for colour, (name, (losses, errors)) in zip(colours, results.items(), strict=True):
    left.semilogy(losses, color=colour, label=name)
    right.semilogy(errors, color=colour)
left.set(title="Loss", xlabel="step")
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
right.set(
    title="Largest constraint error",
    xlabel="step",
    ylim=(1e-8, 1e-5),
)
right.axhline(2e-6, color="0.6", linestyle="--", linewidth=1)
right.text(5, 2.4e-6, "guaranteed bound", color="0.4", fontsize="small")
plt.show()

for name, (losses, errors) in results.items():
    print(f"{name:45s} loss {losses[-1]:.1e}, worst error {max(errors):.1e}")

# %%
# Another base class
# ------------------
# `riemannian` takes any class of torch.optim that evaluates the loss once per step, and
# classes of your own. Their options stay options. Two more come from us: how the
# moments follow the moving frame, and how often it is refined (:doc:`/optimizers`).

RiemannianNAdam = riemannian(torch.optim.NAdam)
losses, errors = train(
    lambda model: RiemannianNAdam(
        param_groups(model, lr=6e-3, scale_lr=2e-2),
        moments="transport",
        polish_every=50,
    )
)
print(f"RiemannianNAdam: loss {losses[-1]:.1e}, worst error {max(errors):.1e}")

# %%
# A class that does not fit is refused, with the reason.

try:
    riemannian(torch.optim.LBFGS)
except TypeError as error:
    print(error)

# %%
# Weight decay pulls a frame towards zero. That direction is normal to the manifold, so
# it has no effect on a frame. The optimizer warns:

import warnings

model = network(seed=2)
groups = param_groups(model, lr=6e-3, scale_lr=2e-2)
groups[0]["weight_decay"] = 0.1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    RiemannianAdamW(groups)
print(caught[0].message)
