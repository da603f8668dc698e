"""``manifold-cl subspace``, called as a user calls it, on the toy stream."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Call
from toy import INPUTS, ToyTask, toy_stream

from manifold_cl import ProtectedSubspace, SubspaceMemory
from manifold_cl.streams import STREAMS

BUILD = ("subspace", "build", "--stream", "toy", "--rank", 4, "--examples", 48, "--energy", 0.9)


@pytest.fixture(autouse=True)
def only_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STREAMS, "_entries", {"toy": lambda **cut: toy_stream(name="toy", **cut)})


def test_a_memory_is_built_task_by_task_and_shown(call: Call, tmp_path: Path) -> None:
    code, out, err = call(*BUILD, "--out", tmp_path / "m", "--tasks", "first, second")
    assert code == 0, err
    assert "protected subspaces: first, second, ToyModel" in out
    assert f"written to {tmp_path / 'm'}" in out
    memory = SubspaceMemory.load(tmp_path / "m", model=toy_stream().make_model())
    assert (list(memory), memory.tasks) == (["inner", "outer"], ("first", "second"))
    row = next(line for line in out.splitlines() if "inner" in line)
    growth = memory.growth["inner"]
    for said in (f"{INPUTS}", f"{memory['inner'].k} (", f"{growth.added}", f"{growth.explained:.3f}"):
        assert said in row
    code, out, err = call("subspace", "info", tmp_path / "m", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["tasks"] == ["first", "second"]
    assert shown["layers"]["inner"] == json.loads(json.dumps(growth.to_dict()))
    assert shown["model"] == "ToyModel"
    assert 0 < shown["protected_share"] < 1
    assert "inner" in call("subspace", "info", tmp_path / "m")[1]


def test_subspaces_are_replaced_unless_a_task_would_be_lost(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert call(*BUILD, "--out", out, "--tasks", "first")[0] == 0
    before = (out / "memory.safetensors").read_bytes()
    code, _, err = call(*BUILD, "--out", out, "--tasks", "second")
    assert code == 2
    assert f"--memory {out}" in " ".join(err.split()).replace("- ", "-")
    assert (out / "memory.safetensors").read_bytes() == before
    assert call(*BUILD, "--out", out, "--memory", out, "--tasks", "second")[0] == 0
    assert SubspaceMemory.load(out).tasks == ("first", "second")
    grown = (out / "memory.safetensors").read_bytes()
    assert call(*BUILD, "--out", out, "--tasks", "first,second")[0] == 0  # the same tasks anew, in one call
    assert SubspaceMemory.load(out).tasks == ("first", "second")
    (out / "memory.safetensors").write_bytes(grown[:100])
    assert call(*BUILD, "--out", out, "--tasks", "third")[0] == 0  # nobody could read what was there


def test_growing_a_memory_keeps_its_columns_first(call: Call, tmp_path: Path) -> None:
    call(*BUILD, "--out", tmp_path / "one", "--tasks", "first", "--weights", 0.3)
    code, out, err = call(
        *(*BUILD, "--memory", tmp_path / "one", "--tasks", "third", "--out", tmp_path / "two", "--json"),
        *(
            "--source",
            "activation+gradient",
            "--policy",
            "evict",
            "--threshold-rule",
            "exclusive",
            "--memory-budget",
            "1MB",
        ),
    )
    assert code == 0, err
    shown = json.loads(out)
    assert shown["tasks"] == ["pre-training", "first", "third"]
    assert [item["task"] for item in shown["history"]] == ["third"]
    assert shown["history"][0]["passes"] == 3  # the inputs once, the gradient twice
    assert shown["history"][0]["skipped_batches"] == []
    one, two = (SubspaceMemory.load(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(two["inner"].basis[:, : one["inner"].k], one["inner"].basis)
    assert two.growth["inner"].to_dict() == shown["history"][0]["layers"]["inner"]


def test_statistics_are_taken_at_the_model_with_its_adapters(call: Call, tmp_path: Path) -> None:
    run = ("run", "--stream", "toy", "--method", "eblora", "--set", "rank=4", "--out", tmp_path / "runs")
    assert call(*run, "--set", "lr=0.03", "--set", "statistic_examples=32", "--tasks", "first")[0] == 0
    (adapter,) = (tmp_path / "runs").glob("*/tasks/01-first")
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    assert call(*BUILD, "--out", plain, "--tasks", "first")[0] == 0
    assert call(*BUILD, "--out", merged, "--tasks", "first", "--adapters", adapter)[0] == 0
    a, b = SubspaceMemory.load(plain), SubspaceMemory.load(merged)
    assert a.model != b.model
    assert a["outer"].basis.shape != b["outer"].basis.shape or not torch.equal(a["outer"].basis, b["outer"].basis)


def test_check_says_what_is_wrong(call: Call, tmp_path: Path) -> None:
    call(*BUILD, "--out", tmp_path, "--tasks", "first")
    code, out, err = call("subspace", "check", tmp_path, "--stream", "toy", "--rank", 4)
    assert (code, out) == (0, "")
    assert "2 layers, intact, orthonormal to" in err
    code, out, _ = call("subspace", "check", tmp_path, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert json.loads(out)["orthonormality"] < 1e-6  # float64 orthonormalisation, rounded once
    code, out, err = call("subspace", "check", tmp_path, "--rank", 24, "--json")
    assert code == 2
    assert "free directions, too few for rank 24" in json.loads(out)["problems"][0]
    assert "2 problems: inner:" in err
    content = bytearray((tmp_path / "memory.safetensors").read_bytes())
    content[-3] ^= 4
    (tmp_path / "memory.safetensors").write_bytes(bytes(content))
    code, _, err = call("subspace", "check", tmp_path)
    assert (code, "memory.safetensors was changed or damaged" in err) == (2, True)


def test_check_measures_what_no_checksum_sees(call: Call, tmp_path: Path) -> None:
    skewed = torch.linalg.qr(torch.randn(INPUTS, 2, generator=torch.Generator().manual_seed(0)))[0]
    skewed[:, 1] += 5e-5 * skewed[:, 0]
    SubspaceMemory({"inner": ProtectedSubspace(skewed), "other": ProtectedSubspace.empty(3)}).save(tmp_path)
    code, _, err = call("subspace", "check", tmp_path, "--stream", "toy")
    assert code == 2
    assert "columns are not orthonormal: max|FᵀF − I| = 5.0e-05; other: no linear module of the model" in err
    code, out, _ = call("subspace", "info", tmp_path)
    assert (code, "no task recorded" in out) == (0, True)  # a memory without a history is shown all the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--energy", 0), r"energy, the threshold, is a share in (0, 1], got 0.0"),
        (("--source", "hessian"), "source is sensitivity, activation, gradient, or several joined by +, got 'hessian'"),
        (("--policy", "shrink"), "the policy for full layers is stop, evict, raise, got 'shrink'"),
        (("--threshold-rule", "half"), "--threshold-rule is inclusive or exclusive, got 'half'"),
        (("--memory", "nowhere"), "nowhere does not exist: give for --memory a folder with memory.safetensors"),
        (("--adapters", "nowhere"), "nowhere does not exist: give for --adapters a folder with an adapter"),
        (("--memory-budget", "100B"), "the statistic of inner alone takes 2304 bytes, the memory budget is 100"),
        (("--rank", 17), "outer has 16 inputs, too few for rank 17"),
        (("--examples", 0), "'--examples': it is at least 1, got 0"),
        (("--passes-per-sketch", 3), "--passes-per-sketch is 1 or 2, got 3"),
        (("--stream", "tpy"), "unknown stream 'tpy'"),
        (("--device", "abacus"), "device 'abacus' is not available here"),
    ],
)
def test_bad_input_ends_with_code_two_and_writes_no_memory(
    arguments: tuple[object, ...], message: str, call: Call, tmp_path: Path
) -> None:
    code, _, err = call(*BUILD, "--out", tmp_path / "m", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "m" / "memory.safetensors").exists()


def test_batches_with_nan_stop_the_build_or_are_left_out_by_number(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ToyTask.loss
    count = [0]

    def loss(self: ToyTask, model: Any, batch: Any) -> torch.Tensor:
        count[0] += 1
        value = original(self, model, batch)
        return value * float("nan") if count[0] == 2 else value

    monkeypatch.setattr(ToyTask, "loss", loss)
    code, _, err = call(*BUILD, "--out", tmp_path, "--tasks", "first")
    assert code == 1
    assert "the loss of batch 1 became nan" in err
    count[0] = 0
    code, out, err = call(*BUILD, "--out", tmp_path, "--tasks", "first", "--skip-nonfinite", "--json")
    assert code == 0
    assert "first: left out batches [1], whose values are not finite" in err
    assert json.loads(out)["history"][0]["skipped_batches"] == [1]


def test_help_names_the_three_verbs(call: Call) -> None:
    code, out, err = call("subspace")
    assert code == 2
    assert all(verb in out + err for verb in ("build", "info", "check"))
