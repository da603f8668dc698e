"""Which optimizers can be made Riemannian: torch's and those of other packages, each against a slow twin.

    python benchmarks/any_optimizer.py                        # every package that is installed
    python benchmarks/any_optimizer.py --only heavyball --path /folder/with/more/packages

The twin takes one ordinary step of the plain class on Riemannian gradients, projects what each point moved by and
retracts by an SVD, all in float64 and one matrix at a time. A class works if its Riemannian form takes the same
steps, holds both constraints in float32 at every step and in ``eval()``, resumes and pickles to the same numbers
wherever the plain class does, and leaves points alone at rate 0. Every class has a process and a time limit of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from any_optimizer_trials import examine
from rich.console import Console
from rich.table import Table

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

PACKAGES = {
    "torch.optim": "torch",
    "pytorch_optimizer": "pytorch_optimizer",
    "heavyball": "heavyball",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion-pytorch",
    "adabelief_pytorch": "adabelief-pytorch",
    "adan_pytorch": "adan-pytorch",
    "dadaptation": "dadaptation",
    "came_pytorch": "came-pytorch",
    "torch_optimizer": "torch_optimizer",
}
"""Module and distribution of every package that is tried."""
VERDICTS = {
    "works": "same steps as the twin, and everything else",
    "refused": "refused by name at construction",
    "plain fails": "the plain class cannot step a list of parameters either",
    "wrong": "other numbers than the plain class, without a word",
    "crash": "an error that is not a refusal at construction, or out of time",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[], help="run these packages, or package.Class, and keep earlier rows of others"
    )
    parser.add_argument("--path", type=Path, action="append", default=[], help="folder with more packages")
    parser.add_argument("--jobs", type=int, default=1, help="classes at once")
    parser.add_argument("--limit", type=int, default=240, help="seconds per class")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "any_optimizer.json")
    options = parser.parse_args()
    sys.path += map(str, options.path)
    torch.set_num_threads(1)
    console = Console()
    rows: list[dict[str, Any]] = []
    packages: dict[str, str | None] = {}
    jobs: list[tuple[str, str, type[torch.optim.Optimizer]]] = []
    for module, distribution in PACKAGES.items():
        chosen = [name for name in options.only if name == module or name.startswith(f"{module}.")]
        if options.only and not chosen:
            continue
        try:
            classes = classes_of(module)
        except ImportError as error:
            console.print(f"{module}: not installed ({error})")
            packages[module] = None
            continue
        packages[module] = importlib.metadata.version(distribution)
        jobs += [
            (module, name, cls)
            for name, cls in classes.items()
            if not chosen or module in chosen or f"{module}.{name}" in chosen
        ]
    for row in verdicts(jobs, at_once=options.jobs, limit=options.limit):
        rows.append(row)
        name = f"{row['package']}.{row['class']}"
        console.print(f"{name}: {row['verdict']}  {row.get('reason', '')}", soft_wrap=True, markup=False)
    if options.only and options.out.exists():
        earlier = json.loads(options.out.read_text())
        done = {(row["package"], row["class"]) for row in rows}
        rows += [row for row in earlier["classes"] if (row["package"], row["class"]) not in done]
        packages = earlier["packages"] | packages
    rows.sort(key=lambda row: (list(PACKAGES).index(row["package"]), row["class"]))
    packages = {module: packages[module] for module in PACKAGES if module in packages}
    show(console, rows, packages)
    write_json(options.out, result(rows, packages))
    options.out.with_suffix(".md").write_text(markdown(rows, packages))
    return int(any(row["verdict"] in ("wrong", "crash") for row in rows))


def classes_of(module: str) -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizer classes that a module exports, each once, in the order of their names."""
    content = importlib.import_module(module)
    if module == "heavyball":  # else every shape compiles for minutes
        content.utils.compile_mode = None
    found = {
        name: value
        for name, value in sorted(vars(content).items())
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return {name: value for name, value in found.items() if value.__name__ == name or value not in found.values()}


def verdicts(
    jobs: list[tuple[str, str, type[torch.optim.Optimizer]]], *, at_once: int, limit: int
) -> Iterator[dict[str, Any]]:
    """What `examine` finds, each class in a process of its own, so many ``at_once``."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(jobs), dict[Any, tuple[str, str, Any, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            module, name, cls = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=report, args=(sender, cls))
            process.start()
            sender.close()
            running[receiver] = (module, name, process, time.monotonic() + limit)
        ready = multiprocessing.connection.wait(list(running), timeout=1.0)
        for receiver, (module, name, process, end) in list(running.items()):
            if receiver in ready:
                try:
                    found = receiver.recv()
                except EOFError:
                    found = {"verdict": "crash", "reason": "the process ended without a result"}
            elif time.monotonic() > end:
                found = {"verdict": "crash", "reason": f"no result after {limit} s"}
            else:
                continue
            process.kill()
            process.join()
            del running[receiver]
            yield {"package": module, "class": name, **found}


def report(sender: Any, cls: type[torch.optim.Optimizer]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # some classes print
        sender.send(examine(cls))


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}


def result(rows: list[dict[str, Any]], packages: dict[str, str | None]) -> dict[str, Any]:
    return {
        "what": "every optimizer class of these packages made Riemannian, against a slow twin of its plain form",
        "packages": packages,
        "counts": counts(rows),
        "verdicts": VERDICTS,
        "classes": rows,
        "versions": library_versions(),
        "machine": machine(),
    }


def markdown(rows: list[dict[str, Any]], packages: dict[str, str | None]) -> str:
    """One line per package, then the classes that are refused or whose plain form fails, by reason."""
    lines = ["| package | version | " + " | ".join(VERDICTS) + " |", "|---|---|" + "---|" * len(VERDICTS)]
    for package, version in packages.items():
        own = counts([row for row in rows if row["package"] == package])
        lines.append(f"| `{package}` | {version or 'not installed'} | {' | '.join(map(str, own.values()))} |")
    lines.append(f"| all | | {' | '.join(map(str, counts(rows).values()))} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] != "works":
            reason = " ".join(str(row.get("reason", "")).split()).replace("|", "\\|")
            reasons.setdefault((row["verdict"], reason), []).append(f"`{row['package']}.{row['class']}`")
    lines += ["", "| verdict | reason | classes |", "|---|---|---|"]
    lines += [f"| {verdict} | {reason} | {', '.join(names)} |" for (verdict, reason), names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def show(console: Console, rows: list[dict[str, Any]], packages: dict[str, str | None]) -> None:
    table = Table(title=f"{len(rows)} classes")
    table.add_column("package")
    for verdict in VERDICTS:
        table.add_column(verdict, justify="right")
    for package in packages:
        own = counts([row for row in rows if row["package"] == package])
        table.add_row(package, *map(str, own.values()))
    table.add_row("all", *map(str, counts(rows).values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
