"""What a layer costs beside PEFT's LoRA of equal rank, and how long adapter files take.

    python benchmarks/bench_layer.py [--threads 2] [--device cuda] [--model-shaped]

Forward and backward of one adapted linear layer (LLaMA-7B shapes): ours, the PEFT tuner's, and PEFT's LoRA, timed in
turn, so that a drift of the machine's speed hits all of them; what is reported is the median of paired ratios, and
behind it the ratio of the shortest times, which a busy machine disturbs least. Then a
7B-shaped set of 224 layers at rank 16 is written, read and exported. With ``--model-shaped`` (a GPU with 40 GB or more)
a LLaVA-7B-shaped language model with random weights takes whole training steps beside LoRA with AdamW.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import linear

from manifold_cl import (
    EBLoRALinear,
    RiemannianAdamW,
    eblora_adapters,
    export_lora,
    inject_adapters,
    load_adapters,
    param_groups,
    save_adapters,
)
from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

RANK, WIDTH, BLOCKS = 16, 4096, 32
AIMS = {"ratio": 1.05, "load_s": 2.0, "export_s": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--model-shaped", action="store_true", help="whole training steps of a 7B-shaped model (GPU)")
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="of the model, a multiple of 128; its other sizes scale"
    )
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    out = options.out or Path(__file__).parent / "results" / f"layer{'-cuda' if device.type == 'cuda' else ''}.json"

    width, inner, blocks = options.width, widened(options.width), options.blocks
    shapes = {"q_proj": (width, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    layers = {
        f"{name}, {str(dtype).removeprefix('torch.')}": layer_ratios(shape, dtype, device, options)
        for name, shape in shapes.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    alone = adapter_alone(device, options)
    files = file_seconds(width, blocks)
    table = Table(title=f"forward and backward of one layer, {options.tokens} tokens, rank {RANK}, on {device}")
    for column in ("layer", "LoRA ms", "ours / LoRA", "PEFT tuner / LoRA"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, row in layers.items():
        ratios = (f"{row[key]:.3f} ({row[key + '_of_minima']:.3f})" for key in ("ours", "peft"))
        table.add_row(name, f"{row['lora_ms']:.1f}", *ratios)
    Console().print(table)
    worst = max(max(row["ours"], row["peft"]) for row in layers.values())
    Console().print(f"worst ratio {worst:.3f} (aim {AIMS['ratio']})")
    Console().print("the adapter alone over LoRA's: " + ", ".join(f"{k} {v:.2f}" for k, v in alone.items()))
    Console().print(", ".join(f"{key.replace('_', ' ')} {value:.2f} s" for key, value in files.items() if "_s" in key))
    content = {
        "what": f"adapted linear layers beside PEFT's LoRA, rank {RANK}; files of {files['layers']} layers of LLaMA-7B",
        "aims": AIMS,
        "layers": layers,
        "worst_ratio": worst,
        "adapter_alone_over_lora": alone,
        "files": files,
        "met": {
            "ratio": worst <= AIMS["ratio"],
            "load": files["load_s"] <= AIMS["load_s"],
            "export": files["export_s"] <= AIMS["export_s"],
        },
        "tokens": options.tokens,
        "repeats": options.repeats,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "clock": "processor" if own_clock(device) else "wall",
        "load": os.getloadavg(),
        "versions": library_versions(),
        "machine": machine(),
    }
    if device.type != "cuda":
        content["not_measured"] = "the 7B-shaped training step and its memory: --model-shaped, on a GPU"
    if options.model_shaped:
        content["model_shaped"] = model_shaped(device, width, blocks, options.repeats)
        Console().print(content["model_shaped"])
    write_json(out, content)


def layer_ratios(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> dict[str, float]:
    m, n = shape
    draw = torch.Generator().manual_seed(0)

    def base() -> nn.Module:
        model = nn.Sequential()
        model.add_module("proj", nn.Linear(n, m, bias=False, device=device, dtype=dtype))
        return model

    ours = base()
    inject_adapters(ours, ["proj"], eblora_adapters(rank=RANK, generator=draw))
    tuned = get_peft_model(base(), EBLoraConfig(r=RANK, target_modules=["proj"]))
    # PEFT would compute a bfloat16 layer's LoRA in float32; in the layer's own precision it is at its fastest.
    lora = get_peft_model(base(), LoraConfig(r=RANK, target_modules=["proj"]), autocast_adapter_dtype=False)
    models = {"lora": lora, "ours": ours, "peft": tuned}
    x = torch.randn(4, options.tokens // 4, n, device=device, dtype=dtype, requires_grad=True)

    def run(model: nn.Module) -> None:
        x.grad = None
        model.zero_grad()
        model(x).sum().backward()

    laps: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for i in range(options.repeats + 3):
        for name in order[i % 3 :] + order[: i % 3]:  # nobody always comes first
            seconds = timed(lambda name=name: run(models[name]), device, wall=not own_clock(device))
            if i >= 3:  # warm-up
                laps[name].append(seconds)
    found = {"lora_ms": 1e3 * statistics.median(laps["lora"])}
    for name in ("ours", "peft"):
        found[name] = statistics.median(a / b for a, b in zip(laps[name], laps["lora"], strict=True))
        found[f"{name}_of_minima"] = min(laps[name]) / min(laps["lora"])
    return found


def adapter_alone(device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """The thin products only, without the base layer's, which hide them: ours over ``F.linear(F.linear(x, A), B)``."""
    found, width = {}, options.width
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(options.tokens, width, device=device, dtype=dtype, requires_grad=True)
        a = torch.randn(RANK, width, device=device, dtype=dtype, requires_grad=True)
        b = torch.randn(width, RANK, device=device, dtype=dtype, requires_grad=True)
        left, right = (torch.randn(width, RANK, device=device, requires_grad=True) for _ in range(2))
        scale = torch.tensor(0.1, device=device, requires_grad=True)
        works = {
            "lora": lambda x=x, a=a, b=b: (linear(linear(x, a), b) * 2.0).sum().backward(),
            "ours": lambda x=x, u=left, v=right, s=scale: Factors(u, v, s * 2.0).apply(x).sum().backward(),
        }
        laps: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(2 * options.repeats + 3):
            for name, work in works.items():
                laps[name].append(timed(work, device, wall=not own_clock(device)))
        ratios = (o / p for o, p in zip(laps["ours"][3:], laps["lora"][3:], strict=True))
        found[str(dtype).removeprefix("torch.")] = statistics.median(ratios)
    return found


