"""Measurements while a model trains: live factors against PEFT's own update, the log, its page, and both trainers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet, TrainingWatch, interference_table, model_factors, read_training_log, spectrum_table
from manifold_cl.adapters import EBLoRALinear, LoRALinear

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.q = nn.Linear(6, 7)
        self.conv = nn.Conv2d(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.words(x))


def adapted(**options: Any) -> Any:
    """A PEFT model with random factors."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["words", "q", "conv"], **options}
    model = peft.get_peft_model(Model(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def test_live_factors_are_the_update_of_peft() -> None:
    model = adapted(use_rslora=True)
    factors = model_factors(model)
    assert list(factors) == ["conv", "q", "words"]
    for layer, (left, right) in factors.items():
        delta = model.base_model.model.get_submodule(layer).get_delta_weight("default").detach()
        expected = delta.mT if layer == "words" else delta.flatten(1)  # PEFT's embeddings: tokens by width
        assert torch.allclose(left @ right.mT, expected, atol=1e-6)


@pytest.mark.slow
def test_live_factors_are_those_of_the_saved_folder(tmp_path: Path) -> None:
    model = adapted(target_modules=["words", "q"])
    model.save_pretrained(tmp_path)
    saved = AdapterSet.load(tmp_path)
    for layer, (left, right) in model_factors(torch.compile(model)).items():
        a, b = saved.factors(saved.tasks[0], layer)
        assert torch.allclose(left @ right.mT, a @ b.mT, atol=1e-6)


def test_the_norm_of_all_layers_together(tmp_path: Path) -> None:
    model = adapted()
    TrainingWatch(tmp_path, file_format="csv", page=False).measure(model, 1)
    log = read_training_log(tmp_path)
    total = log[(log["metric"] == "frobenius") & (log["layer"] == "total")]["value"].item()
    norms = [torch.linalg.matrix_norm(left @ right.mT) for left, right in model_factors(model).values()]
    assert total == pytest.approx(float(torch.stack(norms).square().sum().sqrt()), rel=1e-5)


def test_two_active_adapters_are_summed_and_inactive_ones_are_not() -> None:
    model = adapted(target_modules=["q"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    layer = model.base_model.model.q
    assert model_factors(model)["q"][0].shape[1] == 3
    model.base_model.set_adapter(["default", "other"])
    left, right = model_factors(model)["q"]
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert torch.allclose(left @ right.mT, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [EBLoRALinear, LoRALinear])
def test_adapters_of_manifold_cl_are_read_by_their_factors(kind: Any) -> None:
    layer = kind(nn.Linear(6, 7), 2)
    for parameter in (layer.left, layer.right):
        nn.init.orthogonal_(parameter)
    left, right = model_factors(nn.Sequential(layer))["0"]
    assert torch.allclose(left @ right.mT, layer.factors().delta_weight(), atol=1e-6)


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no adapter that can be read"):
        model_factors(Model())
    with pytest.raises(ValueError, match=r"q: DoRA"):
        model_factors(adapted(target_modules=["q"], use_dora=True))
    loha = peft.get_peft_model(Model(), peft.LoHaConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match=r"q is a peft\.tuners\.loha"):
        model_factors(loha)
    diverged = adapted(target_modules=["q"])
    diverged.base_model.model.q.lora_A["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="q: the factors contain NaN"):
        model_factors(diverged)
    sharded = adapted(target_modules=["q"])
    sharded.base_model.model.q.lora_A["default"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="sharded"):
        model_factors(sharded)


def earlier(seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {"q": (torch.randn(7, 2, generator=draw), torch.randn(6, 2, generator=draw))}


def test_numbers_are_those_of_the_tables(tmp_path: Path) -> None:
    model = adapted(target_modules=["words", "q"])
    past = AdapterSet.from_factors({"news": earlier(1), "films": earlier(2)})
    basis = torch.eye(6)[:, :2]
    watch = TrainingWatch(tmp_path, every=5, earlier=past, protected={"q": basis}, page=False)
    numbers = watch.measure(model, 5)
    log = read_training_log(tmp_path)
    factors = model_factors(model)
    spectra = spectrum_table(AdapterSet.from_factors({"now": factors}))
    rank = spectra[(spectra["metric"] == "effective_rank_energy") & (spectra["update"] == "task")]
    assert numbers["watch/effective_rank_energy"] == pytest.approx(rank["value"].mean())
    own = log[(log["metric"] == "effective_rank_energy") & (log["layer"] != "total")].set_index("layer")["value"]
    assert own.to_dict() == pytest.approx(rank.set_index("layer")["value"].to_dict())
    together = AdapterSet.from_factors({"news": earlier(1), "films": earlier(2), "now": {"q": factors["q"]}})
    table = interference_table(together, protected={"q": basis}).query("task_b == 'now' and layer == 'total'")
    expected = {f"watch/{row.metric}/{row.task_a}": row.value for row in table.itertuples()}
    for name in ("input_overlap/news", "backward/films", "alignment/news", "leakage/protected"):
        assert numbers[f"watch/{name}"] == pytest.approx(expected[f"watch/{name}"])
    assert log.loc[log["metric"] == "input_overlap", "p"].between(0, 1).all()


def test_a_fresh_adapter_has_a_norm_and_no_spectrum(tmp_path: Path) -> None:
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=3, target_modules=["q"]))
    past = AdapterSet.from_factors({"news": earlier()})
    numbers = TrainingWatch(tmp_path, earlier=past, file_format="csv", page=False).measure(model, 0)
    assert numbers == {"watch/frobenius": 0.0}


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_resumed_training_replaces_the_later_rows(file_format: Any, tmp_path: Path) -> None:
    model = adapted(target_modules=["q"])
    watch = TrainingWatch(tmp_path, every=10, file_format=file_format, page=False)
    for step in (10, 20, 30):
        watch.measure(model, step, extra={"geometry/scale": step})
    again = TrainingWatch(tmp_path, every=10, file_format=file_format, page=False)
    again.measure(model, 20, extra={"geometry/scale": -1.0})
    log = read_training_log(tmp_path)
    scale = log[log["metric"] == "geometry/scale"].set_index("step")["value"]
    assert scale.to_dict() == {10: 10.0, 20: -1.0}
    if file_format == "parquet":  # as others read it
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "log").sort_values("step", kind="stable"), log)


def test_wrong_options_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        TrainingWatch(tmp_path, every=0)
    with pytest.raises(ValueError, match="file_format is 'xls'"):
        TrainingWatch(tmp_path, file_format="xls")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="called 'news'"):
        TrainingWatch(tmp_path, earlier=AdapterSet.from_factors({"news": earlier()}), task="news")
    with pytest.raises(FileNotFoundError, match="no log"):
        read_training_log(tmp_path)


@pytest.mark.slow
def test_the_page_reloads_itself_until_the_end_and_names_interference(tmp_path: Path) -> None:
    model = adapted(target_modules=["q"])
    own = model_factors(model)
    watch = TrainingWatch(tmp_path, every=1, earlier=AdapterSet.from_factors({"<i>old</i>": own}), file_format="csv")
    watch.measure(model, 1)
    page = (tmp_path / "training.html").read_text(encoding="utf-8")
    assert "location.reload" in page
    assert "overlap of input subspaces, &lt;i&gt;old&lt;/i&gt;: 1.000" in page
    watch.measure(model, 2)  # too soon for another page
    assert "1 measurements" in (tmp_path / "training.html").read_text(encoding="utf-8")
    watch.finish()
    page = (tmp_path / "training.html").read_text(encoding="utf-8")
    assert "location.reload" not in page
    assert "2 measurements" in page


def test_an_unrelated_training_gives_no_alarm(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(task: str) -> dict[str, tuple[Tensor, Tensor]]:
        return {f"h.{k}.q": (torch.randn(40, 4, generator=draw), torch.randn(50, 4, generator=draw)) for k in range(3)}

    past, now = AdapterSet.from_factors({"old": random("old")}), random("now")
    watch = TrainingWatch(tmp_path, every=1, earlier=past, factors=lambda model: now, file_format="csv")
    numbers = watch.measure(nn.Identity(), 1)
    assert np.isfinite(list(numbers.values())).all()
    assert "No interference with earlier tasks beyond chance" in (tmp_path / "training.html").read_text("utf-8")
