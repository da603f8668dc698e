"""A tokenizer of some thirty words and a random llama for it, the same for the same seed; nothing is downloaded."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """red green blue yes no one two three cat dog cow sky sea sun what is the colour animal of number a name say
this that here user assistant system ? : ."""
WORDS = TEXT.split()
TEMPLATE = (
    "{% for message in messages %}{{ bos_token }} {{ message['role'] }} : {{ message['content'] }} {{ eos_token }} "
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }} assistant : {% endif %}"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Splits at white space; ``<s>``, ``</s>``, ``<pad>`` and ``<unk>`` are its special tokens."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **{**names, **options})
    made.chat_template = TEMPLATE
    return made


def decoder(*, seed: int = 0, layers: int = 2, vocabulary: int = len(WORDS) + 4, width: int = 32) -> LlamaForCausalLM:
    """A llama in evaluation mode."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # at transformers' 0.02 no adapter could move the logits
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
