"""The pre-trained decoder of the embedded language-model streams: SmolLM2-135M-Instruct, a llama of 30 blocks."""

from __future__ import annotations

from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from typing import Any

import torch
from torch import nn

from manifold_cl.files import complete_model
from manifold_cl.streams.packaged_models import SMOLLM2_MODEL
from manifold_cl.streams.sentence_encoder import silence

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Suffixes of the 210 linear modules that receive adapters: seven in each of the 30 blocks."""
(GGUF,) = SMOLLM2_MODEL.files


def load_decoder() -> nn.Module:
    """A fresh copy of the pre-trained decoder, dequantised to float32, in evaluation mode and frozen.

    The weights have four bits each in their file, so they are near those of the published checkpoint and not equal.
    The loader uses no network.

    Raises:
        ImportError: transformers, accelerate or gguf is not installed.
        FetchError: the model's file is neither installed nor cached and could not be fetched.
        FileError: transformers finds weights of the model under other names, and would draw them at random.
    """
    transformers = _transformers()
    folder = SMOLLM2_MODEL.folder()
    with silence(transformers.utils.logging), redirect_stderr(StringIO()):  # a progress bar that has no switch
        load, options = transformers.AutoModelForCausalLM.from_pretrained, {"gguf_file": GGUF, "dtype": torch.float32}
        model = complete_model(load, folder, local_files_only=True, attn_implementation="sdpa", **options)
    # The weights are plain float32 now; transformers would refuse to save a model that it takes for quantised.
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


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
            "the decoder is loaded with transformers, accelerate and gguf: pip install 'transformers>=5.0' "
            "'accelerate>=1.2' 'gguf>=0.10'"
        ) from error
    return transformers
