"""Updates that act beside frozen weights: the functions of merged ones, on weights that never change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import INPUTS, frozen_model, toy_stream

from manifold_cl import METHODS, ContinualRunner, eblora_adapters, export_lora, inject_adapters
from manifold_cl.adapters import Factors, keep_adapters, keep_factors, kept_updates, merge_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.continual import Training, make_method
from manifold_cl.files import FileError

THEMSELVES = {
    "gpm": "trains the weights",
    "osft_lora": "singular vectors of the weights",
    "zero_shot": "does not train",
}
"""Methods without updates, or that need them merged."""


@pytest.mark.parametrize("name", sorted(METHODS.keys() - THEMSELVES.keys()))
def test_kept_updates_learn_what_merged_ones_learn(name: str, tmp_path: Path) -> None:
    records, models = [], []
    for keep in (False, True):
        method = make_method(name, rank=4)
        if keep:
            method.keep_updates()
        runner = ContinualRunner(
            toy_stream(tasks=["first", "second"], examples=32), method, tmp_path / str(keep), training=Training()
        )
        records.append(runner.run())
        models.append(runner.learned_model(records[-1]))
    merged, kept = records
    for ours, theirs in zip(kept.losses, merged.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # float32 sums in another order, over the steps of two tasks
    x = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(models[0](x), models[1](x), rtol=1e-3, atol=1e-3)
    before = frozen_model().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in models[1].state_dict().items())
    count = 1 if name == "joint" else 2
    assert {layer: len(updates) for layer, updates in kept_updates(models[1]).items()} == dict.fromkeys(
        ("inner", "outer"), count
    )


def test_a_method_that_trains_the_weights_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="gpm trains the weights"):
        make_method("gpm").keep_updates()


def test_keeping_gives_the_outputs_of_merging_and_survives_a_copy() -> None:
    def adapted() -> nn.Module:
        model = frozen_model()
        draw = torch.Generator().manual_seed(1)
        inject_adapters(model, ["inner", "outer"], eblora_adapters(rank=3, generator=draw, initial_scale=0.5))
        return model

    merged, kept = adapted(), adapted()
    x = torch.randn(5, INPUTS)
    before = kept(x)
    merge_adapters(merged)
    assert keep_adapters(kept).keys() == {"inner", "outer"}
    assert torch.allclose(kept(x), before, atol=1e-6)  # one rounding of float32
    assert torch.allclose(kept(x), merged(x), atol=1e-5)
    assert not torch.allclose(kept(x), frozen_model()(x), atol=1e-2)
    assert torch.equal(copy.deepcopy(kept)(x), kept(x))
    half = copy.deepcopy(kept).to(torch.bfloat16)
    assert torch.allclose(half(x.bfloat16()).float(), before, atol=0.1)  # three digits of bfloat16, three layers
    assert kept_updates(half)["inner"][0].left.dtype == torch.float32


def test_an_update_that_does_not_fit_is_refused_before_any_is_kept() -> None:
    model, one = frozen_model(), torch.tensor(1.0)
    good = Factors(torch.ones(16, 2), torch.ones(24, 2), one)
    with pytest.raises(ValueError, match=r"'nowhere'"):
        keep_factors(model, {"inner": good, "nowhere": good})
    with pytest.raises(ValueError, match=r"outer: the update is \(16, 24\), the weight \(16, 16\)"):
        keep_factors(model, {"inner": good, "outer": good})
    assert kept_updates(model) == {}


def test_a_run_that_keeps_is_another_configuration(tmp_path: Path) -> None:
    def runner(*, keep: bool) -> ContinualRunner:
        method = make_method("sequential_merge", rank=2)
        if keep:
            method.keep_updates()
        return ContinualRunner(toy_stream(tasks=["first"], examples=16), method, tmp_path)

    assert "merge" not in runner(keep=False).config
    runner(keep=True).run()
    with pytest.raises(FileError, match="merge: 'keep' there"):
        runner(keep=False).run(resume=True)


def test_an_export_holds_kept_updates_too(tmp_path: Path) -> None:
    model = frozen_model()
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        inject_adapters(model, ["inner"], eblora_adapters(rank=2, initial_scale=0.3, generator=draw))
        expected = model(torch.eye(INPUTS))
        if not kept_updates(model):
            keep_adapters(model)
    exported = export_lora(model, tmp_path / "lora")
    assert exported["inner"].rank == 4
    again = frozen_model()
    merge_factors(again, exported)
    torch.testing.assert_close(again(torch.eye(INPUTS)), expected, rtol=1e-4, atol=1e-5)


def test_an_evaluation_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = frozen_model()
    inject_adapters(model, ["inner"], eblora_adapters(rank=2, initial_scale=0.3))
    keep_adapters(model)
    x = torch.ones(2, INPUTS)
    with torch.inference_mode():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("call", [keep_adapters, merge_adapters])
def test_adapters_of_peft_are_not_taken_out(call: Callable[[nn.Module], Any]) -> None:
    model = frozen_model()
    model.peft_config = {}
    with pytest.raises(ValueError, match=f"{call.__name__} takes adapters of inject_adapters"):
        call(model)
