"""What the site adds to plain pages: formulas, a search for dead links, complete arguments, links as on a code host."""

import sys
from pathlib import Path

import pytest

import manifold_cl
from manifold_cl import METHODS, EBLoRALinear, RiemannianAdamW, RiemannianSGD

pytest.importorskip("sphinx")
pytest.importorskip("latex2mathml")

EXTENSIONS = Path(manifold_cl.__file__).parents[1] / "docs" / "_ext"
sys.path.insert(0, str(EXTENSIONS))
try:
    import arguments
    import dead_links
    import docstrings
    import links
    import mathml
finally:
    sys.path.remove(str(EXTENSIONS))


def test_the_comment_on_a_constant_is_that_of_its_own_package() -> None:
    """The checks of the geometry have another constant of this name."""
    import manifold_cl.geometry.checks.measure as other
    import manifold_cl.lab.registry as ours

    assert other.STEPS != ours.STEPS
    assert docstrings._comment_on("manifold_cl.lab.STEPS") == ["Steps by name.", ""]
    assert docstrings._comment_on("manifold_cl.lab.NO_SUCH_CONSTANT") is None


@pytest.mark.parametrize("what", ["property", "attribute", "data"])
def test_the_first_line_of_a_property_is_shown_in_its_order(what: str) -> None:
    """Napoleon alone shows ``TEXT`` first, and ``Per layer`` below it as the type."""
    from sphinx.ext.napoleon import Config, GoogleDocstring

    lines = ["Per layer: the rank.", "", "At most: n."]
    docstrings.on_docstring(None, what, "a.b", None, None, lines)
    shown = str(GoogleDocstring(lines, Config(), what=what, name="a.b"))
    assert ":type:" not in shown
    assert shown.index("Per layer") < shown.index("the rank") < shown.index("At most")


def test_a_matrix_with_an_index_is_one_base() -> None:
    formula = mathml.mathml(r"\begin{bmatrix} A & B \\ I & A \end{bmatrix}_{:,\,1:p}", "inline")
    assert "<msub><mrow><mtable" in formula
    assert 'class="bracketed"' in formula
    assert "</mtable></mrow><mrow>" in formula


@pytest.mark.parametrize("source", [r"|u| = 4", r"\lVert u\rVert_F = 4"])
def test_bars_have_no_space_of_relations(source: str) -> None:
    formula = mathml.mathml(source, "inline")
    bars = formula.count(">|<") + formula.count(">‖<")
    assert bars == 2
    assert formula.count('lspace="0" rspace="0"') == 2


def test_names_of_operators_have_thin_spaces() -> None:
    formula = mathml.mathml(r"x \operatorname{sym}(G) + \operatorname{grad}_E = -A", "inline")
    assert '<mo lspace="0.167em" rspace="0">sym</mo>' in formula
    assert '<msub><mo lspace="0" rspace="0">grad</mo><mi>E</mi></msub>' in formula
    assert '<mo form="prefix">−</mo>' in formula


def test_dead_links_of_a_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a> <a href="#top">2</a> <a href="https://x.org/y">3</a>')
    (tmp_path / "b.html").write_text(
        '<p id="here"></p> <a href="c.html">1</a> <a href="a.html#no">2</a> <img src="d.png">'
    )
    assert dead_links.dead_links(tmp_path) == [("b.html", "c.html"), ("b.html", "a.html#no"), ("b.html", "d.png")]


@pytest.mark.parametrize("kind", [RiemannianAdamW, RiemannianSGD, EBLoRALinear, *METHODS.values()])
def test_every_argument_is_shown_and_described(kind: type) -> None:
    complete = arguments.merged(kind)
    assert complete is not None
    signature, texts = complete
    assert list(signature.parameters) == list(texts)
    assert all(texts.values())


def test_the_rates_and_the_moments_of_the_optimizer_are_among_them() -> None:
    complete = arguments.merged(RiemannianAdamW)
    assert complete is not None
    assert {"lr", "betas", "weight_decay", "moments", "step_rule", "process_group"} <= set(complete[0].parameters)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("<!-- {toctree}\n:hidden:\n\nmethod\n-->", "```{toctree}\n:hidden:\n\nmethod\n```"),
        ("[t](../gallery/plot_08_peft.py)", "[t](../tutorials/plot_08_peft.rst)"),
        ("[m](../method.md#metrics)", "[m](../method.md#metrics)"),
        ("[p](../../pyproject.toml)", "[p](path:../../pyproject.toml)"),
        ("[b](../../benchmarks)", "b"),
    ],
)
def test_links_of_a_page_without_a_repository(source: str, shown: str) -> None:
    assert rewritten(source, "") == shown


def test_links_to_source_files_lead_to_the_repository_where_it_is_known() -> None:
    address = "https://host.example/owner/manifold_cl"
    assert rewritten("[p](../../pyproject.toml)", address) == f"[p]({address}/blob/main/pyproject.toml)"
    assert rewritten("[b](../../benchmarks)", address) == f"[b]({address}/tree/main/benchmarks)"


def rewritten(text: str, repository: str) -> str:
    return links.for_the_site(text, "decisions/one", EXTENSIONS.parents[1], repository, "main")
