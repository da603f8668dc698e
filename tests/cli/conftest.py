"""The command as a user calls it."""

from collections.abc import Iterator

import pytest
from blank_figures import figures
from command import Call, Ended
from forks import forked_workers

from manifold_cl import cli


@pytest.fixture(autouse=True, scope="module")
def _blank_figures() -> Iterator[None]:
    """Pages with blank figures, until the file ends; the default run of test_cli_runs.py has them drawn."""
    with figures(drawn=False):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forked_workers() -> Iterator[None]:
    """Cells of studies and searches in forks, until the file ends; those of tests/study are new processes."""
    with forked_workers():
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the command and catches what it prints, on a screen so wide that no table breaks."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(each) for each in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, " ".join(err.split()))

    return run
