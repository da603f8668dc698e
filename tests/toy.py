"""A stream small enough to learn in a tenth of a second: three classification tasks on disjoint input subspaces."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl import Task, TaskStream
from manifold_cl.continual.task import Split

INPUTS, HIDDEN, CLASSES, OWN = 24, 16, 4, 6
TASKS = ("first", "second", "third")
SIZES: Mapping[Split, int] = {"train": 96, "validation": 40, "test": 80}

Batch = tuple[Tensor, Tensor]


class ToyTask(Task):
    """Inputs live in six directions of their own; the class is the largest of four linear scores of them."""

    def __init__(self, name: str, basis: Tensor, *, seed: int, examples: int | None = None) -> None:
        self.name = name
        draw = torch.Generator().manual_seed(seed)
        rule = torch.randn(OWN, CLASSES, generator=draw)
        self._data: dict[Split, Batch] = {}
        for split, size in SIZES.items():
            z = torch.randn(size, OWN, generator=draw)
            self._data[split] = (z @ basis.mT, (z @ rule).argmax(1))
        if examples is not None:
            x, y = self._data["train"]
            self._data["train"] = (x[:examples], y[:examples])

    def size(self, split: Split) -> int:
        return len(self._data[split][0])

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        x, y = self._data[split]
        order = torch.arange(len(x)) if generator is None else torch.randperm(len(x), generator=generator)
        for part in order.split(batch_size):
            yield x[part], y[part]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        x, y = self._data[split]
        logits = model(x)
        right = (logits.argmax(1) == y).float().mean()
        sure = logits.softmax(1).gather(1, y[:, None]).mean()
        return {"accuracy": 100 * float(right), "certainty": 100 * float(sure)}


class ToyModel(nn.Module):
    """Two adapted layers and a head that stays."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.inner = nn.Linear(INPUTS, HIDDEN)
        self.outer = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))
        return logits


def frozen_model() -> ToyModel:
    model = ToyModel()
    model.requires_grad_(False)
    model.eval()
    return model


def toy_stream(
    *, tasks: Sequence[str] | None = None, examples: int | None = None, name: str = "toy", **_: Any
) -> TaskStream:
    """The stream; called like the builders in `manifold_cl.streams.STREAMS`."""
    draw = torch.Generator().manual_seed(11)
    rotation, _r = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=draw))
    bases = dict(zip(TASKS, rotation.split(OWN, dim=1), strict=False))
    chosen = TASKS if tasks is None else tasks
    return TaskStream(
        name=name,
        tasks=tuple(ToyTask(t, bases[t], seed=TASKS.index(t), examples=examples) for t in chosen),
        make_model=frozen_model,
        targets=("inner", "outer"),
        provenance={"origin": "drawn from seeds"},
    )
