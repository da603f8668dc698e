"""Links that work on a code host and on the site: tutorials, source files, names of the API, hidden directives.

Pages are plain Markdown. What only the site can show is a directive inside a comment, `<!-- {name} ... -->`.
"""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

DIRECTIVE = re.compile(r"^<!-- (\{[a-z-]+\}.*?)\n?-->", re.M | re.S)
TUTORIAL = re.compile(r"\]\(((?:\.\./)*)gallery/(plot_\w+)\.py\)")
OUTSIDE = re.compile(r"(\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(((?:\.\./)[^)\s#]*)(#[^)\s]*)?\)")
BACK = re.compile(r'(<a class="viewcode-back" href="[^"#]*#)([^"]+)(")')
PACKAGES = ("manifold_cl", "analysis")


def for_the_site(text: str, docname: str, root: Path, repository: str, branch: str) -> str:
    """The source of a Markdown page with hidden directives shown, and with its links as the site has them."""
    folder = posixpath.dirname(f"docs/{docname}")

    def source_file(found: re.Match[str]) -> str:
        label, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith(("docs/", "..")):
            return found.group()
        if repository:
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"{label}({repository}/{kind}/{branch}/{path}{anchor})"
        return f"{label}(path:{target})" if (root / path).is_file() else label[1:-1]  # a copy; a folder has no page

    text = DIRECTIVE.sub(r"```\1\n```", text)
    text = TUTORIAL.sub(r"](\1tutorials/\2.rst)", text)
    return OUTSIDE.sub(source_file, text)


def on_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Rewrite the links of a Markdown page for the site."""
    if Path(app.env.doc2path(docname)).suffix == ".md":
        config = app.config
        repository = (config.repository_url, config.repository_branch)
        content[0] = for_the_site(content[0], docname, Path(app.srcdir).parent, *repository)


class PageRole(SphinxRole):
    """``:page:`text <method.md#anchor>``: a section of a Markdown page, named as Markdown names it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        found = re.fullmatch(r"(.+?)\s*<(.+?)\.md(?:#(.*))?>", self.text, re.S)
        if not found:
            message = self.inliner.reporter.error(
                f"not of the form text <page.md#anchor>: {self.text}", line=self.lineno
            )
            return [], [message]
        text, page, anchor = found.groups()
        reference = addnodes.pending_xref(
            refdomain="doc",
            reftype="myst",
            reftarget=page,
            reftargetid=anchor,
            refexplicit=True,
            refdoc=self.env.docname,
        )
        reference += nodes.inline("", text, classes=["xref", "myst"])
        return [reference], []


class NameLinks(SphinxPostTransform):
    """Links names of the API that a Markdown page sets as code, at their first place in each section."""

    default_priority = 900  # after references are resolved
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Link names; a link to an API page whose text is one name gets that name's anchor."""
        if not str(self.env.doc2path(self.env.docname)).endswith(".md"):
            return
        linked: set[tuple[int, str]] = set()
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            found = self._object(name.removesuffix("()"), called=name.endswith("()"))
            if found is None:
                continue
            docname, anchor, full = found
            above = self._enclosing(literal)
            if isinstance(above, nodes.reference):
                uri = above.get("refuri", "")
                if (
                    above.astext() == name
                    and uri
                    and uri == self.app.builder.get_relative_uri(self.env.docname, docname)
                ):
                    above["refuri"] = f"{uri}#{anchor}"
            elif above is None:
                section = literal.parent
                while section.parent is not None and not isinstance(section, nodes.section):
                    section = section.parent
                if (id(section), full) not in linked:
                    linked.add((id(section), full))
                    reference = make_refnode(self.app.builder, self.env.docname, docname, anchor, [], full)
                    literal.replace_self(reference)
                    reference += literal

    def _enclosing(self, node: nodes.Node) -> nodes.Node | None:
        while node.parent is not None:
            node = node.parent
            if isinstance(node, (nodes.reference, nodes.title)):
                return node
        return None

    def _object(self, name: str, called: bool) -> tuple[str, str, str] | None:
        """(page, anchor, full name) of the documented object with this name, if it is clear which one is meant."""
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) or not (called or re.search(r"[A-Z_.]", name)):
            return None
        objects = self.env.get_domain("py").objects  # type: ignore[attr-defined]
        for full in (name, *(f"{package}.{name}" for package in PACKAGES)):
            if full in objects and objects[full].objtype != "module":
                return objects[full].docname, objects[full].node_id, full
        hits = {
            entry[:2]: full
            for full, entry in objects.items()
            if full.endswith(f".{name}")
            and not entry.aliased
            and ("." in name or entry.objtype in ("class", "function", "data"))
        }
        if len(hits) != 1:
            return None
        ((docname, anchor), full) = hits.popitem()
        return docname, anchor, full


def on_start(app: Sphinx) -> None:
    """Remove what an earlier build left: pages of source code, which are not made again, and renamed tutorials."""
    shutil.rmtree(Path(app.outdir) / "_modules", ignore_errors=True)
    source = Path(app.srcdir)
    scripts = {path.stem for path in source.glob("gallery/plot_*.py")}
    for page in source.glob("tutorials/plot_*.rst"):
        if page.stem not in scripts:
            page.unlink()


def on_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Point the links from source code back to the API at the names as documented: viewcode keeps one name per file."""
    if page.startswith("_modules/") and "body" in context:
        context["body"] = BACK.sub(lambda found: f"{found[1]}{_anchor(app, found[2])}{found[3]}", context["body"])


def _anchor(app: Sphinx, name: str) -> str:
    objects = app.env.get_domain("py").objects  # type: ignore[attr-defined]
    if name in objects:
        return str(objects[name].node_id)
    package, *rest = name.split(".")
    for start in range(len(rest)):
        tail = "." + ".".join(rest[start:])
        hits = {
            each.node_id for full, each in objects.items() if full.startswith(f"{package}.") and full.endswith(tail)
        }
        if len(hits) == 1:
            return str(hits.pop())
    return name


def setup(app: Sphinx) -> dict[str, bool]:
    """Register settings, handlers and the role."""
    app.add_config_value("repository_url", "", "env", str)
    app.add_config_value("repository_branch", "main", "env", str)
    app.connect("builder-inited", on_start)
    app.connect("source-read", on_source)
    app.connect("html-page-context", on_page, priority=900)
    app.add_role("page", PageRole())
    app.add_post_transform(NameLinks)
    return {"parallel_read_safe": True}
