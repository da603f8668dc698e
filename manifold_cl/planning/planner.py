"""`memory_plan`: each kind of memory of a run, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from manifold_cl.adapters import Adapter, EBLoRALinear
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import Targets, target_linears
from manifold_cl.continual.method import Method
from manifold_cl.continual.methods.bases import AdapterMethod, FrameMethod, ProtectingMethod
from manifold_cl.continual.methods.registry import make_method
from manifold_cl.continual.subspaces import InputMoment, memory_pass_nbytes, start_pass_nbytes
from manifold_cl.optim.buckets import Member
from manifold_cl.planning.advice import savings
from manifold_cl.planning.lines import MemoryPlan, PlanLine, gigabytes
from manifold_cl.planning.live_bytes import storage_bytes
from manifold_cl.planning.scratch import step_scratch
from manifold_cl.planning.skeleton import PassBytes, Protected, add_adapters, make_skeleton, open_config, run_on_shapes
from manifold_cl.rules import validate_whole

PREFETCHED = 2
"""Blocks whose complete weights exist at once under FSDP2: the one that computes, and the one fetched ahead."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is planned, as `memory_plan` takes it."""

    config: Any
    method: Method
    targets: Targets
    batch: int
    tokens: int
    devices: int
    dtype: torch.dtype
    checkpointing: bool
    protected: Protected
    options: Mapping[str, Any] = field(default_factory=dict)


def memory_plan(
    model: Any,
    *,
    method: str = "eblora",
    targets: Targets = "all-linear",
    batch: int = 8,
    tokens: int = 512,
    devices: int = 1,
    dtype: str | torch.dtype | None = None,
    checkpointing: bool = False,
    protected: Protected = 0.2,
    **options: Any,
) -> MemoryPlan:
    """Bytes per device that training a transformers model with a method needs, without loading a weight.

    The model is built on the meta device, and one forward and backward pass runs on shapes, so the activations are
    those of the code that trains, for a batch with padding. What libraries hold beside tensors comes on top: the CUDA
    context (about 0.5 GB), workspaces of kernels, and memory that the allocator keeps unused.

    Args:
        model: a transformers model, its configuration, or a path or name of one.
        method: name of a method that trains adapters.
        targets: layers to adapt, as in `inject_adapters`.
        batch: examples per device and step.
        tokens: tokens per example.
        devices: number of GPUs, which shard weights, factors, gradients and moments (FSDP2) and each read a batch.
        dtype: of the base weights; the configuration's by default.
        checkpointing: recompute activations block by block in the backward pass.
        protected: protected directions of each layer: a share of its inputs (0.2), a number (256), or a number per
            layer name.
        **options: of the method, such as ``rank=16``.

    Raises:
        ValueError: for a method without adapters, an option out of range, a rank that does not fit.
        TypeError: for a model that is none of transformers.
    """
    for name, number in (("batch", batch), ("tokens", tokens), ("devices", devices)):
        validate_whole(name, number)
    config = open_config(model)
    setup = Setup(
        config=config,
        method=make_method(method, **options),
        targets=targets,
        batch=batch,
        tokens=tokens,
        devices=devices,
        dtype=parse_dtype(dtype if dtype is not None else getattr(config, "dtype", None) or "float32"),
        checkpointing=checkpointing,
        protected=protected,
        options=options,
    )
    return plan_of(setup)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point precision by its name in torch; ValueError for another name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype is float32, bfloat16 or float16, got {dtype!r}")
    return found


