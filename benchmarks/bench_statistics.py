"""Statistics and starts on a small decoder: time beside training, examples that suffice, sizes of folders.

    python benchmarks/bench_statistics.py [--part time examples folder shared] [--threads 1]

Four parts. Time: CPU seconds of a task's start and of its memory's growth on lm-four, beside training steps of 16
examples. Examples: for the memory and the start from fewer examples, the share of the energy of 160 other examples of
the task, in four blocks. Folder: bytes of a PEFT folder after one and two tasks, beside plain LoRA. Shared: runs of
text-three with a statistic per layer and per input.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RiemannianAdamW,
    RunRecord,
    SubspaceMemory,
    param_groups,
    protect,
)
from manifold_cl.adapters import inject_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import (
    ContinualRunner,
    Passes,
    Training,
    collect_statistics,
    grow_memory,
    make_method,
    task_losses,
)
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.subspaces import InputMoment, Statistic, leading_directions, measure_importance
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

PARTS = ("time", "folder", "examples", "shared")
RANK, ENERGY, STEPS = 16, 0.97, 60
START, MEMORY = 32, 64
"""Examples for the start and for the memory; part "examples" compares other numbers."""
COUNTS = (1, 2, 3, 4, 6, 10)
_T = TypeVar("_T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/shared-inputs"), help="folder of part shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "statistics.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.part:
        parts = {"time": times, "folder": folders, "examples": examples, "shared": partial(shared, options.runs)}
        found[part] = parts[part]()
        found |= {"what": __doc__.splitlines()[0], "threads": options.threads}
        found |= {"versions": library_versions(), "machine": machine()}
        write_json(options.out, found)
        print(part, found[part], flush=True)


def measured(call: Callable[[], _T]) -> tuple[_T, float]:
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def times() -> dict[str, Any]:
    """CPU seconds; ``before`` is scaled from 32 examples to the 160 of the defaults, its decompositions are not."""
    stream = open_stream("lm-four", tasks=["glosses"])
    model, task = stream.make_model(), stream.tasks[0]
    layers = target_linears(model, stream.targets)
    empty = SubspaceMemory.empty(layers, compact=True)

    def losses(count: int) -> Any:
        return task_losses(model, task, examples=count)

    def grow(count: int, passes: Passes) -> SubspaceMemory:
        return grow_memory(empty, layers, losses(count), energy=ENERGY, rank=RANK, task="glosses", passes=passes)

    starts, start = measured(lambda: leading_directions(layers, losses(START), RANK, empty))
    shared, memory = measured(lambda: grow(MEMORY, Passes(shared_inputs=True)))
    _, own_32 = measured(lambda: grow(32, Passes()))
    _, own_16 = measured(lambda: grow(16, Passes()))

    def make(name: str, layer: nn.Module) -> EBLoRALinear:
        return EBLoRALinear(layer, RANK, alpha=32.0, complement=shared[name], initial_scale=-0.05)

    def inject() -> None:
        for name, adapter in inject_adapters(model, stream.targets, make).items():
            adapter.point_along(starts[name].left, starts[name].right)  # type: ignore[attr-defined]

    _, injection = measured(inject)
    optimizer = RiemannianAdamW(param_groups(model, lr=6e-3, scale_lr=2e-2))
    laps = []
    for batch in list(task.batches("train", batch_size=16))[:6]:

        def step(batch: Any = batch) -> None:
            optimizer.zero_grad()
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        laps.append(measured(step)[1])
    training = STEPS * statistics.median(laps[1:])
    per_batch = own_32 - own_16
    before = start * 160 / START + own_16 + 9 * per_batch
    return {
        "seconds": {"start": start, "memory": memory, "injection": injection, "step": training / STEPS},
        "seconds_before": {"start": start * 160 / START, "memory": own_16 + 9 * per_batch},
        "examples": {"start": START, "memory": MEMORY},
        "steps": STEPS,
        "share_of_training": (start + memory) / training,
        "share_of_training_before": before / training,
    }


def folders() -> dict[str, Any]:
    """Bytes of PEFT folders over plain LoRA's, with the protected bases after one task and after two."""
    from peft import LoraConfig, get_peft_model

    from manifold_cl.adapters.peft import EBLoraConfig

    stream = open_stream("lm-four", tasks=["glosses", "sentiment"])
    model = stream.make_model()
    layers = target_linears(model, stream.targets)
    memories = {
        "per layer, float32": SubspaceMemory.empty(layers),
        "per input, float32": SubspaceMemory.empty(layers),
        "per input, compact": SubspaceMemory.empty(layers, compact=True),
    }
    found: dict[str, Any] = {"bases": {kind: [] for kind in memories}, "k": [], "share": {}}

    def size(config: Any, memory: SubspaceMemory | None = None) -> int:
        wrapped = get_peft_model(copy.deepcopy(model), config)
        if memory is not None:
            protect(wrapped, memory)
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    targets = list(stream.targets)
    lora = size(LoraConfig(r=RANK, target_modules=targets))
    for task in stream.tasks:
        for per in ("layer", "input"):
            passes = Passes(shared_inputs=per == "input")
            losses = task_losses(model, task, examples=MEMORY)
            moments = list(measure_importance(layers, losses, source="sensitivity", energy=ENERGY, passes=passes))
            for kind in [kind for kind in memories if per in kind]:
                memories[kind] = memories[kind].extended(moments, energy=ENERGY, rank=RANK, task=task.name)
        found["k"].append({kind: statistics.mean(s.k for s in memory.values()) for kind, memory in memories.items()})
        for kind, memory in memories.items():
            total = size(EBLoraConfig(r=RANK, target_modules=targets), memory)
            found["bases"][kind].append(total)
            found["share"].setdefault(kind, []).append(total / lora)
        found["explained"] = {
            kind: statistics.mean(g.explained for g in memory.growth.values()) for kind, memory in memories.items()
        }
    return {"lora": lora, "rank": RANK, "tasks": [task.name for task in stream.tasks], **found}


