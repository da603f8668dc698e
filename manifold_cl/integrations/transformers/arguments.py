"""``TrainingArguments`` of a run over tasks: what is refused, what the method decides, and what a record holds."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from manifold_cl.continual.method import Method
from manifold_cl.continual.stage import derive_seed
from manifold_cl.continual.task import Split, Task
from manifold_cl.continual.training import Training
from manifold_cl.rules import validate_kind

REFUSED: Mapping[str, str] = {
    "deepspeed": "DeepSpeed flattens parameters, and frames are matrices: use torchrun or accelerate launch (DDP)",
    "fsdp": "FSDP shards the model while a task trains, and merging needs whole weights: use DDP, or one device",
    "push_to_hub": "every task would be pushed as a model of its own: push the finished model",
    "load_best_model_at_end": "a task ends with its last step, which the record and the memory describe",
    "auto_find_batch_size": "the batch size would change within a run: set per_device_train_batch_size",
    "save_only_model": "a task could not be resumed to the same numbers: leave it off",
    "enable_jit_checkpoint": "a task stopped by SIGTERM would count as learned: set save_steps, and resume",
    "ignore_data_skip": "a task could not be resumed to the same numbers: leave it off",
    "resume_from_checkpoint": "call train(resume=True), which finds the task and its checkpoint",
}
"""Options of `TrainingArguments` that a run over tasks cannot follow, and why."""

LAUNCHERS = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
"""Variables that ``accelerate launch`` sets for the same engines."""

OPTIMIZER = (
    *("learning_rate", "optim", "optim_args", "optim_target_modules"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Options of the Trainer's own optimizer, in whose place the method's steps."""

ENCODING = (
    *("chat_template_path", "dataset_text_field", "dataset_kwargs", "eos_token", "pad_token", "truncation_mode"),
    *("completion_only_loss", "assistant_only_loss"),
)
"""Options of TRL's preparation of texts; a task hands over tokens, with labels on its answers."""
OF_EXAMPLES = ("label_smoothing_factor", "train_sampling_strategy", "group_by_length", "dataloader_drop_last")
"""Options for examples that the Trainer reads. Tasks without ``encode`` have batches and a loss of their own."""
BATCHING = ("packing", "packing_strategy", "eval_packing", "padding_free", "shuffle_dataset")
"""Options of TRL's batches, which only TRL's trainers follow."""

NOT_RECORDED = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "use_cpu", "debug", "skip_memory_metrics"),
    *("log_", "logging_", "save_", "eval_", "hub_", "trackio_", "ddp_", "do_", "dataloader_num", "dataloader_pin"),
    *("dataloader_persistent", "dataloader_prefetch", "local_rank", "per_device_eval", "prediction_loss_only"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "num_train_epochs"),
    *("warmup_steps", *OPTIMIZER),
)
"""Beginnings of the names of options that change no number, or that the record holds under names of its own."""


def default_arguments(folder: Path | str) -> TrainingArguments:
    """The settings of the project's own loop: batches of 16, one epoch, warm-up over a tenth, a cosine, no clipping."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=0.0,
        logging_steps=10,
        report_to="none",
    )


def run_folder(args: TrainingArguments | None, folder: Path | str | None) -> Path:
    """The folder of a run: the one that is given, else that of ``args``.

    Raises:
        ValueError: where neither is given.
        TypeError: for ``args`` of another kind, such as a folder.
    """
    if args is not None:
        validate_kind("args", args, TrainingArguments, remedy="give TrainingArguments(folder, ...), or folder=")
    if folder is None and (args is None or args.output_dir is None):
        raise ValueError("no folder for the run: give folder, or args with an output_dir")
    return Path(folder if folder is not None else args.output_dir)  # type: ignore[union-attr]


def validate_arguments(args: TrainingArguments) -> None:
    """Raise ValueError, with the name of the option, for settings that a run over tasks cannot follow."""
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}={getattr(args, name)!r} is refused: {reason}")
    for variable, name in LAUNCHERS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(f"accelerate launch set {name} ({variable}): {REFUSED[name]}")
    if args.save_strategy == "best":
        raise ValueError("save_strategy='best' is refused: a task resumes from its last step; use 'steps' or 'epoch'")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process would spread the batch over {args.n_gpu} GPUs (DataParallel): start one process per GPU with "
            "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )


def validate_own_batches(args: TrainingArguments, options: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Raise ValueError for options of the data or the loss that tasks without ``encode`` would ignore."""
    own = [task.name for task in tasks if getattr(task, "encode", None) is None]
    found = [name for name in OF_EXAMPLES if hasattr(args, name) and getattr(args, name) != _default(args, name)]
    found += [name for name in ("compute_loss_func", "data_collator") if options.get(name) is not None]
    if own and found:
        raise ValueError(
            f"{', '.join(found)}: ignored by {', '.join(own)}, whose batches and loss are their own (no encode): leave "
            "these options out, or give the tasks an encode"
        )


