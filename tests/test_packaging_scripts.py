"""The scripts of ``.ci``: wrong input is refused before anything is built or installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / ".ci"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corre"], "no environment of this name: corre; there are core, "),
        (["--files", "core"], "--files installs nothing"),
        (["--files", "--newest"], "--files installs nothing"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, monkeypatch, capsys):
    packages = script("packages", monkeypatch)
    monkeypatch.setattr(packages, "build", lambda folder: pytest.fail("it builds"))
    monkeypatch.setattr(sys, "argv", ["packages.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        packages.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_environment_that_failed_starts_again_from_nothing(monkeypatch, tmp_path):
    packages = script("packages", monkeypatch)
    folder, seen = tmp_path / "core", []
    (folder / "jobs" / "run").mkdir(parents=True)

    def run(command, *, cwd=None):
        if cwd is not None:
            seen.append(sorted(path.name for path in cwd.iterdir()))
        return ""

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(packages.venv, "create", lambda *_, **__: None)
    packages.environment("core", tmp_path / "a.whl", folder, newest=False)
    assert seen[0] == ["study.toml", "toy.py"]


def test_help_installs_nothing(monkeypatch, capsys):
    oldest = script("oldest", monkeypatch)
    monkeypatch.setattr(oldest.subprocess, "run", lambda *_, **__: pytest.fail("it installs"))
    monkeypatch.setattr(sys, "argv", ["oldest.py", "--help"])
    assert oldest.main() == 0
    assert "build/oldest" in capsys.readouterr().out


def test_lower_bounds_are_exact_versions(monkeypatch):
    bounds = script("oldest", monkeypatch).bounds()
    assert {"torch", "geoopt", "peft", "transformers"} <= bounds.keys()
    assert all(version[0].isdigit() for version in bounds.values())


def project(folder: Path, dependencies: list[str], first: list[str], second: list[str]) -> Path:
    extras = {**{name: [] for name in ("bench", "pymanopt", "parquet", "hub", "llm")}, "peft": first, "hf": second}
    lines = [f"{name} = {wanted}" for name, wanted in extras.items()]
    text = f"[project]\ndependencies = {dependencies}\n[project.optional-dependencies]\n" + "\n".join(lines)
    (folder / "pyproject.toml").write_text(text)
    return folder


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_bounds_the_pin_is_the_oldest_version_that_both_allow(turned, monkeypatch, tmp_path):
    oldest = script("oldest", monkeypatch)
    extras = [["peft>=0.21,<0.22", "a>=5.9"], ["b<0.10, >=0.9", "a>=5.10"]]
    monkeypatch.setattr(oldest, "ROOT", project(tmp_path, ["torch>=2.6"], *(extras[::-1] if turned else extras)))
    assert oldest.bounds() == {"torch": "2.6", "peft": "0.21", "b": "0.9", "a": "5.10"}


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch>=2.6,>=2.7"])
def test_a_requirement_without_one_lower_bound_is_refused(requirement, monkeypatch, tmp_path):
    oldest = script("oldest", monkeypatch)
    monkeypatch.setattr(oldest, "ROOT", project(tmp_path, [requirement], [], []))
    with pytest.raises(SystemExit, match="lower bounds in 'torch"):
        oldest.bounds()
