"""Changes of a model's answers on examples, from after one task to after a later one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.activations.added_updates import AddedUpdates
from analysis.activations.calls import Forward, call_model
from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.merging import together
from analysis.statistics.resampling import bootstrap_interval

METRICS = ("kl", "top1_change", "loss_before", "loss_after", "loss_change")
RESAMPLES = 2000
Progress = Callable[[int, int], None]
"""Called with the number of finished batches and of all batches."""
BASE = ""
"""The name in task_a of the model without updates."""
IGNORED = -100
"""The label of positions that do not count, transformers' convention."""


@torch.no_grad()
def answer_changes(
    model: nn.Module,
    adapters: AdapterSet,
    data: Mapping[str, Sequence[Any]],
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy data, task_a, task_b, example, metric, value: answers after `task_b` against those after `task_a`.

    Updates add up in the order of the tasks. Data called like a task is compared from the model after that task to the
    model after each later one, and also from the base model (``task_a = ""``) to the model after the task itself, as a
    scale. Other data is compared from the base model to the model after each task. Each example has one value per
    metric, its mean over the positions that count, so that intervals come from resampling examples:

    * ``kl``: KL(before ‖ after) of the answers' distributions, nats;
    * ``top1_change``: share of positions whose most likely answer differs;
    * ``loss_before``, ``loss_after``: cross entropy of the batch's ``labels``, nats, where it has them.

    Positions that count answer a label other than −100: the next token's for a causal model, whose labels are its
    ``input_ids``. Where a batch has no labels, they are those of tokens that are not padding.

    Args:
        model: holds the base weights; layers are Linear, Conv1D or Embedding modules. Weights are not changed.
        adapters: the updates, in order.
        data: name to batches; each a mapping of keywords such as ``input_ids``, or what `forward` takes.
        forward: (model, batch) to logits (examples, ..., classes); by default the model is called with the batch.
        progress: called with the number of finished batches and of all batches.

    Raises:
        ValueError: a layer is missing or has another shape, a data set is empty, or no position of an example counts.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> _ = nn.init.zeros_(model[0].weight)  # both answers have probability 1/2
    >>> to_three = AdapterSet.from_factors({"a": {"0": (torch.tensor([[3.0], [1.0]]).log(), torch.ones(1, 1))}})
    >>> table = answer_changes(model, to_three, {"mine": [torch.ones(2, 1)]})  # 3/4 and 1/4: ln(4/3) / 2
    >>> [(row.example, row.metric, round(row.value, 4)) for row in table.itertuples()]
    [(0, 'kl', 0.1438), (0, 'top1_change', 0.0), (1, 'kl', 0.1438), (1, 'top1_change', 0.0)]
    """
    if not data or not all(map(len, data.values())):
        empty = next((name for name, batches in data.items() if not len(batches)), "")
        raise ValueError(f"data {empty!r} has no batches: give at least one example under every name")
    run = forward or _without_labels
    rows: list[tuple[str, str, str, int, str, float]] = []
    done, total = 0, sum(map(len, data.values()))
    with AddedUpdates(model, adapters).attached() as added:
        for name, batches in data.items():
            first = 0
            for batch in batches:
                size = 0
                for a, b, values in _compared(model, added, adapters.tasks, name, partial(run, model, batch), batch):
                    for metric, numbers in values.items():
                        size = len(numbers)
                        rows += [(name, a, b, first + i, metric, value) for i, value in enumerate(numbers.tolist())]
                first += size
                done += 1
                if progress is not None:
                    progress(done, total)
    table = pd.DataFrame(rows, columns=["data", "task_a", "task_b", "example", "metric", "value"])
    order = ["data", "task_a", "task_b", "example"]
    return table.sort_values(order, kind="stable", key=lambda c: pd.factorize(c)[0]).reset_index(drop=True)


@torch.no_grad()
def merged_answers(
    model: nn.Module,
    adapters: AdapterSet,
    merged: AdapterSet,
    data: Mapping[str, Sequence[Any]],
    *,
    forward: Forward | None = None,
    level: float = 0.95,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Answers with merged updates against those with the tasks' own: rule, task, metric, value, interval, examples.

    `data` has the batches of every task. Metrics are those of `answer_changes`, "before" being the model with the
    task's own update alone and "after" the model with the merged one: ``kl`` is KL(own ‖ merged), nats, mean over the
    examples. The rule ``""`` is the model without updates, as a scale. Intervals as in `answer_intervals`.

    Raises:
        ValueError: as `answer_changes`, or a task has no data.
    """
    if missing := [task for task in adapters.tasks if not data.get(task)]:
        raise ValueError(f"task {missing[0]!r} has no data: give batches of every task")
    run, rules = forward or _without_labels, merged.tasks
    rows: list[tuple[str, str, str, int, str, float]] = []
    done, total = 0, sum(len(data[task]) for task in adapters.tasks)
    with AddedUpdates(model, together(adapters, merged)).attached() as added:
        for place, task in enumerate(adapters.tasks):
            first = 0
            for batch in data[task]:
                added.only = place
                logits = run(model, batch)
                positions = _positions(model, batch, logits, task)
                own, size = positions.log_shares(logits), len(positions.counted)
                for number, rule in enumerate((BASE, *rules), start=len(adapters.tasks) - 1):
                    added.only = number if rule else None  # none of the updates: `count` is 0
                    values = _changes(positions, own, positions.log_shares(run(model, batch)))
                    for metric, numbers in values.items():
                        rows += [(task, rule, task, first + i, metric, v) for i, v in enumerate(numbers.tolist())]
                first, done = first + size, done + 1
                if progress is not None:
                    progress(done, total)
    table = pd.DataFrame(rows, columns=["data", "task_a", "task_b", "example", "metric", "value"])
    table = answer_intervals(table, level=level)
    table = table.drop(columns="data").rename(columns={"task_a": "rule", "task_b": "task"})
    order = {rule: place for place, rule in enumerate((BASE, *rules))}
    return table.sort_values("rule", key=lambda c: c.map(order), kind="stable").reset_index(drop=True)


class _Positions(NamedTuple):
    """The positions of a batch that count, and what they should answer."""

    counted: Tensor  # bool, (examples, positions)
    targets: Tensor | None  # (N,) for the N positions that count

    def log_shares(self, logits: Tensor) -> Tensor:
        """Logarithms (N, classes) of the answers' probabilities."""
        chosen = logits.reshape(*self.counted.shape, logits.shape[-1])[self.counted]
        return chosen.float().log_softmax(-1)

    def means(self, values: Tensor) -> Tensor:
        """The mean (examples,) of one number per position that counts."""
        example = self.counted.nonzero()[:, 0]
        sums = torch.zeros(len(self.counted), dtype=torch.float64, device=values.device)
        return sums.index_add(0, example, values.double()) / self.counted.sum(1)


def _compared(
    model: nn.Module, added: AddedUpdates, tasks: Sequence[str], name: str, answers: Callable[[], Tensor], batch: Any
) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(task a, task b, metric to values per example) of one batch; `answers` runs the model on it."""
    own = tasks.index(name) + 1 if name in tasks else 0
    stages = [(0, own)] if own else []
    stages += [(own, later) for later in range(own + 1, len(tasks) + 1)]
    known: dict[int, Tensor] = {}
    positions: _Positions | None = None
    for a, b in stages:
        for count in (a, b):
            if count in known:
                continue
            added.count = count
            logits = answers()
            positions = positions or _positions(model, batch, logits, name)
            known[count] = positions.log_shares(logits)
        assert positions is not None
        yield (tasks[a - 1] if a else BASE), tasks[b - 1], _changes(positions, known[a], known[b])
        known = {count: shares for count, shares in known.items() if count == own}  # vocabularies are large


def _changes(positions: _Positions, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Metric to its mean per example."""
    values = {
        "kl": (before.exp() * (before - after)).sum(-1).clamp(min=0.0),  # rounding may leave −1e-9
        "top1_change": before.argmax(-1) != after.argmax(-1),
    }
    if positions.targets is not None:
        index = positions.targets[:, None]
        values |= {"loss_before": -before.gather(1, index)[:, 0], "loss_after": -after.gather(1, index)[:, 0]}
    return {metric: positions.means(value) for metric, value in values.items()}


def _positions(model: nn.Module, batch: Any, logits: Tensor, name: str) -> _Positions:
    """The positions of a batch that count: those that answer a label, else those of tokens that are no padding."""
    size = tuple(logits.shape[:-1])
    fields = batch if isinstance(batch, Mapping) else {}
    labels, mask = fields.get("labels"), fields.get("attention_mask")
    targets = None
    if labels is not None and tuple(labels.shape) == size:
        if len(size) == 2 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            # the answer at one position is about the token after it
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labels = labels.reshape(size[0], -1).to(logits.device)
        counted = labels != IGNORED
        targets = labels[counted]
    elif mask is not None and tuple(mask.shape) == size:
        counted = mask.bool().to(logits.device)
    else:
        counted = torch.ones(size[0], math.prod(size[1:]), dtype=torch.bool, device=logits.device)
    if not counted.any(1).all():
        raise ValueError(
            f"data {name!r}: an example has no position that counts: give it at least two tokens, or an answer that "
            "fits into the model's length"
        )
    return _Positions(counted, targets)


def answer_intervals(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Means over examples with bootstrap intervals: data, task_a, task_b, metric, value, ci_low, ci_high, examples.

    ``loss_change`` is the mean of the examples' own differences ``loss_after − loss_before``, with its interval.
    Intervals need three examples and are NaN with fewer.
    """
    keys = ["data", "task_a", "task_b"]
    rows = []
    for key, group in table.groupby(keys, sort=False):
        wide = group.pivot(index="example", columns="metric", values="value")
        if "loss_after" in wide:
            wide["loss_change"] = wide["loss_after"] - wide["loss_before"]
        for metric in [name for name in METRICS if name in wide]:
            low, high = bootstrap_interval(wide[metric], level=level, samples=RESAMPLES)
            rows.append((*key, metric, float(wide[metric].mean()), low, high, len(wide)))
    return pd.DataFrame(rows, columns=[*keys, "metric", "value", "ci_low", "ci_high", "examples"])


def _without_labels(model: nn.Module, batch: Any) -> Tensor:
    """The model's logits; with labels it would also compute a loss that is not used."""
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key != "labels"}
    return call_model(model, batch)
