"""HTML pages that need nothing but themselves: templates, numbers for people, atomic writing."""

import math
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import plots


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """The path of a new page: a template of this room filled with `values`, there completely or not at all."""
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, data_uri=plots.to_data_uri)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = Path(path)
    _write(path, environment.get_template(template).render(written=written, **values))
    return path


def number(value: float | None, form: str = ".1f") -> str:
    """A number for people; a dash when it is unknown, a true minus sign when it is negative."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else "∞"


def _write(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old page or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's 0o600 would keep the page from a web server
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
