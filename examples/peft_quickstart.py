"""Balanced adapters through PEFT, from ``get_peft_model`` to a plain LoRA file.

    python examples/peft_quickstart.py                       # a tiny random model, seconds, nothing is downloaded
    python examples/peft_quickstart.py --model PATH_OR_NAME  # any causal language model that transformers loads

Two tasks one after the other: the second adapter avoids the input directions that the first one used. Then saving,
reloading in a new process with identical logits, and the exact export that stock PEFT reads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from manifold_cl import RiemannianAdamW, SubspaceMemory, export_lora, grow_memory, param_groups, protect, task_losses
from manifold_cl.adapters import eblora_layers, geometry_metrics, target_linears
from manifold_cl.adapters.peft import EBLoraConfig

CONFIG = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "initial_scale": -0.05}
STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or name; empty for a tiny random LLaMA")
    parser.add_argument("--out", type=Path, default=None, help="where the adapter goes; a temporary folder by default")
    parser.add_argument("--reload", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        reload(options.model, options.reload)
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(options.model, options.out or Path(temporary))


def run(name: str, out: Path) -> None:
    # Task one: an ordinary PEFT model; only the optimizer is ours.
    model = get_peft_model(base_model(name), EBLoraConfig(**CONFIG), adapter_name="first")
    model.print_trainable_parameters()
    print(f"task 1: loss {train(model, task(1)):.3f}")

    # Protected directions of task one: the input directions of each layer that matter to its loss.
    layers = target_linears(model, CONFIG["target_modules"])
    losses = task_losses(model, [{"input_ids": part, "labels": part} for part in task(1).split(16)], examples=64)
    memory = grow_memory(SubspaceMemory.empty(layers), layers, losses, energy=0.97, rank=CONFIG["r"], task="first")

    # Task two: one more adapter on top of the first, outside these directions.
    model.add_adapter("second", EBLoraConfig(**CONFIG, seed=1))
    model.base_model.set_adapter(["first", "second"])
    for layer in eblora_layers(model).values():  # the first one acts but does not train any more
        layer.set_requires_grad("first", False)
    protect(model, memory, adapter="second")
    before = loss(model, task(1))
    print(f"task 2: loss {train(model, task(2)):.3f}")
    print(f"task 1 afterwards: loss {loss(model, task(1)):.3f}, was {before:.3f}")
    print({name: f"{value:.1e}" for name, value in geometry_metrics(model, prefix="").items()})

    # Save, and read in a new process: the same logits to the last bit.
    model.set_adapter("second")
    logits = predictions(model)
    model.save_pretrained(out)
    torch.save(logits, out / "logits.pt")
    command = [sys.executable, __file__, "--model", name, "--reload", str(out)]
    subprocess.run(command, check=True)

    # Plain LoRA, exactly, for everything that reads PEFT's format.
    export_lora(out / "second", out / "lora")
    lora = PeftModel.from_pretrained(base_model(name), out / "lora").eval()
    difference = (predictions(lora) - logits).abs().max()
    print(f"as plain LoRA in stock PEFT: logits differ by {float(difference):.0e}")


def reload(name: str, folder: Path) -> None:
    model = PeftModel.from_pretrained(base_model(name), folder / "second").eval()
    same = torch.equal(predictions(model), torch.load(folder / "logits.pt"))
    print(f"reloaded in a new process: logits identical: {same}")
    sys.exit(not same)


def base_model(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name:
        return AutoModelForCausalLM.from_pretrained(name).eval()
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def task(number: int) -> Tensor:
    """Sixty-four sentences of sixteen words: counting by ``number`` from any start, in a vocabulary of its own."""
    words = 20
    return words * number + (torch.arange(64)[:, None] + number * torch.arange(16)) % words


def train(model: nn.Module, sentences: Tensor) -> float:
    # Higher than the usual lr=6e-3, scale_lr=2e-2: sixty steps from random weights.
    optimizer = RiemannianAdamW(param_groups(model, lr=2e-2, scale_lr=5e-2), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model.train()
    for step in range(STEPS):
        batch = sentences[step * 16 % len(sentences) :][:16]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return loss(model, sentences)


@torch.no_grad()
def loss(model: nn.Module, sentences: Tensor) -> float:
    return float(model(input_ids=sentences, labels=sentences).loss)


@torch.no_grad()
def predictions(model: nn.Module) -> Tensor:
    return model(input_ids=task(2)[:4]).logits


if __name__ == "__main__":
    main()
