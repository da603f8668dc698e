"""Random transformers of a few thousand parameters, the same for the same seed; nothing is downloaded."""

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 50


def llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return drawn(lambda: LlamaForCausalLM(config), seed).to(dtype).eval()


def gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return drawn(lambda: GPT2LMHeadModel(config), seed).eval()


def bert(*, seed: int = 0) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )
    return drawn(lambda: BertForSequenceClassification(config), seed).eval()


def drawn(make, seed: int) -> nn.Module:
    """The model that ``make`` draws from torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape or (2, 9), generator=torch.Generator().manual_seed(seed))
