"""Tokens of prompts and answers, and what a causal language model makes of them: losses, likelihoods, greedy answers.

Sequences are padded on the left, so that the answers of a batch end together: only their positions need logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.continual.checkpointing import following_checkpoints
from manifold_cl.continual.losses import IGNORED
from manifold_cl.rules import described, validate_whole


@dataclass(frozen=True)
class Tokens:
    """The tokens of one example.

    Args:
        prompt: what the model reads.
        answer: what it learns to write, with the end token.
        cut: number of tokens that did not fit, at the beginning of the prompt or at the end of the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class TextEncoder:
    """Turns prompts and answers into tokens. Texts are taken as they are: no blank is put between them.

    A prompt that begins with the tokenizer's own first token, as chat templates write it, gets no second one.

    Args:
        tokenizer: of transformers, with an end token.
        max_length: tokens of prompt and answer together.

    Raises:
        ValueError: for a tokenizer without an end token: answers would never end.
        TypeError: for anything but a tokenizer, such as its name.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not hasattr(tokenizer, "eos_token_id"):
            remedy = "give AutoTokenizer.from_pretrained(name)"
            raise TypeError(f"tokenizer is a tokenizer of transformers, got {described(tokenizer)}: {remedy}")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no end token, so that no answer would end: set tokenizer.eos_token"
            )
        validate_whole("max_length, with a token to read and one to write,", max_length, least=2)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end: int = tokenizer.eos_token_id
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each prompt, with the tokenizer's first token; never empty."""
        first = self.tokenizer.bos_token
        begun = [bool(first) and text.startswith(first) for text in texts]
        rows = {flag: iter(self._ids([t for t, b in zip(texts, begun, strict=True) if b is flag], special=not flag))
                for flag in (True, False)}  # fmt: skip
        return [self._opened(next(rows[flag])) for flag in begun]

    def answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each answer, with the end token."""
        return [(*ids, self.end) if ids[-1:] != [self.end] else tuple(ids) for ids in self._ids(texts, special=False)]

    def examples(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Tokens]:
        """Tokens of at most ``max_length``: a longer prompt loses its beginning, a longer answer its end."""
        return [self._fitted(*pair) for pair in zip(self.prompts(prompts), self.answers(answers), strict=True)]

    def fitted_prompts(self, texts: Sequence[str], rooms: Sequence[int]) -> list[tuple[int, ...]]:
        """Prompts that leave so many tokens of ``max_length`` each; a longer one loses its beginning."""
        return [ids[-max(1, self.max_length - room) :] for ids, room in zip(self.prompts(texts), rooms, strict=True)]

    def _fitted(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tokens:
        written = answer[: self.max_length - 1]
        read = prompt[-(self.max_length - len(written)) :]
        return Tokens(read, written, cut=len(prompt) + len(answer) - len(read) - len(written))

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning about lengths, which are measured here.
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return rows

    def _opened(self, ids: list[int]) -> tuple[int, ...]:
        while ids and ids[-1] == self.end:  # some tokenizers close every text
            ids = ids[:-1]
        if ids:
            return tuple(ids)
        return (self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id,)


def answer_loss(model: nn.Module, examples: Sequence[Tokens], pad: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each predicted from the tokens before it; 0-d, with a graph."""
    longest = max(len(example.answer) for example in examples)
    with following_checkpoints(model):
        logits = last_logits(model, [example.prompt + example.answer for example in examples], longest + 1, pad)
    labels = torch.full((len(examples), longest), IGNORED, device=logits.device)
    for row, example in enumerate(examples):
        labels[row, longest - len(example.answer) :] = torch.tensor(example.answer, device=logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


def last_logits(model: nn.Module, sequences: Sequence[Sequence[int]], count: int, pad: int) -> Tensor:
    """Logits (b, count, vocabulary) in float32 at the last ``count`` positions of each sequence."""
    with autocast(model):
        output = model(**_padded(model, sequences, pad), use_cache=False, **_kept(model, count))
    logits: Tensor = output.logits
    return logits[:, -count:].float()


@torch.no_grad()
def option_log_likelihoods(
    model: nn.Module, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]], pad: int
) -> list[Tensor]:
    """``log p(option | prompt)`` of each option of each prompt, end tokens included; one (options,) per prompt.

    Each prompt is read once: its keys and values serve all of its options. A model without such a cache reads every
    pair.
    """
    model.eval()
    counts = [len(each) for each in options]
    flat = [tuple(option) for each in options for option in each]
    owners = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
    batch = _padded(model, prompts, pad)
    with autocast(model):
        output = model(**batch, use_cache=True, **_kept(model, 1))
    cache = getattr(output, "past_key_values", None)
    if hasattr(cache, "batch_select_indices"):
        first = output.logits[:, -1].float().log_softmax(dim=-1)
        total = _continued(model, first, cache, batch["attention_mask"], owners, flat, pad)
    else:
        total = _from_pairs(model, [tuple(prompts[i]) for i in owners.tolist()], flat, pad)
    return list(torch.split(total.cpu(), counts))


