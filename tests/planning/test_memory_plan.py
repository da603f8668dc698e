"""Each line of a plan is the number of bytes of the tensors that training really makes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from manifold_cl import ProtectedSubspace, SubspaceMemory, Task, memory_plan
from manifold_cl.adapters import adapters_of
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Passes, leading_directions, make_method, measure_importance
from manifold_cl.continual.checkpointing import checkpoint_activations
from manifold_cl.continual.stage import Stage
from manifold_cl.optim.buckets import Member
from manifold_cl.planning.live_bytes import LiveBytes, counting_saved, storage_bytes
from manifold_cl.planning.scratch import step_scratch

BATCH, TOKENS, RANK, SHARE = 4, 24, 4, 0.25
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
METHODS = {
    "eblora": {},
    "restricted": {},
    "balanced": {},
    "eblora spectral": {"step": "spectral"},
    "sequential_merge": {},
    "inflora": {},
    "lora_muon": {},
    "e2lora": {},
    "splitlora": {},
}
CARRYING = ("ella", "ewc_lora", "slao", "olora", "e2lora", "splitlora")
"""Methods that keep tensors of their own from the first task on."""


class Texts(Task):
    """One batch of random tokens, with padding."""

    name = "texts"

    def __init__(self) -> None:
        self.ids = torch.randint(50, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
        self.mask = torch.ones_like(self.ids)
        self.mask[0, -3:] = 0

    def size(self, split: Any) -> int:
        return BATCH

    def batches(self, split: Any, *, batch_size: int, generator: Any = None) -> Iterator[Any]:
        yield {"input_ids": self.ids, "labels": self.ids, "attention_mask": self.mask}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch, use_cache=False).loss

    def scores(self, model: nn.Module, split: Any = "test") -> Mapping[str, float]:
        return {"score": 0.0}


@dataclass
class Trained:
    """A real model after one step of a method, with what was counted on the way."""

    model: Any
    method: Any
    optimizer: Any
    lines: dict[str, int]


def trained(config: Any, name: str, *, checkpointing: bool = False) -> Trained:
    torch.manual_seed(0)
    task = Texts()
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    lines = {"base weights": storage_bytes([*model.parameters(), *model.buffers()])}
    layers = target_linears(model, "all-linear")
    method = make_method(name.split()[0], rank=RANK, **METHODS.get(name, {}))
    widths = {key: layer.in_features if hasattr(layer, "in_features") else layer.nx for key, layer in layers.items()}
    bases = {key: torch.randn(n, int(SHARE * n)) for key, n in widths.items()}
    if hasattr(method, "memory"):
        method.memory = SubspaceMemory({key: ProtectedSubspace.from_directions(a) for key, a in bases.items()})
    method.begin_task(model, Stage(task, 0, "all-linear", 0, BATCH))
    inside = [(n, p) for n, p in model.named_parameters() if ".base." not in n and any(k in n for k in layers)]
    parameters = [p for n, p in inside if n.rpartition(".")[2] in ("left", "right", "scale")]
    lines["factors"] = storage_bytes(parameters)
    protected = [
        f.complement for a in adapters_of(model).values() for _, _, f in _points(a) if f.complement is not None
    ]
    memory = getattr(method, "memory", None) or {}
    lines["protected bases"] = storage_bytes([*protected, *(subspace.basis for subspace in memory.values())])
    model.train()
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    optimizer = method.make_optimizer(model)
    (batch,) = task.batches("train", batch_size=BATCH)
    known = [*model.parameters(), *model.buffers(), task.ids, task.mask]
    with counting_saved(known) as saved:
        loss = task.loss(model, batch)
    lines["saved"] = saved.nbytes
    saved.clear()
    del loss
    drop = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with LiveBytes(known) as live:
        task.loss(model, batch).backward()
    lines["activations"] = live.peak
    for hook in drop:
        hook.remove()
    task.loss(model, batch).backward()
    lines["gradients"] = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    states = [
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.numel() > 1
    ]
    scalars = [p for p in model.parameters() if p.requires_grad and p.numel() == 1]
    averages = [v for p in scalars for k, v in optimizer.state.get(p, {}).items() if k != "step"]
    lines["moments"] = storage_bytes(states) + sum(v.nbytes for v in averages)
    return Trained(model, method, optimizer, lines)


def _points(adapter: Any) -> list[Any]:
    return list(adapter.manifold_parameters()) if hasattr(adapter, "manifold_parameters") else []


def planned(config: Any, name: str, **options: Any) -> Any:
    sizes = {"batch": BATCH, "tokens": TOKENS, "rank": RANK, "protected": SHARE}
    return memory_plan(config, method=name.split()[0], **sizes, **METHODS.get(name, {}), **options)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_line_of_eblora_is_what_a_step_allocates(config: Any, checkpointing: bool) -> None:
    real = trained(config, "eblora", checkpointing=checkpointing)
    plan = planned(config, "eblora", checkpointing=checkpointing)
    for line in ("base weights", "factors", "gradients", "moments", "protected bases"):
        assert plan[line] == real.lines[line], line
    assert plan["activations"] == pytest.approx(real.lines["activations"], rel=0.01)
    (note,) = [line.note for line in plan.lines if line.name == "activations"]
    assert note.startswith(f"{real.lines['saved'] / 1e9:.2f} GB")
    assert plan.held == real.lines["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"eblora"}))
def test_the_lines_of_other_methods(name: str) -> None:
    real, plan = trained(LLAMA, name), planned(LLAMA, name)
    for line in ("base weights", "factors", "gradients", "moments", "protected bases"):
        assert plan[line] == real.lines[line], line
    assert plan["activations"] == pytest.approx(real.lines["activations"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARRYING)
def test_what_a_method_carries_is_what_it_holds_after_one_task(name: str) -> None:
    model, task = AutoModelForCausalLM.from_config(LLAMA).requires_grad_(False), Texts()
    method, stage = make_method(name, rank=RANK), Stage(task, 0, "all-linear", 0, BATCH)
    method.begin_task(model, stage)
    method.finish_task(model, stage)
    method.end_task(model, stage)
    held = [*method.state(), *getattr(method, "minor", {}).values(), *getattr(method, "drift", {}).values()]
    plan = planned(LLAMA, name)
    if name == "splitlora":  # minor directions are at most as many as inputs
        assert 0.5 * plan["carried"] < storage_bytes(held) <= plan["carried"]
    else:
        assert plan["carried"] == storage_bytes(held)


def test_exact_moments_of_wide_layers_are_planned() -> None:
    wide = LlamaConfig(
        hidden_size=256, intermediate_size=6000, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    sizes = {"batch": 1, "tokens": 4, "targets": ["down_proj"], "rank": 4}
    assert memory_plan(wide, method="inflora", **sizes)["statistics"] == 4 * 6000**2
    assert memory_plan(wide, method="keeplora", **sizes)["statistics"] < 4 * 6000 * 1000


@pytest.mark.slow
def test_checkpointing_plans_fewer_activations() -> None:
    with_all, recomputed = (planned(LLAMA, "eblora", checkpointing=flag)["activations"] for flag in (False, True))
    assert recomputed < 0.8 * with_all


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sensitivity", "gradient"])
def test_statistics_are_those_of_the_largest_pass(source: str) -> None:
    model = AutoModelForCausalLM.from_config(LLAMA).requires_grad_(False)
    layers = target_linears(model, "all-linear")
    task = Texts()
    losses = Stage(task, 0, "all-linear", 0, BATCH).losses(model, BATCH, "memory")
    held: dict[str, int] = {}
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:

        def run(name: str, work: Any) -> None:
            before, counts = live.now, []
            work(Passes(on_pass=lambda _: counts.append(live.now - before), max_size=128))
            held[name] = max(counts)

        run("memory", lambda p: list(measure_importance(layers, losses, source=source, energy=0.5, passes=p)))
        run("start", lambda p: leading_directions(layers, losses, RANK, passes=p))
    plan = planned(LLAMA, "eblora", source=source)
    assert plan["statistics"] == pytest.approx(max(held.values()), rel=0.05)


def test_the_scratch_of_a_step_is_that_of_its_workspace() -> None:
    real = trained(LLAMA, "eblora")
    points = [Member(p, f) for a in adapters_of(real.model).values() for _, p, f in _points(a)]
    step = real.optimizer._riemannian.plan
    stacked = sum(
        bucket.geometry.projector.stacked.nbytes
        for _, bucket in step.buckets
        if bucket.geometry.projector.stacked is not None
    )
    scratch = step_scratch(points)
    assert scratch.stacked == stacked > 0
    assert scratch.slabs == pytest.approx(step.workspace.nbytes, rel=0.02)


@pytest.mark.slow
def test_the_memory_file_is_that_large_on_disk(tmp_path: Path) -> None:
    real, plan = trained(LLAMA, "eblora"), planned(LLAMA, "eblora")
    real.method.memory.save(tmp_path)
    manifest = 40_000  # names and energies of columns, at these sizes more than the bases
    assert plan["memory file"] < (tmp_path / "memory.safetensors").stat().st_size < plan["memory file"] + manifest
    assert plan.total("training") == sum(e.nbytes for e in plan.lines if e.phase in ("always", "training"))


@pytest.mark.slow
def test_devices_share_weights_factors_and_moments() -> None:
    one, four = planned(LLAMA, "eblora"), planned(LLAMA, "eblora", devices=4)
    for line in ("factors", "gradients", "moments"):
        assert four[line] == -(-one[line] // 4)
    assert four["base weights"] < 0.3 * one["base weights"]
    assert four["activations"] == one["activations"]
    assert four["protected bases"] == one["protected bases"]
    assert four["gathered weights"] > 0


@pytest.mark.slow
def test_a_model_a_folder_and_a_configuration_give_one_plan(tmp_path: Any) -> None:
    LLAMA.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(LLAMA)
    plans = [planned(each, "eblora").to_dict() for each in (LLAMA, model, tmp_path, str(tmp_path / "config.json"))]
    assert plans[0]["lines"] == plans[1]["lines"] == plans[2]["lines"] == plans[3]["lines"]


@pytest.mark.slow
def test_precision_halves_weights_and_leaves_factors() -> None:
    wide, narrow = planned(LLAMA, "eblora"), planned(LLAMA, "eblora", dtype="bfloat16")
    assert narrow["base weights"] == pytest.approx(wide["base weights"] / 2, rel=0.01)
    assert narrow["factors"] == wide["factors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"devices": 0}, "devices"),
        ({"protected": 1.5}, "protected=1.5"),
        ({"dtype": "int8"}, "int8"),
        ({"method": "gpm"}, "gpm"),
        ({"method": "eblorra"}, "eblora"),
        ({"rank": 64}, "64"),
        ({"targets": ["q_prj"]}, "q_proj"),
    ],
)
def test_what_cannot_be_planned_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_plan(LLAMA, **{"method": "eblora", **changes})


def test_a_model_without_a_configuration_is_an_error() -> None:
    with pytest.raises(TypeError, match="Linear"):
        memory_plan(nn.Linear(3, 2))


def test_a_plan_leaves_the_configuration_as_it_was() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    before = config.to_dict()
    memory_plan(config, rank=2, batch=1, tokens=4, dtype="bfloat16")
    assert config.to_dict() == before


@pytest.mark.slow
def test_directions_of_weights_are_never_shared_between_layers() -> None:
    own = planned(LLAMA, "eblora", from_weights=0.2)
    asked = planned(LLAMA, "eblora", from_weights=0.2, shared_inputs=True)
    shared = planned(LLAMA, "eblora", shared_inputs=True)
    assert shared["protected bases"] < own["protected bases"] == asked["protected bases"]
    assert not any("shared_inputs" in saving.how for saving in own.savings)
