"""A step of `ContinualTrainer` beside PEFT's LoRA in the same Trainer: time of a step, and bytes saved for backward.

    python benchmarks/bench_trainer.py                 # SmolLM2's widths, four blocks, CPU time of one thread
    python benchmarks/bench_trainer.py --device cuda --blocks 30 --length 256 --bf16
    python benchmarks/bench_trainer.py --width 64 --steps 4 --rounds 1     # whether the script runs

Weights and tokens are random, so nothing is downloaded. Both have rank 16 on all linear layers and the Trainer's
clipping; LoRA steps with AdamW. The steps of ContinualTrainer are those of a second task, under the protection of the
first. Rounds alternate, and the ratio of each round is taken, so that a drift of the machine's speed hits both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from manifold_cl import Task, eblora_adapters, inject_adapters
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.integrations.transformers import ContinualTrainer

RANK = 16
AIMS = {"step": 1.06, "saved": 1.02}
VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    times: dict[str, list[float]] = {"lora": [], "eblora": []}
    for number in range(options.rounds):
        order = list(times)[:: 1 if number % 2 else -1]
        for name in order:
            times[name].append(STEPS[name](options))
            print(f"round {number + 1}: {name} {1000 * times[name][-1]:.1f} ms", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(times["eblora"], times["lora"], strict=True)]
    saved = {name: saved_bytes(options, name) for name in times}
    content = {
        "setting": {key: value for key, value in vars(options).items() if key != "out"} | {"rank": RANK},
        "aims": AIMS,
        "step_ms": {name: [1000 * seconds for seconds in each] for name, each in times.items()},
        "step_ratio": statistics.median(ratios),
        "step_ratio_of_shortest": min(times["eblora"]) / min(times["lora"]),
        "saved_mb": {name: value / 1e6 for name, value in saved.items()},
        "saved_ratio": saved["eblora"] / saved["lora"],
        "clock": "CPU time of the process" if options.device == "cpu" else "time, device synchronized",
        "machine": machine(),
        "versions": library_versions(),
    }
    show(content)
    if options.out is not None:
        write_json(options.out, content)


class RandomTask(Task):
    """Random tokens, of which the second half is learned."""

    def __init__(self, name: str, options: argparse.Namespace, *, seed: int) -> None:
        self.name = name
        draw = torch.Generator().manual_seed(seed)
        shape = (options.batch * options.steps, options.length)
        self.tokens = torch.randint(VOCABULARY, shape, generator=draw)
        self.labels = self.tokens.clone()
        self.labels[:, : options.length // 2] = -100

    def size(self, split: str) -> int:
        """Number of examples."""
        return len(self.tokens)

    def batches(
        self, split: str, *, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels, in order."""
        yield from zip(self.tokens.split(batch_size), self.labels.split(batch_size), strict=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the second half."""
        device = next(model.parameters()).device
        return model(input_ids=batch[0].to(device), labels=batch[1].to(device)).loss

    def scores(self, model: nn.Module, split: str = "test") -> Mapping[str, float]:
        """No evaluation: it is no part of a step."""
        return {"score": 0.0}

    def encode(self, split: str) -> list[dict[str, list[int]]]:
        """Examples for the Trainer."""
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for ids, labels in zip(self.tokens.tolist(), self.labels.tolist(), strict=True)
        ]


class StepClock(TrainerCallback):
    """Seconds of each step, from its first batch to the end of the optimizer's step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start of a step."""
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End of a step."""
        self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def model_of(options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 64 or 1,
        num_key_value_heads=max(options.width // 192, 1),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def arguments(options: argparse.Namespace, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        bf16=options.bf16,
        dataloader_pin_memory=options.device != "cpu",
    )


def lora_step(options: argparse.Namespace) -> float:
    """Median seconds of a step of PEFT's LoRA, without the first quarter."""
    clock = StepClock(options.device)
    model = get_peft_model(model_of(options), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        data = [
            {key: torch.tensor(value) for key, value in row.items()}
            for row in RandomTask("second", options, seed=2).encode("train")
        ]
        Trainer(model=model, args=arguments(options, folder), train_dataset=data, callbacks=[clock]).train()
    return statistics.median(clock.seconds[options.steps // 4 :])


def eblora_step(options: argparse.Namespace) -> float:
    """Median seconds of a step of the second task, without the first quarter."""
    clock = StepClock(options.device)
    tasks = [RandomTask(name, options, seed=number) for number, name in enumerate(("first", "second"), 1)]
    method = {"name": "eblora", "statistic_examples": options.batch}
    with tempfile.TemporaryDirectory() as folder:
        ContinualTrainer(model_of(options), tasks, method, arguments(options, folder), callbacks=[clock]).train()
    return statistics.median(clock.seconds[options.steps + options.steps // 4 :])


STEPS = {"lora": lora_step, "eblora": eblora_step}


def saved_bytes(options: argparse.Namespace, name: str) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of one batch, parameters left out."""
    model = model_of(options)
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    else:
        memory = {
            name: torch.randn(layer.in_features, layer.in_features // 5)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name != "lm_head"
        }
        inject_adapters(model, "all-linear", eblora_adapters(rank=RANK, alpha=2.0 * RANK, memory=memory))
    model.to(options.device).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = next(RandomTask("second", options, seed=2).batches("train", batch_size=options.batch))
    cast = torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        loss = model(input_ids=batch[0].to(options.device), labels=batch[1].to(options.device)).loss
    del loss
    return sum(kept.values())


def show(content: Mapping[str, Any]) -> None:
    table = Table("", "LoRA in PEFT", "eblora", "ratio", "aim")
    fastest = {name: min(each) for name, each in content["step_ms"].items()}
    table.add_row(
        "step, shortest of the rounds (ms)",
        f"{fastest['lora']:.1f}",
        f"{fastest['eblora']:.1f}",
        f"{content['step_ratio']:.3f} (median of rounds), {content['step_ratio_of_shortest']:.3f} (shortest)",
        f"{AIMS['step']}",
    )
    saved = content["saved_mb"]
    table.add_row(
        "saved for backward (MB)",
        *(f"{saved[name]:.1f}" for name in ("lora", "eblora")),
        f"{content['saved_ratio']:.4f}",
        f"{AIMS['saved']}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
