"""``analyze suggest`` and ``mend`` with a language model and examples, as a user calls them."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import Call
from tiny_decoder import WORDS, decoder, tokenizer
from transformers import LlamaForCausalLM

from analysis import AdapterSet
from analysis.formats import save_lora
from manifold_cl.streams.model_inputs import read_batches


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter ``ad/01-news``, and 24 examples."""
    folder = tmp_path_factory.mktemp("model")
    decoder().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    draw = torch.Generator().manual_seed(0)
    updates = []
    for layer, (m, n) in {"layers.0.self_attn.q_proj": (32, 32), "layers.1.mlp.up_proj": (48, 32)}.items():
        left = torch.randn(m, 5, generator=draw) * torch.logspace(-0.5, -1.5, 5)
        updates.append(("news", f"model.{layer}", left, torch.randn(n, 5, generator=draw)))
    save_lora(folder / "ad", [("news", updates)])
    rows = []
    for _ in range(24):
        picked = [WORDS[int(i)] for i in torch.randint(len(WORDS), (7,), generator=draw)]
        rows.append(json.dumps({"prompt": " ".join(picked[:4]), "completion": " ".join(picked[4:])}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def peft_loss(place: Path, adapter: Path) -> float:
    """The mean loss of the examples, by transformers and stock PEFT."""
    peft = pytest.importorskip("peft")
    batches = read_batches(place / "data.jsonl", tokenizer(), examples=256)
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(place / "base"), str(adapter)).eval()
    losses = []
    for batch in batches:
        for row in range(len(batch["labels"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            losses.append(float(model(**one).loss))
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_ranks_by_drift_have_an_interval_above_the_share(call: Call, place: Path, tmp_path: Path) -> None:
    data = ("--model", place / "base", "--data", place / "data.jsonl")
    code, out, err = call(
        *("analyze", "suggest", place / "ad" / "01-news", *data, "--keep", "0.8", "--out", tmp_path / "new", "--json")
    )
    assert code == 0, err
    ranks = pd.read_csv(tmp_path / "new" / "ranks.csv")
    assert (ranks["ci_low"] >= 0.8).all()
    assert (ranks["ci_low"] <= ranks["kept"]).all()
    assert (ranks["kept"] <= ranks["ci_high"]).all()
    assert json.loads(out)["uniform_rank"] == ranks["rank"].max()
    loss = next(each["headline"] for each in json.loads(out)["findings"] if "the loss of these 24" in each["headline"])
    before, after = (peft_loss(place, adapter) for adapter in (place / "ad" / "01-news", tmp_path / "new"))
    assert f"from {before:.4f} to {after:.4f}" in loss
    written = AdapterSet.load(tmp_path / "new")
    assert [written.shape("new", layer)[2] for layer in ranks["layer"]] == ranks["rank"].tolist()


def test_sensitivity_and_projection_write_what_they_rest_on(call: Call, place: Path, tmp_path: Path) -> None:
    data = ("--model", place / "base", "--data", place / "data.jsonl")
    code, out, err = call(
        "analyze", "mend", place / "ad" / "01-news", "--apply", "sensitivity=0.9", *data, "--out", tmp_path / "s"
    )
    assert code == 0, err
    before, after = (peft_loss(place, adapter) for adapter in (place / "ad" / "01-news", tmp_path / "s"))
    assert f"the loss of these 24 examples goes from {before:.4f} to {after:.4f}" in out
    table = pd.read_csv(tmp_path / "s" / "sensitivity.csv")
    assert len(table) == 10
    assert table["p_holm"].between(0, 1).all()
    changes = pd.read_csv(tmp_path / "s" / "changes.csv").set_index(["layer", "metric"])
    sure = table[table["p_holm"] < 0.05]["layer"].unique()
    for layer in table["layer"].unique():
        moved = float(changes.loc[(layer, "relative_change"), "after"]) > 1e-4  # rounding of float32 files
        assert moved is (layer in sure)
    code, _, err = call(
        *("analyze", "mend", place / "ad" / "01-news", "--apply", "intruders=0.5", "--base", place / "base"),
        *("--out", tmp_path / "i"),
    )
    assert code == 0, err
    rank = pd.read_csv(tmp_path / "i" / "changes.csv").query("metric == 'rank' and layer == 'total'").iloc[0]
    assert rank["after"] >= rank["before"] == 10


def test_a_name_of_the_hub_without_a_network_is_named(
    call: Call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    data = ("--model", "nobody/nothing", "--data", place / "data.jsonl", "--out", tmp_path / "new")
    code, _, err = call("analyze", "suggest", place / "ad" / "01-news", *data)
    assert code == 2
    assert "nobody/nothing" in err
    assert "hf download nobody/nothing" in err
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: place / "base")
    code, _, err = call("analyze", "suggest", place / "ad" / "01-news", *data)
    assert code == 0, err
