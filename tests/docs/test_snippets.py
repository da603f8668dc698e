"""Every code block of the pages works as copied: Python runs page by page, shell commands parse.

The Python blocks of a page run in their order, in one namespace and an empty folder. A TOML block that begins with
``# name.toml`` is first saved under that name.
"""

import ast
import builtins
import contextlib
import importlib.metadata
import inspect
import os
import re
import socket
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blank_figures import figures
from forks import forked_workers, start_ranks
from old_versions import needs_sharding
from snippets import BLOCKS, MARKS, PYTHON, ROOT, Block, blocks_of

from manifold_cl import eblora_adapters, inject_adapters, save_adapters
from manifold_cl.study import read_plan

pytest.importorskip("transformers")
pytest.importorskip("peft")

PYTHON_BLOCKS = [block for blocks in BLOCKS.values() for block in blocks if block.language in PYTHON]
BY_PAGE = {
    page: found for page, blocks in BLOCKS.items() if (found := [block for block in blocks if block.language in PYTHON])
}
SLOW = [page for page, blocks in BY_PAGE.items() if any(block.mark == "slow" for block in blocks)]
FAST = [  # the first page of the site is the README, and a page with slow blocks runs whole among the slow tests
    page
    for page, blocks in BY_PAGE.items()
    if page not in SLOW and page.name != "index.md" and any(block.mark == "" for block in blocks)
]
APART = [block for block in PYTHON_BLOCKS if block.mark == "two processes"]
NOT_RUN = [block for block in PYTHON_BLOCKS if block.mark == "not run"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(blocks: list[Block]) -> dict[str, Any]:
    """Execute blocks in one namespace; a traceback shows the page and its line."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(block.page), "exec"), space)
    return space


def save_files(page: Path, folder: Path) -> None:
    """What a reader has by then: the files that the page shows, and the run that an earlier command left."""
    for block in BLOCKS[page]:
        first = block.code.partition("\n")[0]
        if block.language == "toml" and first.startswith("# ") and first.endswith(".toml"):
            (folder / first[2:]).write_text(block.code, encoding="utf-8")
        for task in ("task-0", "task-1") if block.mark == "of a run" else ():
            model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            inject_adapters(model, ["0"], eblora_adapters(rank=2, initial_scale=1.0))
            save_adapters(model, folder / block.reason / task)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: Path, folder: Path, marks: tuple[str, ...]) -> None:
    if any("from trl import" in block.code for block in BY_PAGE[page] if block.mark in marks):
        pytest.importorskip("trl")
    save_files(page, folder)
    # every figure of the pages is drawn in tests/analysis
    with torch.random.fork_rng(devices=[]), forked_workers(), figures(drawn=False):
        torch.manual_seed(0)
        run([block for block in BY_PAGE[page] if block.mark in marks])


@pytest.mark.parametrize("page", FAST, ids=name)
def test_the_blocks_of_a_page_run_in_order(page: Path, empty_folder: Path) -> None:
    run_page(page, empty_folder, ("", "of a run"))


@pytest.mark.slow
@pytest.mark.stream
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_the_blocks_of_a_page_run_in_order_with_the_slow_ones(page: Path, empty_folder: Path) -> None:
    run_page(page, empty_folder, ("", "of a run", "slow"))


def on_rank(rank: int, ports: Sequence[int]) -> None:
    """Run all blocks as torchrun would start them, each on a port of its own."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for block, port in zip(APART, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run([block])


@needs_sharding
def test_distributed_blocks_run_on_two_processes(empty_folder: Path) -> None:
    assert len(APART) > 1
    ports = []
    for _ in APART:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    start_ranks(on_rank, (ports,), 2)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
def test_blocks_that_do_not_run_import_and_call_what_exists(block: Block) -> None:
    assert problems_of(block) == []


def problems_of(block: Block) -> list[str]:
    """Names that are not defined, and arguments that no function takes."""
    tree = ast.parse(block.code)
    imports = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    space: dict[str, Any] = {}
    exec(compile(imports, block.place, "exec"), space)
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known = {*space, *stored, *vars(builtins)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in known:
            found.append(f"{node.id} is not defined")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(space.get(node.func.id)):
            if any(isinstance(part, ast.Starred) for part in node.args) or any(
                word.arg is None for word in node.keywords
            ):
                continue
            try:
                words = {str(word.arg): None for word in node.keywords}
                inspect.signature(space[node.func.id]).bind(*node.args, **words)
            except TypeError as error:
                found.append(f"{node.func.id}: {error}")
    return found


def imports_of(blocks: list[Block]) -> set[str]:
    """Distributions that the blocks of a page import, of this package's modules those that need an extra."""
    found = set()
    for block in blocks:
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Import):
                found |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
                found |= {name for name in ("peft", "transformers", "lightning") if f".{name}" in node.module}
    return found - set(sys.stdlib_module_names) - {"manifold_cl", "analysis"}


def required(requirements: list[str]) -> set[str]:
    """Names of requirements, without those of other extras, and what these need themselves."""
    names = {re.split(r"[^\w.-]", each)[0].lower() for each in requirements if "extra ==" not in each}
    for name in list(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            below = importlib.metadata.requires(name) or []
            names |= {re.split(r"[^\w.-]", each)[0].lower() for each in below if "extra ==" not in each}
    return names


def missing_extras(page: Path, text: str, blocks: list[Block]) -> set[str]:
    """Distributions that a reader of the page lacks after ``pip install -e .`` and the extras that the page names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"\[extras?\]\([^)]*#extras\)((?:[ ,]|and|`\w+`)+)", text))))
    named |= {each for names in re.findall(r"\.\[([\w,]+)\]", text) for each in names.split(",")}
    has = required(project["dependencies"]) | set(re.findall(r"pip install (\w+)", text))
    for each in named & project["optional-dependencies"].keys():
        has |= required(project["optional-dependencies"][each])
    return imports_of(blocks) - has


@pytest.mark.parametrize("page", BY_PAGE, ids=name)
def test_a_page_names_the_extras_that_its_programs_import(page: Path) -> None:
    assert missing_extras(page, page.read_text(encoding="utf-8"), BY_PAGE[page]) == set()


def test_a_missing_extra_is_found() -> None:
    page = ROOT / "docs" / "one.md"
    blocks = blocks_of(page, "```python\nimport torch, peft\nfrom datasets import Dataset\n```\n")
    assert missing_extras(page, "", blocks) == {"peft", "datasets"}
    assert missing_extras(page, "the [extras](install.md#extras) `hf` and `peft`", blocks) == {"datasets"}
    assert missing_extras(page, "`pip install -e '.[peft]'`, `pip install datasets`", blocks) == set()


STUDIES = [
    block for blocks in BLOCKS.values() for block in blocks if block.language == "toml" and "[methods." in block.code
]


@pytest.mark.slow
@pytest.mark.parametrize("block", STUDIES, ids=lambda block: block.place)
def test_the_study_of_a_page_is_valid_in_an_empty_folder(block: Block, empty_folder: Path) -> None:
    for other in BLOCKS[block.page]:  # a stream of the reader's own is a file that the page shows
        if other.language in PYTHON and (own := re.search(r"--stream (\w+\.py):", other.code)):
            Path(own[1]).write_text(other.code, encoding="utf-8")
    Path("shown.toml").write_text(block.code, encoding="utf-8")
    plan = read_plan("shown.toml")
    assert len(plan.cells) == len(plan.entries) * len(plan.replicates) >= 6


def test_marks_are_known_and_give_reasons() -> None:
    for block in PYTHON_BLOCKS:
        assert block.mark in ("", *MARKS), block.place
        assert block.reason or block.mark in ("", "two processes"), block.place


def test_most_blocks_run() -> None:
    assert len(PYTHON_BLOCKS) >= 15
    assert len(NOT_RUN) <= 2, "a block that cannot run needs a good reason"


def test_a_broken_block_is_found(empty_folder: Path) -> None:
    page = ROOT / "docs" / "one.md"
    (first, second) = blocks_of(page, "```python\nx = 1\n```\n\n<!-- snippet: slow, why -->\n```py\nx + y\n```\n")
    assert (second.line, second.mark, second.reason) == (7, "slow", "why")
    with pytest.raises(NameError, match="'y'"):
        run([first, second])
    (gone,) = blocks_of(page, "```python\nfrom manifold_cl import protect\nprotect(model, strct=True)\n```\n")
    assert len(problems_of(gone)) == 2
