"""Models and batches of their inputs from JSONL files, as measurements read them."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import torch

import manifold_cl
from manifold_cl.cli.model_data import named_files, read_model_data
from manifold_cl.files import FileError
from manifold_cl.streams.model_inputs import load_text_model, load_text_tokenizer, read_batches

ROWS = [{"prompt": "the sky is", "completion": " blue"}, {"prompt": "what colour is a dog ?", "completion": " red"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_decoder.decoder().save_pretrained(folder)
    tiny_decoder.tokenizer().save_pretrained(folder)
    return folder


def test_rows_become_padded_batches_with_labels_on_answers(tmp_path: Path) -> None:
    tokenizer = tiny_decoder.tokenizer()
    (batch,) = read_batches(write(tmp_path / "rows.jsonl", ROWS), tokenizer)
    ids, mask, labels = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == mask.shape == labels.shape
    assert tokenizer.decode(ids[0][mask[0].bool()]) == "the sky is blue </s>"
    assert tokenizer.decode(labels[1][labels[1] >= 0]) == "red </s>"
    assert mask.sum(1).tolist() == [5, 8]
    assert (ids[0, 5:] == tokenizer.pad_token_id).all()


def test_a_fixed_draw_of_rows_in_batches(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS * 8)
    batches = read_batches(path, tiny_decoder.tokenizer(), examples=5, batch=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    again = read_batches(path, tiny_decoder.tokenizer(), examples=5, batch=2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_a_model_with_named_data(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    read = read_model_data(str(model), [f"colours={path}", str(path)])
    assert read is not None
    loaded, data = read
    assert list(data) == ["colours", "rows"]
    assert loaded(**data["rows"][0]).logits.shape[:2] == data["rows"][0]["input_ids"].shape
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_encoder_reads_rows_of_text(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    folder = tmp_path / "encoder"
    BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).save_pretrained(folder)
    tiny_decoder.tokenizer(model_max_length=8).save_pretrained(folder)
    loaded, tokenizer = load_text_model(str(folder)), load_text_tokenizer(str(folder))
    assert type(loaded).__name__ == "BertForSequenceClassification"
    texts = write(tmp_path / "texts.jsonl", [{"text": "the sky is blue"}, {"text": " ".join(["red"] * 20)}])
    (batch,) = read_batches(texts, tokenizer, causal=False)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    assert loaded(**batch).logits.shape == (2, 2)
    with pytest.raises(ValueError, match="rows of form 'prompt'"):
        read_batches(write(tmp_path / "rows.jsonl", ROWS), tokenizer, causal=False)


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes))
    weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith("classifier.")}
    encoder.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(FileError, match=r"partial lacks 2 weights of the model, such as classifier\.bias"):
        load_text_model(str(tmp_path / "partial"))


def test_every_model_of_transformers_is_read_by_the_function_that_refuses_missing_weights() -> None:
    """No call of ``from_pretrained`` but those of configurations, tokenizers and processors."""
    trees = {path.name: ast.parse(path.read_text()) for path in Path(manifold_cl.__file__).parent.rglob("*.py")}
    calls = [(name, n) for name, tree in trees.items() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    given = {n for _, call in calls if ast.unparse(call.func) == "complete_model" for n in ast.walk(call)}  # as lambda
    loads = [(name, ast.unparse(n.func)) for name, n in calls if n not in given]
    called = [(name, text) for name, text in loads if text.endswith(".from_pretrained")]
    harmless = ("AutoConfig", "AutoTokenizer", "AutoProcessor")
    assert len(called) > 5
    assert not [(name, text) for name, text in called if text.split(".")[-2] not in harmless]


def test_wrong_options_and_files_are_named(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert read_model_data(None, None) is None
    for given in ((str(model), None), (None, [str(path)])):
        with pytest.raises(ValueError, match="belong together"):
            read_model_data(*given)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_model_data(str(model), [str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="a name of its own"):
        named_files([str(path), f"rows={path}"])
    with pytest.raises(FileError, match=r"bad\.jsonl.*2"):
        read_model_data(str(model), [str(write(tmp_path / "bad.jsonl", [*ROWS[:1], {"prompt": "the"}]))])
    with pytest.raises(FileError, match=r"config\.json"):
        read_model_data(str(tmp_path), [str(path)])
    with pytest.raises(ValueError, match="has no rows"):
        read_batches(write(tmp_path / "empty.jsonl", []), tiny_decoder.tokenizer())
    with pytest.raises(ValueError, match="examples"):
        read_batches(path, tiny_decoder.tokenizer(), examples=0)
