"""The PEFT method around training: protection, mixed batches, merges, averages and exports."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft import config, logits
from tiny_models import gpt2, llama, tokens
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    RiemannianAdamW,
    eblora_adapters,
    export_lora,
    inject_adapters,
    merge_adapters,
    param_groups,
    save_adapters,
)
from manifold_cl.adapters import eblora_layers, geometry_metrics, protect, retract_adapters, target_linears
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.peft import EBLoraConfig

FIRST = "model.layers.0.self_attn.q_proj"


def bases(model: nn.Module, columns: int = 3, *, seed: int = 0) -> dict[str, Tensor]:
    """A protected input subspace for each adapted layer."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: layer.eblora_right["default"].shape[0] for name, layer in eblora_layers(model).items()}
    return {name: torch.linalg.qr(torch.randn(n, columns, generator=draw)).Q for name, n in sizes.items()}


def test_a_memory_that_lacks_adapted_layers_is_refused_with_their_names() -> None:
    model = get_peft_model(llama(), config())
    memory = bases(model)
    layers = eblora_layers(model)
    del memory[FIRST]
    with pytest.raises(ValueError, match=rf"no entry for 1 adapted layers, .*{FIRST}.*strict=False"):
        protect(model, memory)
    assert all(layer.manifolds("default")[1].k == 0 for layer in layers.values())
    protect(model, memory, strict=False)
    assert [layer.manifolds("default")[1].k for layer in layers.values()] == [0, 3, 3, 3, 3, 3]
    protect(model, {**memory, FIRST: None})  # said to be free
    with pytest.raises(ValueError, match=r"no entry for 5 adapted layers, .*v_proj"):
        protect(model, output_memory={FIRST: torch.eye(32)[:, :2]})
    protect(model, output_memory={FIRST: torch.eye(32)[:, :2]}, strict=False)
    assert [manifold.k for manifold in layers[FIRST].manifolds("default")] == [2, 0]
    second = next(name for name in memory)
    protect(model, output_memory={second: torch.eye(16)[:, :1]}, strict=False)
    assert [manifold.k for manifold in layers[second].manifolds("default")] == [1, 3]  # the input side stayed


def test_a_memory_that_fails_at_the_last_layer_changes_no_layer() -> None:
    model = get_peft_model(llama(), config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = bases(model)
    last = list(memory)[-1]
    memory[last] = torch.eye(48)[:, :46]
    with pytest.raises(ValueError, match=f"^{last}: complement leaves 2 free directions"):
        protect(model, memory)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(layer.manifolds("default")[1].k == 0 for layer in eblora_layers(model).values())


def test_a_merged_adapter_is_not_moved_under_its_base() -> None:
    model = get_peft_model(llama(), config())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the base weight.*unmerge_adapter\(\)"):
        protect(model, bases(model))


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_into_an_existing_adapter_restores_its_protection(low_memory: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    memory = bases(model)
    protect(model, memory)
    model.save_pretrained(tmp_path)
    again = get_peft_model(llama(), config(seed=5))
    again.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_memory)  # as Trainer resumes
    for name, layer in eblora_layers(again).items():
        manifold = layer.manifolds("default")[1]
        assert manifold.k == 3
        torch.testing.assert_close(manifold.complement, memory[name])
    assert geometry_metrics(again) == geometry_metrics(model)


def test_a_state_dict_restores_protection_and_does_not_weaken_it_silently() -> None:
    def built(memory: dict[str, Tensor] | None, seed: int = 0) -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
        draw = torch.Generator().manual_seed(seed)
        inject_adapters(model, ["0"], eblora_adapters(rank=2, memory=memory, generator=draw))
        return model

    basis = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(3))).Q
    protected, free = built({"0": basis}), built(None, seed=1)
    for assign in (False, True):
        again = built(None, seed=2)
        again.load_state_dict(protected.state_dict(), assign=assign)
        (_, _, output), (_, frame, inputs) = again[0].manifold_parameters()
        assert (output.k, inputs.k) == (0, 5)
        assert max(inputs.constraint_error(frame)) <= 2e-6  # float32
    more = built({"0": torch.cat([basis, torch.linalg.qr(basis, mode="complete").Q[:, 5:6]], dim=1)}, seed=4)
    wider = built({"0": basis})
    wider.load_state_dict(more.state_dict())
    assert wider[0].right_manifold.k == 6
    with pytest.warns(UserWarning, match=r"0\.right: 6 protected directions are replaced by the 5 of the loaded state"):
        wider.load_state_dict(protected.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0\.right: the saved frame reaches into what this model protects"):
            protected.load_state_dict(free.state_dict(), strict=strict)


def test_each_member_of_a_batch_can_have_an_adapter_of_its_own() -> None:
    model = get_peft_model(llama(), config(), adapter_name="one")
    model.add_adapter("two", config(r=2, target_modules=["q_proj"], seed=3))
    model.eval()
    ids = tokens(4, 7)
    alone = []
    with torch.no_grad():
        for name in ("one", "two"):
            model.set_adapter(name)
            alone.append(model(input_ids=ids).logits)
        with model.disable_adapter():
            alone.append(model(input_ids=ids).logits)
        mixed = model(input_ids=ids, adapter_names=["two", "__base__", "one", "two"]).logits
        for row, source in enumerate((1, 2, 0, 1)):
            # One product for fewer rows: float32 rounding of logits below 1.
            torch.testing.assert_close(mixed[row], alone[source][row], rtol=0, atol=1e-6)
        torch.testing.assert_close(model(input_ids=ids).logits, alone[1], rtol=0, atol=0)  # hooks are gone
        options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        beams = model.generate(input_ids=ids[:, :3], adapter_names=["one"] * 4, **options)
        model.set_adapter("one")
        assert torch.equal(beams, model.generate(input_ids=ids[:, :3], **options))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"adapter_names": ["default", "typo"]}, r"adapter_names has 'typo': there are default and __base__"),
        ({"adapter_names": ["default"]}, r"1 adapter_names for 2 inputs"),
        ({"alora_offsets": [1, 1]}, "alora_offsets belong to activated LoRA"),
    ],
)
def test_arguments_that_choose_the_adapter_are_refused_by_name(inputs: dict[str, Any], message: str) -> None:
    model = get_peft_model(llama(), config()).eval()
    with pytest.raises(ValueError, match=message):
        model(input_ids=tokens(), **inputs)
    model.train()
    with pytest.raises(ValueError, match="adapter_names are for inference"):
        model(input_ids=tokens(), adapter_names=["default", "default"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="adapter_names while adapters are merged"):
        model(input_ids=tokens(), adapter_names=["default", "default"])


def test_the_spelling_of_peft_is_understood(tmp_path: Path) -> None:
    model = get_peft_model(llama(), EBLoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["q_proj"]))
    layer = eblora_layers(model)[FIRST]
    assert layer.eblora_scaling["default"] == 2.0
    assert layer.eblora_dropout["default"].p == 0.25
    model.save_pretrained(tmp_path)
    assert EBLoraConfig.from_pretrained(tmp_path).alpha == 8
    with pytest.raises(ValueError, match=r"alpha=4 and lora_alpha=8 are one option"):
        EBLoraConfig(alpha=4, lora_alpha=8)
    with pytest.raises(ValueError, match=r"dropout=0\.1 and lora_dropout=0\.2 are one option"):
        EBLoraConfig(dropout=0.1, lora_dropout=0.2)
    with pytest.raises(ValueError, match=r"merged_dtype is float32, .* got 'single'"):
        EBLoraConfig(merged_dtype="single")


