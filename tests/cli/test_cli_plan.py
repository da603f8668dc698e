"""``manifold-cl plan``: the table, the JSON, and what it refuses."""

import json
from pathlib import Path

import pytest
from command import Call

pytest.importorskip("transformers")

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
SIZES = ("--rank", "4", "--batch", "2", "--tokens", "8")


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path / "config.json")


@pytest.mark.slow
def test_the_json_has_the_lines_of_the_function(call: Call, config: str) -> None:
    from manifold_cl import memory_plan

    shown = json.loads(call("plan", "--model", config, *SIZES, "--devices", "2", "--json").out)
    expected = memory_plan(config, rank=4, batch=2, tokens=8, devices=2).to_dict()
    assert shown == json.loads(json.dumps(expected))
    assert shown["total"]["training"] == sum(
        line["bytes"] for line in shown["lines"] if line["phase"] in ("always", "training")
    )


def test_the_table_shows_every_line_and_savings_in_order(call: Call, config: str) -> None:
    shown = call("plan", "--model", config, *SIZES).out
    for name in ("base weights", "factors", "moments", "protected bases", "activations", "statistics", "together"):
        assert name in shown
    assert "halve the batch" in shown
    saved = json.loads(call("plan", "--model", config, *SIZES, "--json").out)["savings"]
    sizes = [saving["bytes"] for saving in saved]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0


@pytest.mark.slow
def test_a_saving_is_what_the_changed_plan_needs_less(config: str) -> None:
    from manifold_cl import memory_plan

    sizes = {"rank": 4, "batch": 8, "tokens": 64}
    plan = memory_plan(config, **sizes)
    saved = {saving.change: saving.nbytes for saving in plan.savings}
    checkpointed = memory_plan(config, **sizes, checkpointing=True)
    assert saved["recompute activations"] == plan.total("training") - checkpointed.total("training")
    half = memory_plan(config, **{**sizes, "batch": 4})
    assert saved["halve the batch, and accumulate two"] == pytest.approx(plan.peak - half.peak, rel=0.1)
    narrow = memory_plan(config, **sizes, dtype="bfloat16")
    assert saved["load the base in bfloat16"] == pytest.approx(plan["base weights"] - narrow["base weights"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int3"), "int3"),
        (("--method", "gpm"), "gpm"),
        (("--targets", "q_prj"), "q_proj"),
        (("--protected", "-1"), "-1"),
        (("--set", "energi=0.9"), "energy"),
    ],
)
def test_what_cannot_be_planned_is_refused(call: Call, config: str, options: tuple[str, ...], message: str) -> None:
    ended = call("plan", "--model", config, *options)
    assert ended.code == 2
    assert message in ended.err


def test_a_missing_file_is_refused(call: Call) -> None:
    ended = call("plan", "--model", "nowhere/config.json")
    assert ended.code == 2
    assert "nowhere/config.json does not exist" in ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--protected=-0.5",), "no share in"),
        (("--protected=1.5",), "no share in"),
        (("--protected=nan",), "no share in"),
        (("--set", "rank=8"), "give one of them"),
        (("--dtype", "float8_e4m3fn"), "dtype is float32"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(call: Call, config: str, options: tuple[str, ...], words: str) -> None:
    result = call("plan", "--model", config, *SIZES, *options)
    assert result.code != 0
    assert words in result.err


@pytest.mark.slow
def test_the_rank_may_come_as_an_option_of_the_method(call: Call, config: str) -> None:
    shown = [
        call("plan", "--model", config, "--batch", "2", "--tokens", "8", "--json", *rank).out
        for rank in (("--set", "rank=4"), ("--rank", "4"))
    ]
    assert shown[0] == shown[1]
