"""The same training on a bfloat16 base and on a float32 one: constraint errors, precision of the frames, losses.

    python benchmarks/bf16_training.py                   # a GPU: four blocks of width 1024, 100 steps
    python benchmarks/bf16_training.py --device cpu --width 64 --blocks 1 --steps 4

A LLaMA-shaped model with random weights learns a few fixed batches of random tokens by EBLoRA, with 64 protected
directions per layer. Frames stay in float32 on both bases. Exit code 1 when a constraint error is above 2e-6.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manifold_cl import EBLoRALinear, RiemannianAdamW, adapters_of, inject_adapters, param_groups
from manifold_cl.adapters import target_linears
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

CONSTRAINT = 2e-6
RANK, PROTECTED, BATCHES, TOKENS = 16, 64, 4, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=1024, help="of the model, a multiple of 64; the rest scales")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bf16.json")
    options = parser.parse_args()
    content: dict[str, Any] = {
        "what": "EBLoRA on a bfloat16 and a float32 base of a LLaMA-shaped model with random weights",
        "device": options.device,
        **{name: getattr(options, name) for name in ("width", "blocks", "steps")},
        "limit": CONSTRAINT,
        "versions": library_versions(),
        "machine": machine(),
    }
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        content[name] = found = trained(dtype, options)
        write_json(options.out, content)
        errors = f"errors {found['orthonormality']:.1e} and {found['protection']:.1e}"
        print(
            f"{name}: loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}, {errors}, {found['step_ms']:.1f} ms"
        )
    worst = max(content[name][error] for name in ("bfloat16", "float32") for error in ("orthonormality", "protection"))
    return 0 if worst <= CONSTRAINT else 1


def trained(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of all steps, the largest constraint errors, precision of the frames, milliseconds per step."""
    torch.manual_seed(0)
    width = options.width
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    model = LlamaForCausalLM(config).to(options.device, dtype)
    draw = torch.Generator().manual_seed(1)

    def adapter(_: str, layer: torch.nn.Module) -> EBLoRALinear:
        n = layer.in_features
        basis = torch.linalg.qr(torch.randn(n, min(PROTECTED, n // 4), generator=draw))[0].to(options.device)
        return EBLoRALinear(layer, RANK, alpha=2 * RANK, complement=basis, initial_scale=-0.05, generator=draw)

    inject_adapters(model, list(target_linears(model, "all-linear")), adapter)
    optimizer = RiemannianAdamW(param_groups(model, lr=6e-3, scale_lr=2e-2), weight_decay=0.0)
    batches = [torch.randint(1000, (8, TOKENS), generator=draw).to(options.device) for _ in range(BATCHES)]
    losses, laps = [], []
    for step in range(options.steps):
        start = time.perf_counter()
        ids = batches[step % BATCHES]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))  # waits for the device
        laps.append(1e3 * (time.perf_counter() - start))
    frames = {str(p.dtype).removeprefix("torch.") for a in adapters_of(model).values() for p in (a.left, a.right)}
    errors = optimizer.constraint_error()
    return {
        "losses": losses,
        "orthonormality": errors.orthonormality,
        "protection": errors.protection,
        "frames": sorted(frames),
        "step_ms": sorted(laps)[len(laps) // 2],
    }


if __name__ == "__main__":
    sys.exit(main())