def share_lost(weight: Tensor, before: Tensor, delta: Tensor) -> float:
    return float((weight.double() - before.double() - delta.double()).norm() / delta.double().norm())


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_a_merge_into_bfloat16_warns_with_the_share_that_is_lost(make: Any) -> None:
    targets = ["q_proj"] if make is llama else ["c_attn"]
    model = get_peft_model(make().to(torch.bfloat16), config(initial_scale=-1e-3, target_modules=targets)).eval()
    layers = eblora_layers(model)
    name, layer = next(iter(layers.items()))
    before, delta = layer.base_layer.weight.clone(), layer.get_delta_weight("default")
    expected = logits(model)
    with pytest.warns(
        UserWarning, match=r"loses a median of \d+% of the merged update over 2 layers.*merged_dtype"
    ) as w:
        model.merge_adapter()
    assert len(w) == 1
    lost = share_lost(layer.base_layer.weight, before, delta)
    assert lost > 0.05
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)

    wide = get_peft_model(
        make().to(torch.bfloat16), config(initial_scale=-1e-3, target_modules=targets, merged_dtype="float32")
    ).eval()
    inner = eblora_layers(wide)[name]
    wide.merge_adapter()  # warnings are errors here
    assert inner.base_layer.weight.dtype == torch.float32
    assert share_lost(inner.base_layer.weight, before, delta) < 1e-3  # float32 rounding of weights of 0.02
    torch.testing.assert_close(logits(wide), expected, rtol=0, atol=2**-7)  # outputs are bfloat16
    wide.unmerge_adapter()
    assert inner.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(inner.base_layer.weight, before)
    merged = wide.merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2**-7)


