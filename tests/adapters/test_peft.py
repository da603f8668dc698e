"""The PEFT method: saving, loading, switching, merging, patterns and constraints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from old_versions import LOADS_NATIVELY
from peft import PeftModel, get_peft_model
from tiny_models import bert, gpt2, llama, tokens
from torch import Tensor, nn

from manifold_cl import ProtectedSubspace, RiemannianAdamW, export_lora, param_groups
from manifold_cl.adapters import eblora_layers, geometry_metrics, protect
from manifold_cl.adapters.peft import EBLoraConfig, EBLoraLayer
from manifold_cl.continual.checkpointing import checkpoint_activations

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "diagonal": {"core": "diagonal", "compensate": True},
    "full": {"core": "full", "start": "pretrained", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6.0}},
}


def config(**options: Any) -> EBLoraConfig:
    given = {"r": 4, "alpha": 8, "target_modules": TARGETS, "initial_scale": -0.3, **options}
    return EBLoraConfig(**given)


def memory(model: nn.Module) -> dict[str, Tensor]:
    """A subspace of another width for every layer, each of two layers in three."""
    draw = torch.Generator().manual_seed(3)
    frames = {n: layer.manifold_parameters() for n, layer in eblora_layers(model).items()}
    sizes = {n: next(f for key, f, _ in pairs if "right" in key).shape[0] for n, pairs in frames.items()}
    return {n: torch.randn(size, 1 + i, generator=draw) for i, (n, size) in enumerate(sizes.items()) if i % 3}


def train(model: nn.Module, steps: int = 3, *, seed: int = 1, **inputs: Tensor) -> list[float]:
    optimizer = RiemannianAdamW(param_groups(model, lr=0.02), weight_decay=0.0)
    ids = tokens(4, 9, seed=seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, **(inputs or {"labels": ids})).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


RELOAD = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
import peft
cases = {cases!r}
try:
    peft.PeftConfig.from_pretrained(cases[0][1])
except KeyError as error:
    print("without the import:", repr(error))
import manifold_cl.adapters.peft
from tiny_models import bert, gpt2, llama, tokens
for base, folder, way in cases:
    model = eval(base)
    if way == "native":
        model.load_adapter(folder)
    else:
        model = peft.PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=way == "low memory")
    with torch.no_grad():
        torch.save(model(input_ids=tokens()).logits, folder + "/" + way + ".pt")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_was_trained_and_saved_comes_back_with_identical_logits(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = get_peft_model(llama(dtype=dtype), config(**options))
    protect(model, memory(model), strict=False)
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    found = geometry_metrics(model, prefix="")
    assert max(found["orthonormality"], found["protection"]) <= 2e-6  # float32 frames, on a bfloat16 base too
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert not torch.equal(expected, logits(llama(dtype=dtype)))
    for low in (False, True):
        again = PeftModel.from_pretrained(llama(dtype=dtype), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again), expected)
        ours = {n: p for n, p in again.named_parameters() if "eblora_" in n}
        assert {p.dtype for p in ours.values()} == {torch.float32}
        assert geometry_metrics(again, prefix="") == found  # the complements came along, bit for bit
    native = llama(dtype=dtype)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), expected)
    assert geometry_metrics(native, prefix="") == found


@pytest.mark.slow
def test_a_new_process_reads_what_this_one_wrote(tmp_path: Path) -> None:
    """Three architectures, both precisions, all ways to load; and what happens without the import."""
    models = {
        "llama()": get_peft_model(llama(), config(core="diagonal")),
        "llama(dtype=torch.bfloat16)": get_peft_model(llama(dtype=torch.bfloat16), config(compensate=True)),
        "bert()": get_peft_model(
            bert(), config(target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier"])
        ),
        "gpt2()": get_peft_model(gpt2(), config(target_modules=["c_attn", "c_fc"])),
    }
    head = models["bert()"].base_model.model.classifier.modules_to_save["default"]
    before = head.weight.detach().clone()
    expected, cases = {}, []
    for i, (base, model) in enumerate(models.items()):
        folder = tmp_path / str(i)
        if "llama" in base:
            protect(model, memory(model), strict=False)
        train(model, **({"labels": torch.tensor([0, 1, 2, 0])} if "bert" in base else {}))
        model.eval().save_pretrained(folder)
        for way in ("standard", "low memory", "native"):
            if way == "native" and "llama" not in base and not LOADS_NATIVELY:
                continue
            cases.append((base, str(folder), way))
            expected[str(folder), way] = logits(model)
    assert not torch.equal(head.weight, before)  # the head, saved whole, was trained
    code = RELOAD.format(tests=str(Path(__file__).parent), cases=cases)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip() == """without the import: KeyError('EBLORA')"""
    for (folder_name, way), wanted in expected.items():
        assert torch.equal(torch.load(Path(folder_name) / f"{way}.pt"), wanted), (folder_name, way)


def test_the_transposed_layers_of_gpt2_merge() -> None:
    model = get_peft_model(gpt2(), config(target_modules=["c_attn", "c_fc"]))
    train(model)
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)  # float32, logits below 1
    assert not any(isinstance(module, EBLoraLayer) for module in merged.modules())


def test_adapters_are_added_switched_combined_disabled_merged_and_deleted() -> None:
    base = llama()
    untouched = logits(base)
    model = get_peft_model(base, config(), adapter_name="one")
    train(model)
    model.add_adapter("two", config(r=2, core="full", seed=5))
    one = logits(model)
    model.set_adapter("two")
    assert {n for n, p in model.named_parameters() if p.requires_grad and "two" not in n} == set()
    train(model, seed=2)
    two = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)  # training the second left the first alone
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert len({tuple(x.flatten().tolist()) for x in (untouched, one, two, both)}) == 4
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model), both)
    layer = next(iter(eblora_layers(model).values()))
    weight = layer.base_layer.weight.clone()
    model.merge_adapter(["one", "two"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-6)  # float32, logits below 1
    with model.disable_adapter():  # PEFT's rule: a disabled adapter is unmerged
        assert torch.equal(logits(model), untouched)
    assert torch.equal(layer.base_layer.weight, weight)
    with pytest.warns(UserWarning, match="nothing is merged"):
        layer.unmerge()
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    assert layer.r == {"one": 4}
    assert not any("two" in name for name, _ in model.named_parameters())
    assert model.get_model_status().available_adapters == ["one"]
    torch.testing.assert_close(logits(model.merge_and_unload()), one, rtol=0, atol=1e-6)


def test_each_of_several_adapters_is_saved_and_read_by_name(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(), adapter_name="one")
    model.add_adapter("two", config(r=2, target_modules=["q_proj"], initial_scale=0.5))
    model.save_pretrained(tmp_path)
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = logits(model)
    again = PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    again.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name in ("one", "two"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])


def test_patterns_give_layers_their_own_rank_and_alpha() -> None:
    model = get_peft_model(
        llama(), config(rank_pattern={"q_proj": 3, r"layers\.1\..*v_proj": 1}, alpha_pattern={"down_proj": 2.0})
    )
    layers = eblora_layers(model)
    ranks = {name.removeprefix("model.layers."): layer.r["default"] for name, layer in layers.items()}
    assert ranks == {
        "0.self_attn.q_proj": 3, "0.self_attn.v_proj": 4, "0.mlp.down_proj": 4,
        "1.self_attn.q_proj": 3, "1.self_attn.v_proj": 1, "1.mlp.down_proj": 4,
    }  # fmt: skip
    scalings = {layer.r["default"]: layer.eblora_scaling["default"] for n, layer in layers.items() if "self" in n}
    assert scalings == {3: 8 / 3, 4: 2.0, 1: 8.0}
    assert layers["model.layers.0.mlp.down_proj"].eblora_scaling["default"] == 0.5
    only = get_peft_model(llama(), config(layers_to_transform=[1]))
    assert {name.split(".")[2] for name in eblora_layers(only)} == {"1"}
    free = get_peft_model(llama(), config(alpha=None))
    assert {layer.eblora_scaling["default"] for layer in eblora_layers(free).values()} == {1.0}


def test_a_start_depends_on_seed_and_layer_only() -> None:
    first, again, other = (get_peft_model(llama(), config(seed=seed)) for seed in (0, 0, 1))
    frames = [
        [p.detach() for n, p in model.named_parameters() if "eblora_right" in n] for model in (first, again, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(frames[0], frames[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(frames[0], frames[2], strict=True))
    assert not torch.equal(frames[0][0], frames[0][3])  # the same projection of two blocks


def test_the_native_interface_of_transformers_trains_saves_and_loads(tmp_path: Path) -> None:
    model = llama()
    untouched = logits(model)
    model.add_adapter(config())
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(model.eval()))
    again.disable_adapters()
    assert torch.equal(logits(again), untouched)
    again.enable_adapters()
    again.delete_adapter("default")
    assert torch.equal(logits(again), untouched)


def test_a_converted_model_keeps_its_frames_in_float32() -> None:
    model = get_peft_model(llama(), config(compensate=True))
    protect(model, memory(model), strict=False)
    before = {n: t.clone() for n, t in model.state_dict().items() if "eblora_" in n}
    model.to(torch.bfloat16)
    after = model.state_dict()
    assert after["base_model.model.lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_gradient_checkpointing_and_dropout_do_what_they_say() -> None:
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(llama(), config())
        model.train()
        if checkpointing:
            checkpoint_activations(model.base_model.model)
        ids = tokens(4, 9)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    model = get_peft_model(llama(), config(dropout=0.5)).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


def test_point_along_starts_a_named_adapter_and_protect_moves_it_out() -> None:
    model = get_peft_model(llama(), config(compensate=True))
    untouched = logits(llama())
    name, layer = next(iter(eblora_layers(model).items()))
    draw = torch.Generator().manual_seed(0)
    layer.point_along(torch.randn(32, 4, generator=draw), torch.randn(32, 4, generator=draw))
    assert torch.equal(logits(model), untouched)  # compensated anew
    inside = layer.eblora_right["default"].detach().clone()
    protect(
        model, {name: ProtectedSubspace.from_directions(inside)}, output_memory={name: torch.randn(32, 3)}, strict=False
    )
    leaks = {key: manifold.constraint_error(frame) for key, frame, manifold in layer.manifold_parameters()}
    assert max(max(error) for error in leaks.values()) <= 2e-6  # float32, even where the whole frame was inside
    assert [m.k for _, _, m in layer.manifold_parameters()] == [3, 4]
    assert torch.equal(logits(model), untouched)


def test_the_model_card_tells_how_to_load(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import manifold_cl.adapters.peft") == 1
    assert "KeyError: 'EBLORA'" in card  # the test above sees it happen
    assert "manifold-cl export" in card
    (tmp_path / "bare").mkdir()
    config().save_pretrained(str(tmp_path / "bare"))
    config().save_pretrained(str(tmp_path / "bare"))
    assert (tmp_path / "bare" / "README.md").read_text().count("How to load this adapter") == 1


def test_the_written_configuration_is_plain_json(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    protect(model, memory(model), strict=False)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "EBLORA"
    assert content["protected"] == {n: [basis.shape[1], 0] for n, basis in memory(model).items()}
    assert len(content["base_fingerprint"]) == 6
    assert all(len(text.split()) == 17 for text in content["base_fingerprint"].values())


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_layer_whose_bias_is_computed_merges() -> None:
    """The modules that compute the bias have a number for a name, as the layer has."""
    layer = nn.Linear(6, 6)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    model = get_peft_model(nn.Sequential(layer), config(r=2, target_modules=["0"])).eval()
    x = torch.randn(4, 6)
    expected = model(x).detach()
    assert list(eblora_layers(model)) == ["0"]
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-5)  # float32, six terms


def test_adapters_in_subfolders_are_named_by_an_export(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(llama(), config(r=2))
    model.add_adapter("two", config(r=3, seed=1))
    model.save_pretrained(tmp_path / "both")
    with pytest.warns(UserWarning, match="has other adapters in subfolders, which are not exported: two"):
        found = export_lora(tmp_path / "both", tmp_path / "one")
    assert {factors.rank for factors in found.values()} == {2}
    recwarn.clear()
    found = export_lora([tmp_path / "both", tmp_path / "both" / "two"], tmp_path / "sum")
    assert {factors.rank for factors in found.values()} == {5}
    assert not [warning for warning in recwarn if "subfolders" in str(warning.message)]


@pytest.mark.parametrize("low", [False, True])
def test_a_compact_adapter_is_saved_again_as_it_was(low: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    layers = {name: layer.get_base_layer() for name, layer in eblora_layers(model).items()}
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.linalg.qr(torch.randn(one.in_features, 3, generator=draw))[0] for name, one in layers.items()}
    protect(model, {name: ProtectedSubspace(basis).compacted() for name, basis in found.items()})
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(llama(), tmp_path / "first", low_cpu_mem_usage=low)
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert len(files[0]) == len(files[1])
    assert torch.equal(logits(again), logits(model))
