"""Balanced adapters in transformers' Trainer, killed half-way and resumed to the same bits.

    python examples/hf_trainer.py                       # a tiny random model, seconds, nothing is downloaded
    python examples/hf_trainer.py --model PATH_OR_NAME --report-to tensorboard
    torchrun --nproc_per_node 2 examples/hf_trainer.py --out runs/trainer   # several devices, or two CPU processes

Only two lines are ours: the optimizer's factory, and `log_geometry`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from manifold_cl import TrainerOptimizer, searched_rates
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.integrations.transformers import log_geometry

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
SHOWN = ("step", "loss", "geometry/orthonormality", "geometry/scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or name; empty for a tiny random LLaMA")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, …")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None, help="checkpoints; a temporary folder by default")
    options = parser.parse_args()
    if PROCESSES > 1 and options.out is None:
        parser.error("several processes share their checkpoints: give --out")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        whole = trainer(options, out)
        whole.train()
        for entry in whole.state.log_history:
            if "loss" in entry and whole.is_world_process_zero():
                print(
                    {key: f"{entry[key]:.3g}" for key in ("step", "loss", "geometry/orthonormality", "geometry/scale")}
                )

        resumed = trainer(options, out)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{options.steps // 2}"))
        same = all(map(torch.equal, trained(whole.model), trained(resumed.model)))
        if whole.is_world_process_zero():
            print("resumed from half-way: the same parameters:", same)


def trainer(options: argparse.Namespace, out: Path) -> Trainer:
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(base_model(options.model), EBLoraConfig(r=8, alpha=16, target_modules=targets, seed=0))
    made = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_steps=max(options.steps // 4, 1),
            save_steps=max(options.steps // 2, 1),
            report_to=options.report_to,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            ddp_backend="gloo" if PROCESSES > 1 and not torch.cuda.is_available() else None,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        ),
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(TrainerOptimizer, searched_rates(model)),
    )
    log_geometry(made)
    return made


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Counting from anywhere, modulo twenty."""

    def __init__(self) -> None:
        self.sentences = (torch.arange(512)[:, None] * 7 + torch.arange(16)) % 20

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sentences[index], "labels": self.sentences[index]}


def base_model(name: str) -> nn.Module:
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


if __name__ == "__main__":
    main()
