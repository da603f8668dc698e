"""What the Riemannian step costs, beside the training step it belongs to.

    python benchmarks/step.py

Measures, on the embedded encoder with adapters on its 36 linear layers and a memory that is filled as in the middle of
a stream: one training step (forward, backward), one `RiemannianAdamW` step, and plain AdamW's on the same
parameters. The three are timed in turn, so that a drift of the machine's speed hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from manifold_cl import EBLoRALinear, RiemannianAdamW, inject_adapters, param_groups
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

FILLED = 0.35
"""Share of input directions that is protected."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    options = parser.parse_args()

    stream = open_stream("text-six", tasks=["nouns"])
    task, model = stream.tasks[0], stream.make_model().to(options.device)
    draw = torch.Generator().manual_seed(0)

    def make(_: str, linear: torch.nn.Linear) -> EBLoRALinear:
        n = linear.in_features
        basis = torch.linalg.qr(torch.randn(n, int(FILLED * n), generator=draw))[0].to(options.device)
        return EBLoRALinear(linear, 16, alpha=32, complement=basis, initial_scale=-0.02, generator=draw)

    inject_adapters(model, stream.targets, make)
    ours = RiemannianAdamW(param_groups(model, lr=1e-4))
    trainable = [p for p in model.parameters() if p.requires_grad]
    twins = [p.detach().clone().requires_grad_() for p in trainable]
    plain = torch.optim.AdamW(twins, lr=1e-4, weight_decay=0.0)

    def timed(work) -> float:
        synchronize(options.device)
        start = time.perf_counter()
        work()
        synchronize(options.device)
        return 1e3 * (time.perf_counter() - start)

    def forward_backward() -> None:
        ours.zero_grad()
        task.loss(model, batch).backward()

    rows: dict[str, list[float]] = {"forward and backward": [], "RiemannianAdamW step": [], "AdamW step": []}
    batches = list(task.batches("train", batch_size=16, generator=draw))
    for i in range(options.steps + 3):
        batch = batches[i % len(batches)]
        lap = {"forward and backward": timed(forward_backward), "RiemannianAdamW step": timed(ours.step)}
        for p, twin in zip(trainable, twins, strict=True):
            twin.grad = p.grad.clone()
        lap["AdamW step"] = timed(plain.step)
        if i >= 3:  # warm-up
            for name, milliseconds in lap.items():
                rows[name].append(milliseconds)

    medians = {name: statistics.median(times) for name, times in rows.items()}
    share = statistics.median(
        step / (step + work)
        for step, work in zip(rows["RiemannianAdamW step"], rows["forward and backward"], strict=True)
    )
    table = Table(title="milliseconds, median (smallest)")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, times in rows.items():
        table.add_row(name, f"{medians[name]:.1f} ({min(times):.1f})")
    table.add_row("optimizer's share of a training step", f"{100 * share:.1f} %")
    Console().print(table)
    write_json(
        options.out,
        {
            "what": "one step of all adapters beside one training step, text-six/nouns, batch 16, rank 16, 36 layers",
            "protected_share": FILLED,
            "median_ms": medians,
            "min_ms": {name: min(times) for name, times in rows.items()},
            "optimizer_share_of_training_step": share,
            "steps": options.steps,
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
