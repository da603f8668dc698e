"""LLaVA by transformers' own classes: loading, batches of images and texts, losses, answers.

Pillow reads the images, and the checkpoint's own image processor prepares them. Without torchvision, transformers uses
its Pillow implementation, with the same result up to resampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.checkpointing import following_checkpoints
from manifold_cl.continual.losses import IGNORED
from manifold_cl.files import FileError, complete_model, is_missing_folder, library_errors
from manifold_cl.streams.causal_tokens import autocast
from manifold_cl.streams.instructions import Instruction
from manifold_cl.streams.language_model import as_frozen_base
from manifold_cl.streams.templates import Template

logger = logging.getLogger("manifold_cl")


def load_llava(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    targets: str | None = None,
    merged_dtype: torch.dtype = torch.float32,
    train_projector: bool = False,
    checkpointing: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """A fresh `LlavaForConditionalGeneration`, frozen and in evaluation mode.

    Args:
        name: a folder, or a checkpoint of the hub such as ``llava-hf/llava-1.5-7b-hf``.
        dtype: of the frozen weights and of the products; adapters are always float32.
        targets: regular expression of the linear modules into which updates will be merged.
        merged_dtype: of the weights of these modules. In bfloat16 a typical update would be lost to rounding, since it
            is smaller than half a step at the weight.
        train_projector: keep the projector in float32, so that small steps are not lost. It stays frozen here.
        checkpointing: recompute activations in the backward pass: about a third slower, much less memory.
        local_files_only: never use the network.

    Raises:
        ImportError: transformers is not installed.
        FileError: a folder without a model, one that is no LLaVA, or one that lacks weights.
    """
    transformers = _transformers()
    require_llava(name)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model = complete_model(load, name, dtype="auto", attn_implementation="sdpa", local_files_only=local_files_only)
    others: dict[str, torch.dtype] = {}
    if train_projector:
        names = (name for name, _ in model.named_parameters())
        others |= {name: torch.float32 for name in names if name.startswith("model.multi_modal_projector.")}
    if targets and dtype != torch.float32:
        others |= {f"{name}.weight": merged_dtype for name in target_linears(model, targets)}
    return as_frozen_base(model, dtype, others, checkpointing=checkpointing)


def load_processor(name: str, *, local_files_only: bool = False) -> Any:
    """The checkpoint's processor: its tokenizer and its image processor.

    Raises:
        ImportError: transformers or Pillow is not installed.
        FileError: a folder without LLaVA, or a tokenizer without offsets.
    """
    require_llava(name)
    try:
        import PIL  # noqa: F401 - transformers' own message for its absence names torchvision
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'pillow>=11'") from error
    if not local_files_only and not Path(name).exists():
        logger.info("model %s: downloaded from the hub, unless it is in the hub's cache", name)
    with library_errors(name, "transformers"):
        processor = _transformers().AutoProcessor.from_pretrained(name, local_files_only=local_files_only)
    if not getattr(processor.tokenizer, "is_fast", False):
        raise FileError(f"{name} has a slow tokenizer without offsets: install 'tokenizers' and use tokenizer.json")
    return processor


def require_llava(name: str) -> None:
    """Raise FileError for a folder that holds no LLaVA, before anything is loaded; names of the hub pass."""
    folder = Path(name)
    if not folder.exists():
        if is_missing_folder(name):
            raise FileError(f"model {name} does not exist: give a folder or a name such as llava-hf/llava-1.5-7b-hf")
        return
    path = folder / "config.json"
    if not path.is_file():
        raise FileError(f"{folder} has no config.json: a model folder as written by save_pretrained is needed")
    with library_errors(path, "transformers"):
        kind = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind != "llava":
        raise FileError(
            f"{folder} holds a model of type {kind!r}, 'llava' is needed: replace authors' own checkpoints by their "
            "conversions under llava-hf"
        )


@dataclass(frozen=True)
class Collator:
    """Turns instructions into tensors for the model.

    Args:
        processor: the checkpoint's.
        template: writes conversations.
        find: returns the file of an image path.
        aspect: ``"pad"`` makes images square first, with the processor's mean colour, as LLaVA-1.5 was trained.
        max_length: tokens after which training texts are truncated.
    """

    processor: Any
    template: Template
    find: Callable[[str], Path]
    aspect: Literal["pad", "crop"] = "pad"
    max_length: int = 2048

    def for_training(self, items: Sequence[Instruction]) -> dict[str, Tensor]:
        """Tensors with ``labels``, which are the tokens of answers and `IGNORED` elsewhere; padded on the right.

        Raises:
            ValueError: for an item whose question alone fills ``max_length``.
            FileError: for an image that cannot be read.
        """
        prompts = [self.template.written(item.turns, **self._marks(item)) for item in items]
        batch = self._processed(items, [prompt.text for prompt in prompts], side="right", offsets=True)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        offsets = batch.pop("offset_mapping")
        for row, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            # The processor repeats each image mark once per patch, always in front of the first answer.
            patches = int((batch["input_ids"][row] == self.processor.image_token_id).sum())
            shift = (patches - len(item.images)) * len(self.processor.image_token)
            answered = torch.zeros(len(labels[row]), dtype=torch.bool)
            for start, end in prompt.answers:
                answered |= (offsets[row, :, 0] < end + shift) & (offsets[row, :, 1] > start + shift)
            answered &= batch["attention_mask"][row].bool()
            labels[row, answered] = batch["input_ids"][row, answered]
            if not answered[: self.max_length].any():
                raise ValueError(
                    f"item {item.key} (line {item.line}) has {int(batch['attention_mask'][row].sum())} tokens, none of "
                    f"the first {self.max_length} in an answer: raise max_length"
                )
        batch["labels"] = labels
        return {key: value if key == "pixel_values" else value[:, : self.max_length] for key, value in batch.items()}

    def for_answering(self, items: Sequence[Instruction]) -> dict[str, Tensor]:
        """Tensors up to the beginning of the last answer; padded on the left, so that answers start together."""
        texts = [self.template.asked(item.turns, **self._marks(item)) for item in items]
        return self._processed(items, texts, side="left", offsets=False)

    def _marks(self, item: Instruction) -> dict[str, Any]:
        end = self.processor.tokenizer.eos_token
        return {"images": len(item.images), "image_token": self.processor.image_token, "end": end}

    def _processed(
        self, items: Sequence[Instruction], texts: list[str], *, side: str, offsets: bool
    ) -> dict[str, Tensor]:
        encoded = self.processor(
            images=[self._image(image, item) for item in items for image in item.images] or None,
            text=texts,
            padding=True,
            padding_side=side,
            return_tensors="pt",
            return_offsets_mapping=offsets,
        )
        names = ("input_ids", "attention_mask", "pixel_values", "offset_mapping")
        return {key: encoded[key] for key in names if key in encoded}

    def _image(self, name: str, item: Instruction) -> Any:
        from PIL import Image

        path = self.find(name)
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:  # UnidentifiedImageError is one
            message = f"{path}, the image of item {item.key} (line {item.line}), cannot be read: {error}"
            raise FileError(message) from None
        if self.aspect == "crop" or image.width == image.height:
            return image
        side = max(image.size)
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each predicted from the tokens before it."""
    with following_checkpoints(model), autocast(model):
        value: Tensor = model(**_to_device(model, batch), use_cache=False).loss
    return value


@torch.no_grad()
def answers(model: nn.Module, batch: dict[str, Tensor], processor: Any, *, max_new_tokens: int) -> list[str]:
    """The greedily decoded answer to each item."""
    tokenizer = processor.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = _to_device(model.eval(), batch)
    with autocast(model):
        tokens = model.generate(  # type: ignore[operator]
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _to_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("LLaVA is loaded with transformers: pip install 'transformers>=5.2' 'pillow>=11'") from error
    return transformers
