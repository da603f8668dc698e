"""The vision-language model of the stream ``vlm-three``: LLaVA's class over DINOv2-S, a projector and SmolLM2-135M."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_cl.streams.small_decoder import decoder_tokenizer

IMAGE_TOKEN = "<image>"
QUADRANTS = 4
IMAGE_TOKENS = 1 + QUADRANTS
"""Tokens per picture in a prompt: the class token, and the mean of each quadrant's patches."""
TARGETS = r"model\.language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The 210 linear modules of the language model, seven in each of 30 blocks. Tower and projector stay as they are."""


class PooledProjector(nn.Module):
    """A linear map from the tower's last hidden states to five token embeddings of the language model.

    ``P(h) = A (z(h) − mean) / deviation + b``, with z the tower's final normalisation, then means over quadrants.
    The projector of LLaVA gives a token per patch, 36 here, which would triple the length of a prompt.

    Args:
        norm: the final normalisation of the tower, which LLaVA's class leaves out. It is copied.
        width: of the language model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, norm: nn.LayerNorm, width: int) -> None:
        super().__init__()
        features = norm.normalized_shape[0]
        self.norm = copy.deepcopy(norm)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.linear = nn.Linear(features, width)

    def forward(self, hidden: Float[Tensor, "b patches features"]) -> Float[Tensor, "b tokens width"]:
        """The token embeddings of pictures, from the tower's states of the class token and of the patches."""
        return self.project(self.pool(hidden))

    def pool(self, hidden: Float[Tensor, "b patches features"]) -> Float[Tensor, "b tokens features"]:
        """The normalised class token, and the mean over each quadrant of a square grid of patches.

        ValueError for a number of patches that is no square of an even number.
        """
        states: Tensor = self.norm(hidden)
        patches = states[:, 1:]
        half = round(patches.shape[1] ** 0.5) // 2
        if (2 * half) ** 2 != patches.shape[1] or not half:
            raise ValueError(
                f"{patches.shape[1]} patches cannot be cut into quadrants: pictures need an even number of patches "
                "per side"
            )
        grid = patches.reshape(len(patches), 2, half, 2, half, -1)
        return torch.cat([states[:, :1], grid.mean(dim=(2, 4)).flatten(1, 2)], dim=1)

    def project(self, pooled: Float[Tensor, "b tokens features"]) -> Float[Tensor, "b tokens width"]:
        """The token embeddings of pooled states."""
        tokens: Tensor = self.linear((pooled - self.mean) / self.deviation)
        return tokens


class Shown(nn.Module):
    """A vision-language model that is shown pictures: it is called with texts alone, as a language model.

    The texts hold `IMAGE_TOKENS` image tokens per picture. Later calls with a cache leave the pictures out.

    Args:
        model: the vision-language model.
        pixels: one picture per text of a batch, normalised.
    """

    def __init__(self, model: nn.Module, pixels: Float[Tensor, "b 3 h w"]) -> None:
        super().__init__()
        self.model = model
        self.pixels = pixels

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """The model's output."""
        return self.model(
            input_ids=input_ids,
            pixel_values=self.pixels if past_key_values is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    def generate(self, **inputs: Any) -> Tensor:
        """The model's own ``generate``, with the pictures."""
        tokens: Tensor = self.model.generate(pixel_values=self.pixels, **inputs)  # type: ignore[operator]
        return tokens

    @property
    def generation_config(self) -> Any:
        """The model's settings of ``generate``."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    def get_input_embeddings(self) -> nn.Module:
        """The model's token embeddings."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings


@cache
def picture_tokenizer() -> Any:
    """The decoder's tokenizer with the token ``<image>``, which gets the first number after its own."""
    return with_image_token(copy.deepcopy(decoder_tokenizer()))


def with_image_token(tokenizer: Any) -> Any:
    """The same tokenizer, with ``<image>`` as a special token."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def assemble(tower: nn.Module, decoder: nn.Module, image_token: int) -> nn.Module:
    """A ``LlavaForConditionalGeneration`` of ``tower`` and ``decoder``, with a random `PooledProjector`.

    It takes the modules themselves. The decoder's embeddings get a row of zeros per number up to ``image_token``.
    float32, evaluation mode, frozen.
    """
    import transformers

    decoder.resize_token_embeddings(image_token + 1, mean_resizing=False)  # type: ignore[operator]
    text: Any = decoder.config
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):  # every part is replaced
        model: Any = transformers.LlavaForConditionalGeneration(config)
    norm: Any = tower.layernorm
    model.model.vision_tower = tower
    model.model.multi_modal_projector = PooledProjector(norm, text.hidden_size)
    model.model.language_model = decoder.model
    model.lm_head = decoder.lm_head
    with torch.no_grad():
        decoder.get_input_embeddings().weight[image_token:].zero_()  # type: ignore[operator]
    model.generation_config = decoder.generation_config
    model.config._attn_implementation = "sdpa"
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen
