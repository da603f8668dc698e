"""``manifold-cl analyze --model --data``: the report starts with how answers on examples change."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers")

from command import Call
from tiny_decoder import decoder, tokenizer

from analysis import AdapterSet, answer_changes, answer_intervals
from manifold_cl.cli.model_data import read_model_data

ROWS = [
    {"prompt": f"what is the colour of {noun} ? ", "completion": colour}
    for noun, colour in [("cat", "red"), ("dog", "blue"), ("cow", "green"), ("sky", "blue"), ("sea", "green")]
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its tokenizer, two adapters, and examples of the first."""
    model = decoder()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    draw = torch.Generator().manual_seed(0)
    factors = {
        task: {
            f"model.layers.{i}.self_attn.q_proj": (
                torch.randn(32, 2, generator=draw),
                torch.randn(32, 2, generator=draw),
            )
            for i in range(2)
        }
        for task in ("colours", "animals")
    }
    AdapterSet.from_factors(factors).save(tmp_path / "adapters")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.mark.slow
def test_the_answers_lead_and_their_tables_are_written(call: Call, folder: Path) -> None:
    data, out = f"colours={folder / 'rows.jsonl'}", folder / "out"
    ended = call("analyze", folder / "adapters", "--model", folder / "base", "--data", data, "--out", out, "--json")
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)
    first = printed["findings"][0]
    assert first["kind"] == "answers"
    assert "unknown" not in {finding["kind"] for finding in printed["findings"]}
    given = read_model_data(str(folder / "base"), [data])
    assert given is not None
    adapters = AdapterSet.load(folder / "adapters")
    expected = answer_intervals(answer_changes(given[0], adapters, given[1]))
    written = pd.read_csv(printed["paths"]["answers"], keep_default_na=False)
    assert written["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(), rel=1e-6)
    assert next(zip(written["task_a"], written["task_b"], strict=True)) == ("", "colours")
    loss = expected[(expected["task_b"] == "animals")].set_index("metric")["value"]
    assert f"from {loss['loss_before']:.2f} to {loss['loss_after']:.2f} nats" in first["headline"]
    drift = pd.read_csv(printed["paths"]["drift"])
    assert set(drift["layer"]) == {*adapters.layers, "total"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Answers on examples" in page
    assert "cannot be judged from weights" not in page


def test_without_data_the_terminal_and_the_page_state_what_is_not_known(call: Call, folder: Path) -> None:
    ended = call("analyze", folder / "adapters", "--out", folder / "out")
    assert ended.code == 0
    assert "not known: Whether anything is forgotten cannot be judged from weights alone." in ended.out
    assert "cannot be judged from weights" in (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_wrong_input_writes_nothing(call: Call, folder: Path) -> None:
    adapters, out = folder / "adapters", folder / "out"
    for arguments, message in (
        (("--model", folder / "base"), "--model and --data belong together"),
        (("--data", folder / "rows.jsonl"), "--model and --data belong together"),
        (("--model", folder / "base", "--data", folder / "none.jsonl"), "none.jsonl does not exist"),
    ):
        ended = call("analyze", adapters, *arguments, "--out", out)
        assert ended.code == 2
        assert message in ended.err
    other = AdapterSet.from_factors({"a": {"model.layers.9.mlp": (torch.ones(32, 1), torch.ones(32, 1))}})
    other.save(folder / "other")
    data = ("--data", folder / "rows.jsonl")
    ended = call("analyze", folder / "other", "--model", folder / "base", *data, "--out", out)
    assert ended.code == 2
    assert "model.layers.9.mlp" in ended.err
    assert not out.exists()
