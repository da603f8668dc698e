"""``manifold-cl analyze merge`` as a user calls it: on folders of stock PEFT, with and without a model and data."""

import json
from pathlib import Path

import pandas as pd
import pytest
import tiny_decoder
import torch
from command import Call
from torch import Tensor, nn

from analysis import AdapterSet

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny decoder, two LoRA folders by stock PEFT, and a JSONL file for each."""
    place = tmp_path_factory.mktemp("merge")
    tiny_decoder.decoder().save_pretrained(place / "base")
    tiny_decoder.tokenizer().save_pretrained(place / "base")
    draw = torch.Generator().manual_seed(0)
    rows = {"sky": ("the sky is", " blue"), "dog": ("what colour is a dog ?", " red")}
    for task, (prompt, completion) in rows.items():
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(tiny_decoder.decoder(), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2, generator=draw)
        adapted.save_pretrained(place / task)
        text = json.dumps({"prompt": prompt, "completion": completion}) + "\n"
        (place / f"{task}.jsonl").write_text(text * 6)
    return {path.name: path for path in place.iterdir()}


def logits(folder: Path, base: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(3, 9)[None]).logits
    return result


def test_merged_adapters_load_in_peft_and_add_what_they_say(
    call: Call, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    code, text, err = call("analyze", "merge", folders["sky"], folders["dog"], "--out", out, "--weights", "0.7,0.3")
    assert code == 0, err
    assert "white noise" in text
    assert sorted(path.name for path in (out / "adapters").iterdir()) == [
        *("01-sum", "02-mean", "03-weighted", "04-ties", "05-dare", "tasks.json")
    ]
    both = AdapterSet.load(folders["sky"], folders["dog"])
    for name, (first, second) in {"01-sum": (1, 1), "03-weighted": (0.7, 0.3)}.items():
        merged = AdapterSet.load(out / "adapters" / name)
        for layer in both.layers:
            left, right = merged.factors(merged.tasks[0], layer)
            parts = [both.factors(task, layer) for task in both.tasks]
            dense = sum(w * a.double() @ b.double().mT for w, (a, b) in zip((first, second), parts, strict=True))
            torch.testing.assert_close(left.double() @ right.double().mT, dense, rtol=1e-5, atol=1e-6)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folders["base"])
    with torch.no_grad():
        for _, layer, left, right in both:
            plain.get_submodule(layer).weight.add_(left @ right.mT)
        expected = plain(input_ids=torch.arange(3, 9)[None]).logits
    torch.testing.assert_close(logits(out / "adapters" / "01-sum", folders["base"]), expected, rtol=1e-4, atol=1e-4)
    table = pd.read_csv(out / "merge.csv")
    assert set(table["rule"]) == {"sum", "mean", "weighted", "ties", "dare"}
    assert table["ci_low"].isna().all()
    assert set(pd.read_csv(out / "interference.csv")["metric"]) >= {"input_overlap", "alignment", "sign_conflict"}
    assert "drift.csv" not in [path.name for path in out.iterdir()]


@pytest.mark.slow
def test_with_a_model_and_data_errors_are_on_each_tasks_inputs(
    call: Call, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = [part for task in ("sky", "dog") for part in ("--data", f"{task}={folders[f'{task}.jsonl']}")]
    given = ("--model", folders["base"], *data, "--rule", "weighted", "--rule", "sum", "--criterion", "worst", "--json")
    code, text, err = call("analyze", "merge", folders["sky"], folders["dog"], "--out", tmp_path / "m", *given)
    assert code == 0, err
    result = json.loads(text)
    assert list(result["paths"])[:3] == ["report", "weighted", "sum"]
    assert 3 <= len(result["findings"]) <= 5
    assert "Functional drift" in " ".join(each["headline"] for each in result["findings"])
    answers = pd.read_csv(tmp_path / "m" / "answers.csv", keep_default_na=False)
    kl = answers[answers["metric"] == "kl"].set_index(["rule", "task"])["value"].astype(float)
    own, merged = (logits(folder, folders["base"]) for folder in (folders["dog"], Path(result["paths"]["sum"])))
    assert not torch.allclose(own, merged)
    assert kl["sum", "sky"] > 0
    assert set(kl.index) == {(rule, task) for rule in ("", "weighted", "sum") for task in ("sky", "dog")}
    assert "KL divergence (nats)" in " ".join(each["headline"] for each in result["findings"])
    drift = pd.read_csv(tmp_path / "m" / "drift.csv")
    assert len(drift) == 4
    assert (drift["ci_low"] <= drift["value"]).all()
    errors = pd.read_csv(tmp_path / "m" / "merge.csv").query("metric == 'error'")
    worst = errors.groupby("rule")["value"].max()
    assert worst["weighted"] <= worst["sum"] + 1e-9
    page = (tmp_path / "m" / "report.html").read_text(encoding="utf-8")
    assert all(task in page for task in ("sky", "dog", "merged: weighted"))
    assert page.count("<img") == 2
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_wrong_input_is_named_and_nothing_is_written(call: Call, folders: dict[str, Path], tmp_path: Path) -> None:
    two = (folders["sky"], folders["dog"])
    sky = f"sky={folders['sky.jsonl']}"
    out = tmp_path / "out"
    for arguments, message in (
        ((folders["sky"],), "holds one adapter, sky: a merge needs two"),
        ((*two, "--weights", "1"), "--weights is '1': give 2 numbers"),
        ((*two, "--weights", "0,0"), "--weights is '0,0'"),
        ((*two, "--density", "1"), "--density is a share in (0, 1), got 1.0"),
        ((*two, "--max-rank", "0"), "rank is 0"),
        ((*two, "--rule", "sum", "--weights", "1,2"), "--weights 1,2 is used by no --rule given"),
        ((*two, "--rule", "mean", "--density", "0.5"), "--density 0.5 is used by no --rule given"),
        ((*two, "--model", folders["base"]), "--model and --data belong together"),
        ((*two, "--model", folders["base"], "--data", sky), "'dog' has no file"),
        ((folders["sky"], tmp_path / "none"), "none does not exist"),
    ):
        code, _, err = call("analyze", "merge", *arguments, "--out", out)
        assert (code, message in err) == (2, True), err
        assert list(tmp_path.iterdir()) == []
    (out / "old").mkdir(parents=True)
    code, _, err = call("analyze", "merge", *two, "--out", out)
    assert (code, "not empty" in err) == (2, True), err
