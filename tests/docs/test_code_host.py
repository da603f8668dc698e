"""The Markdown reads well on a code host: every link resolves there, and nothing on the page is for the site only."""

import importlib.util
import re
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"_build", "tutorials"}


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


code_host, references = _load("code_host"), _load("references")

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(DOCS).parts[0] not in GENERATED]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]

SITE_ONLY = {
    "a role": r"\{[a-z]+(?::[a-z]+)*\}`",
    "a directive in sight": r"^ *(?:`{3,}|~{3,}|:{3,})\{",
    "a colon fence": r"^:{3,}",
    "a label": r"^\([\w-]+\)=\s*$",
    "attributes": r"\{[.#][\w-]+\}",
    "a substitution": r"\{\{.*?\}\}",
}


def problems_of(path: Path, text: str) -> list[str]:
    """What a reader on a code host could not follow or would see as raw syntax."""
    found = []
    for is_image, label, target in code_host.links(text):
        if not label.strip():
            found.append(f"no text: {target}")
        if re.match(r"(?:https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.is_relative_to(ROOT) or not (file == path or file.exists()):
            found.append(f"no such file: {target}")
        elif file.is_relative_to(DOCS) and file != DOCS and file.relative_to(DOCS).parts[0] in GENERATED:
            found.append(f"written by a build: {target}")
        elif is_image and file.suffix not in {".png", ".svg", ".jpg", ".gif"}:
            found.append(f"not an image: {target}")
        elif anchor and file.suffix == ".md":
            known = code_host.anchors(text if file == path else file.read_text(encoding="utf-8"))
            if anchor not in known:
                found.append(f"no such section: {target}")
        elif anchor and not re.fullmatch(r"L\d+(-L\d+)?", anchor):
            found.append(f"an anchor in a file without sections: {target}")
    rest = code_host.LINK.sub("", code_host.CODE.sub("", code_host.prose(text)))
    found += [f"a link that does not end: {part}" for part in re.findall(r"\]\([^\n]{0,40}", rest)]
    code_kept = code_host.COMMENT.sub("", text)
    for kind in ("a directive in sight", "a colon fence"):
        found += [f"{kind}: {hit}" for hit in re.findall(SITE_ONLY[kind], code_kept, re.M)]
    for kind in ("a role", "a label", "attributes", "a substitution"):
        masked = re.sub(r"\$[^$\n]+\$|\$\$.*?\$\$", "", code_host.prose(text), flags=re.S)
        found += [f"{kind}: {hit}" for hit in re.findall(SITE_ONLY[kind], masked, re.M)]
    return found


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_link_resolves_and_no_syntax_of_the_site_shows(path: Path) -> None:
    assert problems_of(path, path.read_text(encoding="utf-8")) == []


def test_links_and_anchors_are_found() -> None:
    all_links = [link for path in PAGES for link in code_host.links(path.read_text(encoding="utf-8"))]
    assert len(all_links) > 150
    assert sum("#" in target for _, _, target in all_links) > 30


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[](data.md)", "no text: data.md"),
        ("[a](nowhere.md)", "no such file: nowhere.md"),
        ("[a](data)", "no such file: data"),
        ("[a](tutorials/plot_03.rst)", "no such file: tutorials/plot_03.rst"),
        ("[a](../../out.md)", "no such file: ../../out.md"),
        ("[a](data.md#no-such-part)", "no such section: data.md#no-such-part"),
        ("# Here\n\n[a](#there)", "no such section: #there"),
        ("![a](data.md)", "not an image: data.md"),
        ("[![](mark.svg)](data.md)", "no such file: mark.svg"),
        ("See {py:class}`Task`.", "a role: {py:class}`"),
        ("```{include} data.md\n```", "a directive in sight: ```{"),
        (":::{note}\nA\n:::", "a colon fence: :::"),
        ("(here)=\n# Title", "a label: (here)="),
        ("([a](data.md, b)", "a link that does not end: ](data.md, b)"),
    ],
)
def test_each_problem_is_named(text: str, problem: str) -> None:
    assert problem in problems_of(DOCS / "one.md", text)


def test_what_a_code_host_hides_or_shows_well_is_no_problem() -> None:
    text = (
        "# The `first` part: 1.5\n\n# Twice\n\n# Twice\n\n<!-- {toctree}\nnowhere\n-->\n\n"
        "[a](#the-first-part-15) [b](#twice-1)\n"
        "`[code](nowhere.md)` $x_{.5}$ [tutorial](gallery/ruff.toml) [folder](decisions) [out](https://example.org)\n\n"
        "```md\n[](nowhere.md)\n```\n"
    )
    assert problems_of(DOCS / "one.md", text) == []


def test_the_page_of_references_is_that_of_the_bibliography() -> None:
    assert (DOCS / "references.md").read_text(encoding="utf-8") == references.page()


def test_the_page_of_decisions_lists_them_all() -> None:
    text = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    listed = {target: label for _, label, target in code_host.links(text)}
    pages = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("decisions/0*.md")}
    assert listed == {name: next(iter(code_host.anchors(page).values())) for name, page in pages.items()}
