"""``analyze suggest`` and ``mend`` with ``--stream``: scores of a stream's tasks before and after, and the gate."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import Call
from text_folders import COLOURS
from tiny_decoder import decoder, tokenizer
from toy import toy_stream

from analysis import AdapterSet
from analysis.formats import save_lora
from manifold_cl.streams import LanguageOptions, open_language_stream

STREAM = f"{Path(__file__).parents[1] / 'toy.py'}:toy_stream"
SHAPES = {"inner": (16, 24), "outer": (16, 16)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    factors = [
        ("news", layer, torch.randn(m, 4, generator=draw) / 4, torch.randn(n, 4, generator=draw))
        for layer, (m, n) in SHAPES.items()
    ]
    return save_lora(tmp_path / "ad", [("news", factors)]) / "01-news"


def dense_scores(folder: Path) -> dict[str, float]:
    """The accuracy of every task, with the update added to the weights."""
    model, adapters = toy_stream().make_model(), AdapterSet.load(folder)
    for layer in adapters.layers:
        left, right = adapters.factors(adapters.tasks[0], layer)
        model.get_submodule(layer).weight.data += left @ right.T
    return {task.name: task.scores(model)["accuracy"] for task in toy_stream().tasks}


@pytest.mark.parametrize("command", [("suggest", "--keep", "0.5"), ("mend", "--apply", "truncate=1")])
def test_scores_are_those_of_the_merged_models(
    call: Call, adapter: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    new = tmp_path / "new"
    given = ("analyze", name, adapter, *options, "--stream", STREAM, "--out", new, "--json")
    code, out, err = call(*given, "--max-drop", "100")
    assert code == 0, err
    found = json.loads(out)["evaluation"]
    assert found == json.loads((new / "evaluation.json").read_text())
    for when, folder in (("before", adapter), ("after", new)):
        scores = {task: row[when] for task, row in found["tasks"].items()}
        assert scores == pytest.approx(dense_scores(folder), abs=1e-4)
    drops = [row["drop"] for row in found["tasks"].values()]
    assert max(drops) > 1
    assert found["passes"] is True
    assert "energy is no score" not in out
    (sentence,) = [one["headline"] for one in json.loads(out)["findings"] if "stream toy" in one["headline"]]
    assert f"{', '.join(found['tasks'])} cannot fail" in sentence  # no score before is above --max-drop 100


def test_a_drop_beyond_the_bound_closes_the_gate(call: Call, adapter: Path, tmp_path: Path) -> None:
    given = ("analyze", "suggest", adapter, "--keep", "0.5", "--stream", STREAM, "--out", tmp_path / "new")
    code, out, err = call(*given, "--max-drop", "0.5")
    assert code == 3, err
    assert "gate closed" in err
    assert "stream toy fails on" in out
    assert "cannot fail" not in out
    assert (tmp_path / "new" / "ranks.csv").exists()


def test_examples_are_compared_pair_by_pair_in_a_folder_of_text(call: Call, tmp_path: Path) -> None:
    for part, rows in (("train", 6), ("test", 12)):
        lines = [{"prompt": f"say {COLOURS[i % 3]} :", "completion": f" {COLOURS[i % 3]}"} for i in range(rows)]
        file = tmp_path / "texts" / "colour" / f"{part}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({**row, "options": list(COLOURS)}) + "\n" for row in lines))
    decoder().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(32, 4, generator=draw) for _ in range(2))
    save_lora(tmp_path / "ad", [("news", [("news", "model.layers.0.self_attn.q_proj", left, right)])])
    given = ("analyze", "suggest", tmp_path / "ad" / "01-news", "--stream", tmp_path / "texts", "--keep", "0.5")
    code, _, err = call(*given, "--out", tmp_path / "none")
    assert (code, "give --model" in err) == (2, True)
    given = (*given, "--model", tmp_path / "base", "--max-drop", "100", "--out", tmp_path / "new", "--json")
    code, out, err = call(*given)
    assert code == 0, err
    (row,) = json.loads(out)["evaluation"]["tasks"].values()
    assert row["examples"] == 12
    assert row["ci_low"] <= row["drop"] <= row["ci_high"]
    assert "curve.csv" in {path.name for path in (tmp_path / "new").iterdir()}
    assert len(pd.read_csv(tmp_path / "new" / "ranks.csv")) == 1
    stream = open_language_stream(tmp_path / "texts", LanguageOptions(model=str(tmp_path / "base")))
    model = stream.make_model()
    (task,) = stream.tasks
    each = task.example_scores(model)
    assert each is not None
    assert sum(each) / len(each) == pytest.approx(task.scores(model)["score"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stream", "nothing"), "--stream nothing is no folder here, no file.py:function, and no stream"),
        (("--stream", STREAM, "--model", "base"), "--stream toy has a model of its own: leave out --model"),
        (("--stream", str(Path(__file__).parent), "--model", "missing/model"), "missing/model"),
        (("--stream", STREAM, "--evaluate", "echo {adapter}"), "both score the adapter"),
        (("--stream", STREAM, "--lower-is-better"), "--lower-is-better is for scores of --evaluate"),
    ],
)
def test_wrong_input_writes_nothing(
    call: Call, adapter: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = call("analyze", "suggest", adapter, *options, "--out", tmp_path / "new")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_another_model_is_refused(call: Call, tmp_path: Path) -> None:
    ad = save_lora(tmp_path / "ad", [("news", [("news", "other", torch.ones(4, 1), torch.ones(3, 1))])])
    code, _, err = call("analyze", "suggest", ad / "01-news", "--stream", STREAM, "--out", tmp_path / "new")
    assert code == 2
    assert "1 of 1 layers are no modules of the model" in " ".join(err.split())
    assert not (tmp_path / "new").exists()
