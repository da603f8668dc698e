"""The shell commands of the pages exist: subcommands, options, make targets, scripts, extras of pip."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from snippets import BLOCKS, PAGES, ROOT, SHELL

from manifold_cl.cli import app

INLINE = re.compile(r"(?<!`)`{1,2}((?:manifold-cl|make) [^`]+)`{1,2}(?!`)")
WITH_TUTORIALS = [*PAGES, ROOT / "benchmarks/README.md", *sorted((ROOT / "docs/gallery").glob("*.py"))]
FOREIGN = {"--require-hashes", "--no-build-isolation", "--nproc-per-node", "--multi_gpu", "--repository", "--dry"}
"""Options of pip, torchrun, accelerate and twine, and of ``benchmarks/gpu.py`` away from its name."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


@cache
def root() -> Any:
    return typer.main.get_command(app)


def lines_of(code: str) -> Iterator[str]:
    """The commands of a block: continued lines joined, prompts, comments and output left out."""
    code = code.replace("\\\n", " ")
    prompted = re.search(r"^\$ ", code, re.M) is not None
    for line in code.splitlines():
        if prompted and not line.startswith("$ "):
            continue
        line = line.removeprefix("$ ").strip()
        if line and not line.startswith("#"):
            yield line


def text_of(page: Path) -> str:
    """A page's text; of a tutorial, its comments and docstring without the marks of comments."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".py":
        return text
    return str(ast.get_docstring(ast.parse(text))) + "\n" + re.sub(r"^#(?: |$)", "", text, flags=re.M)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of blocks and of code in sentences."""
    for page in WITH_TUTORIALS:
        place = str(page.relative_to(ROOT))
        text = text_of(page)
        for block in BLOCKS.get(page, ()):
            if block.language in SHELL:
                yield from ((place, line) for line in lines_of(block.code))
        if page.suffix == ".py":
            yield from ((place, line.strip()) for line in re.findall(r"^ +((?:manifold-cl|make) .*)$", text, re.M))
        for inline in INLINE.findall(text):
            yield place, " ".join(inline.split())


def problem(line: str) -> str:
    """Why this command cannot work, or nothing."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return str(error)
    while words and re.fullmatch(r"\w+=.*", words[0], re.S):
        words = words[1:]
    for separator in ("&&", ";", "|", "||"):
        if separator in words:
            at = words.index(separator)
            return problem(shlex.join(words[:at])) or problem(shlex.join(words[at + 1 :]))
    if not words:
        return ""
    program = Path(words[0]).name
    if program == "manifold-cl":
        return _in_parser(words[1:])
    if program == "make":
        wrong = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in TARGETS]
        return f"make has no {wrong}" if wrong else ""
    if program == "pip":
        return _in_pip(words)
    if program in ("python", "python3", "torchrun", "accelerate", "bash"):
        return _in_script(words[1:])
    return ""


def _in_parser(words: list[str]) -> str:
    command: Any = root()
    path = ["manifold-cl"]
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            if (default := getattr(command, "default", None)) is not None and words[0] not in ("-h", "--help"):
                words = [default, *words]
            elif words[0].startswith("-"):
                break
            else:
                return f"{' '.join(path)} has no command {words[0]}"
        command = command.commands[words[0]]
        path.append(words.pop(0))
    options = {option: part for part in command.params for option in (*part.opts, *part.secondary_opts)}
    for word in words:
        option = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", word) and option not in {*options, "--help"}:
            return f"{' '.join(path)} has no option {option}"
    return ""


def _in_pip(words: list[str]) -> str:
    for word in words:
        name, _, extras = word.partition("[")
        unknown = {each.strip() for each in extras.rstrip("]").split(",")} - EXTRAS if extras else set()
        if name == "manifold-cl":
            return "no package index has manifold-cl"
        if name == "." and unknown:
            return f"no such extras: {unknown}"
    return ""


def _in_script(words: list[str]) -> str:
    if "-m" in words and words[words.index("-m") + 1] == "manifold_cl.cli":
        return _in_parser(words[words.index("-m") + 2 :])
    script = next((word for word in words if word.endswith((".py", ".sh")) or word.startswith(".ci/")), "")
    if not script or "/" not in script:
        return ""
    if not (ROOT / script).is_file():
        return f"no such file: {script}"
    text = (ROOT / script).read_text(encoding="utf-8")
    wrong = [word for word in words[words.index(script) + 1 :] if word.startswith("--") and f'"{word}"' not in text]
    return f"{script} has no option {wrong}" if wrong else ""


@pytest.mark.parametrize("page", WITH_TUTORIALS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    mine = [line for place, line in commands() if place == str(page.relative_to(ROOT))]
    assert {line: why for line in mine if (why := problem(line))} == {}


def options_of(command: Any) -> set[str]:
    """Every option of a command and of the commands below it."""
    own = {option for part in command.params for option in (*part.opts, *part.secondary_opts)}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", WITH_TUTORIALS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_options_that_sentences_name_exist(page: Path) -> None:
    """Those of scripts stand beside the script's name, in one piece of code."""
    text = re.sub(r"^( *)```.*?^\1```", "", text_of(page), flags=re.M | re.S)
    known = options_of(root()) | FOREIGN | {"--help"}
    pieces = [piece for piece in re.findall(r"(?<!`)`{1,2}([^`]+)`{1,2}(?!`)", text) if ".py " not in piece]
    named = {option for piece in pieces for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", piece)}
    assert named - known == set()


def test_commands_are_found() -> None:
    assert sum(line.startswith("manifold-cl") for _, line in commands()) > 40


@pytest.mark.parametrize(
    "line",
    [
        "manifold-cl rum",
        "manifold-cl run --quik",
        "manifold-cl subspace grow",
        "manifold-cl run --quick && manifold-cl run --resum",
        "torchrun --nproc_per_node 2 -m manifold_cl.cli streams run UCIT --devise cuda",
        "make everything",
        "pip install 'manifold-cl[peft]'",
        "pip install -e '.[everything]'",
        "python examples/nothing.py",
        "python examples/hf_trainer.py --nothing",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert problem(line)


@pytest.mark.parametrize(
    "line",
    [
        "manifold-cl run --quick  # --not an option",
        "MANIFOLD_CL_CACHE=/x .venv/bin/manifold-cl info --json",
        "manifold-cl --help",
        "make test",
        "pip install -e '.[bench]'",
        "python examples/hf_trainer.py --out runs/trainer",
    ],
)
def test_a_right_command_passes(line: str) -> None:
    assert problem(line) == ""