def plan_of(setup: Setup) -> MemoryPlan:
    """The plan of a setup."""
    model = make_skeleton(setup.config, setup.dtype)
    base, frozen, blocks = storage_bytes(model.parameters()), storage_bytes(model.buffers()), block_bytes(model)
    layers = target_linears(model, setup.targets)
    adapters, counts = add_adapters(model, setup.targets, setup.method, setup.protected)
    own = [p for adapter in adapters.values() for key, p in adapter.named_parameters() if not key.startswith("base.")]
    trained = [p for p in own if p.requires_grad]
    moments = moment_bytes(setup.method, model)
    scratch, stacked = _scratch(setup, adapters, storage_bytes(trained))
    statistics, statistics_note = statistics_bytes(setup.method, layers)
    kinds = (True,) if setup.checkpointing else (False, True)  # the last one for the advice
    passed, *others = run_on_shapes(model, layers, batch=setup.batch, tokens=setup.tokens, checkpointing=kinds)
    # what is protected of the weights differs between layers that read one input
    sharable = [] if getattr(setup.method, "from_weights", 0.0) else passed.shared
    once = sharable if getattr(setup.method, "shared_inputs", False) else []
    bases = bases_bytes(layers, counts, once)

    def share(nbytes: int) -> int:
        return -(-nbytes // setup.devices)

    lines = [
        PlanLine("base weights", share(base) + frozen, "always", f"{str(setup.dtype).removeprefix('torch.')}, frozen"),
        *_gathered(setup.devices, blocks),
        PlanLine("factors", share(storage_bytes(own)), "training", f"{len(adapters)} layers, float32"),
        PlanLine("gradients", share(storage_bytes(trained)), "training", "of the factors"),
        PlanLine("moments", share(moments), "training", "of the optimizer, float32"),
        PlanLine("step scratch", scratch, "training", f"{gigabytes(stacked)} of it protected bases, stacked by shape"),
        PlanLine("protected bases", sum(bases.values()), "always", _bases_note(counts, setup)),
        PlanLine("activations", passed.peak, "always", _activations_note(passed, setup)),
        PlanLine("statistics", statistics, "statistics", statistics_note),
        *_carried(setup.method, layers),
        PlanLine("memory file", *memory_file(setup.method, layers, counts, once)),
    ]
    plan = MemoryPlan(_described(setup), tuple(lines), held=passed.saved)
    advice = savings(
        plan,
        recomputed=others[0].peak if others else None,
        shared=sum(bases_bytes(layers, counts, sharable).values()),
        widest=_widest(layers, bases),
        stacked=stacked,
    )
    return replace(plan, savings=tuple(advice))


def bases_bytes(
    layers: Mapping[str, nn.Module], counts: Mapping[str, int], shared: Sequence[Sequence[str]]
) -> dict[str, int]:
    """Layer → bytes of its protected basis, float32; layers that share an input share one, counted at the first."""
    followers = {name for names in shared for name in names[1:] if counts[name] == counts[names[0]]}
    return {name: 0 if name in followers else 4 * sides(layer)[1] * counts[name] for name, layer in layers.items()}


def memory_file(
    method: Method, layers: Mapping[str, nn.Module], counts: Mapping[str, int], shared: Sequence[Sequence[str]]
) -> tuple[int, Literal["disk"], str]:
    """Bytes of the protected bases in a file, where ``compact_memory`` stores six bits per entry in blocks of 64."""
    bases = bases_bytes(layers, counts, shared)
    if not getattr(method, "compact_memory", False):
        return sum(bases.values()), "disk", "float32, per saved task"
    packed = sum(-(-sides(layer)[1] // 64) * 49 * counts[name] for name, layer in layers.items() if bases[name])
    return packed, "disk", "six bits per entry, per saved task"


def statistics_bytes(method: Method, layers: Mapping[str, nn.Module]) -> tuple[int, str]:
    """Bytes of the statistics of the largest pass that the method takes, and its name."""
    passes: dict[str, int] = {}
    if isinstance(method, AdapterMethod) and method.exact_moments:
        passes["of all layers' inputs, exact"] = sum(
            InputMoment.bytes_for(sides(layer)[1]) for layer in layers.values()
        )
    elif isinstance(method, ProtectingMethod):
        passes["for the memory"] = memory_pass_nbytes(layers, source=method.source)
    if isinstance(method, FrameMethod):
        passes["for the start of a task"] = start_pass_nbytes(layers, method.rank)
    note = max(passes, key=lambda name: passes[name], default="none")
    return passes.get(note, 0), note


def moment_bytes(method: Method, model: nn.Module) -> int:
    """Bytes of the optimizer's averages: two per entry for Adam, one where the group has a momentum."""
    groups: Iterable[Mapping[str, Any]] = method.make_optimizer(model).param_groups
    return sum(
        (1 if "momentum" in group and group.get("role") != "scales" else 2) * storage_bytes(group["params"])
        for group in groups
    )


def block_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the largest block, a member of the model's longest list of modules, and of what is outside blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len, default=nn.ModuleList())
    largest = max((storage_bytes(block.parameters()) for block in blocks), default=0)
    return largest, storage_bytes(model.parameters()) - storage_bytes(blocks.parameters())


def _scratch(setup: Setup, adapters: Mapping[str, Adapter], trained: int) -> tuple[int, int]:
    """Scratch of a step, and the part of it that is protected bases."""
    members = [
        Member(p, manifold)
        for adapter in adapters.values()
        if isinstance(adapter, EBLoRALinear)
        for _, p, manifold in adapter.manifold_parameters()
    ]
    if not members:
        return -(-trained // setup.devices), 0
    scratch = step_scratch(members, ranks=setup.devices)
    return scratch.total, scratch.stacked


def _gathered(devices: int, blocks: tuple[int, int]) -> list[PlanLine]:
    if devices == 1:
        return []
    block, outside = blocks
    note = f"by FSDP2: {PREFETCHED} blocks, and what is outside blocks"
    return [PlanLine("gathered weights", PREFETCHED * block + outside, "always", note)]


def _carried(method: Method, layers: Mapping[str, nn.Module]) -> list[PlanLine]:
    """What the method keeps from the first task on; no line where that is nothing."""
    nbytes = method.carried_nbytes(layers) if isinstance(method, AdapterMethod) else 0
    note = f"of {method.name} after one task, on every device"
    return [PlanLine("carried", nbytes, "always", note)] if nbytes else []


def _widest(layers: Mapping[str, nn.Module], bases: Mapping[str, int]) -> tuple[int, int, int]:
    inputs = {name: sides(layer)[1] for name, layer in layers.items()}
    most = max(inputs.values())
    names = [name for name, n in inputs.items() if n == most]
    return most, len(names), sum(bases[name] for name in names)


def _bases_note(counts: Mapping[str, int], setup: Setup) -> str:
    if not any(counts.values()):
        return "nothing is protected"
    smallest, largest = min(counts.values()), max(counts.values())
    return f"float32, {smallest} to {largest} directions per layer" + (", on every device" * (setup.devices > 1))


def _activations_note(passed: PassBytes, setup: Setup) -> str:
    held = f"{passed.saved / 1e9:.2f} GB held for the backward pass"
    return held + (", the rest is recomputed" if setup.checkpointing else "")


def _described(setup: Setup) -> dict[str, Any]:
    return {
        "model": setup.config.model_type,
        "method": setup.method.name,
        **setup.options,
        "targets": setup.targets,
        "batch": setup.batch,
        "tokens": setup.tokens,
        "devices": setup.devices,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "checkpointing": setup.checkpointing,
        "protected": setup.protected,
    }
