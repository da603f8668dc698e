"""`ContinualTrainer`: task after task in a ``Trainer``, into the folder and record of a run."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from manifold_cl.adapters.layers import ALL_LINEAR, Targets
from manifold_cl.continual.method import Method
from manifold_cl.continual.methods import make_method
from manifold_cl.continual.ranks import tensor_digest
from manifold_cl.continual.rates import searched_rates
from manifold_cl.continual.record import RunRecord
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.runner import ContinualRunner, Progress
from manifold_cl.continual.task import Split, Task, TaskStream
from manifold_cl.files import FileError, complete_model
from manifold_cl.integrations.transformers.arguments import (
    default_arguments,
    recorded,
    run_folder,
    training_of,
    validate_arguments,
    validate_own_batches,
    warn_of_ignored,
)
from manifold_cl.integrations.transformers.peft_settings import base_of_peft, settings_of
from manifold_cl.integrations.transformers.phase_bars import PhaseBars
from manifold_cl.integrations.transformers.trainer_loop import CHECKPOINTS, TrainerLoop, is_of_trl
from manifold_cl.plugins import unknown
from manifold_cl.rules import described

Model = nn.Module | str | Callable[[], nn.Module]

UNITS = frozenset({"lr", "step", "direction", "core", "adjust_lr_fn"})
"""Options of methods that give a rate, or change its unit."""

OWN = ("self", "model", "args", "train_dataset", "eval_dataset", "optimizers", "optimizer_cls_and_kwargs", "model_init")
"""Arguments of Trainer classes that a run gives itself."""


class ContinualTrainer:
    """Learns tasks one after the other: a ``Trainer`` trains each, a method protects the earlier ones.

    Per task the method starts its adapters, the Trainer trains them with its own loop, the update is saved, merged or
    kept, the memory grows, and all tasks are evaluated. Folder, record and methods are those of `ContinualRunner`.

    The learning rate is the method's: that of ``args`` belongs to the Trainer's own optimizer, which does not step.
    Schedule, epochs, batch size, accumulation, clipping, precision and checkpoints are those of ``args``; in the last
    steps of a task, where `Method.collects`, no checkpoint is written.

    Args:
        model: the pre-trained model, a function that loads it, or a folder or name of transformers. Of a PEFT model,
            the base is taken, with rank, alpha and targets of its configuration. None for that of a `TaskStream`.
        tasks: tasks in order, or a `TaskStream`. The Trainer reads what ``task.encode(split)`` returns, as
            `CausalLMTask` has it. For a task without ``encode`` it takes the task's own batches and loss.
        method: a name of `METHODS`, a mapping with ``name`` and options (``{"name": "eblora", "lr": 3e-3}``), or a
            fresh `Method`. For a name or mapping without a rate, the rates are `searched_rates` of the model.
        args: of the Trainer; by default those of `ContinualRunner`: one epoch, batches of 16, a cosine.
        folder: of the run; ``args.output_dir`` by default.
        targets: the layers that receive adapters, as in `TaskStream`; by default those of the stream, else all linear
            layers but the head.
        merge: ``"merge"`` adds each update to the weights. With ``"keep"`` the weights never change, and the updates of
            all tasks act beside them and sum up, as a quantised base needs.
        score_by: for all tasks, instead of their own: ``"generation"``, ``"likelihood"`` or ``"loss"``.
        evaluate_on: the split that is scored; ``"validation"`` while tuning.
        trainer_class: `Trainer`, TRL's ``SFTTrainer``, or any subclass.
        **trainer_options: further arguments of that class, such as ``callbacks``; ``peft_config`` sets rank, alpha and
            targets.

    Raises:
        ValueError: for options of ``args`` that a run over tasks, or a task without ``encode``, cannot follow, an
            option of ``peft_config`` that the method does not have, a quantised base with ``merge="merge"``, or
            ``fp16`` with a method that collects statistics in the last steps.
        FileError: for a name or path whose checkpoint cannot be read, or lacks weights of the model.
        TypeError: for an argument that the Trainer class does not take, or tasks or args of another kind.
    """

    def __init__(
        self,
        model: Model | None,
        tasks: Sequence[Task] | TaskStream,
        method: str | Mapping[str, Any] | Method = "eblora",
        args: TrainingArguments | None = None,
        *,
        folder: Path | str | None = None,
        targets: Targets | None = None,
        merge: Literal["merge", "keep"] = "merge",
        score_by: Literal["generation", "likelihood", "loss"] | None = None,
        evaluate_on: Split = "test",
        trainer_class: type[Trainer] = Trainer,
        **trainer_options: Any,
    ) -> None:
        self.folder = run_folder(args, folder)
        if merge not in ("merge", "keep"):
            raise ValueError(f"merge is 'merge' or 'keep', got {merge!r}")
        self.args = args or default_arguments(self.folder)
        validate_arguments(self.args)
        config = trainer_options.pop("peft_config", None)
        _validate_options(trainer_class, trainer_options)
        model, config = base_of_peft(str(model) if isinstance(model, Path) else model, config)
        settings = {} if config is None else settings_of(config)
        stream = tasks if isinstance(tasks, TaskStream) else _stream_of(tasks)
        _validate_tasks(self.args, trainer_options, stream)
        self.targets = _targets(targets, settings.pop("targets", None), stream)
        self._model: Model = stream.make_model if model is None else model
        self._loaded: nn.Module | None = _load(self._model)
        self.method = _validated(_method(method, settings, self._loaded), self.args)
        if merge == "keep":
            self.method.keep_updates()
        if args is not None:
            warn_of_ignored(self.args, self.method, of_trl=is_of_trl(trainer_class))
        files, keep = RunFolder(self.folder, stream.task_names), merge == "keep"
        self.loop = TrainerLoop(
            self.args, files, trainer_class=trainer_class, options=trainer_options, targets=self.targets, keep=keep
        )
        self._provenance = {**stream.provenance, "model": _name_of(self._loaded)}
        self.stream = replace(
            stream,
            tasks=tuple(_scored_by(task, score_by) for task in stream.tasks),
            make_model=self._take,
            targets=self.targets if isinstance(self.targets, str) else tuple(self.targets),
            provenance=self._provenance,
        )
        self.runner = ContinualRunner(
            self.stream,
            self.method,
            self.folder,
            training=training_of(self.args, evaluate_on=evaluate_on),
            device=self.args.device,
            details=self._details(score_by),
            on_progress=None if self.args.disable_tqdm else PhaseBars(),
            loop=self.loop,
        )
        self.record: RunRecord | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model after the tasks learned so far; None before `train`."""
        return self.loop.model

    @property
    def history(self) -> list[list[dict[str, Any]]]:
        """The Trainer's ``log_history`` of each task that was trained by this object."""
        return self.loop.history

    def on_progress(self, report: Callable[[Progress], None]) -> None:
        """Call ``report`` at every step and phase, instead of showing bars."""
        self.runner.on_progress = report

    def train(self, *, resume: bool = False) -> RunRecord:
        """Learn all tasks that are not in the folder yet, and return the complete record.

        Args:
            resume: continue the run in the folder, in the middle of a task from the Trainer's last checkpoint
                (``args.save_steps``). On a CPU in float32 the numbers are bit for bit those of an uninterrupted run.

        Raises:
            ValueError: for a task without training or test examples, a tokenizer that does not fit the model, or a
                model with a weight that is NaN or infinite.
            FileError: for a folder with a run and ``resume`` off, a run of another configuration, or one that began
                from other weights than those of the model.
            FloatingPointError: when the training diverged; the finished tasks are kept.
        """
        self.runner.validate(resume=resume)
        self._prepare()
        if not (self.folder / "record.json").exists() and self.runner.ranks.writes:
            for left in self.folder.glob(f"tasks/*/{CHECKPOINTS}"):
                shutil.rmtree(left)  # of a run whose record is gone
        self.runner.ranks.barrier()
        record = self.runner.run(resume=resume)
        if self._loaded is not None:
            self.runner.learned_model(record)  # the run was complete
        self.record = record
        return record

    def _prepare(self) -> None:
        """Load the pre-trained model again if it is in use, and compare its weights with those of the run."""
        model = self._loaded if self._loaded is not None else _load(self._model)
        weights = tensor_digest(model.parameters())
        self._provenance["weights"] = weights
        if (self.folder / "record.json").exists():
            began = RunRecord.load(self.folder).provenance.get("weights")
            if began != weights:
                raise FileError(
                    f"{self.folder} holds a run that began from other weights than this model has (perhaps the model "
                    "was trained meanwhile): load the pre-trained model again, or give its name or a function that "
                    "loads it"
                )
        self._loaded = model

    def _take(self) -> nn.Module:
        """The model that `_prepare` loaded."""
        model, self._loaded = self._loaded, None
        assert model is not None
        return model

    def _details(self, score_by: str | None) -> dict[str, Any]:
        details = recorded(self.args, self.loop.trainer_class)
        details["targets"] = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        if score_by is not None:
            details["score_by"] = score_by
        return details


