"""``{retraction-table}``: every registered retraction with what `check_retraction` measures when the site is built."""

import math
import re

from docutils import nodes
from references import entries, short
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HEAD = (
    "name",
    "maps (x, u) to",
    "cost",
    "source",
    "order, declared",
    "slopes, measured",
    "error, step of 1",
    "drift, float32",
)
ONE_METRIC, OTHER = "euclidean", "canonical"


class RetractionTable(SphinxDirective):
    """A table built from the registry, so that it cannot disagree with the code."""

    def run(self) -> list[nodes.Node]:
        """Measure and tabulate; a retraction that breaks a promise is a warning, which stops the build."""
        from manifold_cl import RETRACTIONS, check_retraction

        rows = []
        for name, rule in sorted(RETRACTIONS.items()):
            reports = [check_retraction(rule, metric) for metric in (ONE_METRIC, OTHER)]
            for failure in (said for report in reports for said in report.failures()):
                self.state.document.reporter.warning(f"retraction {name!r}: {failure}", line=self.lineno)
            said = type(rule).__call__.__doc__ or ""
            formula, cost = said.split("``"), re.search(r"O\(n.*?\)( \+ O\(.*?\))?(?=[.,\s]|$)", said)
            source = re.search(r"Source: (\w+)", type(rule).__doc__ or "")
            rows.append(
                (
                    f"`{name}`",
                    f"`{formula[1]}`" if len(formula) > 1 else "",
                    cost.group() if cost else "",
                    _citation(source.group(1)) if source else "",
                    ", ".join(_order(rule.order[metric]) for metric in (ONE_METRIC, OTHER)),
                    ", ".join(_slope(report.geodesic_slope) for report in reports),
                    f"{max(reports[0].orthonormality, reports[0].protection):.0e}",
                    f"{reports[0].drift_float32:.0e}",
                )
            )
        lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
        return self.parse_text_to_nodes("\n".join(lines))


def _citation(key: str) -> str:
    return f"[{short(entries()[key])} ({entries()[key]['year']})](references.md#{key})"


def _order(order: float) -> str:
    return "exact" if math.isinf(order) else str(order)


def _slope(slope: float) -> str:
    return "exact" if math.isinf(slope) else f"{slope:.2f}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("retraction-table", RetractionTable)
    return {"parallel_read_safe": True}
