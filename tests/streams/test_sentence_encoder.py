"""The encoder: unit vectors that ignore padding, the right 36 linear modules, no noise, no network."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from manifold_cl.streams import SentenceEncoder, load_encoder
from manifold_cl.streams.sentence_encoder import TARGETS, count_tokens

TEXTS = ("a cat sat on the mat", "stocks fell", "the committee approved a new budget for the coming year, narrowly")


class Tokens(dict[str, Tensor]):
    def to(self, device: torch.device) -> Tokens:
        return Tokens({name: value.to(device) for name, value in self.items()})


def tokenizer(texts, *, padding, truncation, max_length, return_tensors) -> Tokens:
    rows = [[ord(c) for c in text][:max_length] for text in texts]
    width = max(map(len, rows))
    return Tokens(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    )


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(128, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.rows[input_ids])


def test_a_vector_is_the_normalised_mean_over_the_text_s_own_tokens() -> None:
    table = Table()
    vectors = SentenceEncoder(table, tokenizer)(["ab", "c", "dddddd"], 4)
    means = torch.stack([table.rows[[97, 98]].mean(dim=0), table.rows[99], table.rows[100]])
    # float32 rounding of a few operations on numbers of size 1
    torch.testing.assert_close(vectors, means / means.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


def test_without_transformers_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.2'"):
        load_encoder()


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_encoder()


@pytest.mark.stream
def test_it_is_frozen_float32_and_in_evaluation_mode(encoder: SentenceEncoder) -> None:
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.stream
def test_the_targets_are_its_36_linear_modules(encoder: SentenceEncoder) -> None:
    linears = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    shapes = [tuple(m.weight.shape) for name, m in linears.items() if name.endswith(tuple(f".{t}" for t in TARGETS))]
    assert len(shapes) == len(linears) == 36
    assert [shapes.count(shape) for shape in ((384, 384), (1536, 384), (384, 1536))] == [24, 6, 6]
    modules = [name for name, _ in encoder.named_modules() if name.endswith(tuple(f".{t}" for t in TARGETS))]
    assert modules == list(linears)


@pytest.mark.stream
def test_vectors_are_unit_and_do_not_depend_on_batch_mates(encoder: SentenceEncoder) -> None:
    together = encoder(TEXTS, 32)
    alone = torch.cat([encoder([text], 32) for text in TEXTS])
    assert together.shape == (3, 384)
    # float32: six blocks of sums of 384 to 1536 terms
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.stream
def test_texts_are_cut_at_max_tokens(encoder: SentenceEncoder) -> None:
    assert count_tokens(["one two three four", "one"]) == [6, 3]
    torch.testing.assert_close(encoder(["one two three four"], 4), encoder(["one two"], 4))
    assert count_tokens(["word " * 1000]) == [1002]


@pytest.mark.stream
def test_similar_sentences_are_close(encoder: SentenceEncoder) -> None:
    a, b, c = encoder(["a dog barks loudly", "the puppy is barking", "the stock market fell today"], 32)
    assert a @ b > 0.6 > 0.3 > a @ c


@pytest.mark.stream
def test_copies_are_fresh(encoder: SentenceEncoder) -> None:
    first = next(encoder.parameters())
    second = next(load_encoder().parameters())
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.stream
def test_loading_is_silent_offline_and_leaves_settings_as_they_were(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection was opened"))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    state = torch.get_rng_state()
    load_encoder()
    assert tuple(capfd.readouterr()) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert torch.equal(torch.get_rng_state(), state)