def _stream_of(tasks: Sequence[Task]) -> TaskStream:
    """The stream of these tasks, without a model of its own."""

    def make_model() -> nn.Module:
        raise ValueError("tasks in a list have no model: give one")

    if isinstance(tasks, str | Mapping) or not isinstance(tasks, Iterable):
        remedy = "give what causal_lm_tasks(data, tokenizer) returns"
        raise TypeError(f"tasks is a list of Task objects, got {described(tasks)}: {remedy}")
    return TaskStream(name="tasks", tasks=tuple(tasks), make_model=make_model, targets=ALL_LINEAR)


def _load(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str):
        return model()
    loaded: nn.Module = complete_model(AutoModelForCausalLM.from_pretrained, model)
    return loaded


def _targets(given: Targets | None, of_peft: Targets | None, stream: TaskStream) -> Targets:
    """The one choice of layers; ValueError for two that differ."""
    known = [(each,) if isinstance(each, str) else tuple(sorted(each)) for each in (given, of_peft) if each is not None]
    if len(set(known)) > 1:
        raise ValueError(f"targets={given!r}, and peft_config has target_modules={of_peft!r}: give one of them")
    return of_peft if of_peft is not None else given if given is not None else stream.targets


def _validate_tasks(args: TrainingArguments, options: Mapping[str, Any], stream: TaskStream) -> None:
    """Raise ValueError for options that tasks would ignore, and for tasks that ``eval_strategy`` cannot evaluate."""
    validate_own_batches(args, options, stream.tasks)
    if args.eval_strategy == "no":
        return
    lacking = [t.name for t in stream.tasks if "validation" not in getattr(t, "parts", {"validation": ()})]
    if lacking:
        raise ValueError(
            f"eval_strategy evaluates on validation examples, and {', '.join(lacking)} has none: give some, hold them "
            "out by held_out=('validation', 'test') of causal_lm_tasks, or leave eval_strategy out"
        )


