"""Markdown as a code host reads it: the anchors of headings, and the links of a page outside code."""

import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2`*[ ]*$", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\](?:\([^)]*\))?)*)\]\(([^()\s]*(?:\([^()]*\)[^()\s]*)*)(?:\s+\"[^\"]*\")?\)"
)
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.M)


def prose(text: str) -> str:
    """The text without fenced blocks and comments."""
    return COMMENT.sub("", FENCE.sub("", text))


def slug(title: str) -> str:
    """The anchor of a heading: lower case, words joined by hyphens, no other signs."""
    title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def anchors(text: str) -> dict[str, str]:
    """Anchor -> title of every heading; a repeated title gets ``-1``, ``-2``, ..."""
    found: dict[str, str] = {}
    for title in HEADING.findall(prose(text)):
        base = anchor = slug(title)
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{base}-{number}"
        found[anchor] = title.replace("`", "").strip()
    return found


def links(text: str) -> Iterator[tuple[bool, str, str]]:
    """(is an image, text, target) of every inline link outside code."""
    masked = CODE.sub(lambda code: "`" * len(code.group()), prose(text))
    for image, label, target in LINK.findall(masked):
        yield bool(image), label, target
        for inner, inner_label, inner_target in LINK.findall(label):
            yield bool(inner), inner_label, inner_target


def anchor_of(page: Path, title: str) -> str:
    """The anchor of the section with this title, its number and signs of code left out; empty if there is none."""
    wanted = title.replace("`", "")
    for anchor, each in anchors(page.read_text(encoding="utf-8")).items():
        if re.sub(r"^[\d.]+ ", "", each) == wanted:
            return anchor
    return ""
