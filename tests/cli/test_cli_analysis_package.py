"""A user's own ``analysis`` is named, and not executed."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = "from manifold_cl.cli import main; main(['analyze', 'anything'])"


@pytest.mark.parametrize("name", ["analysis/__init__.py", "analysis.py", "analysis/notes.txt"])
def test_a_package_of_the_same_name_is_named_and_not_executed(tmp_path: Path, name: str) -> None:
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("raise SystemExit('executed')")
    # ``python -c`` puts the current folder in front of the installed packages, as notebooks and scripts do
    result = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "executed" not in result.stderr
    if name.endswith(".py"):
        assert str(own) in result.stderr
        assert "Rename it" in result.stderr
    else:  # a folder without __init__.py does not shadow a package
        assert "anything" in result.stderr
