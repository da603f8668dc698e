"""The pre-trained sentence encoder that the text streams start from: MiniLM-L6, 22.7 M parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_cl.files import complete_model
from manifold_cl.streams.language_model import without_progress_bar
from manifold_cl.streams.packaged_models import MINILM_MODEL

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
"""Suffixes of the 36 linear modules that receive adapters: six in each of the six blocks.

``output.dense`` also matches ``attention.output.dense``; both are listed, so that an ablation can leave one out. A
module counts once, whatever the number of its suffixes.
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
        """Unit vectors, one per text; tokens after the first ``max_tokens`` are dropped.

        Texts are padded to the longest of their batch, which changes no vector and costs less than ``max_tokens``.
        """
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(next(self.parameters()).device)
        hidden: Tensor = self.transformer(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        # Normalising the sum equals normalising the mean: the count is a positive factor.
        return nn.functional.normalize((hidden * mask).sum(dim=1), dim=-1)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Number of tokens of each text, before truncation."""
    tokenizer = _tokenizer(_model_folder())
    # verbose=False: no warning about texts that are truncated later.
    return [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def load_encoder() -> SentenceEncoder:
    """A fresh copy of the pre-trained encoder: float32, evaluation mode, frozen. The loader uses no network.

    Raises:
        ImportError: transformers is not installed.
        FetchError: the model's files are neither installed nor cached and could not be fetched.
        FileError: transformers finds weights of the model under other names, and would draw them at random.
    """
    folder = _model_folder()
    tokenizer = _tokenizer(folder)
    with silence(_transformers().utils.logging):
        transformer = complete_model(
            _transformers().AutoModel.from_pretrained,
            folder,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="sdpa",  # no slower than eager attention on a CPU, with less memory
            add_pooling_layer=False,  # not part of the sentence vector
        )
    return SentenceEncoder(transformer, tokenizer).eval().requires_grad_(False)


def _model_folder() -> Path:
    _transformers()  # before a download that would be useless without it
    return MINILM_MODEL.folder()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "text streams load their encoder with transformers: pip install 'transformers>=5.2'"
        ) from error
    return transformers


def _tokenizer(folder: Path) -> Any:
    with silence(_transformers().utils.logging):
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def silence(logging: Any) -> Iterator[None]:
    """Silences transformers' progress bar and load report."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bar(logging):
            yield
    finally:
        logging.set_verbosity(verbosity)
