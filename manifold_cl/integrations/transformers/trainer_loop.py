"""The training loop of a run in which a ``Trainer`` of transformers trains each task."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from manifold_cl.adapters.base_layers import is_quantised
from manifold_cl.adapters.frozen_updates import kept_updates
from manifold_cl.adapters.layers import Targets, target_linears
from manifold_cl.continual.checkpointing import checkpointing_method, following_checkpoints
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.training_loop import TrainingJob, TrainingLoop, all_finite, diverged
from manifold_cl.integrations.transformers.arguments import checkpointing, task_arguments
from manifold_cl.integrations.transformers.task_trainer import StepReports, TaskTraining, last_checkpoint, task_trainer
from manifold_cl.integrations.transformers.training_data import Collator, TaskBatches, encoded, tokenizer_of

CHECKPOINTS = "checkpoints"


class TrainerLoop(TrainingLoop):
    """Trains each task in a new object of one Trainer class.

    Statistics and evaluation run in the precision of the training: in autocast with ``bf16`` or ``fp16``, and
    statistics with gradient checkpointing where the training has it.

    Args:
        args: of all tasks.
        files: the folder of the run.
        trainer_class: `Trainer` or a subclass.
        options: further arguments of the class.
        targets: the layers that receive adapters.
        keep: updates act beside the weights, which may be quantised.
    """

    def __init__(
        self,
        args: TrainingArguments,
        files: RunFolder,
        *,
        trainer_class: type[Trainer],
        options: Mapping[str, Any],
        targets: Targets,
        keep: bool,
    ) -> None:
        self.args, self.files, self.options = args, files, dict(options)
        self.trainer_class, self._made = trainer_class, task_trainer(trainer_class)
        self.targets, self.keep = targets, keep
        self.model: nn.Module | None = None
        """The model of the run, once it was placed."""
        self.history: list[list[dict[str, Any]]] = []
        """The Trainer's log of each task that was trained in this process."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The frozen model in evaluation mode, on its device; a model that is spread or quantised stays in place."""
        quantised = [name for name, layer in target_linears(model, self.targets).items() if is_quantised(layer)]
        if quantised and not self.keep:
            raise ValueError(
                f"{quantised[0]} is quantised, and an update cannot be merged into it: give merge='keep', with which "
                "updates act beside the weights, or load the model in bfloat16"
            )
        model.requires_grad_(False)
        self.model = model.eval()
        if not quantised and getattr(model, "hf_device_map", None) is None:
            self.model = model.to(device)
        return self.model

    @contextmanager
    def passes(self, model: nn.Module) -> Iterator[None]:
        """A context for statistics: autocast, and gradient checkpointing with dropout off."""
        with self._precision(model), ExitStack() as stack:
            enable = checkpointing_method(model)
            if (options := checkpointing(self.args)) is not None and enable is not None:
                enable(options)
                stack.enter_context(following_checkpoints(model.eval()))
            yield

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """A context for evaluation: autocast, evaluation mode. Checkpoints of finished tasks are removed."""
        if Ranks.current().writes:
            for folder in self.files.path.glob(f"tasks/*/{CHECKPOINTS}"):
                shutil.rmtree(folder, ignore_errors=True)
        if self.keep and self.history and not kept_updates(model):
            raise RuntimeError("the method merged its update although merge='keep': its end_task must call self.merge")
        model.eval()
        with self._precision(model):
            yield

    def train(self, model: nn.Module, job: TrainingJob) -> list[float]:
        """Train one task in the Trainer, from its last checkpoint if there is one; the loss of every step."""
        stage, ranks = job.stage, job.ranks
        folder = self.files.task(stage.index) / CHECKPOINTS
        args = task_arguments(self.args, folder, index=stage.index, task=stage.task.name)
        progress = TaskTraining(job)
        job.clock.seconds["optimizer"] = 0.0
        checkpoint = last_checkpoint(folder)
        ranks.barrier()  # every rank has read the folder
        with _unpatched(model), _accepts_quantised(model):
            trainer = self._trainer(model, args, progress)
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except (ValueError, RuntimeError) as error:
                trained = [p for p in model.parameters() if p.requires_grad]
                if all_finite(trained) and all_finite(p.grad for p in trained if p.grad is not None):
                    raise
                raise diverged(f"gradients of {stage.task.name}", len(progress.losses) + 1) from error
            finally:
                trainer.accelerator.free_memory()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not all_finite(trained):
            raise diverged(f"the parameters that {stage.task.name} trained", len(progress.losses))
        ranks.validate_equal(trained, f"the parameters that {stage.task.name} trained")
        model.zero_grad(set_to_none=True)
        model.eval()
        self.history.append(trainer.state.log_history)
        columns = zip(*ranks.all_gather(progress.losses), strict=True)
        return [sum(each) / ranks.count for each in columns]

    def _trainer(self, model: nn.Module, args: TrainingArguments, training: TaskTraining) -> Trainer:
        options, task = dict(self.options), training.job.stage.task
        data: Any = encoded(task, "train")
        if data is None:
            training.batches = data = TaskBatches(training.job.stage)
            if args.eval_strategy != "no":
                raise ValueError(
                    f"eval_strategy={str(args.eval_strategy.value)!r} needs examples that the Trainer can read, and "
                    f"task {task.name!r} has no encode: leave it off; all tasks are evaluated after each one"
                )
        else:
            tokenizer = tokenizer_of(task)
            validate_lengths(args, data, task.name)
            if self._of_trl:
                data = _table(data)
                options.setdefault("processing_class", tokenizer)
            else:
                options.setdefault("data_collator", Collator.of(tokenizer))
            if args.eval_strategy != "no":
                held_out = encoded(task, "validation") or []
                options.setdefault("eval_dataset", _table(held_out) if self._of_trl else held_out)
        if training.batches is not None and self._of_trl:
            raise ValueError(
                f"{self.trainer_class.__name__} reads tokens, and task {task.name!r} has no encode: make it a "
                "CausalLMTask, or leave out trainer_class"
            )
        frozen_bits = [(p, p.data) for p in model.parameters() if p.requires_grad]
        trainer = self._made(model=model, args=args, train_dataset=data, **options)
        for p, values in frozen_bits:
            p.data = values.to(p.device)  # TRL casts what trains on a quantised base to bfloat16
        trainer.training = training
        trainer.add_callback(StepReports(training))
        if args.logging_strategy == "no":
            trainer.remove_callback(PrinterCallback)  # it would print the last summary
        return trainer

    @property
    def _of_trl(self) -> bool:
        return is_of_trl(self.trainer_class)

    @contextmanager
    def _precision(self, model: nn.Module) -> Iterator[None]:
        """A context in which the forward pass runs in autocast, as in training; the geometry around it does not."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        if dtype is None:
            yield
            return
        with _unpatched(model):
            cast = torch.autocast(self.args.device.type, dtype=dtype)
            model.forward = cast(model.forward)
            yield


def is_of_trl(trainer_class: type) -> bool:
    """Whether the class is TRL's, whose datasets are tables and whose collator needs a tokenizer."""
    return any(cls.__module__.partition(".")[0] == "trl" for cls in trainer_class.__mro__)


