"""Arguments of classes that take some from elsewhere: Riemannian optimizers, the adapter layer, methods of the runner.

Signatures and lists are made from the code and from the table in `optimizers.md`: they cannot disagree with them.
"""

import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent.parent


def arguments_of(doc: str | None) -> dict[str, str]:
    """Name -> text of the "Args:" section of a Google docstring."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.cleandoc(doc or ""), re.M)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section[1])) if section else ():
        name, _, text = entry.partition(":")
        found[name.strip()] = " ".join(text.split())
    return found


def step_options() -> dict[str, str]:
    """Option -> values and meaning, from the table on the page of the optimizers."""
    page = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    table = page.partition("## Options of the step")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", table, re.M)
    texts = {name: re.sub(r"\[(.+?)\]\(.+?\)", r"\1", f"{values}: {meaning}") for name, values, meaning in rows}
    return {
        name: re.sub(r"\$(.+?)\$", r":math:`\1`", re.sub(r"`([^`]+)`", r"``\1``", text)) for name, text in texts.items()
    }


def _riemannian(kind: type) -> tuple[inspect.Signature, dict[str, str]]:
    from manifold_cl.optim.riemannian import RiemannianStep, base_class
    from manifold_cl.optim.validation import DEFAULTS

    base, keyword = base_class(kind), inspect.Parameter.KEYWORD_ONLY
    taken = {name: part.replace(annotation=part.empty) for name, part in inspect.signature(base).parameters.items()}
    own = {name: inspect.Parameter(name, keyword, default=value) for name, value in DEFAULTS.items()}
    own["step_rule"] = inspect.Parameter("step_rule", keyword, default="corrected")
    own["process_group"] = inspect.Parameter("process_group", keyword, default=None)
    known, meanings = arguments_of(RiemannianStep.__doc__), step_options()
    texts = {"params": known["params"]}
    texts |= {name: f"as in `torch.optim.{base.__name__}`." for name in taken if name != "params"}
    texts |= {name: f"{meanings[name]}." for name in DEFAULTS}
    texts["step_rule"] = (
        "``corrected``, ``official``: sets ``metric_pre``, ``tangent_post`` and ``step_scale`` at once."
    )
    texts["process_group"] = known["process_group"]
    return inspect.Signature([*taken.values(), *own.values()]), texts


def _with_options(kind: type, options: type) -> tuple[inspect.Signature, dict[str, str]]:
    signature, texts = inspect.signature(kind), arguments_of(kind.__doc__)
    kept = [part for part in signature.parameters.values() if part.kind is not part.VAR_KEYWORD]
    more = [
        part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in inspect.signature(options).parameters.values()
    ]
    texts = {name: text for name, text in texts.items() if not name.startswith("**")} | arguments_of(options.__doc__)
    parts = [part.replace(annotation=part.empty) for part in (*kept, *more)]
    return inspect.Signature(parts), texts


def _method(kind: type) -> tuple[inspect.Signature, dict[str, str]]:
    """Every option of a method, described where the class that introduces or overrides it does."""
    from manifold_cl.continual.methods import EBLoRA

    known = arguments_of(EBLoRA.__doc__)  # it describes the options of its bases too
    for parent in reversed(kind.__mro__):
        known |= arguments_of(vars(parent).get("__doc__"))
    names = [each.name for each in fields(kind) if each.init]
    parts = inspect.signature(kind).parameters
    signature = inspect.Signature([parts[name].replace(annotation=inspect.Parameter.empty) for name in names])
    return signature, {name: known[name] for name in names if name in known}


def merged(kind: object) -> tuple[inspect.Signature, dict[str, str]] | None:
    """The complete signature of a class with the text of every argument, where the class itself shows only a part."""
    from manifold_cl import EBLoRALinear, Method
    from manifold_cl.adapters import EBLoRAOptions

    if not isinstance(kind, type):
        return None
    if vars(kind).get("_riemannian_made"):
        return _riemannian(kind)
    if kind is EBLoRALinear:
        return _with_options(kind, EBLoRAOptions)
    if issubclass(kind, Method) and is_dataclass(kind):
        return _method(kind)
    return None


def on_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Show every argument."""
    complete = merged(obj)
    return None if complete is None else (str(complete[0]), returns)


def on_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Describe every argument."""
    complete = merged(obj)
    if complete is None or what not in ("class", "data"):
        return
    doc = "\n".join(lines)
    if vars(obj).get("_riemannian_made"):
        doc = (
            doc.partition("; see `riemannian`")[0] + ": every parameter on a manifold stays there. See `riemannian`.\n"
        )
    section = "Args:\n" + "".join(f"    {each}: {text}\n" for each, text in complete[1].items()) + "\n"
    found = re.search(r"^Args:\n(?:    .*\n?|\n)+", doc, re.M)
    doc = f"{doc[: found.start()]}{section}{doc[found.end() :]}" if found else f"{doc}\n\n{section}"
    lines[:] = doc.split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handlers."""
    app.connect("autodoc-process-docstring", on_docstring, priority=300)  # before citations are made live
    app.connect("autodoc-process-signature", on_signature, priority=300)
    return {"parallel_read_safe": True}
