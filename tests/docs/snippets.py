"""The code blocks of the pages, with their marks.

A mark is a comment above the block, which no reader sees: ``<!-- snippet: two processes -->``,
``<!-- snippet: of a run, FOLDER -->`` (it reads a finished run there), ``<!-- snippet: slow, REASON -->`` or
``<!-- snippet: not run, REASON -->``.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"_build", "_ext", "gallery", "tutorials"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [
    path
    for path in sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")])
    if path.relative_to(DOCS).parts[0] not in GENERATED
]
FENCE = re.compile(r"^(?:<!-- snippet: ([^\n]*?) -->\n\n?)?( *)(`{3,})(\w*)[^\n]*\n(.*?)^\2\3[ ]*$", re.M | re.S)
DIRECTIVE = re.compile(r"^()( *)\.\. (code-block):: (\w+)\n\n((?:\2 +[^\n]*\n|\n)+)", re.M)
MARKS = ("two processes", "of a run", "slow", "not run")
PYTHON = {"python", "py", "python3"}
SHELL = {"sh", "bash", "console", "shell"}


@dataclass(frozen=True)
class Block:
    """One block: where it stands, its language, its mark with the reason, its text."""

    page: Path
    line: int
    language: str
    mark: str
    reason: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """Every code block of a page, in order."""
    if text is None:
        text = page.read_text(encoding="utf-8")
    found = []
    for part in (FENCE if page.suffix == ".md" else DIRECTIVE).finditer(text):
        mark, _, reason = (part[1] or "").partition(", ")
        line = text.count("\n", 0, part.start(5)) + 1
        found.append(Block(page, line, part[4], mark, reason, textwrap.dedent(part[5])))
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}
