"""Expected times, and the progress of runs on a terminal and in a pipe."""

import io
import json
import runpy
import time
from importlib import import_module
from pathlib import Path

import pytest

from manifold_cl import METHODS
from manifold_cl.cli import durations, progress
from manifold_cl.cli.durations import expected_seconds, in_words, measured
from manifold_cl.cli.progress import RunClock, show_runs
from manifold_cl.continual.runner import Progress

ROOT = Path(__file__).parents[2]


def test_the_measured_times_are_those_of_the_committed_records() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "durations.py"))
    assert script["durations"]() == json.loads(Path(durations.__file__).with_suffix(".json").read_text())


def test_the_expected_time_follows_tasks_and_examples() -> None:
    seconds = measured()["streams"]["text-six"]["seconds"]
    complete = expected_seconds("text-six", ["eblora"])
    assert complete == pytest.approx(sum(seconds["eblora"].values()))
    assert expected_seconds("text-six", ["eblora"], tasks=3) == pytest.approx(complete / 2)
    few = expected_seconds("text-six", ["eblora"], examples=96)
    assert few == pytest.approx(seconds["eblora"]["train"] / 10 + seconds["eblora"]["other"])
    assert expected_seconds("text-six", ["eblora", "olora"]) == pytest.approx(complete + sum(seconds["olora"].values()))


NOT_IN_A_STUDY = {
    *(
        "best",
        "e2lora",
        "ella",
        "ewc_lora",
        "factorial",
        "lora_muon",
        "lora_muon_ogd",
        "osft_lora",
        "slao",
        "splitlora",
    ),
}
"""Methods that no committed study has run yet."""


def test_every_method_has_a_time_and_others_are_unknown() -> None:
    for stream in ("text-six", "text-three"):
        assert measured()["streams"][stream]["seconds"].keys() == METHODS.keys() - NOT_IN_A_STUDY
    assert expected_seconds("text-three", ["olora"]) < expected_seconds("text-six", ["olora"])
    assert expected_seconds("text-three", ["mine"]) is None
    assert expected_seconds("ucit", ["eblora"]) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def state(index: int, phase: str, step: int = 0, steps: int = 0) -> Progress:
    return Progress("nouns", index, 2, phase, step, steps, 0.5)


def test_the_time_left_comes_from_the_work_of_this_call() -> None:
    now = Clock()
    clock = RunClock({"a": 1.0, "b": 3.0}, 400.0, now)
    now.now += 30
    clock.update("a", state(0, "zero-shot", 1, 2))
    assert clock.seconds_left() == 370  # as expected before anything was trained
    clock.update("a", state(0, "prepare"))
    now.now += 40
    clock.update("a", state(1, "prepare"))  # half of a, so an eighth of everything, in 40 seconds
    assert clock.done == pytest.approx(1 / 8)
    assert clock.seconds_left() == pytest.approx(7 * 40)
    assert clock.line() == "a: task 2 of 2, nouns, prepare; about 5 minutes left"
    clock.finish("a")
    assert clock.done == pytest.approx(1 / 4)


def test_passes_for_statistics_have_batches_and_the_time_left() -> None:
    now = Clock()
    clock = RunClock({"a": 1.0}, None, now)
    clock.update("a", state(0, "prepare"))
    first = Progress("nouns", 0, 2, "statistics", 5, 10, passes=1, seconds_left=42.0)
    clock.update("a", first)
    assert clock.line() == "a: task 1 of 2, nouns, statistics, pass 1: batch 5 of 10, 40 seconds to the end of the pass"
    assert clock.done == pytest.approx(0.05 / 2)  # half of a tenth of the first of two tasks
    clock.update("a", Progress("nouns", 0, 2, "statistics", 0, 10, passes=2))
    assert clock.done == pytest.approx(0.05 / 2)
    assert clock.line() == "a: task 1 of 2, nouns, statistics, pass 2: batch 0 of 10"
    clock.update("a", state(0, "finish"))
    clock.update("a", Progress("nouns", 0, 2, "statistics", 10, 10, passes=1, seconds_left=0.0))
    assert clock.done == pytest.approx(0.85 / 2)


def test_tasks_of_an_earlier_call_took_no_time_of_this_one() -> None:
    now = Clock()
    clock = RunClock({"done": 1.0, "half": 1.0, "new": 2.0}, None, now)
    clock.finish("done")
    clock.update("half", state(1, "prepare"))
    assert clock.seconds_left() is None
    now.now += 60
    clock.finish("half")
    assert clock.done == pytest.approx(1 / 2)
    assert clock.seconds_left() == pytest.approx(60 / (1 / 8) / 2)


def test_a_time_that_was_expected_and_is_over_is_not_shown() -> None:
    now = Clock()
    clock = RunClock({"a": 1.0}, 10.0, now)
    now.now += 11
    assert (clock.seconds_left(), clock.line()) == (None, "starting")


def test_a_pipe_gets_a_line_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setattr(progress.screen, "_file", written)  # `file` would be restored as the captured stream
    with show_runs({"a": 1.0}) as display:
        display.on_progress("a")(state(1, "train", 3, 6))
        while written.getvalue().count("\n") < 2:
            time.sleep(0.01)
    lines = written.getvalue().rstrip().splitlines()  # rich before 14.3 ends with an empty line
    assert all(line.startswith("a: task 2 of 2, nouns, train 3/6, loss 0.500") for line in lines[1:])
    after = written.getvalue()
    time.sleep(0.1)
    assert written.getvalue() == after  # nothing is printed once the runs are over


def test_a_terminal_gets_one_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = import_module("manifold_cl.cli.screen")  # the package has an object of that name
    terminal = screen.Screen(stderr=True, width=120)
    terminal._force_terminal = terminal.is_interactive = True
    terminal.file = written
    for module in (screen, progress):
        monkeypatch.setattr(module, "screen", terminal)
    with show_runs({"a": 1.0}, 90.0) as display:
        display.on_progress("a")(state(0, "train", 3, 6))
        display.finish("a")
    text = written.getvalue()
    assert "complete" in text
    assert text.endswith("\x1b[2K")  # the line of the bar is erased


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "10 seconds"), (87, "90 seconds"), (530, "9 minutes"), (7500, "2 hours 5 minutes")]
)
def test_times_are_rounded_for_people(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
