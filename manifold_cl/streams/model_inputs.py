"""A language model or text encoder, and batches of its inputs from JSONL files: for measurements, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.continual.losses import IGNORED
from manifold_cl.files import FileError, complete_model, library_errors
from manifold_cl.rules import validate_whole
from manifold_cl.streams.causal_lm import TextExample
from manifold_cl.streams.causal_tasks import read_source
from manifold_cl.streams.causal_tokens import TextEncoder
from manifold_cl.streams.language_model import as_frozen_base, load_causal_lm, load_tokenizer, require_causal_lm
from manifold_cl.streams.selection import drawn
from manifold_cl.streams.text_layouts import LAYOUTS
from manifold_cl.streams.text_rows import RowReader

Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask`` (b, tokens), padded on the right; ``labels`` too for a causal model."""


def load_text_model(name: str) -> nn.Module:
    """A frozen text model of transformers, in float32 and evaluation mode.

    Causal language models are loaded as such, other models as the class that their configuration names.

    Args:
        name: a folder, or a checkpoint of the hub, which must hold a causal language model.

    Raises:
        ImportError: transformers is not installed.
        FileError: a folder without a model, a model without a class in transformers, or one that lacks weights.
    """
    if is_causal(name):
        return load_causal_lm(name)
    import transformers

    with library_errors(Path(name) / "config.json", "transformers"):
        names = transformers.AutoConfig.from_pretrained(name, local_files_only=True).architectures or ["AutoModel"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise FileError(f"{name}/config.json names the architecture {names[0]!r}, which transformers does not have")
    model = complete_model(kind.from_pretrained, name, local_files_only=True)
    return as_frozen_base(model, torch.float32, {}, checkpointing=False)


def load_text_tokenizer(name: str) -> Any:
    """The tokenizer of a model that `load_text_model` loads; FileError for a folder without one."""
    if is_causal(name):
        return load_tokenizer(name)
    import transformers

    with library_errors(name, "transformers"):
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)


def is_causal(name: str) -> bool:
    """Whether a folder holds a causal language model, as every name of the hub is taken to; FileError for no model."""
    try:
        require_causal_lm(name)
    except FileError:
        if not (Path(name) / "config.json").is_file():
            raise
        return False
    if not Path(name).exists():
        return True
    import transformers

    with library_errors(Path(name) / "config.json", "transformers"):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    # an encoder such as BERT has a causal class too: the checkpoint's own class decides
    causal = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return not config.architectures or causal.__name__ in config.architectures


def read_batches(
    path: Path, tokenizer: Any, *, causal: bool = True, examples: int = 128, batch: int = 8, max_length: int = 512
) -> list[Batch]:
    """Batches of the rows of a JSONL file, in its order, or of a fixed draw where it has more than `examples`.

    Rows are those of `causal_lm_tasks`: ``prompt`` and ``completion``, ``messages``, or ``text``. Prompt and answer
    are both read by the model; labels hold the answer's tokens.

    Args:
        path: the file, or a folder of which the training part is read.
        tokenizer: of the model.
        causal: whether the model is a causal language model; others read rows of ``text`` only.
        examples: the largest number of rows.
        batch: rows per batch.
        max_length: tokens per row; a longer prompt loses its beginning, a longer text its end.

    Raises:
        FileError: a missing file or a row that is no example; the message has its line.
        ValueError: no rows, or rows of another form than the model reads.
    """
    validate_whole("examples", examples)
    validate_whole("batch", batch)
    if not path.exists():
        raise FileError(f"{path} does not exist: give a JSONL file with one example per line")
    reader = RowReader(tokenizer)
    rows = read_source(LAYOUTS["jsonl"].source(path.stem, path, reader))["train"]
    reader.report_unused(path.stem)
    if not rows:
        raise ValueError(f"{path} has no rows: give at least one example")
    if not causal and reader.form != "text":
        raise ValueError(f"{path} has rows of form {reader.form!r}: a model that is no causal one reads rows of 'text'")
    chosen = drawn(rows, examples, key=path.stem)
    encoded = _tokens(chosen, tokenizer, max_length) if causal else _texts(chosen, tokenizer, max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return [_padded(encoded[start : start + batch], pad or 0, causal) for start in range(0, len(encoded), batch)]


def _tokens(rows: Sequence[TextExample], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of prompts and answers."""
    examples = TextEncoder(tokenizer, max_length).examples([row.prompt for row in rows], [row.answer for row in rows])
    return [([*each.prompt, *each.answer], [IGNORED] * len(each.prompt) + list(each.answer)) for each in examples]


def _texts(rows: Sequence[TextExample], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of texts, without labels."""
    longest = min(max_length, tokenizer.model_max_length)
    ids = tokenizer([row.answer for row in rows], truncation=True, max_length=longest)["input_ids"]
    return [(each, []) for each in ids]


def _padded(rows: Sequence[tuple[list[int], list[int]]], pad: int, labelled: bool) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    }
    if labelled:
        batch["labels"] = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return batch
