"""Self-contained HTML pages: templates, formatted numbers, atomic writing."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import analysis.plots as plots
from analysis.files import replacing
from analysis.names import visible


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """The path of a new page: a template of this package filled with `values`, written atomically."""
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(number=number, data_uri=plots.to_data_uri)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = Path(path)
    page = environment.get_template(template).render(written=written, **values)
    with replacing(path) as new:
        new.write_text(page, encoding="utf-8")
    return path


def _shown(value: Any) -> Any:
    """The value as the page shows it: strings without control characters."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float | None, form: str = ".1f") -> str:
    """The formatted number; a dash if unknown, with a true minus sign."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else "∞"
