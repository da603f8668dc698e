"""Training of the small vision-language model's projector: pictures of emoji → their names, everything else frozen."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn

from manifold_cl.files import FileError
from manifold_cl.streams.archives import EMOJI_NAMES, LOCK, OPENMOJI, SMOLLM2, VISION, FetchError, cache_dir
from manifold_cl.streams.emoji import Emoji, Painter, Placement
from manifold_cl.streams.small_llava import PooledProjector
from manifold_cl.streams.vision_tower import normalised
from manifold_cl.tensor_files import read_tensors, write_tensors

log = logging.getLogger("manifold_cl")


@dataclass(frozen=True)
class ProjectorRecipe:
    """How the projector is trained. All choices are ours (docs/vision-language.md, "A small real model: vlm-three").

    Args:
        side: of the pictures, in pixels.
        placements: random placements per emoji, drawn once.
        ridge: penalty of the closed-form start, per standardised feature and emoji.
        gain: factor of the start's differences between pictures, which a penalised fit makes too small.
        shots: names that the prompt repeats as examples.
        steps: of AdamW.
        batch: pictures per step.
        tokens: of the five tokens of a picture, drawn per step.
        lr: peak rate; 10 steps of warm-up, then a cosine to 2 %.
        seed: of placements, order and tokens.
    """

    side: int = 84
    placements: int = 3
    ridge: float = 1000.0
    gain: float = 8.0
    shots: int = 8
    steps: int = 60
    batch: int = 32
    tokens: int = 3
    lr: float = 4e-5
    seed: int = 0


FIRST, EQUALS, END = "<|im_start|>", " =", "\n"
WARMUP = 10


def trained_projector(
    make_model: Callable[[], nn.Module], tokenizer: Any, emoji: Sequence[Emoji], recipe: ProjectorRecipe
) -> dict[str, Tensor]:
    """The weights of a projector trained by ``recipe``, from the cache or trained now and kept there.

    The cached file has a checksum, and its folder a digest of the recipe, the emoji and the archives.

    Args:
        make_model: loads the model, which is needed only if the cache has no weights.
        tokenizer: the model's.
        emoji: those to train on.
        recipe: the recipe.

    Raises:
        FetchError: the cached file is damaged.
    """
    archives = [archive.sha256 for archive in (VISION, SMOLLM2, OPENMOJI, EMOJI_NAMES)]
    key = {"recipe": asdict(recipe), "archives": archives, "emoji": [e.character for e in emoji]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"vlm-three-{digest}" / "projector.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / LOCK):
        if not path.exists():
            model: Any = make_model()
            train_projector(model, tokenizer, emoji, recipe)
            write_tensors(path, model.model.multi_modal_projector.state_dict(), {"recipe": asdict(recipe)})
    return read_projector(path)


def read_projector(path: Path) -> dict[str, Tensor]:
    """The weights in the cache; FetchError for a damaged file."""
    try:
        return read_tensors(path)[0]
    except FileError as error:
        raise FetchError(
            f"{error}: delete the folder {path.parent} and run again to train the projector anew"
        ) from None


def train_projector(model: nn.Module, tokenizer: Any, emoji: Sequence[Emoji], recipe: ProjectorRecipe) -> None:
    """Train the model's `PooledProjector` on pictures of ``emoji`` and their names; logs steps and the time left."""
    log.info(
        "training the projector of the vision-language model: %d pictures of %d emoji, then %d steps; done once, the "
        "weights stay in %s",
        *(len(emoji) * recipe.placements, len(emoji), recipe.steps, cache_dir()),
    )
    pooled = pooled_pictures(model, emoji, recipe)
    namer = Namer(model, tokenizer, [e.name for e in emoji[: recipe.shots]])
    names = namer.names(emoji)
    start_projector(namer.projector, pooled, namer.targets(names), recipe)
    fit_projector(namer, pooled, names, recipe)


@torch.no_grad()
def pooled_pictures(
    model: nn.Module, emoji: Sequence[Emoji], recipe: ProjectorRecipe
) -> Float[Tensor, "emoji placements tokens features"]:
    """The pooled states of pictures of every emoji: the first in the middle, the others in random placements."""
    inner: Any = model.model
    painter, rng = Painter(recipe.side), random.Random(recipe.seed)
    progress, pooled = Progress("pictures", len(emoji)), []
    for number, each in enumerate(emoji, 1):
        places = [Placement(), *(Placement.drawn(rng) for _ in range(recipe.placements - 1))]
        pixels = normalised(torch.stack([painter.paint(each.character, place) for place in places]))
        hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        pooled.append(inner.multi_modal_projector.pool(hidden))
        progress(number)
    return torch.stack(pooled)


@torch.no_grad()
def start_projector(
    projector: PooledProjector,
    pooled: Float[Tensor, "emoji placements tokens features"],
    targets: Float[Tensor, "emoji width"],
    recipe: ProjectorRecipe,
) -> None:
    """Set the projector to the ridge regression of ``targets`` on standardised features, times the gain."""
    features = pooled.flatten(0, 2)
    repeated = targets[:, None].expand(-1, pooled.shape[1] * pooled.shape[2], -1).flatten(0, 1)
    projector.mean.copy_(features.mean(dim=0))
    projector.deviation.copy_(features.std(dim=0).clamp_min(1e-6))
    centred, middle = (features - projector.mean) / projector.deviation, repeated.mean(dim=0)
    penalty = recipe.ridge * len(centred) / len(targets)
    gram = centred.T @ centred + penalty * torch.eye(centred.shape[1])
    fitted = torch.linalg.solve(gram, centred.T @ (repeated - middle))
    projector.linear.weight.copy_(recipe.gain * fitted.T)
    projector.linear.bias.copy_(middle)


