"""The script that measures the tests refuses workers, whose times it cannot see."""

import sys
from pathlib import Path

import pytest

import manifold_cl


@pytest.mark.parametrize("workers", [["-n", "auto"], ["-n2"], ["--numprocesses=2"]])
def test_workers_are_refused_and_nothing_is_written(
    workers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(f"{manifold_cl.__path__[0]}/../benchmarks")
    import suite_times

    monkeypatch.setattr(suite_times, "RESULT", tmp_path / "times.json")
    monkeypatch.setattr(suite_times, "measure", lambda _: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["suite_times.py", *workers, "tests/test_kinds.py"])
    with pytest.raises(SystemExit):
        suite_times.main()
    assert "leave out -n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
