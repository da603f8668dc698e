"""HTML pages that need nothing but themselves: templates, numbers for people, atomic writing."""

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
    """The path of a new page: a template of this package filled with `values`, there completely or not at all."""
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
    """What stands in the page for a value: strings, which may be names of others, without control characters."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float | None, form: str = ".1f") -> str:
    """A number for people; a dash when it is unknown, a true minus sign when it is negative."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else "∞"
