"""The tables of docs/seven-billion.md are what the functions compute and what was measured."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from torch import nn

import manifold_cl
from manifold_cl.planning import planner
from manifold_cl.planning.skeleton import PassBytes, run_on_shapes

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/seven-billion.md").read_text(encoding="utf-8")
SETUPS = {
    "1 GPU": {},
    "1 GPU, recomputed": {"checkpointing": True},
    "4 GPUs, recomputed": {"checkpointing": True, "devices": 4},
    "8 GPUs, recomputed": {"checkpointing": True, "devices": 8},
}


@pytest.fixture(scope="module", autouse=True)
def passes_once() -> Iterator[None]:
    """The passes of one size hold the same bytes on one device and on several: measured once for all plans."""
    measured: dict[tuple[object, ...], PassBytes] = {}

    def run_once(
        model: nn.Module, layers: Mapping[str, nn.Module], *, checkpointing: Sequence[bool], **sizes: int
    ) -> list[PassBytes]:
        keys = [(*layers, *sizes.items(), wanted) for wanted in checkpointing]
        left = [key[-1] for key in keys if key not in measured]
        found = run_on_shapes(model, layers, checkpointing=left, **sizes) if left else []  # type: ignore[arg-type]
        measured.update(zip([key for key in keys if key not in measured], found, strict=True))
        return [measured[key] for key in keys]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "run_on_shapes", run_once)
        yield


def tables() -> str:
    """Both tables of the page."""
    from manifold_cl import memory_plan
    from manifold_cl.planning.lines import gigabytes

    config = str(ROOT / "examples/llama_7b.json")
    plans = {name: memory_plan(config, **setup) for name, setup in SETUPS.items()}  # type: ignore[arg-type]
    names = [line.name for line in plans["4 GPUs, recomputed"].lines]
    shown = {name: [gigabytes(plan[name]) if plan[name] else "–" for plan in plans.values()] for name in names}
    for phase in ("training", "statistics"):
        shown[f"**together, {phase}**"] = [gigabytes(plan.total(phase)) for plan in plans.values()]  # type: ignore[arg-type]
    lines = [f"| per GPU | {' | '.join(plans)} |", "|---|" + "--:|" * len(plans)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in shown.items()]
    savings = ["| change | saves about |", "|---|--:|"]
    savings += [f"| {saving.change} | {gigabytes(saving.nbytes)} |" for saving in plans["1 GPU"].savings]
    return "\n".join(lines) + "\n\n" + "\n".join(savings)


@pytest.mark.slow
def test_the_tables_are_those_of_the_function() -> None:
    memory, savings = tables().split("\n\n")
    assert memory in PAGE
    assert savings in PAGE


@pytest.mark.slow
def test_the_bases_of_shared_inputs_are_those_on_the_page() -> None:
    from manifold_cl import memory_plan

    config, small = (
        str(ROOT / "examples/llama_7b.json"),
        {"batch": 1, "tokens": 16, "shared_inputs": True, "checkpointing": True},
    )
    plan = memory_plan(config, **small, compact_memory=True)
    narrow = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    without = memory_plan(config, **small, targets=narrow)["protected bases"]
    sizes = [plan["protected bases"], without, plan["memory file"]]
    all_layers, others, file = (f"{size / 1e9:.2f} GB" for size in sizes)
    assert f"The bases of all layers are then {all_layers}, without `down_proj` {others}." in PAGE
    assert f"the memory file is {file} instead of" in PAGE


def test_the_times_are_those_that_were_measured() -> None:
    llava = json.loads((ROOT / "benchmarks/results/gpu/llava.json").read_text(encoding="utf-8"))["median"]["eblora"]
    assert f"no checkpointing | {llava['step_ms']:.0f} ms |" in PAGE
    assert f"of which the optimizer | {llava['optimizer_ms']:.0f} ms |" in PAGE
