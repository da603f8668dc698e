"""Formulas as MathML, made at build time: pages show them without a script and without the network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    source = node.astext().strip()
    # As with MathJax, blank lines separate formulas and \\ starts a line of one.
    parts = [part.strip() for part in source.split("\n\n") if part.strip()]
    for part in parts:
        aligned = rf"\begin{{aligned}}{part}\end{{aligned}}" if r"\\" in part and r"\begin" not in part else part
        translator.body.append(f'<div class="formula">{convert(aligned, display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
