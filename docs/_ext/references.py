"""The page of references, written from `references.bib` as plain Markdown: ``python docs/_ext/references.py``."""

import re
import unicodedata
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parent.parent
HEAD = """# References

<!-- Written from references.bib by `python docs/_ext/references.py`. -->

For readers who follow a citation. No geometry is needed to read the list.

Docstrings and pages cite by key, such as `edelman1998geometry`: author, year, first word.
"""
ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}
FIELD = re.compile(r"(\w+)\s*=\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")

Entry = dict[str, str]


def _plain(text: str) -> str:
    text = re.sub(
        r"\{?\\(['`^\"~])\{?(\w)\}?\}?", lambda sign: unicodedata.normalize("NFC", sign[2] + ACCENTS[sign[1]]), text
    )
    text = re.sub(r"\{?\\AA\}?", "Å", text).replace("--", "–")
    return re.sub(r"[{}]", "", text)


@cache
def entries() -> dict[str, Entry]:
    """Key -> fields of every entry, LaTeX written as Unicode."""
    source = (DOCS / "references.bib").read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^@", source, flags=re.M)[1:]:
        key = re.match(r"\w+\{(\S+),", part)
        assert key, part
        found[key[1]] = {name: _plain(value) for name, value in FIELD.findall(part)}
    return found


def _authors(entry: Entry) -> list[tuple[str, str]]:
    """(family name, given names) of each author."""
    pairs = [name.partition(",") for name in entry["author"].split(" and ")]
    return [(family.strip(), given.strip()) for family, _, given in pairs]


def short(entry: Entry) -> str:
    """The authors as a citation names them: one, two, or the first and "et al."."""
    families = [family for family, _ in _authors(entry)]
    if len(families) > 2 or families[-1] == "others":
        return f"{families[0]} et al."
    return " and ".join(families)


def _where(entry: Entry) -> str:
    venue = next(
        (entry[name] for name in ("journal", "booktitle", "publisher", "school", "howpublished") if name in entry), ""
    )
    if "series" in entry:
        venue += f", {entry['series']}"
    if "volume" in entry:
        venue += f" {entry['volume']}"
    if "number" in entry:
        venue += f" ({entry['number']})"
    if "pages" in entry:
        venue += f", {entry['pages']}"
    return ", ".join(part for part in (venue, entry["year"]) if part)


def _links(entry: Entry) -> str:
    found = []
    if "doi" in entry:
        found.append(f"[doi:{entry['doi']}](https://doi.org/{entry['doi']})")
    if "eprint" in entry:
        found.append(f"[arXiv:{entry['eprint']}](https://arxiv.org/abs/{entry['eprint']})")
    if "url" in entry:
        found.append(f"<{entry['url']}>")
    return "".join(f" {link}." for link in found)


def page() -> str:
    """The Markdown page: one heading per key, so that `references.md#key` is a link everywhere."""
    parts = [HEAD]
    for key, entry in sorted(entries().items()):
        names = [f"{given} {family}".strip() for family, given in _authors(entry)]
        authors = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
        parts.append(f"## {key}\n\n{authors}. *{entry['title']}*. {_where(entry)}.{_links(entry)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "references.md").write_text(page(), encoding="utf-8")