def warn_of_ignored(args: TrainingArguments, method: Method, *, of_trl: bool) -> None:
    """Warn once of the options of the Trainer's optimizer that were set, and once of TRL's options without effect.

    Args:
        args: of the run.
        method: its own optimizer steps.
        of_trl: whether the trainer class is TRL's.
    """
    _warn_of_unread(args, of_trl)
    ignored = {name: value for name, value in changed(args).items() if name in OPTIMIZER and value is not None}
    rate = method.options().get("lr")
    if ignored.get("learning_rate") == rate:
        ignored.pop("learning_rate", None)
    if ignored:
        listed = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        warnings.warn(
            f"{listed}: ignored, because the optimizer of {method.name} steps"
            + (f" (lr={rate:g}; another one: method={{'name': {method.name!r}, 'lr': ...}})" if rate else ""),
            UserWarning,
            stacklevel=3,
        )


def _warn_of_unread(args: TrainingArguments, of_trl: bool) -> None:
    """Warn of the options of TRL that have no effect on the tokens of a task."""
    names = ENCODING if of_trl else (*ENCODING, *BATCHING)
    found = [name for name in names if hasattr(args, name) and getattr(args, name) != _default(args, name)]
    if found:
        listed = ", ".join(f"{name}={getattr(args, name)!r}" for name in found)
        reason = "a task hands over tokens, with labels on its answers alone"
        if not of_trl and set(found) & set(BATCHING):
            reason += ", and the batches of TRL need trainer_class=SFTTrainer"
        warnings.warn(f"{listed} of {type(args).__name__}: ignored, because {reason}", UserWarning, stacklevel=4)


def _default(args: TrainingArguments, name: str) -> Any:
    option = next(option for option in fields(args) if option.name == name)
    return option.default if option.default_factory is MISSING else option.default_factory()


def changed(args: TrainingArguments) -> dict[str, Any]:
    """The options that differ from the defaults of their class, where they are plain values."""
    values = {}
    for option in fields(args):
        value, default = getattr(args, option.name), _default(args, option.name)
        value, default = getattr(value, "value", value), getattr(default, "value", default)
        if value != default and (value or default) and isinstance(value, str | int | float | bool | list | dict):
            values[option.name] = value
    return values


def checkpointing(args: TrainingArguments) -> dict[str, Any] | None:
    """Options of gradient checkpointing; None where it is off. transformers 5.2x calls it activation checkpointing."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, None):
            return dict(getattr(args, f"{name}_kwargs", None) or {"use_reentrant": False})
    return None


def training_of(args: TrainingArguments, *, evaluate_on: Split) -> Training:
    """The options of a run as far as the project's own loop has them; the schedule is the Trainer's."""
    return Training(
        epochs=max(1, math.ceil(args.num_train_epochs)),
        batch_size=args.per_device_train_batch_size,
        warmup=args.warmup_steps if 0 < args.warmup_steps < 1 else 0.0,
        seed=args.seed,
        evaluate_on=evaluate_on,
        accumulation=args.gradient_accumulation_steps,
        clip=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
    )


def recorded(args: TrainingArguments, trainer_class: type) -> dict[str, Any]:
    """Further entries of a record's configuration: the trainer, its schedule, and every option that was changed."""
    entries: dict[str, Any] = {"trainer": trainer_class.__name__, "schedule": str(args.lr_scheduler_type.value)}
    if args.max_steps > 0:
        entries["max_steps"] = args.max_steps
    elif args.num_train_epochs != math.ceil(args.num_train_epochs):
        entries["epochs"] = args.num_train_epochs
    if args.warmup_steps >= 1:
        entries["warmup_steps"] = args.warmup_steps
    for name, value in changed(args).items():
        if not name.startswith(NOT_RECORDED) and name not in ("lr_scheduler_type", "max_steps"):
            entries[f"trainer.{name}"] = value
    return entries


def task_arguments(args: TrainingArguments, folder: Path, *, index: int, task: str) -> TrainingArguments:
    """A copy for one task: its own folder of checkpoints, its own order of the data, and its name in reports."""
    own = copy.copy(args)
    for name, value in vars(own).items():
        if isinstance(value, dict):
            setattr(own, name, dict(value))
    own.output_dir = str(folder)
    own.seed = derive_seed(args.seed, index, "trainer") % 2**32  # numpy takes no larger one
    own.run_name = f"{args.run_name or folder.parent.parent.parent.name}-{task}"
    if not torch.accelerator.is_available():
        own.dataloader_pin_memory = False  # torch warns where there is nothing to pin for
    return own
