"""The pre-trained sentence encoder that the text streams start from: MiniLM-L6, 22.7 M parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_cl.streams.archives import model_folder

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
"""Suffixes of the 36 linear modules that receive adapters: six in each of the six blocks.

``output.dense`` alone also ends the name of ``attention.output.dense``; both are listed, so that an
ablation can leave one out on purpose. A match counts a module once, however many suffixes it has.
"""


class SentenceEncoder(nn.Module):
    """L2-normalised means of the last hidden states, over the tokens of each text.

    Args:
        transformer: a model that returns ``last_hidden_state``.
        tokenizer: turns texts into padded ``input_ids`` and ``attention_mask``.
    """

    def __init__(self, transformer: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str], max_tokens: int) -> Float[Tensor, "b d"]:
        """Unit vectors, one for each text, whose tokens after the first ``max_tokens`` are dropped.

        Texts are padded to the longest of their batch, not to ``max_tokens``: padding changes no
        vector, and costs as much as words do.
        """
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(next(self.parameters()).device)
        hidden: Tensor = self.transformer(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        # Normalising the sum equals normalising the mean: the count is a positive factor.
        return nn.functional.normalize((hidden * mask).sum(dim=1), dim=-1)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Numbers of tokens that the encoder reads in each text, before any cut."""
    tokenizer = _tokenizer(_model_folder())
    # verbose=False: a text may exceed what the model reads, it will be cut later.
    return [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def load_encoder() -> SentenceEncoder:
    """A fresh copy of the pre-trained encoder: float32, evaluation mode, frozen. Never asks the network.

    Raises:
        ImportError: transformers is not installed.
        FetchError: the model's files are neither installed nor cached and could not be fetched.
    """
    folder = _model_folder()
    tokenizer = _tokenizer(folder)
    with _silence(_transformers().utils.logging):
        transformer = _transformers().AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            # No slower than eager attention on a CPU at 16 x 32 tokens, and lighter in memory.
            attn_implementation="sdpa",
            # The pooler reads the first token only and is not part of the sentence vector.
            add_pooling_layer=False,
        )
    return SentenceEncoder(transformer, tokenizer).eval().requires_grad_(False)


def _model_folder() -> Path:
    _transformers()  # first: without it, fetching the model would be in vain
    return model_folder()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the text streams load their encoder with transformers: pip install 'manifold-cl[bench]'"
        ) from error
    return transformers


def _tokenizer(folder: Path) -> Any:
    with _silence(_transformers().utils.logging):
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _silence(logging: Any) -> Iterator[None]:
    """Keeps transformers' progress bar and load report off the screen, then restores its settings."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
