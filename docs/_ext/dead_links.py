"""Warns of every link of the built site to a page, file or anchor that it does not have: ``make docs`` then fails."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
CREATED_BY_SCRIPT = {"search.html"}  # pages whose content a script writes
TARGETS = {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src"), ("source", "src")}


class _Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            if value is not None and (tag, name) in TARGETS:
                self.links.append(value)


def dead_links(folder: Path) -> list[tuple[str, str]]:
    """(page, target) of every internal link without a target, once each."""
    pages = {
        path.resolve(): _Page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.parts
    }
    found = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            known = pages.get(target)
            if not target.exists() or (known and anchor not in known.anchors and target.name not in CREATED_BY_SCRIPT):
                found.append((str(path.relative_to(folder.resolve())), link))
    return found


def on_finished(app: Sphinx, error: Exception | None) -> None:
    """Warn of each."""
    if error is None and app.builder.format == "html":
        for page, link in dead_links(Path(app.outdir)):
            LOG.warning("%s: dead link to %s", page, link, type="links", subtype="dead")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handler."""
    app.connect("build-finished", on_finished, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
