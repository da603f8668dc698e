"""What a training step of a LLaVA-7B-shaped model costs with EBLoRA, beside LoRA with AdamW at equal rank.

    python benchmarks/bench_llava.py                       # a GPU: the full shape, 224 layers, 448 frames, batch 8
    python benchmarks/bench_llava.py --device cpu          # one block at a quarter of the width: only the ratio counts

Weights are random, so nothing is downloaded; a step's time does not depend on them. Both kinds of adapters are put
into the same frozen model in turn, several times, and the ratio is the median over the pairs: a drift of the machine's
speed hits both. Aims: a step at most 1.05 times, peak memory at most 1.01 times that of LoRA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from manifold_cl import EBLoRALinear, RiemannianAdamW, inject_adapters, merge_adapters, param_groups
from manifold_cl.adapters import LoRALinear
from manifold_cl.continual.environment import library_versions, machine, peak_memory_mb
from manifold_cl.files import write_json
from manifold_cl.streams import published_layout
from manifold_cl.streams.llava import loss

AIMS = {"time": 1.05, "memory": 1.01}
IMAGE_TOKEN, PATCHES = 99, 576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, help="of the language model (GPU 4096, CPU 1024)")
    parser.add_argument("--layers", type=int, help="blocks of the language model (GPU 32, CPU 1)")
    parser.add_argument("--batch", type=int, help="examples a step (GPU 8, CPU 1)")
    parser.add_argument("--words", type=int, default=64, help="text tokens beside the 576 of the image")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--protected", type=int, default=256, help="protected directions of every layer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind in a pair, after one to warm up")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "llava.json")
    given = parser.parse_args()
    gpu = given.device.startswith("cuda")
    layers, batch_size = given.layers or (32 if gpu else 1), given.batch or (8 if gpu else 1)
    width = given.width or (4096 if gpu else 1024)
    given.protected = min(given.protected, width // 2)
    model = make_model(layers, width=width, device=given.device)
    batch = make_batch(batch_size, given.words, model=model)
    rows: dict[str, list[dict[str, float]]] = {"lora": [], "eblora": []}
    for _ in range(given.pairs):
        for kind, laps in rows.items():
            laps.append(measured(model, batch, kind, given))
    ratios = {
        what: statistics.median(e[what] / b[what] for e, b in zip(rows["eblora"], rows["lora"], strict=True))
        for what in (("step_ms", "peak_mb") if gpu else ("step_ms",))
    }
    medians = {k: {w: statistics.median(lap[w] for lap in laps) for w in laps[0]} for k, laps in rows.items()}
    table = Table(title=f"a step of {layers} blocks, batch {batch_size}, rank {given.rank}, on {given.device}")
    for column in ("", "step ms", "of which optimizer", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, found in medians.items():
        table.add_row(kind, *(f"{found[what]:.1f}" for what in ("step_ms", "optimizer_ms", "peak_mb")))
    Console().print(table)
    print("eblora / lora:", ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items()), f"(aims {AIMS})")
    write_json(
        given.out,
        {
            "what": "one training step of a LLaVA-7B-shaped model with random weights, EBLoRA beside LoRA + AdamW",
            "full_size": width == 4096 and layers == 32,
            "layers": layers,
            "batch": batch_size,
            "tokens": PATCHES + given.words,
            "rank": given.rank,
            "protected": given.protected,
            "aims": AIMS,
            "ratio_eblora_over_lora": ratios,
            "median": medians,
            "pairs": rows,
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def make_model(layers: int, *, width: int, device: str) -> Any:
    """A frozen bf16 LLaVA with random weights, made where it runs; vocabulary and image encoder shrink with it."""
    seen = 1024 if width == 4096 else max(64, width // 4)
    language = LlamaConfig(
        vocab_size=32064 * width // 4096,
        hidden_size=width,
        intermediate_size=11008 * width // 4096,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
    )
    vision = CLIPVisionConfig(
        hidden_size=seen,
        intermediate_size=4 * seen,
        num_hidden_layers=24 if width == 4096 else 2,
        num_attention_heads=seen // 64,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_batch(size: int, words: int, *, model: Any) -> dict[str, torch.Tensor]:
    """Images of noise, each followed by random words, half of which are the answer."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(100, min(model.config.text_config.vocab_size, 32000), (size, words), generator=draw)
    tokens = torch.cat([torch.full((size, PATCHES), IMAGE_TOKEN), text], dim=1)
    labels = tokens.clone()
    labels[:, : PATCHES + words // 2] = -100
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "pixel_values": torch.randn(size, 3, 336, 336, generator=draw).to(model.dtype),
    }
    return {key: value.to(model.device) for key, value in batch.items()}


def measured(model: Any, batch: dict[str, torch.Tensor], kind: str, given: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step and of its optimizer, and peak memory, with fresh adapters of one kind."""
    gpu = given.device.startswith("cuda")
    draw = torch.Generator().manual_seed(0)

    def make(_: str, linear: torch.nn.Linear) -> EBLoRALinear | LoRALinear:
        if kind == "lora":
            return LoRALinear(linear, given.rank, alpha=2 * given.rank, generator=draw)
        n = linear.in_features
        basis = torch.linalg.qr(torch.randn(n, given.protected, generator=draw).to(given.device))[0]
        return EBLoRALinear(
            linear, given.rank, alpha=2 * given.rank, complement=basis, initial_scale=-0.005, generator=draw
        )

    inject_adapters(model, published_layout("ucit").targets, make)
    if kind == "lora":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    else:
        optimizer = RiemannianAdamW(param_groups(model, lr=1e-5))
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps, parts = [], []
    for number in range(given.steps + 1):
        start = now(gpu)
        loss(model, batch).backward()
        middle = now(gpu)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = now(gpu)
        if number:
            steps.append(1e3 * (end - start))
            parts.append(1e3 * (end - middle))
    peak = torch.cuda.max_memory_allocated() / 1e6 if gpu else peak_memory_mb()
    merge_adapters(model)
    return {"step_ms": statistics.median(steps), "optimizer_ms": statistics.median(parts), "peak_mb": peak}


def now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
