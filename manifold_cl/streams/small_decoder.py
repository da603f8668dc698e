"""The pre-trained decoder of the embedded language-model streams: SmolLM2-135M-Instruct, a llama of 30 blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.files import complete_model
from manifold_cl.streams.gguf_files import read_gguf
from manifold_cl.streams.packaged_models import SMOLLM2_MODEL
from manifold_cl.streams.sentence_encoder import silence

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Suffixes of the 210 linear modules that receive adapters: seven in each of the 30 blocks."""
(GGUF,) = SMOLLM2_MODEL.files
OPTIONS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Options of transformers' ``LlamaConfig`` → their keys in a GGUF file."""
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in a GGUF file → names in transformers, outside and inside the blocks."""
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def load_decoder() -> nn.Module:
    """A fresh copy of the pre-trained decoder, dequantised to float32, in evaluation mode and frozen.

    The weights have four bits each in their file, so they are near those of the published checkpoint and not equal.
    The loader uses no network. The model is that of ``from_pretrained(gguf_file=...)``, in a tenth of its time.

    Raises:
        ImportError: transformers, accelerate or gguf is not installed.
        FetchError: the model's file is neither installed nor cached and could not be fetched.
        FileError: transformers finds weights of the model under other names, and would draw them at random.
    """
    transformers = _transformers()
    folder = SMOLLM2_MODEL.folder()
    content = read_gguf(folder / GGUF)
    config = transformers.LlamaConfig(**llama_options(content.metadata))
    state = llama_state(content.tensors, config.num_attention_heads, config.num_key_value_heads)
    del content
    with silence(transformers.utils.logging), redirect_stderr(StringIO()):  # a progress bar that has no switch
        model = complete_model(
            lambda _, **options: transformers.LlamaForCausalLM.from_pretrained(None, **options),
            folder / GGUF,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    model.name_or_path = model.config.name_or_path = str(folder)
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def llama_options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The options of transformers' ``LlamaConfig`` in the metadata of a GGUF file with tied embeddings."""
    tokens = {f"{kind}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"] for kind, key in SPECIAL.items()}
    return {name: metadata[f"llama.{key}"] for name, key in OPTIONS.items()} | tokens | {"tie_word_embeddings": True}


def llama_state(tensors: Mapping[str, Tensor], heads: int, key_heads: int) -> dict[str, Tensor]:
    """The tensors of a llama in a GGUF file, by the names and in the layout of transformers.

    Rows of queries and keys alternate between the halves of a head in the file, and follow each other in transformers.
    """
    state = {}
    for name, tensor in tensors.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            state[OUTER[name]] = tensor
            continue
        index, part = block.groups()
        if part in ("attn_q", "attn_k"):
            pairs = tensor.reshape(heads if part == "attn_q" else key_heads, -1, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        state[f"model.layers.{index}.{INNER[part]}.weight"] = tensor
    return state


@cache
def decoder_tokenizer() -> Any:
    """The decoder's tokenizer; converting it from its file takes seconds, so that a process does it once."""
    transformers = _transformers()
    folder = SMOLLM2_MODEL.folder()
    with silence(transformers.utils.logging):
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True)


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401 - transformers loads GGUF files with both
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(
            "the decoder is loaded with transformers, accelerate and gguf: pip install 'transformers>=5.2' "
            "'accelerate>=1.7' 'gguf>=0.16'"
        ) from error
    return transformers
