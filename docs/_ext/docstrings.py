"""Makes citations and references of the docstrings live: bibliography keys, sections of the essays, bare names."""

import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from code_host import anchor_of, anchors
from docutils import nodes
from references import entries, short
from sphinx.application import Sphinx
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).parent.parent
KEY = re.compile(r"\b[a-z]+(?:19|20)\d\d[a-z]+\b")
SECTION = re.compile(r"""`{0,2}docs/(?P<page>[\w-]+(?:/[\w-]+)?)\.md`{0,2}(?:,?\s"(?P<title>[^"]+)")?""")


def keys_in(text: str) -> set[str]:
    """Bibliography keys: author, year, word."""
    return set(KEY.findall(text))


def _cite(key: str) -> str:
    entry = entries().get(key)
    return f":page:`{short(entry)} ({entry['year']}) <references.md#{key}>`" if entry else key


def _link_sections(text: str) -> str:
    def link(found: re.Match[str]) -> str:
        page, title = found.group("page"), " ".join((found.group("title") or "").split())
        anchor = anchor_of(DOCS / f"{page}.md", title) if title else ""
        shown = title or _title(page)
        return f":page:`{shown} <{page}.md#{anchor}>`" if anchor else f":page:`{shown} <{page}.md>`"

    return SECTION.sub(link, text)


@cache
def _title(page: str) -> str:
    return next(iter(anchors((DOCS / f"{page}.md").read_text(encoding="utf-8")).values()))


def _comment_on(name: str) -> list[str] | None:
    """The string below a constant where it is defined: the module that re-exports it has only the type's docstring."""
    package, _, constant = name.rpartition(".")
    ours = [each for each in sys.modules if each.split(".")[0] in ("manifold_cl", "analysis")]
    for module in sorted(ours, key=lambda each: (not f"{each}.".startswith(f"{package}."), each)):
        with suppress(PycodeError):
            found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", constant))
            if found:
                return found
    return None


def on_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite a docstring's citations."""
    if what == "data" and (comment := _comment_on(name)):
        lines[:] = comment
    text = re.sub(r"^(\s*\w+: )(\w)\.$", r"\1``\2``.", "\n".join(lines), flags=re.M)  # "rank: r." would be a list
    lines[:] = _link_sections(KEY.sub(lambda found: _cite(found.group()), text)).split("\n")
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment: napoleon takes what stands before a colon of the first line for the type


def on_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a signature's aliases by their names, and defaults that only a repr could show as ``...``."""

    def plain(text: str | None) -> str | None:
        return text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text).replace("<factory>", "...")

    return plain(signature), plain(returns)


def on_missing(app: Sphinx, env: object, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """A bare name refers to the one documented object that ends with it, if there is exactly one."""
    if node.get("refdomain") != "py" or not node.get("reftarget"):
        return None
    target = node["reftarget"]
    objects = env.get_domain("py").objects  # type: ignore[attr-defined]
    hits = {entry[:2]: name for name, entry in objects.items() if name.endswith(f".{target}") and not entry.aliased}
    if len(hits) != 1:
        return None
    (docname, anchor), name = hits.popitem()
    return make_refnode(app.builder, node["refdoc"], docname, anchor, [content], name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handlers."""
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", on_signature)
    app.connect("missing-reference", on_missing)
    return {"parallel_read_safe": True}
