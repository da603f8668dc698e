"""Three tasks in words, learned one after the other in TRL's SFTTrainer: plain LoRA forgets, EBLoRA protects.

    python examples/trl_sft_continual.py                             # a tiny random LLaMA, a minute, no download
    python examples/trl_sft_continual.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data FOLDER --out runs/words
    python examples/trl_sft_continual.py --out runs/words --resume   # after an interruption
    torchrun --nproc_per_node 2 examples/trl_sft_continual.py --out runs/words

FOLDER holds one JSONL file per task, with ``prompt`` and ``completion`` or ``messages`` per line. Each method gets a
run folder under ``--out``, which `manifold-cl compare`, `analyze` and `export` read.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from manifold_cl.integrations.transformers import ContinualTrainer
from manifold_cl.streams import causal_lm_tasks

NOUNS = ("apple", "rose", "tiger", "river", "stone", "cloud", "bread", "horse", "lemon", "eagle", "piano", "sugar")
ANSWERS = {"colour": ("red", "green", "blue"), "size": ("small", "large"), "place": ("home", "forest", "sea", "sky")}
WORDS = (*NOUNS, *ANSWERS, *(word for words in ANSWERS.values() for word in words), "which", "has", "?")
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or name; empty for a tiny random LLaMA")
    parser.add_argument("--data", type=Path, default=None, help="one JSONL file per task; three small tasks by default")
    parser.add_argument("--methods", nargs="+", default=["sequential_merge", "eblora"])
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--keep", action="store_true", help="merge nothing: for quantised models")
    parser.add_argument("--out", type=Path, default=None, help="runs; a temporary folder by default")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if PROCESSES > 1 and options.out is None:
        parser.error("several processes share their runs: give --out")
    if bool(options.model) != bool(options.data):
        parser.error("the tiny model knows the words of the small tasks only: give --model and --data together")
    with tempfile.TemporaryDirectory() as temporary:
        for method in options.methods:
            run(method, options, (options.out or Path(temporary)) / method)


def run(method: str, options: argparse.Namespace, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else tiny_tokenizer()
    cuda = torch.cuda.is_available()
    trainer = ContinualTrainer(
        options.model or tiny_model,
        causal_lm_tasks(options.data or small_tasks(), tokenizer, score_by=None if options.data else "likelihood"),
        method,
        SFTConfig(
            str(folder),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            bf16=cuda and torch.cuda.is_bf16_supported(),
            activation_checkpointing=bool(options.model),
            use_cpu=not cuda,
            ddp_backend=None if cuda or PROCESSES == 1 else "gloo",
            save_steps=20,
            logging_strategy="no",
            disable_tqdm=not options.model,
            report_to="none",
        ),
        merge="keep" if options.keep else "merge",
        trainer_class=SFTTrainer,
    )
    record = trainer.train(resume=options.resume)
    if trainer.runner.ranks.writes:
        print(f"{method}: percent right after each task (rows), by task (columns): {', '.join(record.tasks)}")
        for row in record.matrix():
            print("   " + " ".join(f"{value:6.1f}" for value in row))
        print("   " + ", ".join(f"{name.upper()} {record.metrics[name]:.1f}" for name in ("mft", "mfn", "bwt")))


def small_tasks() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Three facts per noun, drawn at random, to be learned by heart: training and test rows are the same."""
    draw = torch.Generator().manual_seed(0)
    tasks = {}
    for name, answers in ANSWERS.items():
        drawn = torch.randint(len(answers), (len(NOUNS),), generator=draw).tolist()
        rows = [
            {"prompt": f"which {name} has {noun} ? ", "completion": answers[index], "options": list(answers)}
            for noun, index in zip(NOUNS, drawn, strict=True)
        ]
        tasks[name] = {"train": rows * 4, "test": rows}
    return tasks


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<end>", "<unknown>", *WORDS))}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