class Both(Statistic):
    """The weighted moment of the inputs, and the dense gradient."""

    def __init__(self, m: int, n: int) -> None:
        self.moment, self.gradient = InputMoment(n, weighted=True), torch.zeros(m, n)
        self._sums = (*self.moment.sums(), self.gradient)

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add tokens to both."""
        self.moment.add(x, d)
        self.gradient += d.mT @ x

    def importance(self) -> Tensor:
        """The moment."""
        return self.moment.importance()


def examples(name: str = "glosses") -> dict[str, Any]:
    """By number of examples: captured energy, columns, and the start's share of the best 16 directions' energy."""
    stream = open_stream("lm-four", tasks=[name])
    model, task = stream.make_model(), stream.tasks[0]
    chosen = {"0", "10", "20", "29"}
    layers = {k: layer for k, layer in target_linears(model, stream.targets).items() if k.split(".")[2] in chosen}

    def collect(seed: int, on_batch: Callable[[dict[str, Both], int], None]) -> dict[str, Both]:
        sums = {key: Both(*sides(layer)) for key, layer in layers.items()}
        losses = task_losses(model, task, examples=160, seed=seed)
        collect_statistics(layers, losses(), sums, on_batch=lambda batch: on_batch(sums, batch))
        return sums

    reference = collect(99, lambda *_: None)
    best = {k: float(torch.linalg.svdvals(r.gradient)[:RANK].square().sum()) for k, r in reference.items()}
    rows: dict[str, Any] = {}

    def compare(sums: dict[str, Both], batch: int) -> None:
        if batch not in COUNTS:
            return
        captured, k, start = [], [], []
        for key, part in sums.items():
            moment, empty = reference[key].importance(), ProtectedSubspace.empty(part.gradient.shape[1])
            basis = empty.extended_to_moment(part.importance(), energy=ENERGY).basis
            captured.append(float(((moment @ basis) * basis).sum() / moment.diagonal().sum()))
            u, _, vt = torch.linalg.svd(part.gradient, full_matrices=False)
            held = u[:, :RANK].mT @ reference[key].gradient @ vt[:RANK].mT
            k.append(basis.shape[1])
            start.append(float(held.square().sum()) / best[key])
        rows[str(16 * batch)] = {
            "captured": statistics.mean(captured),
            "least_captured": min(captured),
            "k": statistics.mean(k),
            "start": statistics.mean(start),
        }

    collect(1, compare)
    return {"task": name, "blocks": sorted(map(int, chosen)), "energy": ENERGY, "by_examples": rows}


def shared(folder: Path) -> dict[str, Any]:
    """Scores and protected shares of runs on text-three, with a statistic per layer and per input."""
    rows: dict[str, Any] = {}
    for kind, options in {"per layer": {}, "per input": {"shared_inputs": True}}.items():
        for seed in (0, 1):
            path = folder / f"{kind.replace(' ', '-')}-{seed}"
            if (path / "record.json").exists():
                record = RunRecord.load(path)
            else:
                method = make_method("eblora", **options)
                record = ContinualRunner(open_stream("text-three"), method, path, training=Training(seed=seed)).run()
            rows.setdefault(kind, []).append(
                {
                    "seed": seed,
                    **{name: record.metrics[name] for name in ("mft", "mfn", "bwt")},
                    "protected": record.capacity[-1]["mean_fraction"],
                }
            )
    return {"stream": "text-three", "method": "eblora", "runs": rows}


if __name__ == "__main__":
    main()