def test_a_direct_merge_warns_once_and_takes_a_precision_too() -> None:
    def built() -> nn.Module:
        model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).to(torch.bfloat16)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        draw = torch.Generator().manual_seed(9)
        inject_adapters(model, ["0", "1"], eblora_adapters(rank=4, initial_scale=1e-2, generator=draw))
        return model

    model, wide = built(), built()
    with pytest.warns(UserWarning, match=r"a median of \d+% of the merged update over 2 layers") as found:
        added = merge_adapters(model)
    assert len(found) == 1
    merge_adapters(wide, merged_dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    before = built()[0].base.weight
    assert share_lost(wide[0].weight, before, added["0"].delta_weight()) < 1e-3
    assert share_lost(model[0].weight, before, added["0"].delta_weight()) > 0.1
    with pytest.warns(UserWarning, match="a median of"):
        merge_factors(model, added)
    with pytest.warns(UserWarning, match=r"EBLoRALinear \(torch.bfloat16\)"):
        built()[0].merge()


def average(model: nn.Module) -> nn.Module:
    """A mean of the model and a copy with other frames, as EMA and SWA make them."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if hasattr(module, "manifold_parameters"):
                for _, frame, manifold in module.manifold_parameters():
                    draw = torch.Generator().manual_seed(frame.shape[0])
                    frame.copy_(manifold.projx(frame + 0.2 * torch.randn(frame.shape, generator=draw)))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(other)
    return averaged.module


def test_averages_of_adapters_are_not_saved_merged_or_exported_before_they_are_retracted(tmp_path: Path) -> None:
    wrapped = get_peft_model(llama(), config())
    protect(wrapped, bases(wrapped))
    plain = llama()
    memory = {**dict.fromkeys(target_linears(plain, ["q_proj"])), FIRST: torch.eye(32)[:, :4]}
    inject_adapters(plain, ["q_proj"], eblora_adapters(rank=3, memory=memory))
    message = r"adapters that are off their manifolds: \d+ frames, farthest .*retract_adapters\(model\).*projx"
    for model, uses in (
        (average(plain), {"save": lambda m: save_adapters(m, tmp_path), "merge": merge_adapters}),
        (average(wrapped), {"save": lambda m: m.save_pretrained(tmp_path), "merge": lambda m: m.merge_and_unload()}),
    ):
        uses["export"] = lambda m: export_lora(m, tmp_path / "lora")
        for use in uses.values():
            with pytest.raises(ValueError, match=message):
                use(model)
        before = retract_adapters(model)
        assert before > 1e-3
        assert retract_adapters(model) <= 2e-6  # float32
        assert geometry_metrics(model)["geometry/protection"] <= 2e-6
        for name in ("export", "save", "merge"):
            uses[name](model)
    with pytest.raises(ValueError, match="no balanced adapters"):
        retract_adapters(nn.Linear(3, 3))


def test_inactive_adapters_are_retracted_and_opposite_frames_are_named() -> None:
    model = get_peft_model(llama(), config(), adapter_name="one")
    model.add_adapter("two", config(seed=1))
    layer = eblora_layers(model)[FIRST]
    layer.eblora_left["two"].data.mul_(0.5)
    assert retract_adapters(model) == pytest.approx(0.75)
    layer.eblora_right["two"].data.zero_()
    with pytest.raises(ValueError, match=rf"{FIRST}\.eblora_right\.two: no nearest point"):
        retract_adapters(model)


def test_a_folder_with_frames_off_the_manifold_is_not_exported(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = get_peft_model(llama(), config())
    protect(model, bases(model))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    intact = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not a view of the file
    key = f"base_model.model.{FIRST}.eblora_right"
    off, missing = rf"{FIRST}\.right is off its manifold", rf"{FIRST}\.eblora_right has NaN"
    frames = {1.1 * intact[key]: off, torch.linalg.qr(torch.randn(32, 4)).Q: off, torch.nan * intact[key]: missing}
    for bad, message in frames.items():
        save_file({**intact, key: bad.contiguous()}, path)
        with pytest.raises(ValueError, match=message):
            export_lora(tmp_path, tmp_path / "lora")


class Towers(nn.Module):
    """Two towers of which one is named as the other's ending, with dots and digits in the names."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"block_1": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
        self.image = nn.ModuleDict({"text": nn.ModuleDict({"block_1": nn.ModuleList([nn.Linear(6, 6)])})})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.text["block_1"], self.image["text"]["block_1"][0]):
            x = torch.tanh(layer(x))
        return x


def test_an_export_names_its_layers_exactly(tmp_path: Path) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    base = Towers()
    model = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(0)
    ranks = {"text.block_1.0": 2, "text.block_1.1": 3}
    inject_adapters(
        model,
        r"text\.block_1\.\d",
        lambda name, layer: EBLoRALinear(layer, ranks[name], initial_scale=0.5, generator=draw),
    )
    export_lora(model, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    adapted = {n for n, m in again.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(ranks)
    x = torch.randn(5, 6, generator=draw)
    torch.testing.assert_close(again(x), model(x))
    assert isinstance(LoraConfig.from_pretrained(tmp_path).target_modules, str)


def test_protection_after_the_optimizer_was_built_holds() -> None:
    model = get_peft_model(llama(), config())
    optimizer = RiemannianAdamW(param_groups(model, lr=0.02), weight_decay=0.0)
    ids = tokens(4, 9)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    for columns in (3, 5):
        protect(model, bases(model, columns))
        step()
        step()
        found = geometry_metrics(model, prefix="")
        assert max(found["orthonormality"], found["protection"]) <= 2e-6  # float32
        assert max(optimizer.constraint_error()) <= 2e-6
