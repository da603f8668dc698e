"""The JSON of all `analyze` commands: one vocabulary, the one that docs/analysis.md lists."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command import Call

from analysis.formats import save_lora
from manifold_cl.cli.analyze import commands
from manifold_cl.cli.analyze.summary import SHARED, print_summary

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": (),
    "merge": ("--rule", "sum"),
    "suggest": (),
    "mend": ("--apply", "flatten"),
    "many": ("--processes", "1"),
}
ALONE = ("suggest", "mend")
"""Commands that take one adapter here."""


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Command to its object, on two adapters of the same layers."""
    from manifold_cl.cli import main

    place, draw = tmp_path_factory.mktemp("json"), torch.Generator().manual_seed(0)
    named = [
        (
            task,
            [
                (task, f"h.{i}.q", torch.randn(12, 3, generator=draw), torch.randn(10, 3, generator=draw))
                for i in range(3)
            ],
        )
        for task in ("news", "code")
    ]
    save_lora(place / "ad", named)
    adapters = [str(place / "ad" / name) for name in ("01-news", "02-code")]
    found = {}
    for name, options in COMMANDS.items():
        paths = adapters[:1] if name in ALONE else adapters
        with pytest.MonkeyPatch.context() as patch:
            printed: list[str] = []
            patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))  # noqa: B023
            main(["analyze", name, *paths, *options, "--out", str(place / name), "--json"])
        found[name] = json.loads(printed[-1])
    return found


def listed() -> dict[str, set[str]]:
    """Key to the commands that have it, from the table of the page."""
    section = PAGE.read_text(encoding="utf-8").partition("## For programs")[2]
    keys: dict[str, set[str]] = {}
    for names, where in re.findall(r"^\| (`.*?`) \| (.*?) \|", section, flags=re.MULTILINE):
        using = set(COMMANDS) if where == "all" else set(re.findall(r"`(\w+)`", where))
        keys |= dict.fromkeys(re.findall(r"`(\w+)`", names), using)
    return keys


def test_every_command_is_compared() -> None:
    assert {command.name or command.callback.__name__ for command in commands.registered_commands} == {  # type: ignore[union-attr]
        "report",
        *(name for name in COMMANDS if name != "report"),
    }


def test_the_page_lists_every_key_of_every_command(summaries: dict[str, dict[str, Any]]) -> None:
    found: dict[str, set[str]] = {}
    for name, summary in summaries.items():
        for key in summary:
            found.setdefault(key, set()).add(name)
    assert found == listed()
    assert {key for key, using in found.items() if using == set(COMMANDS)} == set(SHARED)


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_keys_have_one_form(summaries: dict[str, dict[str, Any]], name: str) -> None:
    summary = summaries[name]
    assert Path(summary["out"]).is_dir()
    assert all(Path(path).exists() for path in summary["paths"].values())
    assert summary["paths"]["report"] == str(Path(summary["out"]) / "report.html")
    assert summary["findings"]
    assert all(finding["headline"] for finding in summary["findings"])
    assert all(isinstance(each, str) for each in summary["notices"])
    assert all({"task", "file", "tensor", "reason"} <= set(each) for each in summary["left_out"])


def test_what_is_not_read_is_listed_by_every_command(call: Call, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for task in ("news", "code"):
        layers = [
            (task, f"h.{i}.q", torch.randn(6, 2, generator=draw), torch.randn(5, 2, generator=draw)) for i in range(2)
        ]
        save_lora(tmp_path / task, [(task, layers)])
    adapters = [tmp_path / task / f"01-{task}" for task in ("news", "code")]
    for name in ("report", "merge"):  # `--layers` chooses what is read; in suggest and mend, what is changed
        options = ("--layers", r"h\.0", "--out", tmp_path / name, "--json")
        code, out, err = call("analyze", name, *adapters, *COMMANDS[name], *options)
        assert code == 0, err
        assert {each["tensor"] for each in json.loads(out)["left_out"]} == {"h.1.q"}


def test_metrics_of_tables_have_one_name(summaries: dict[str, dict[str, Any]]) -> None:
    def read(name: str, table: str) -> pd.DataFrame:
        return pd.read_csv(summaries[name]["paths"][table])

    spectra = read("report", "spectra").query("update == 'task' and task == '01-news'")
    merged = read("merge", "spectra").query("task == '01-news'")
    changes = read("mend", "changes").query("layer != 'total'")
    members = read("many", "members").set_index("member")
    for metric in ("frobenius", "effective_rank_energy", "top1_energy"):
        values = spectra[spectra["metric"] == metric].set_index("layer")["value"]
        assert merged[merged["metric"] == metric].set_index("layer")["value"].to_dict() == pytest.approx(
            values.to_dict()
        )
        before = changes[changes["metric"] == metric].set_index("layer")["before"]
        assert before.to_dict() == pytest.approx(values.to_dict(), rel=1e-5)
        total = float((values**2).sum() ** 0.5) if metric == "frobenius" else float(values.mean())
        assert members.loc["01-news", metric] == pytest.approx(total)


def test_numbers_that_json_lacks_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"infinite": float("inf"), "unknown": float("nan"), "known": 1.5}
    print_summary(tmp_path, {}, [], notices=[], left_out=[], further={"fail_if": [values]})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["fail_if"] == [{"infinite": None, "unknown": None, "known": 1.5}]