def own_clock(device: torch.device) -> bool:
    """Whether processor time is the time that the work takes: one thread, no accelerator."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def timed(work: Callable[[], object], device: torch.device, *, wall: bool = True) -> float:
    """Seconds; of the processor rather than of the wall on request, which other processes then lengthen less."""
    clock = time.perf_counter if wall else time.process_time
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def widened(width: int) -> int:
    """Inner size of a LLaMA block's MLP."""
    return 11008 * width // 4096


class Shared(nn.Module):
    """Linear layers of LLaMA-7B's shapes; every weight is one number, expanded: adapters never write to it."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        inner = widened(width)
        kinds = dict.fromkeys("qkvo", (width, width))
        kinds |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            block = nn.ModuleDict()
            for name, shape in kinds.items():
                block[name] = nn.Linear(shape[1], shape[0], bias=False, device="meta")
                weight = torch.zeros(1, 1, dtype=torch.bfloat16).expand(shape)
                block[name].weight = nn.Parameter(weight, requires_grad=False)
            self.blocks.append(block)


def file_seconds(width: int, blocks: int) -> dict[str, float]:
    cpu = torch.device("cpu")
    model = Shared(width, blocks)
    draw = torch.Generator().manual_seed(0)
    targets = [*"qkvo", "gate", "up", "down"]
    injected = timed(lambda: inject_adapters(model, targets, eblora_adapters(rank=RANK, generator=draw)), cpu)
    with tempfile.TemporaryDirectory() as folder:
        saved = timed(lambda: save_adapters(model, folder), cpu)
        read = timed(lambda: read_adapters(folder), cpu)
        loaded = timed(lambda: load_adapters(model, folder), cpu)
        exported = timed(lambda: export_lora(folder, Path(folder) / "lora"), cpu)
        size = (Path(folder) / "adapter.safetensors").stat().st_size / 1e6
    adapters = sum(isinstance(module, EBLoRALinear) for module in model.modules())
    return {
        "layers": adapters,
        "megabytes": size,
        "inject_s": injected,
        "save_s": saved,
        "read_s": read,
        "load_s": loaded,
        "export_s": exported,
    }


def model_shaped(device: torch.device, width: int, blocks: int, repeats: int) -> dict[str, float]:
    """Step time and peak memory of a 7B-shaped language model with 448 factors, beside LoRA with AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=widened(width), num_hidden_layers=blocks, num_attention_heads=width // 128
    )
    gpu = device.type == "cuda"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = (8, 640) if gpu else (1, 64)  # on a GPU 576 image tokens and a sentence
    ids = torch.randint(0, 32000, shape, device=device)
    found: dict[str, float] = {}
    for name in ("lora", "eblora"):
        with torch.device(device):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        if name == "lora":
            model = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        else:
            model = get_peft_model(model, EBLoraConfig(r=RANK, target_modules=targets))
            optimizer = RiemannianAdamW(param_groups(model, lr=1e-4), weight_decay=0.0)
        checkpoint_activations(model)
        model.enable_input_require_grads()

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        for _ in range(2):
            step()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        found[f"{name}_step_s"] = statistics.median(timed(step, device) for _ in range(min(8, repeats)))
        if gpu:
            found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        del model, optimizer, step
        if gpu:
            torch.cuda.empty_cache()
    for what, unit in {"step": "step_s", "memory": "peak_gb"}.items():
        if f"lora_{unit}" in found:
            found[f"{what}_ratio"] = found[f"eblora_{unit}"] / found[f"lora_{unit}"]
    return found


if __name__ == "__main__":
    main()
