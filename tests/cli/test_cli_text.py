"""Text that the command shows: names and paths of others as they are, options as they are typed."""

import io
import json
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from command import Call
from records import editable
from toy import toy_stream

from analysis import AdapterSet, names
from manifold_cl import ContinualRunner, RunRecord, cli
from manifold_cl.cli.analyze.report import analyze
from manifold_cl.cli.options import as_typed, flags_of, parse_bytes
from manifold_cl.cli.screen import Screen, Words, visible
from manifold_cl.cli.subspace import build
from manifold_cl.continual import make_method

SHOWN = {
    "evil[/x]": "evil[/x]",
    "run[red]7": "run[red]7",
    "[bold]": "[bold]",
    ":smile:": ":smile:",
    "50 % \\d {0} $x$": "50 % \\d {0} $x$",
    "\x1b]0;owned\x07": "\\x1b]0;owned\\x07",
    "\x1b[2Jgone\r": "\\x1b[2Jgone\\r",
    "two\nlines\ttab": "two\\nlines\\ttab",
    "right\u202eleft\u200f": "right\\u202eleft\\u200f",
    "\x9b31m\x7f": "\\x9b31m\\x7f",  # the one-byte form of ESC [
    "half \ud800 pair": "half \\ud800 pair",
    "naïve 日本 שלום 🙂": "naïve 日本 שלום 🙂",
}
"""Name to what a screen shows of it."""


