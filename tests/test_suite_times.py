"""The script that measures the tests: which files it notes, and that it refuses workers, whose times it cannot see."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import manifold_cl


@pytest.fixture
def suite_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with its result in an empty folder."""
    monkeypatch.syspath_prepend(f"{manifold_cl.__path__[0]}/../benchmarks")
    import suite_times

    monkeypatch.setattr(suite_times, "RESULT", tmp_path / "times.json")
    return suite_times


@pytest.mark.parametrize("workers", [["-n", "auto"], ["-n2"], ["--numprocesses=2"]])
def test_workers_are_refused_and_nothing_is_written(
    workers: list[str],
    suite_times: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(suite_times, "measure", lambda _: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["suite_times.py", *workers, "tests/test_kinds.py"])
    with pytest.raises(SystemExit):
        suite_times.main()
    assert "leave out -n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_are_collected_without_such_a_test_lose_their_entry(
    suite_times: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_quick_one.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_became_slow.py").write_text("import pytest\n@pytest.mark.slow\ndef test_it(): pass\n")
    (tmp_path / "test_elsewhere.py").write_text("")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    old = {"tests": 9, **dict.fromkeys(suite_times.PHASES, 1.0), "longest": {}}
    known = {"fast": dict.fromkeys(["test_became_slow.py", "test_elsewhere.py", "test_removed.py"], old)}
    (tmp_path / "times.json").write_text(json.dumps(known))
    monkeypatch.chdir(tmp_path)
    options = ["-p", "no:cacheprovider", "-m", "not slow"]
    assert suite_times.measure([*options, "test_quick_one.py", "test_became_slow.py"]) == 0
    measured = json.loads((tmp_path / "times.json").read_text())["fast"]
    assert set(measured) == {"test_quick_one.py", "test_elsewhere.py"}
    assert measured["test_quick_one.py"]["tests"] == 1
    assert measured["test_elsewhere.py"] == old