class Namer:
    r"""The likelihood of names after the tokens of a picture, in a prompt that repeats words.

    The prompt is " pizza = pizza\n dog = dog\n ... {picture} =": the language model, frozen, has to repeat what it
    reads. A picture whose tokens are near those of its name is named at once, so that training starts with a gradient
    that depends on the picture. The examples are read once; all pictures share their keys and values.

    Args:
        model: the vision-language model.
        tokenizer: the model's.
        examples: the repeated names.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, examples: Sequence[str]) -> None:
        whole: Any = model
        self.inner, self.head, self.embed = whole.model, whole.lm_head, whole.get_input_embeddings()
        self.projector: PooledProjector = self.inner.multi_modal_projector
        shown = FIRST + "".join(f" {name}{EQUALS} {name}{END}" for name in examples)
        before, self.after, self.end = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (shown, EQUALS, END)
        )
        self.encode = partial(tokenizer, add_special_tokens=False)
        with torch.no_grad():
            self.examples = self.inner.language_model(torch.tensor([before]), use_cache=True).past_key_values

    def names(self, emoji: Sequence[Emoji]) -> list[list[int]]:
        """The tokens of names, with the end of the line."""
        return [[*ids, *self.end] for ids in self.encode([f" {e.name}" for e in emoji])["input_ids"]]

    def targets(self, names: Sequence[Sequence[int]]) -> Float[Tensor, "emoji width"]:
        """The mean token embedding of each name, without the end of the line."""
        embeddings: Tensor = self.embed.weight.detach()
        return torch.stack([embeddings[torch.tensor(name[: -len(self.end)])].mean(dim=0) for name in names])

    def loss(self, pooled: Float[Tensor, "b tokens features"], names: Sequence[Sequence[int]]) -> Tensor:
        """Mean cross-entropy of the names' tokens, ends included."""
        values, written = self._log_probabilities(pooled, names)
        return -values[written].mean()

    def log_likelihoods(self, pooled: Float[Tensor, "b tokens features"], names: Sequence[Sequence[int]]) -> Tensor:
        """``log p(name | picture)`` of each pair, end included."""
        values, written = self._log_probabilities(pooled, names)
        return torch.where(written, values, 0.0).sum(dim=1)

    def _log_probabilities(self, pooled: Tensor, names: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, names))
        ids = torch.zeros(len(names), longest, dtype=torch.long)
        written = torch.zeros(len(names), longest, dtype=torch.bool)
        for row, name in enumerate(names):
            ids[row, : len(name)] = torch.tensor(name)
            written[row, : len(name)] = True
        after = self.embed(torch.tensor(self.after)).expand(len(names), -1, -1)
        read = torch.cat([self.projector.project(pooled), after, self.embed(ids[:, :-1])], dim=1)
        cache = copy.deepcopy(self.examples)
        cache.batch_repeat_interleave(len(names))
        output = self.inner.language_model(inputs_embeds=read, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state[:, -longest:]
        losses = nn.functional.cross_entropy(self.head(hidden[written]), ids[written], reduction="none")
        return torch.zeros(ids.shape).masked_scatter(written, -losses), written


def fit_projector(
    namer: Namer, pooled: Float[Tensor, "emoji placements tokens features"], names: Sequence[Sequence[int]],
    recipe: ProjectorRecipe,
) -> list[float]:  # fmt: skip
    """Train the projector's linear map by AdamW on the names' likelihood; the loss of every step."""
    linear, rng = namer.projector.linear.requires_grad_(True), random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    progress, losses = Progress("steps", recipe.steps), []
    waiting: list[int] = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1, (step + 1) / WARMUP) * (
            0.51 + 0.49 * math.cos(math.pi * step / recipe.steps)
        )  # fmt: skip
        if len(waiting) < recipe.batch:
            waiting += rng.sample(range(len(names)), len(names))
        chosen = [waiting.pop() for _ in range(recipe.batch)]
        places = [rng.randrange(pooled.shape[1]) for _ in chosen]
        tokens = sorted(rng.sample(range(pooled.shape[2]), min(recipe.tokens, pooled.shape[2])))
        loss = namer.loss(pooled[chosen, places][:, tokens], [names[i] for i in chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        recent = losses[-10:]
        progress(step + 1, f"loss {sum(recent) / len(recent):.2f}")
    linear.requires_grad_(False)
    return losses


@torch.no_grad()
def naming_accuracy(
    namer: Namer,
    pooled: Float[Tensor, "emoji tokens features"],
    names: Sequence[Sequence[int]],
    *,
    choices: int = 20,
    seed: int = 0,
) -> list[bool]:
    """Whether the likeliest of ``choices`` names is the right one, per picture; the others are drawn by ``seed``.

    A name's likelihood is compared per token, so that long names are not at a disadvantage.
    """
    rng, right = random.Random(seed), []
    for i in range(len(names)):
        options = [names[i], *(names[j] for j in rng.sample([j for j in range(len(names)) if j != i], choices - 1))]
        values = namer.log_likelihoods(pooled[i].expand(len(options), -1, -1), options)
        right.append(int((values / torch.tensor([len(option) for option in options])).argmax()) == 0)
    return right


class Progress:
    """Logs every tenth of some work, with the time that is left.

    Args:
        unit: what is counted.
        total: its number.
    """

    def __init__(self, unit: str, total: int) -> None:
        self.unit, self.total, self.start = unit, total, time.monotonic()

    def __call__(self, done: int, detail: str = "") -> None:
        """Log if a tenth has just been finished."""
        if done * 10 // self.total == (done - 1) * 10 // self.total:
            return
        left = (time.monotonic() - self.start) / done * (self.total - done)
        extra = f", {detail}" if detail else ""
        log.info("  %d of %d %s%s, about %.0f s left", done, self.total, self.unit, extra, left)