def is_harmless(text: str) -> bool:
    """Whether a terminal only prints it: lines of letters and spaces."""
    return all(letter == "\n" or letter.isprintable() or unicodedata.category(letter) == "Zs" for letter in text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a method that learns nothing."""
    folder = tmp_path_factory.mktemp("named") / "run"
    ContinualRunner(toy_stream(), make_method("zero_shot"), folder).run()
    return folder


@pytest.fixture
def rename(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the run's record with some keys changed."""

    def change(**changes: Any) -> Path:
        record = editable(run / "record.json") | changes
        folder = tmp_path / "renamed"
        folder.mkdir(exist_ok=True)
        (folder / "record.json").write_text(json.dumps(record))
        return folder

    return change


@pytest.mark.parametrize(("name", "shown"), SHOWN.items())
def test_the_name_of_a_foreign_run_is_shown_as_it_is(
    name: str, shown: str, call: Call, rename: Callable[..., Path]
) -> None:
    code, out, err = call("compare", rename(name=name, stream=name))
    assert (code, err) == (0, "")
    assert f"{shown}: accuracy in percent" in out
    assert re.search(rf"^ +{re.escape(shown)} +\d", out, re.MULTILINE)
    assert is_harmless(out)


def test_unknown_numbers_are_shown_as_unknown(call: Call, rename: Callable[..., Path]) -> None:
    errors = [{"orthonormality": 1e-7, "protection": None}, {"orthonormality": 2e-7, "protection": 3e-7}, {}]
    code, out, _ = call("compare", rename(name="", constraints=errors, peak_memory_mb=None, metrics={"mft": None}))
    assert code == 0
    (row,) = [line.split() for line in out.splitlines() if "(no name)" in line]
    assert row[-1] == "nan"  # one error of the first task is not known: the largest is not either
    assert row[-2] == "–"
    assert row[2:8] == ["–"] * 6


@pytest.mark.parametrize("name", ["t[/x]", "\x1b[31mred", "two\nlines", "$x_{", "<script>alert(1)</script>"])
def test_names_of_tasks_and_folders_are_shown_as_they_are(name: str, call: Call, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pair = (torch.randn(5, 2, generator=draw), torch.randn(4, 2, generator=draw))
    AdapterSet.from_factors({name: {"layer": pair}, "other": {"layer": pair}}).save(tmp_path / "set")
    code, out, err = call("analyze", tmp_path / "set", "--out", tmp_path / "o[/1]\x1b[7m")
    assert code == 0, err
    assert f" {visible(name)} " in out
    assert f"{tmp_path}/o[/1]\\x1b[7m/report.html" in out
    assert is_harmless(out + err)
    page = (tmp_path / "o[/1]\x1b[7m" / "report.html").read_text()
    assert "<script>alert" not in page
    assert is_harmless(page)


@pytest.mark.parametrize("name", ["\\[/x]", "[/]", "[link=x]y", "\x1b]8;;x\x07", "a\nb"])
def test_errors_name_paths_as_they_are(name: str, call: Call, tmp_path: Path) -> None:
    for command in ("analyze", "compare"):
        code, _, err = call(command, tmp_path / name)
        assert code == 2
        assert str(tmp_path) in err
        assert "\x1b" not in err
        if name.isprintable():
            assert f"{tmp_path}/{name}" in err


def test_wrong_usage_shows_what_was_typed(call: Call) -> None:
    for arguments in (("run", "--[/x]\x1b[2J"), ("[/x]\x1b[2J",)):
        code, _, err = call(*arguments)
        assert code == 2
        assert "[/x]\\x1b[2J" in err
        assert "\x1b" not in err


def test_an_unexpected_error_is_a_traceback_without_control_characters(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "record.json").touch()

    def fail(_: Path) -> None:
        raise RuntimeError("\x1b]0;owned\x07[/x]")

    monkeypatch.setattr(RunRecord, "load", fail)
    code, _, err = call("compare", tmp_path)
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: \\x1b]0;owned\\x07[/x]" in err


def test_warnings_are_lines_of_their_own(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "record.json").touch()

    def warn(_: Path) -> None:
        warnings.warn("strange \x1b[7m[/x]", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(RunRecord, "load", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = call("compare", tmp_path)
    assert code == 2
    assert re.fullmatch(r"warning: strange \\x1b\[7m\[/x\] error: enough \(test_cli_text\.py, line \d+, in warn\)", err)


def test_a_terminal_without_unicode_shows_codes(rename: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bare = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", bare)
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["compare", str(rename(name="naïve –"))])
    bare.seek(0)
    rows = bare.read().splitlines()
    (header,) = [row for row in rows if "ZERO-SHOT" in row]
    (row,) = [row for row in rows if "na\\xefve \\u2013 " in row]
    assert len(row) == len(header)  # codes count in the width: the columns stay aligned


def test_bars_show_text_as_it_is() -> None:
    task: Any = SimpleNamespace(description="[red]\x1b[2Ja{0}")
    assert Words("{task.description}", "bold").render(task).plain == "[red]\\x1b[2Ja{0}"


def test_messages_indent_their_further_lines() -> None:
    assert Screen().styled(("error:", "red"), " one\nerror: two").plain == "error: one\n  error: two"


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("give base=", "give --base"),
        ("the checkpoint (give base=) is", "the checkpoint (give --base) is"),
        ("(common=True goes on)", "(--common goes on)"),
        ("layers='[' is no regular expression", "--layers='[' is no regular expression"),
        ("name the tasks with tasks=", "name the tasks with --tasks"),
        ("/runs/base=3/x holds nothing", "/runs/base=3/x holds nothing"),
        ("database= is another word", "database= is another word"),
        ("zeros='omit' is no option of the command", "zeros='omit' is no option of the command"),
    ],
)
def test_errors_name_options_as_they_are_typed(message: str, typed: str) -> None:
    assert as_typed(message, flags_of(analyze)) == typed


def test_an_option_with_another_name_on_the_command_line_is_named_by_that() -> None:
    assert as_typed("leave it out with on_nonfinite='skip'", flags_of(build)) == "leave it out with --skip-nonfinite"
    assert flags_of(build)["as_json"] == "--json"


def test_every_error_of_a_command_passes_the_translation(call: Call, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    code, _, err = call("analyze", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "--base" in err
    assert "base=" not in err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "lab.tex", "error: --plot is lab.tex: figures are written as .svg, .pdf or .png"),
        ("--plot", "{file}/lab.svg", "error: --plot is {file}, but {file} is a file"),
    ],
)
def test_files_that_cannot_be_written_are_named_before_the_work(
    option: str, name: str, message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setattr("manifold_cl.geometry.lab.measure_retractions", lambda *_, **__: pytest.fail("measured"))
    code, _, err = call("retractions", option, name.format(file=file))
    assert code == 2
    assert message.format(file=file) in err


def test_the_command_and_the_analysis_show_characters_alike() -> None:
    text = "".join(map(chr, [*range(0x300), 0x202E, 0x2028, 0x3000, 0xE000, 0x1F600]))
    assert visible(text) == names.visible(text)


@pytest.mark.parametrize(
    ("shape", "complement", "message"),
    [
        ("16x8", 10, "--complement 10 does not fit --shape 16x8: .* room for 0 to 8 protected directions"),
        ("8x16", 0, "--shape 8x16 has more columns than rows"),
    ],
)
def test_a_shape_without_room_for_the_complement_names_both_options(
    shape: str, complement: int, message: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifold_cl.geometry.lab.measure_retractions", lambda *_, **__: pytest.fail("measured"))
    code, _, err = call("retractions", "--shape", shape, "--complement", complement)
    assert code == 2
    assert re.search(f"error: {message}", err)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("entrpy_min<0.5", "unknown metric 'entrpy' in 'entrpy_min<0.5', did you mean entropy or"),
        ("norm_ratio_max>1", "--fail-if 'norm_ratio_max>1' is about a size relative to the base model: give --base"),
        ("entropy<1", "a gate is METRIC_{min,max,mean,median}"),
    ],
)
def test_gates_are_verified_before_anything_is_read(
    gate: str, message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.report.read_subjects", lambda *_, **__: pytest.fail("read"))
    code, _, err = call("analyze", tmp_path, "--fail-if", gate, "--out", tmp_path / "out")
    assert code == 2
    assert message in err


@pytest.mark.parametrize("text", ["", "GB", "0", "-1MB", "2TB", "1.2.3MB", "nan", "many"])
def test_a_memory_budget_that_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"such as 500MB or 2GB, got {text!r}")):
        parse_bytes(text)


def commands(command: Any) -> Iterator[Any]:
    """The command, or those of the group."""
    inner = getattr(command, "commands", None)
    yield from [command] if inner is None else (leaf for each in inner.values() for leaf in commands(each))


@pytest.mark.parametrize("name", ["--json", "--seed", "--device", "--resume", "--memory", "--memory-budget"])
def test_a_shared_option_has_one_meaning_in_every_command(name: str) -> None:
    found = [p for each in commands(typer.main.get_command(cli.app)) for p in each.params if name in p.opts]
    assert len(found) > 1
    assert len({option.help for option in found}) == 1
