"""``{retraction-table}``: every registered retraction with what `check_retraction` measures when the site is built."""

import math

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HEAD = (
    "name",
    "maps (x, u) to",
    "order (Euclidean, canonical)",
    "first-order slope",
    "slope to geodesic",
    "error, step of 1",
    "drift, float32",
)


class RetractionTable(SphinxDirective):
    """A table built from the registry, so that it cannot disagree with the code."""

    def run(self) -> list[nodes.Node]:
        """Measure and tabulate; a retraction that breaks a promise is a warning, which stops the build."""
        from manifold_cl import RETRACTIONS, check_retraction

        rows = []
        for name, rule in sorted(RETRACTIONS.items()):
            report = check_retraction(rule)
            for failure in report.failures():
                self.state.document.reporter.warning(f"retraction {name!r}: {failure}", line=self.lineno)
            formula = (type(rule).__call__.__doc__ or "").split("``")
            rows.append(
                (
                    f"`{name}`",
                    f"`{formula[1]}`" if len(formula) > 1 else "",
                    ", ".join(_order(rule.order[metric]) for metric in ("euclidean", "canonical")),
                    f"{report.first_order_slope:.2f}",
                    "exact" if math.isinf(report.geodesic_slope) else f"{report.geodesic_slope:.2f}",
                    f"{max(report.orthonormality, report.protection):.0e}",
                    f"{report.drift_float32:.0e}",
                )
            )
        lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
        return self.parse_text_to_nodes("\n".join(lines))


def _order(order: float) -> str:
    return "exact" if math.isinf(order) else str(order)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("retraction-table", RetractionTable)
    return {"parallel_read_safe": True}
