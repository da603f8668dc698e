"""Holds `memory_plan` against measured memory, line by line, on a llama-7B-shaped model; measures the time of a step.

    python benchmarks/plan_gpu.py                        # a GPU with 70 GB: 32 blocks, batch 8 x 512 tokens
    python benchmarks/plan_gpu.py --device cpu           # two blocks of width 64: whether the script runs

Weights and protected bases are random, so nothing is downloaded. On a GPU memory is what torch's allocator reports, on
a CPU the sum over live tensors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from manifold_cl import adapters_of, inject_adapters
from manifold_cl.adapters import EBLoRALinear
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Passes, leading_directions, make_method, measure_importance, task_losses
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.planning import MemoryPlan, memory_plan
from manifold_cl.planning.live_bytes import LiveBytes

RANK = 16


class Meter:
    """Bytes of tensors on the device, now and at most since the last reset."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.live = nullcontext() if self.cuda else LiveBytes()

    @property
    def now(self) -> int:
        """Bytes that are allocated."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return self.live.now  # type: ignore[attr-defined]

    def peak_of(self, work: Callable[[], Any]) -> int:
        """The most bytes beside those of before, while ``work`` runs."""
        before = self.now
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        self.live.peak = before  # type: ignore[attr-defined]
        work()
        return self.live.peak - before  # type: ignore[attr-defined]

    @contextmanager
    def growth(self, lines: dict[str, int], name: str) -> Iterator[None]:
        """Note how many bytes are allocated inside and stay."""
        before = self.now
        yield
        lines[name] = self.now - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, help="(GPU 32, CPU 2)")
    parser.add_argument("--width", type=int, help="(GPU 4096, CPU 64)")
    parser.add_argument("--batch", type=int, help="(GPU 8, CPU 2)")
    parser.add_argument("--tokens", type=int, help="(GPU 512, CPU 16)")
    parser.add_argument("--protected", type=float, default=0.2, help="protected share of every layer's inputs")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after two that are not")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu" / "plan.json")
    given = parser.parse_args()
    gpu = given.device.startswith("cuda")
    for name, (large, small) in {"blocks": (32, 2), "width": (4096, 64), "batch": (8, 2), "tokens": (512, 16)}.items():
        if getattr(given, name) is None:
            setattr(given, name, large if gpu else small)
    config = config_of(given)
    setups = {"checkpointing": True, "no checkpointing": False}
    plans = {name: planned(config, given, checkpointing=flag) for name, flag in setups.items()}
    meter = Meter(given.device)
    with meter.live:
        lines, times = measure(config, given, meter)
    rows = compared(plans, lines)
    show(rows, times, given)
    content = {
        "what": "memory of training a llama-7B-shaped model with eblora: planned and measured, and times",
        "full_size": given.width == 4096 and given.blocks == 32,
        **{name: getattr(given, name) for name in ("device", "blocks", "width", "batch", "tokens", "protected")},
        "rank": RANK,
        "lines": rows,
        "times": times,
        "plans": {name: plan.to_dict() for name, plan in plans.items()},
        "versions": library_versions(),
        "machine": machine(),
    }
    write_json(given.out, content)


def config_of(given: Any) -> LlamaConfig:
    heads = max(given.width // 128, 2)
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=given.width,
        intermediate_size=11008 * given.width // 4096,
        num_hidden_layers=given.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def planned(config: LlamaConfig, given: Any, *, checkpointing: bool) -> MemoryPlan:
    sizes = {"batch": given.batch, "tokens": given.tokens, "protected": given.protected}
    return memory_plan(config, dtype="bfloat16", rank=RANK, checkpointing=checkpointing, **sizes)


def measure(config: LlamaConfig, given: Any, meter: Meter) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes by line, and seconds by kind of work."""
    lines: dict[str, int] = {}
    times: dict[str, float] = {}
    with meter.growth(lines, "base weights"):
        model = make_model(config, given.device)
    layers = target_linears(model, "all-linear")
    ids = torch.randint(config.vocab_size, (given.batch, given.tokens), device=given.device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # padding, without which no mask is built
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    model.train()
    model.enable_input_require_grads()
    checkpoint_activations(model)
    statistics(layers, task_losses(model, [batch], examples=given.batch), meter, lines, times)
    with meter.growth(lines, "factors"):
        inject_adapters(model, "all-linear", lambda _, layer: EBLoRALinear(layer, RANK, alpha=2 * RANK))
    with meter.growth(lines, "protected bases"):
        protect_at_random(model, given.protected)
    method = make_method("eblora", rank=RANK)
    optimizer = method.make_optimizer(model)

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()

    lines["activations, checkpointing"] = meter.peak_of(backward)
    optimizer.zero_grad(set_to_none=True)
    model.activation_checkpointing_disable()
    lines["activations, no checkpointing"] = meter.peak_of(backward)
    optimizer.zero_grad(set_to_none=True)
    before = meter.now
    backward()
    lines["gradients"] = meter.now - before
    before = meter.now
    temporary = meter.peak_of(optimizer.step)
    kept = meter.now - before
    lines["moments"] = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    lines["step scratch"] = temporary - lines["moments"]
    lines["step scratch that stays"] = kept - lines["moments"]
    for name, enable in (("no checkpointing", False), ("checkpointing", True)):
        if enable:
            checkpoint_activations(model)
        timed(f"step, {name}", times, lambda: (backward(), optimizer.step()), given.steps, meter)
    timed("optimizer alone", times, optimizer.step, given.steps, meter)
    optimizer.zero_grad(set_to_none=True)
    lines["peak of a step, checkpointing"] = meter.now + meter.peak_of(lambda: (backward(), optimizer.step()))
    return lines, times


def make_model(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False)


def statistics(layers: Any, losses: Any, meter: Meter, lines: dict[str, int], times: dict[str, float]) -> None:
    """Bytes of the passes for start and memory after their batch, and their seconds."""
    seen: list[int] = []
    before = meter.now
    passes = Passes(max_size=128, on_pass=lambda _: seen.append(meter.now - before))
    start = time.perf_counter()
    leading_directions(layers, losses, RANK, passes=passes)
    times["start, one batch (s)"] = time.perf_counter() - start
    lines["statistics of the start"] = max(seen)
    seen.clear()
    start = time.perf_counter()
    for _ in measure_importance(layers, losses, source="sensitivity", energy=0.97, passes=passes):
        pass
    times["memory, one batch (s)"] = time.perf_counter() - start
    lines["statistics of the memory"] = max(seen)


def protect_at_random(model: Any, share: float) -> None:
    """Give every input frame a random protected basis of its own memory, and move the frame outside."""
    bases: dict[int, torch.Tensor] = {}
    for adapter in adapters_of(model).values():
        n = sides(adapter.base)[1]
        k = min(int(share * n), n - RANK)
        if n not in bases:
            bases[n] = torch.linalg.qr(torch.randn(n, k, device=adapter.right.device)).Q
        adapter.right_manifold.complement = bases[n].clone()
        with torch.no_grad():
            adapter.right.copy_(adapter.right_manifold.projx(adapter.right))


def timed(name: str, times: dict[str, float], work: Callable[[], Any], laps: int, meter: Meter) -> None:
    """Milliseconds of ``work``: the median of ``laps`` after two that are not counted."""
    found = []
    for _ in range(laps + 2):
        _ = meter.now  # waits for the device
        start = time.perf_counter()
        work()
        _ = meter.now
        found.append(1e3 * (time.perf_counter() - start))
    times[f"{name} (ms)"] = sorted(found[2:])[laps // 2]


def compared(plans: dict[str, MemoryPlan], lines: dict[str, int]) -> dict[str, dict[str, int]]:
    """Planned and measured bytes of the lines that have both, then those that are only measured."""
    plan = plans["checkpointing"]
    pairs = {line.name: (plan[line.name], lines.get(line.name)) for line in plan.lines}
    pairs["statistics"] = (plan["statistics"], max(lines[f"statistics of the {name}"] for name in ("start", "memory")))
    del pairs["activations"]
    for name, each in plans.items():
        pairs[f"activations, {name}"] = (each["activations"], lines[f"activations, {name}"])
    pairs["peak of a step, checkpointing"] = (plan.total("training"), lines["peak of a step, checkpointing"])
    rows = {name: {"planned": a, "measured": b} for name, (a, b) in pairs.items() if b is not None}
    return rows | {name: {"measured": value} for name, value in lines.items() if name not in rows}


def show(rows: dict[str, dict[str, int]], times: dict[str, float], given: Any) -> None:
    table = Table(
        title=f"{given.blocks} blocks of width {given.width}, batch {given.batch} x {given.tokens}, {given.device}"
    )
    for column in ("MB", "planned", "measured", "measured / planned"):
        table.add_column(column, justify="left" if column == "MB" else "right")
    for name, row in rows.items():
        plan = row.get("planned")
        cells = ("", f"{row['measured'] / 1e6:.1f}", "")
        if plan:
            cells = (f"{plan / 1e6:.1f}", f"{row['measured'] / 1e6:.1f}", f"{row['measured'] / plan:.3f}")
        table.add_row(name, *cells)
    Console().print(table)
    for name, value in times.items():
        print(f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
