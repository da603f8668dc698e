"""A page as its reader sees it."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tables as rows of text, what could be fetched, images (those of findings apart) and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.marked: list[str] = []
        self.tips: dict[str, str] = {}
        self._tip, self._findings = "", False
        self.evidence: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[key] or "" for key in ("src", "href", "srcset", "data") if key in found]
        if tag == "ol":
            self._findings = True
        if tag == "img":
            (self.evidence if self._findings else self.images).append(found)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._tip = found.get("title") or ""
            self.tables[-1][-1].append("")
            self.marked += [tag] if found.get("class") == "best" else []
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._findings &= tag != "ol"

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
            self.tips |= {data: self._tip} if self._tip else {}

    def table(self, heading: str) -> dict[str, dict[str, str]]:
        """First column to a row by headings, of the first table with this heading; repeated headings count."""
        found = next(rows for rows in self.tables if heading in rows[0])
        heads = [f"{head} of {found[0][place - 1]}" if head == "p" else head for place, head in enumerate(found[0])]
        return {" ".join(row[0].split()): dict(zip(heads, map(squeezed, row), strict=True)) for row in found[1:]}


def squeezed(text: str) -> str:
    return " ".join(text.split())
