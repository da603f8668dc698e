"""``manifold-cl info``: versions, hardware, and what can be chosen."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.table import Table

from manifold_cl._version import __version__
from manifold_cl.cli.options import Json
from manifold_cl.cli.screen import Screen
from manifold_cl.continual import METHODS
from manifold_cl.geometry import RETRACTIONS
from manifold_cl.streams import STREAMS

if TYPE_CHECKING:
    from manifold_cl.continual import Method


def _options(method: Method) -> dict[str, Any]:
    """Every option and its default, also those that ``method.options()`` leaves out of records."""
    return {one.name: getattr(method, one.name) for one in fields(method) if one.init}  # type: ignore[arg-type]


def info(as_json: Json = False) -> None:
    """Show versions, hardware, methods and their options, retractions, streams, and the cache folder."""
    from manifold_cl.continual.environment import library_versions, machine
    from manifold_cl.streams import cache_dir

    methods = {name: _options(cls()) for name, cls in sorted(METHODS.items())}
    orders = {
        name: {metric: order if math.isfinite(order) else "exact" for metric, order in rule.order.items()}
        for name, rule in sorted(RETRACTIONS.items())
    }
    versions, hardware = library_versions(), machine()
    content = {
        "version": __version__,
        "versions": versions,
        "machine": hardware,
        "methods": methods,
        "retractions": orders,
        "streams": sorted(STREAMS),
        "cache": str(cache_dir()),
    }
    if as_json:
        print(json.dumps(content, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("version", __version__)
    table.add_row("libraries", ", ".join(f"{name} {version}" for name, version in versions.items()))
    table.add_row("machine", ", ".join(f"{key} {value}" for key, value in hardware.items() if value is not None))
    for name, options in methods.items():
        values = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        table.add_row(f"method {name}", values)
    for name, declared in orders.items():
        table.add_row(f"retraction {name}", ", ".join(f"order {q} ({metric})" for metric, q in declared.items()))
    table.add_row("streams", ", ".join(sorted(STREAMS)))
    table.add_row("cache", str(cache_dir()))
    Screen().print(table)
