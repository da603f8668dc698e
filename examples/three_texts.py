"""A stream of your own: a small language model learns three kinds of text that come with Python.

A study names it as ``stream = "three_texts.py:texts"`` (docs/studies.md). The model guesses the next byte of a line. It
was pre-trained on Python's manual. Then it learns source code, the names of characters, and tables of encodings.
Nothing is downloaded. The pre-trained weights are made in seconds when first needed, and kept beside this file.
"""

import inspect
import os
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from encodings import cp862, cp1250, cp1253, iso8859_6, koi8_r, mac_roman
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from manifold_cl import Task, TaskStream

LENGTH, WIDTH = 64, 64
TEST, VALIDATION = 100, 50
WEIGHTS = Path(__file__).with_suffix(".pt")
TEXTS = {
    "code": lambda: inspect.getsource(tarfile),
    "names": lambda: "\n".join(unicodedata.name(chr(i), "") for i in range(0x100, 0x2000)),
    "tables": lambda: "".join(map(inspect.getsource, (cp862, cp1250, cp1253, iso8859_6, koi8_r, mac_roman))),
}


class Text(Task):
    """Guess the next byte; the score is the percentage of bytes guessed right."""

    def __init__(self, name: str, text: str, examples: int | None = None) -> None:
        self.name = name
        data = torch.tensor(list(text.encode()))
        lines = data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH)
        lines = lines[torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))]
        test, validation, train = lines.tensor_split([TEST, TEST + VALIDATION])
        self.parts = {"train": train[:examples], "validation": validation, "test": test}

    def size(self, split: str) -> int:
        return len(self.parts[split])

    def batches(self, split: str, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        lines = self.parts[split]
        order = torch.arange(len(lines)) if generator is None else torch.randperm(len(lines), generator=generator)
        yield from lines[order].split(batch_size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def scores(self, model: nn.Module, split: str = "test") -> Mapping[str, float]:
        lines = self.parts[split]
        with torch.no_grad():
            right = model(lines[:, :-1]).argmax(-1) == lines[:, 1:]
        return {"accuracy": 100 * float(right.float().mean())}


class Block(nn.Module):
    """Attention with four heads, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(nn.functional.layer_norm(x, (WIDTH,))).chunk(3, -1)
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (WIDTH,)))))


class Transformer(nn.Module):
    """Two blocks over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.byte(x) + self.position.weight[: x.shape[1]]
        return self.head(nn.functional.layer_norm(self.blocks(hidden), (WIDTH,)))


def pretrained(steps: int = 250, batch_size: int = 32) -> Transformer:
    """A model that has read part of Python's manual."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer()
    manual = Text("manual", "\n".join(topics.values()), examples=steps * batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in manual.batches("train", batch_size=batch_size):
        optimizer.zero_grad()
        manual.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    return model


def load_model() -> nn.Module:
    """The pre-trained model from its file, which is made first where it is missing."""
    if not WEIGHTS.exists():
        unfinished = WEIGHTS.with_suffix(f".{os.getpid()}")
        torch.save(pretrained().state_dict(), unfinished)
        unfinished.replace(WEIGHTS)  # no other process reads half a file
    model = Transformer()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model.eval().requires_grad_(False)


def texts(tasks: Sequence[str] | None = None, examples: int | None = None) -> TaskStream:
    """The stream, with these tasks in this order and this number of training lines per task."""
    chosen = tuple(Text(name, TEXTS[name](), examples) for name in tasks or TEXTS)
    return TaskStream("three-texts", chosen, load_model, targets=("qkv", "out", "up", "down"))
