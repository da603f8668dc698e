"""``{study-table} FOLDER``: the table of a committed study, as ``manifold-cl compare FOLDER --markdown`` prints it."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


class StudyTable(SphinxDirective):
    """A table built from result files, so that it cannot disagree with them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Read and tabulate; an unfinished study says so."""
        from analysis import StudyResults
        from manifold_cl.cli.study_table import markdown_of

        study = StudyResults.load(ROOT / self.arguments[0])
        for file in sorted(ROOT.joinpath(self.arguments[0]).rglob("*.json")):
            self.env.note_dependency(str(file))
        complete = f"{len(study.records)} of {len(study.plan.cells)} cells are complete."
        return self.parse_text_to_nodes(f"{markdown_of(study)}\n\n{complete} {study.note()}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("study-table", StudyTable)
    return {"parallel_read_safe": True}
