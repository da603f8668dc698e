"""Causal language models and their tokenizers by transformers' own classes: loading, and whether both fit together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from manifold_cl.adapters.layers import ALL_LINEAR, Targets, target_linears
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.files import FileError, complete_model, is_missing_folder, library_errors

FEWEST = 0.5
"""Share of the embedding's rows that a tokenizer of the same model uses at least; padding adds only a few rows."""

logger = logging.getLogger("manifold_cl")
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Model → warnings about tokenizers that were given for it."""


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    merged_dtype: torch.dtype = torch.float32,
    targets: Targets = ALL_LINEAR,
    checkpointing: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """A fresh causal language model, frozen and in evaluation mode.

    Args:
        name: a folder, or a checkpoint of the hub.
        dtype: of the frozen weights and of the products; adapters are always float32.
        merged_dtype: of the weights of the target layers, into which updates are merged. In bfloat16 a typical update
            would be lost to rounding.
        targets: the linear layers that receive adapters.
        checkpointing: recompute activations in the backward pass: slower, much less memory.
        local_files_only: never use the network.

    Raises:
        ImportError: transformers is not installed.
        FileError: a folder without a model, a model of another kind, or one that lacks weights.
    """
    require_causal_lm(name)
    transformers = _transformers()
    load = transformers.AutoModelForCausalLM.from_pretrained
    with without_progress_bar(transformers.utils.logging):
        model = complete_model(load, name, dtype="auto", attn_implementation="sdpa", local_files_only=local_files_only)
    if dtype == torch.float32:
        merged_dtype = dtype
    merged = {f"{layer}.weight": merged_dtype for layer in target_linears(model, targets)}
    return as_frozen_base(model, dtype, merged, checkpointing=checkpointing)


def as_frozen_base(
    model: nn.Module, dtype: torch.dtype, others: Mapping[str, torch.dtype], *, checkpointing: bool
) -> nn.Module:
    """The loaded model, frozen and in evaluation mode, with parameters in ``dtype`` but for those of ``others``.

    Args:
        model: of transformers, in the precision of its checkpoint, from which each parameter is rounded once.
        dtype: of the parameters.
        others: name of a parameter → its own precision.
        checkpointing: recompute activations in the backward pass.
    """
    for key, p in model.named_parameters():
        p.data = p.data.to(others.get(key, dtype))
    if checkpointing:
        checkpoint_activations(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        ImportError: transformers is not installed.
        FileError: a folder without a tokenizer.
    """
    require_causal_lm(name)
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some versions make one where there is none
            raise ValueError("only special tokens are there")
    except Exception as error:  # its parsers raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(
            f"{name} has no tokenizer that can be read ({first}): save the model's own tokenizer there"
        ) from None
    return tokenizer


def require_causal_lm(name: str) -> None:
    """Raise FileError for a folder that holds no causal language model; names of the hub pass."""
    transformers, folder = _transformers(), Path(name)
    if not folder.exists():
        if is_missing_folder(name):
            raise FileError(f"model {name} does not exist: give a folder, or a name of the hub")
        return
    if not (folder / "config.json").is_file():
        raise FileError(f"{folder} has no config.json: a model folder as written by save_pretrained is needed")
    with library_errors(folder / "config.json", "transformers"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise FileError(f"{folder} holds a model of type {config.model_type!r}, a causal language model is needed")


def validate_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Verify that a model and a tokenizer fit together.

    Special tokens of other ids than the model's, and a vocabulary of less than half the embedding, are warnings: each
    is possible, and a sign of a tokenizer of another model.

    Args:
        model: of transformers, or with such a model inside (PEFT).
        tokenizer: of transformers.

    Raises:
        ValueError: the tokenizer has a token for which the model has no embedding.
    """
    require_vocabulary(model, tokenizer)
    rows, name, vocabulary = _rows(model), _name(tokenizer), tokenizer.get_vocab()
    signs = [
        f"its {kind} token has the number {own}, the model's {', '.join(map(str, sorted(known)))}"
        for kind in ("bos", "eos")
        if (own := getattr(tokenizer, f"{kind}_token_id")) is not None
        and (known := _special(model, f"{kind}_token_id"))
        and own not in known
    ]
    if len(vocabulary) < FEWEST * rows:
        signs.append(f"it has {len(vocabulary)} tokens, the embedding {rows} rows")
    message = f"tokenizer {name} may be that of another model: {'; '.join(signs)}; load both under one name"
    if signs and message not in (given := _WARNED.setdefault(model, set())):  # each task of a stream asks
        given.add(message)
        logger.warning(message)


def require_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer with a token for which the model has no embedding."""
    rows, vocabulary = _rows(model), tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[last] >= rows:
        beyond = sum(index >= rows for index in vocabulary.values())
        raise ValueError(
            f"tokenizer {_name(tokenizer)} does not fit the model: {beyond} of its {len(vocabulary)} tokens (such as "
            f"{last!r}) are beyond the embedding's {rows} rows: load the model's own tokenizer, or, for tokens that "
            "you added, call model.resize_token_embeddings(len(tokenizer))"
        )


def _rows(model: nn.Module) -> int:
    """The number of tokens that the model knows."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


@contextmanager
def without_progress_bar(logging: Any) -> Iterator[None]:
    """A context without transformers' progress bar; its warnings, such as of missing weights, stay.

    Both switches of ``logging``, transformers' module, turn the bars of huggingface_hub too, which are put back.
    """
    hub = logging.hf_hub_utils
    shown, hidden = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()


def _special(model: nn.Module, key: str) -> set[int]:
    """The ids of a special token in the model's configurations."""
    found: set[int] = set()
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        value = getattr(config, key, None)
        found.update(value if isinstance(value, Iterable) else [] if value is None else [value])
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("language models are loaded with transformers: pip install 'transformers>=5.2'") from error
    return transformers