@torch.no_grad()
def greedy_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], encoder: TextEncoder, *, max_new_tokens: int
) -> list[str]:
    """The most likely next token, again and again, up to an end token; without special tokens and outer blanks."""
    from transformers import GenerationConfig

    batch = _padded(model.eval(), prompts, encoder.pad)
    known = _inner(model).generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {encoder.end, *(known if isinstance(known, list) else [] if known is None else [known])}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=encoder.pad,
        eos_token_id=sorted(ends),
    )
    batch.pop("position_ids", None)  # generate makes its own
    with autocast(model), _generating_by(model, config):
        tokens = model.generate(**batch)  # type: ignore[operator]
    written = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in encoder.tokenizer.batch_decode(written, skip_special_tokens=True)]


def autocast(model: nn.Module) -> AbstractContextManager[object]:
    """The context of forward passes: mixed precision for a model with half-precision weights, else none."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(embedding.device.type, dtype=embedding.dtype)


@contextmanager
def _generating_by(model: nn.Module, config: Any) -> Iterator[None]:
    """Lets ``config`` alone decide: given to ``generate``, it would be filled up with penalties of the model's own."""
    inner = _inner(model)
    own, inner.generation_config = inner.generation_config, config
    try:
        yield
    finally:
        inner.generation_config = own


def _inner(model: nn.Module) -> nn.Module:
    """The model of transformers inside a wrapper of PEFT."""
    base = getattr(model, "get_base_model", None)
    return cast(nn.Module, base()) if callable(base) else model


def _continued(
    model: nn.Module, first: Tensor, cache: Any, mask: Tensor, owners: Tensor, options: Sequence[tuple[int, ...]],
    pad: int,
) -> Tensor:  # fmt: skip
    """Log-likelihoods (options,) from the log-probabilities (prompts, vocabulary) of first tokens, and the cache."""
    device = first.device
    owners = owners.to(device)
    total = first[owners, torch.tensor([option[0] for option in options], device=device)]
    longest = max(len(option) for option in options) - 1
    if not longest:
        return total
    cache.batch_select_indices(owners)
    shape = (len(options), longest)
    read, targets = torch.full(shape, pad, device=device), torch.full(shape, IGNORED, device=device)
    for row, option in enumerate(options):
        ids = torch.tensor(option, device=device)
        read[row, : len(option) - 1], targets[row, : len(option) - 1] = ids[:-1], ids[1:]
    lengths = mask[owners].sum(dim=1, keepdim=True)
    inputs = {
        "input_ids": read,
        "attention_mask": torch.cat([mask[owners], torch.ones_like(read)], dim=1),
        "past_key_values": cache,
    }
    if _takes(model, "position_ids"):
        inputs["position_ids"] = lengths + torch.arange(longest, device=device)
    with autocast(model):
        logits = model(**inputs, use_cache=True).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return total - loss.view(shape).sum(dim=1)


def _from_pairs(
    model: nn.Module, prompts: Sequence[tuple[int, ...]], options: Sequence[tuple[int, ...]], pad: int
) -> Tensor:
    """Log-likelihoods (options,) where each option is read with its prompt."""
    longest = max(len(option) for option in options)
    sequences = [prompt + option for prompt, option in zip(prompts, options, strict=True)]
    scores = last_logits(model, sequences, longest + 1, pad)[:, :-1].log_softmax(dim=-1)
    rows = []
    for row, option in enumerate(options):
        ids = torch.tensor(option, device=scores.device)
        rows.append(scores[row, longest - len(option) :].gather(1, ids[:, None]).sum())
    return torch.stack(rows)


def _padded(model: nn.Module, sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """The model's inputs, padded on the left; positions count from the first token of each sequence."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if _takes(model, "position_ids"):
        batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    device = next(model.parameters()).device
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _kept(model: nn.Module, count: int) -> dict[str, int]:
    """The option that computes logits at the last positions only, where the model has it."""
    return {"logits_to_keep": count} if _takes(model, "logits_to_keep") else {}


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(_inner(model).forward).parameters
