"""A vision-language model with a few thousand random weights, its tokenizer, and pictures of one colour each."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manifold_cl.streams.picture_task import Picture, PictureQuestion, PictureScore, PictureTask
from manifold_cl.streams.small_llava import IMAGE_TOKEN, assemble, with_image_token
from manifold_cl.streams.vision_tower import tower_config

WORDS = ("<unk>", "<end>", "\n", "=", "Answer:", "Colour?", "red", "red,", "dark", "blue", "blue,")
SIDE = 28
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "dark blue": (0, 0, 90)}


def tokenizer() -> Any:
    """Words of `WORDS`, and the image token."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return with_image_token(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>"))


def tower(seed: int = 0) -> nn.Module:
    """Two blocks of width 16 over 2 x 2 patches."""
    torch.manual_seed(seed)
    config = tower_config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE)
    model: nn.Module = Dinov2Model(config).eval()
    return model


def decoder() -> nn.Module:
    """Two blocks of width 32, with tied embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,  # outputs depend on inputs
        **sizes,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def llava() -> nn.Module:
    """The model of `tower` and `decoder`."""
    return assemble(tower(), decoder(), tokenizer().convert_tokens_to_ids(IMAGE_TOKEN))


def questions(count: int = 6) -> tuple[PictureQuestion, ...]:
    """Pictures of one colour each with a little noise, and their colours."""
    noise = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        word = list(COLOURS)[i % len(COLOURS)]
        picture = torch.tensor(COLOURS[word], dtype=torch.uint8).view(3, 1, 1).repeat(1, SIDE, SIDE)
        picture = picture ^ torch.randint(0, 8, picture.shape, generator=noise, dtype=torch.uint8)
        items.append(PictureQuestion(Picture(picture, f"{word} {i}"), word))
    return tuple(items)


def task(score_by: PictureScore = "likelihood", **changes: Any) -> PictureTask:
    """Colours in words."""
    parts = {"train": questions(), "validation": questions(3), "test": questions()}
    settings = {"question": "Colour?", "options": tuple(COLOURS), "tokenizer": tokenizer(), "score_by": score_by}
    return PictureTask("colours", **{"parts": parts, **settings, **changes})
