"""GGUF files and the llama in them, against the readers of gguf and of transformers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, LlamaConfig

from manifold_cl.files import FileError
from manifold_cl.streams import small_decoder
from manifold_cl.streams.gguf_files import GgufFile, read_gguf
from manifold_cl.streams.small_decoder import llama_options, llama_state, load_decoder

WIDTH, HEADS, KEY_HEADS, BLOCKS, HIDDEN, WORDS = 64, 4, 2, 2, 96, 40
KINDS = [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16]


def write(path: Path) -> Path:
    """A tiny llama of random weights, in three kinds of numbers."""
    writer, draw = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_name("tiny")
    writer.add_vocab_size(WORDS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_token_list([f"word {i}" for i in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    keys = WIDTH * KEY_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for i in range(BLOCKS):
        parts = {"attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (keys, WIDTH), "attn_v": (keys, WIDTH)}
        parts |= {"attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (HIDDEN, WIDTH)}
        parts |= {"ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{i}.{part}": shape for part, shape in parts.items()}
    for number, (name, shape) in enumerate(shapes.items()):
        weight, kind = draw.standard_normal(shape, np.float32), KINDS[number % len(KINDS)]
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_file_is_that_of_the_reader_of_gguf(path):
    content, reader = read_gguf(path), GGUFReader(path)
    assert list(content.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert torch.equal(
            content.tensors[tensor.name], torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        )
    own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    words = own.pop("tokenizer.ggml.tokens")  # the one list of words
    assert len(words) == WORDS
    assert content.metadata == own


def test_a_llama_is_that_of_transformers(path, monkeypatch):
    monkeypatch.setattr(small_decoder, "SMOLLM2_MODEL", SimpleNamespace(folder=lambda: path.parent))
    monkeypatch.setattr(small_decoder, "GGUF", path.name)
    random = torch.get_rng_state()
    model = load_decoder()
    assert torch.equal(torch.get_rng_state(), random)
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    require_equal(model, expected)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected.eval()(ids).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.stream
@pytest.mark.slow
def test_the_decoder_is_that_of_transformers():
    folder = small_decoder.SMOLLM2_MODEL.folder()
    options = {"gguf_file": small_decoder.GGUF, "local_files_only": True, "dtype": torch.float32}
    require_equal(load_decoder(), AutoModelForCausalLM.from_pretrained(folder, **options))


def require_equal(model, expected):
    assert model.name_or_path == expected.name_or_path
    assert model.config.name_or_path == expected.config.name_or_path
    own, other = model.state_dict(), expected.state_dict()
    assert list(own) == list(other)
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    configs = [config.to_dict() for config in (model.config, expected.config)]
    generation = [each.generation_config.to_dict() for each in (model, expected)]
    for config in configs:
        config.pop("_model_name_or_path", None)  # a title in the file
        config.pop("unk_token_id", None)  # of the tokenizer alone
        config.pop("quantization_config", None)  # transformers would refuse to save a model that has it
    assert configs[0] == configs[1]
    assert generation[0] == generation[1]


def test_a_file_that_lacks_a_weight_is_refused(path, monkeypatch):
    def without_norm(file: Path) -> GgufFile:
        content = read_gguf(file)
        del content.tensors["blk.1.ffn_norm.weight"]
        return content

    monkeypatch.setattr(small_decoder, "SMOLLM2_MODEL", SimpleNamespace(folder=lambda: path.parent))
    monkeypatch.setattr(small_decoder, "GGUF", path.name)
    monkeypatch.setattr(small_decoder, "read_gguf", without_norm)
    with pytest.raises(FileError, match=r"tiny\.gguf lacks 1 weights .*1\.post_attention_layernorm"):
        load_decoder()


def test_options_of_a_llama_are_those_of_the_file(path):
    content = read_gguf(path)
    config = LlamaConfig(**llama_options(content.metadata))
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KEY_HEADS)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (WIDTH, HIDDEN, BLOCKS)
    state = llama_state(content.tensors, HEADS, KEY_HEADS)
    assert len(state) == len(content.tensors) == 2 + 9 * BLOCKS


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(path, tmp_path, share):
    content = path.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileError, match=r"short\.gguf"):
        read_gguf(short)


def test_files_of_another_kind_are_refused(path, tmp_path):
    other = tmp_path / "other.gguf"
    with pytest.raises(FileError, match=r"other\.gguf"):
        read_gguf(other)
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FileError, match=r"other\.gguf is no GGUF file"):
        read_gguf(other)
    content = bytearray(path.read_bytes())
    content[4] = 1
    other.write_bytes(content)
    with pytest.raises(FileError, match="version 1"):
        read_gguf(other)
