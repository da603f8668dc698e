"""How often ranks of `suggest_ranks` keep what they state: energy in the written adapter, drift on new texts.

    python benchmarks/bench_suggest.py

A LoRA of rank 16 on all 36 linear layers of MiniLM is trained by PEFT on each task of the stream ``text-three``. Ranks
are suggested from one half of the texts that were not trained on, and measured on the other half. ``energy_kept`` is
the share of layers that keep the stated energy, computed from dense matrices of the written files.
``drift_in_interval`` is the share of layers whose share of drift on the other half lies in the stated interval,
``drift_kept`` of those that keep the stated share there. Ranks are means over layers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from analysis import AdapterSet, suggest_ranks
from analysis.activations import InputMoments, input_moments
from analysis.changes import write_changed
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream
from manifold_cl.streams.sentence_encoder import load_encoder

AIMS = {"energy_kept": "1", "drift_in_interval": "at least 0.95"}
KEEPS = (0.8, 0.9, 0.95, 0.99)
LEVEL = 0.98
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--examples", type=int, default=128, help="texts that ranks are suggested from, and new ones")
    parser.add_argument("--draws", type=int, default=3, help="random halves per task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "suggest.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for task in open_stream("text-three").tasks:
            rows += measured(task, Path(place), options.steps, options.examples, options.draws)
    summary = {
        keep: {
            name: sum(row[name] for row in of_keep) / len(of_keep)
            for name in ("energy_kept", "drift_in_interval", "drift_kept", "energy_rank", "drift_rank")
        }
        for keep in KEEPS
        if (of_keep := [row for row in rows if row["keep"] == keep])
    }
    overall = {name: sum(row[name] for row in rows) / len(rows) for name in (*AIMS, "drift_kept")}
    result = {"aims": AIMS, "level": LEVEL, "layers_and_draws": len(rows), "overall": overall, "by_keep": summary}
    table = Table("keep", "energy kept", "drift in interval", "drift kept", "rank by energy", "rank by drift")
    for keep, values in summary.items():
        table.add_row(f"{keep}", *(f"{value:.4g}" for value in values.values()))
    Console().print(table, overall)
    settings = {"steps": options.steps, "examples": options.examples, "draws": options.draws}
    write_json(options.out, result | settings | {"machine": machine(), "libraries": library_versions()})


def measured(task: Any, place: Path, steps: int, examples: int, draws: int) -> list[dict[str, Any]]:
    """One row per draw, share and layer."""
    adapters = AdapterSet.load(trained(task, place / task.name, steps))
    texts = [*task.part("validation").texts, *task.part("test").texts]
    encoder = load_encoder()
    rows = []
    for draw in range(draws):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(draw)).tolist()
        size = min(examples, len(texts) // 2)
        halves = [[texts[i] for i in order[start : start + size]] for start in (0, size)]
        old, new = (moments(encoder, adapters, each) for each in halves)
        for keep in KEEPS:
            by_energy, by_drift = suggest_ranks(adapters, keep), suggest_ranks(adapters, keep, moments=old, level=LEVEL)
            written = write_changed(place / f"{task.name}-{draw}-{keep}", adapters, by_energy.compressed())
            after = by_drift.compressed()
            ranks = zip(by_energy.table["rank"], by_drift.table.itertuples(), strict=True)
            for rank, row in ranks:
                left, right = (factor.double() for factor in adapters.factors(task.name, row.layer))
                full = left @ right.mT
                rest = full - dense(written, row.layer)
                kept = drift_kept(adapters, after, row.layer, new)
                rows.append(
                    {
                        "keep": keep,
                        "energy_kept": float(1 - rest.square().sum() / full.square().sum() >= keep - 1e-6),
                        "drift_in_interval": float(row.ci_low <= kept <= row.ci_high),
                        "drift_kept": float(kept >= keep),
                        "energy_rank": rank,
                        "drift_rank": row.rank,
                    }
                )
    return rows


def dense(adapters: AdapterSet, layer: str) -> Tensor:
    """ΔW in float64."""
    left, right = adapters.factors(adapters.tasks[0], layer)
    return left.double() @ right.double().mT


def drift_kept(adapters: AdapterSet, after: AdapterSet, layer: str, new: InputMoments) -> float:
    """``1 − E‖(ΔW − ΔW')x‖² / E‖ΔW x‖²`` on the new inputs. Rows of ΔW' are combinations of those of ΔW."""
    task = adapters.tasks[0]
    left, right = (factor.double() for factor in adapters.factors(task, layer))
    change = torch.linalg.lstsq(right, (left @ right.mT - dense(after, layer)).mT).solution.mT  # ΔW − ΔW' = change Rᵀ
    return 1 - float(new.change(layer, task, change).sum() / new.change(layer, task, left).sum())


def trained(task: Any, folder: Path, steps: int) -> Path:
    """The folder of a LoRA that PEFT trained on the task."""
    torch.manual_seed(0)
    encoder = load_encoder()
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    encoder.transformer = peft.get_peft_model(encoder.transformer, config)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-3)
    batches = task.batches("train", batch_size=16, generator=torch.Generator().manual_seed(0))
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        task.loss(encoder.train(), batch).backward()
        optimizer.step()
    encoder.transformer.save_pretrained(folder)
    return folder


def moments(encoder: nn.Module, adapters: AdapterSet, texts: Sequence[str]) -> InputMoments:
    """Moments of the layers' inputs of the base model on the texts."""
    batches = [
        dict(encoder.tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=64, return_tensors="pt"))
        for i in range(0, len(texts), 16)
    ]
    return input_moments(encoder.transformer, adapters, batches, forward=lambda m, b: m(**b).last_hidden_state)


if __name__ == "__main__":
    main()