def _method(method: str | Mapping[str, Any] | Method, settings: Mapping[str, Any], model: nn.Module) -> Method:
    """The method; where neither rates nor another step are given, with the rates of the model nearest in width."""
    if isinstance(method, Method):
        own = method.options()
        if differing := [name for name, value in settings.items() if own.get(name) != value]:
            name = differing[0]
            raise ValueError(
                f"the method has {name}={own.get(name)!r}, and peft_config {name}={settings[name]!r}: give the method "
                "by its name, or leave peft_config out"
            )
        return method
    options = {"name": method} if isinstance(method, str) else dict(method)
    if "name" not in options:
        raise ValueError(f"a method as a mapping has a name, got {options}: give {{'name': 'eblora', ...}}")
    name = options.pop("name")
    rates = {} if options.keys() & UNITS else _searched(model, name)
    return make_method(name, **{**rates, **settings, **options})


def _searched(model: nn.Module, name: str) -> dict[str, float]:
    try:
        return searched_rates(model, name)
    except ValueError:
        return {}  # no search: the default of the method


def _validated(method: Method, args: TrainingArguments) -> Method:
    """The method itself; ValueError for one that collects scaled gradients."""
    if args.fp16 and method.collects(1, 1):
        raise ValueError(
            "fp16=True scales gradients by a factor that changes, and the method collects them in the last steps: use "
            "bf16, or set statistics_during=0"
        )
    return method


def _scored_by(task: Task, score_by: str | None) -> Task:
    """The task, or a copy that is scored in another way."""
    if score_by is None or getattr(task, "score_by", None) == score_by:
        return task
    if not hasattr(task, "scored_by"):
        raise ValueError(f"score_by={score_by!r}: task {task.name!r} has one way of scoring only; leave score_by out")
    return cast(Task, task.scored_by(score_by))


def _validate_options(trainer_class: type[Trainer], options: Mapping[str, Any]) -> None:
    names = [name for name in inspect.signature(trainer_class.__init__).parameters if name not in OWN]
    for name in options:
        if name in OWN:
            raise TypeError(f"{name} is given by the run: task, method and args decide it")
        if name not in names and "kwargs" not in names:
            raise TypeError(unknown(f"argument of {trainer_class.__name__}", name, names))


def _name_of(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name) or type(model).__name__
