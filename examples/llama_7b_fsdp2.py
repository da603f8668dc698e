"""A language model that learns tasks one after the other on several GPUs, its weights sharded by FSDP2.

    torchrun --nproc_per_node 2 examples/llama_7b_fsdp2.py          # a tiny random model, two CPU processes, seconds
    torchrun --nproc_per_node 4 examples/llama_7b_fsdp2.py --model PATH_OR_NAME --checkpointing \
        --tasks medicine.jsonl law.jsonl --out runs/seven-billion    # rows with prompt and completion

Per task: start along its gradient outside the memory, train, let the memory grow, and let the finished update act
beside the weights. No weight changes, so bfloat16 loses nothing. docs/seven-billion.md has the memory that this takes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from manifold_cl import (
    RiemannianAdamW,
    SubspaceMemory,
    adapters_of,
    eblora_adapters,
    grow_memory,
    inject_adapters,
    param_groups,
    searched_rates,
)
from manifold_cl.adapters import Factors, complete, keep_factors, target_linears, write_complete
from manifold_cl.continual import Passes, leading_directions
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.streams import causal_lm_tasks

SCALE = -0.05
"""Magnitude at the start of a task; negative, so that the start is a descent step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or name; empty for a tiny random LLaMA")
    parser.add_argument("--tasks", nargs="+", type=Path, default=[], help="JSONL files, in the order of learning")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="examples per device and step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, help="of the frames (default: searched_rates of the model)")
    parser.add_argument("--scale-lr", type=float, help="of the magnitudes (default: the same)")
    parser.add_argument("--energy", type=float, default=0.97, help="share of a task's energy to protect")
    parser.add_argument("--statistics", type=int, default=160, help="examples for the start and for the memory")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--out", type=Path, help="folder for the updates, the memory and the losses")
    options = parser.parse_args()
    if bool(options.model) != bool(options.tasks):
        parser.error("give --model and --tasks, or neither for a tiny random model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        learn(options, device.type)
    finally:
        dist.destroy_process_group()


def learn(options: argparse.Namespace, device: str) -> None:
    torch.manual_seed(0)  # the same frames on every rank
    model, tokenizer = load(options)
    tasks = causal_lm_tasks(options.tasks or tiny_tasks(), tokenizer, score_by="loss")
    layers = target_linears(model, "all-linear")  # these objects stay inside the adapters
    memory = SubspaceMemory.empty(layers)
    adapters = inject_adapters(model, "all-linear", eblora_adapters(rank=options.rank, alpha=2 * options.rank))
    shard(model, device)
    losses: list[list[float]] = []
    for index, task in enumerate(tasks):
        statistics = partial(passes_over, task, model, options)
        start(adapters, memory, leading_directions(layers, statistics, options.rank, memory, passes=summed(index)))
        error = train(task, model, options)
        memory = grow_memory(
            memory, layers, statistics, energy=options.energy, rank=options.rank, task=task.name, passes=summed(index)
        )
        finished = {name: complete_factors(adapter) for name, adapter in adapters.items()}
        for adapter in adapters.values():  # from here on the update acts beside the weight, and the adapter is free
            adapter.scale.detach().zero_()
        keep_factors(model, finished)
        losses.append([mean_loss(each, model, options) for each in tasks])
        report(f"{task.name}: losses {[round(loss, 3) for loss in losses[-1]]}, constraint {error:.1e}")
        if options.out and dist.get_rank() == 0:
            save(options.out / f"task-{index}", finished, memory)
    if options.out and dist.get_rank() == 0:
        content = {"losses": losses, "bytes": local_bytes(model), "constraint": error}
        (options.out / "losses.json").write_text(json.dumps(content, indent=1))


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The frozen base model in bfloat16 on the CPU, and its tokenizer."""
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        tokenizer = tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if options.checkpointing:
        model.train()
        checkpoint_activations(model)
        model.enable_input_require_grads()
    return model, tokenizer


def shard(model: Any, device: str) -> None:
    """Shard every block, then the rest: weights, frames, and with them gradients and moments."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def own_parts(task: Any, split: str, options: argparse.Namespace, generator: Any = None) -> Iterator[Any]:
    """This rank's part of each batch; a last batch too small for all ranks is left out."""
    ranks = dist.get_world_size()
    for batch in task.batches(split, batch_size=options.batch * ranks, generator=generator):
        if len(batch) >= ranks:
            yield batch[dist.get_rank() :: ranks]


def passes_over(task: Any, model: nn.Module, options: argparse.Namespace) -> Iterator[Callable[[], Tensor]]:
    """The losses of this rank's examples, for statistics."""
    steps = -(-options.statistics // (options.batch * dist.get_world_size()))
    for part, _ in zip(own_parts(task, "train", options), range(steps), strict=False):
        yield partial(task.loss, model, part)


def summed(seed: int) -> Passes:
    """Passes in which every rank reads its own examples, and the sums are added up."""
    return Passes(distributed=True, seed=seed)


@torch.no_grad()
def start(adapters: Any, memory: SubspaceMemory, directions: Any) -> None:
    """Move the adapters out of the memory, along the task's directions, at the magnitude of a start."""
    for name, adapter in adapters.items():
        adapter.protect(memory[name])
        adapter.point_along(directions[name].left, directions[name].right)
        write_complete(adapter.scale, torch.full(adapter.scale.shape, SCALE, device=adapter.scale.device))


def train(task: Any, model: Any, options: argparse.Namespace) -> float:
    """Train the adapters on a task; the largest constraint residual at the end."""
    given = {"lr": options.lr, "scale_lr": options.scale_lr}
    rates = searched_rates(model) | {name: rate for name, rate in given.items() if rate is not None}
    optimizer = RiemannianAdamW(param_groups(model, **rates))
    steps = options.epochs * task.batch_count("train", options.batch * dist.get_world_size())
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for epoch in range(options.epochs):
        for part in own_parts(task, "train", options, torch.Generator().manual_seed(epoch)):
            task.loss(model, part).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return max(optimizer.constraint_error())


def complete_factors(adapter: Any) -> Factors:
    """The adapter's update with all of its rows, which ranks gather."""
    left, right, scale = (complete(part.detach()) for part in (adapter.left, adapter.right, adapter.scale))
    return Factors(left.clone(), right.clone(), scale.squeeze() * adapter.scaling)


@torch.no_grad()
def mean_loss(task: Any, model: nn.Module, options: argparse.Namespace) -> float:
    """The mean loss on the task's test part, over all ranks."""
    found = torch.tensor([float(task.loss(model, part)) for part in own_parts(task, "test", options)]).mean()
    dist.all_reduce(found)
    return float(found) / dist.get_world_size()


def save(folder: Path, update: dict[str, Factors], memory: SubspaceMemory) -> None:
    """Write a task's update as tensors, and the memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{part}": getattr(f, part) for name, f in update.items() for part in ("left", "right", "magnitude")
    }
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "update.safetensors")
    memory.save(folder)


def local_bytes(model: Any) -> dict[str, int]:
    """Bytes of base weights, factors and protected bases that this rank stores."""
    model.reshard()  # what is outside the blocks stays complete after a forward pass
    own = {id(p) for adapter in adapters_of(model).values() for p in (adapter.left, adapter.right, adapter.scale)}
    sizes = [(id(p) in own, p.to_local().nbytes) for p in model.parameters()]
    bases = {
        a.right_manifold.complement.data_ptr(): a.right_manifold.complement.nbytes for a in adapters_of(model).values()
    }
    return {
        "base weights": sum(size for mine, size in sizes if not mine),
        "factors": sum(size for mine, size in sizes if mine),
        "protected bases": sum(bases.values()),
    }


def report(text: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def tiny_tasks() -> dict[str, list[dict[str, str]]]:
    """Three tasks of one kind: each maps the same words to words of its own."""
    words = [f"w{i}" for i in range(16)]
    return {
        f"shift by {shift}": [
            {"prompt": f"{a} {b} t{shift} ", "completion": f"w{(i + shift) % 16}"}
            for i, a in enumerate(words)
            for b in words[:8]
        ]
        for shift in (1, 5)
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "</s>", "<unk>", "t1", "t5", *(f"w{i}" for i in range(16))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    main()
