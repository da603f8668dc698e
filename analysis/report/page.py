"""Self-contained HTML pages: templates, formatted numbers, atomic writing."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import analysis.plots as plots
from analysis.files import replacing
from analysis.names import visible

HEADLINES = {
    # key of the metrics: heading, meaning, whether more is better
    "mft": ("MFT", "mean score on each task right after learning it", True),
    "mfn": ("MFN", "mean score on all tasks at the end", True),
    "maa": ("MAA", "mean over the stream of the mean score on tasks learned so far", True),
    "bwt": ("BWT", "mean change of earlier tasks from just learned to the end; negative is forgetting", True),
    "fwt": ("FWT", "mean score before a task is learned, from the second task on; a level, not a difference", True),
    "fwt_flat": ("FWT, flat", "the same as a flat mean over all entries above the diagonal", True),
    "forgetting": ("forgetting", "mean drop of earlier tasks from their best score; positive is worse", False),
    "zero_shot": ("zero-shot", "mean score of the pre-trained model", None),
}


def best_labels(scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Headline to the label with the best score, where at least two labels have one."""
    best = {}
    for key, (*_, higher) in HEADLINES.items():
        known = {label: row[key] for label, row in scores.items() if not math.isnan(row.get(key, math.nan))}
        if higher is not None and len(known) > 1:
            best[key] = (max if higher else min)(known, key=lambda label: known[label])
    return best


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """The path of a new page: a template of this package filled with `values`, written atomically."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = Path(path)
    page = _environment().get_template(template).render(written=written, **values)
    with replacing(path) as new:
        new.write_text(page, encoding="utf-8")
    return path


@cache
def _environment() -> Environment:
    """The templates, each compiled once per process: that takes as long as a figure."""
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(number=number, p_value=p_value, data_uri=plots.to_data_uri, code=code)
    return environment


def _shown(value: Any) -> Any:
    """The value as the page shows it: strings without control characters, numbers on one line with their %."""
    return (
        visible(value).replace(" %", "\u00a0%") if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def code(text: str) -> Markup:
    """The text with each part between backticks as code, whose options stay on one line.

    >>> code("run `a < b`"), code("`--model`")
    (Markup('run <code>a &lt; b</code>'), Markup('<code><span class="option">--model</span></code>'))
    """
    parts = visible(text).split("`")
    return Markup("").join(_command(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _command(text: str) -> Markup:
    option = Markup('<span class="option">{}</span>')
    words = [option.format(word) if word.startswith("--") else escape(word) for word in text.split(" ")]
    return Markup("<code>{}</code>").format(Markup(" ").join(words))


def p_value(p: float | None) -> str:
    """The p-value; a bound where it is too small for its law to be exact.

    >>> p_value(0.0312), p_value(0.0)
    ('3.1e−02', '< 1e−12')
    """
    return "< 1e−12" if p is not None and p < 1e-12 else number(p, ".1e")


def number(value: float | None, form: str = ".1f") -> str:
    """The formatted number; a dash if unknown, with a true minus sign."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else "∞"
