"""The one import of the package `analysis`, after a check that it is the one installed with `manifold_cl`.

Commands import it from here inside their functions: `analysis` loads pandas and matplotlib.
"""

from importlib.util import find_spec
from pathlib import Path


def verify_not_shadowed() -> None:
    """Raise ImportError if Python would import a user's own `analysis`, which is not executed."""
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

import analysis  # noqa: E402

__all__ = ["analysis"]