def validate_lengths(args: TrainingArguments, examples: Sequence[Mapping[str, Any]], task: str) -> None:
    """Raise ValueError for examples that TRL's ``max_length`` would cut."""
    limit = getattr(args, "max_length", None)
    if limit and (long := [each for each in examples if len(each["input_ids"]) > limit]):
        raise ValueError(
            f"max_length={limit} of {type(args).__name__} would cut {len(long)} of {len(examples)} examples of task "
            f"{task!r}: raise it to {max(len(each['input_ids']) for each in long)}, or lower the task's max_length"
        )


def _table(examples: Sequence[Mapping[str, Any]]) -> Any:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError("TRL's trainers read tables of datasets: pip install datasets") from error
    return Dataset.from_list(list(examples))


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """A context after which the model's forward pass and cache setting are what they were: trainers replace both."""
    missing = object()
    before = {name: vars(model).get(name, missing) for name in ("forward", "_original_forward")}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", missing)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not missing:
                setattr(model, name, value)
            elif name in vars(model):
                delattr(model, name)
        if use_cache is not missing:
            config.use_cache = use_cache  # type: ignore[union-attr]


@contextmanager
def _accepts_quantised(model: nn.Module) -> Iterator[None]:
    """A context in which transformers takes a quantised model as one with adapters, as PEFT marks it."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = getattr(model, "_hf_peft_config_loaded", False)
    marked = cast(Any, model)
    marked._hf_peft_config_loaded = True
    try:
        yield
    finally:
        marked._hf_peft_config_loaded = before
