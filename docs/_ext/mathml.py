"""Formulas as MathML, made at build time: pages show them without a script and without the network."""

import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
BARS = {"|", "‖", "∥"}
SIGNS = {"−", "-", "+", "±"}
CLOSING = {")", "]", "}", "⟩"} | BARS
THIN = "0.167em"


def mathml(source: str, display: str) -> str:
    """The formula, with what latex2mathml gets wrong set right."""
    root = ElementTree.fromstring(convert(source, display=display))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{NAMESPACE}}}")
    for element in list(root.iter()):
        if element.tag in ("msub", "msup") and len(element) > 2:
            _group_base(element)  # a matrix with an index: brackets and table are one base
    for element in list(root.iter()):
        if element.tag in ("mrow", "math"):
            _bracket(element)
        if element.tag == "mspace" and element.get("width") == "negativethinmathspace":
            element.set("width", f"-{THIN}")  # browsers know lengths only
        if element.tag == "mi" and element.text == ";":
            element.tag = "mo"
        if element.tag == "mi" and re.fullmatch("[Α-Ω]", element.text or ""):
            element.set("mathvariant", "normal")
        if element.tag in ("mrow", "mtd", "math"):
            _space(element)
    root.set("xmlns", NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")


def _group_base(element: ElementTree.Element) -> None:
    *base, script = list(element)
    row = ElementTree.Element("mrow")
    row.extend(base)
    element[:] = [row, script]


def _bracket(row: ElementTree.Element) -> None:
    """Brackets of a matrix as the table's border: fonts without stretched brackets would show small ones."""
    for place in range(len(row) - 2):
        left, table, right = row[place : place + 3]
        if table.tag == "mtable" and (left.text, right.text) == ("[", "]"):
            table.set("class", "bracketed")
            row[place : place + 3] = [table]
            return


def _core(element: ElementTree.Element) -> ElementTree.Element:
    """The operator inside scripts."""
    while element.tag in ("msub", "msup", "msubsup") and len(element):
        element = element[0]
    return element


def _space(row: ElementTree.Element) -> None:
    """No space at bars, which come in pairs; a thin one between the name of a function and its neighbours."""
    cores = [_core(child) for child in row]
    for place, core in enumerate(cores):
        text = core.text or ""
        if core.tag != "mo":
            continue
        if text in SIGNS and (place == 0 or (cores[place - 1].tag == "mo" and cores[place - 1].text not in CLOSING)):
            core.set("form", "prefix")  # a sign, no operation: no space
        elif text in BARS:
            core.set("lspace", "0")
            core.set("rspace", "0")
        elif text.isalpha() and len(text) > 1:  # an operator's name
            before = cores[place - 1] if place else None
            after = cores[place + 1] if place + 1 < len(cores) else None
            core.set("lspace", THIN if before is not None and before.tag not in ("mo", "mspace") else "0")
            core.set("rspace", THIN if after is not None and after.tag != "mo" else "0")


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    source = node.astext().strip()
    # As with MathJax, blank lines separate formulas and \\ starts a line of one.
    parts = [part.strip() for part in source.split("\n\n") if part.strip()]
    for part in parts:
        aligned = rf"\begin{{aligned}}{part}\end{{aligned}}" if r"\\" in part and r"\begin" not in part else part
        translator.body.append(f'<div class="formula">{mathml(aligned, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
