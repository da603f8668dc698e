"""The one import of the package `analysis`, after a check that it is the one installed with `manifold_cl`.

Commands import from here inside their functions: `analysis` loads pandas and matplotlib.
"""

from importlib.util import find_spec
from pathlib import Path


def verify_not_shadowed() -> None:
    """Raise if Python would import a user's own ``analysis`` folder or ``analysis.py``; it is not executed.

    Raises:
        ImportError: `analysis` resolves to another file than the one beside `manifold_cl`.
    """
    own = Path(__file__).parents[2] / "analysis" / "__init__.py"
    spec = find_spec("analysis")
    if spec is None or not own.exists():
        return
    found = spec.origin or next(iter(spec.submodule_search_locations or []))
    if Path(found).resolve() != own.resolve():
        raise ImportError(
            f"Python finds another package named 'analysis': {found} instead of {own}. Rename it, or run manifold-cl "
            "from a folder that does not contain it, without PYTHONPATH pointing there"
        )


verify_not_shadowed()

from analysis import (  # noqa: E402
    AdapterSet,
    AdapterTables,
    Checkpoint,
    StudyResults,
    read_protected,
    save_figure,
    write_report,
    write_study_report,
)
from analysis.report import Subject, read_subjects, write_subjects_report  # noqa: E402
from analysis.tables import Gate, need_parquet, write_table  # noqa: E402

__all__ = [
    "AdapterSet",
    "AdapterTables",
    "Checkpoint",
    "Gate",
    "StudyResults",
    "Subject",
    "need_parquet",
    "read_protected",
    "read_subjects",
    "save_figure",
    "write_report",
    "write_study_report",
    "write_subjects_report",
    "write_table",
]
