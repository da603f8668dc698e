"""A line per tutorial while the site is built: its seconds, and the time left. A file beside the site keeps them."""

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent.parent
NAMES = [path.stem for path in sorted((DOCS / "gallery").glob("plot_*.py"))]
MEASURED = DOCS.parent / "benchmarks" / "results" / "docs.json"
FILE = "build-times.json"


def words(seconds: float) -> str:
    """Seconds as people write them.

    >>> words(8.6), words(201)
    ('9 s', '3 min 21 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def cpu_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass
class Times:
    """The clock of one build.

    Args:
        expected: seconds per tutorial as measured before, for the estimate.
        seconds: the tutorials that have run in this build.
        cpu: their CPU seconds.
    """

    expected: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    tutorial_began: float = 0.0
    cpu_before: float = 0.0

    def before(self, name: str) -> str:
        """Starts the clock of a tutorial; returns the first half of its line."""
        self.tutorial_began, self.cpu_before = time.perf_counter(), cpu_seconds()
        return f"tutorial {NAMES.index(name) + 1:2} of {len(NAMES)}  {name:36}"

    def after(self, name: str) -> str:
        """Stops it; returns the second half."""
        self.seconds[name] = time.perf_counter() - self.tutorial_began
        self.cpu[name] = cpu_seconds() - self.cpu_before
        left = self.left(name)
        return f"{words(self.seconds[name]):>12}" + (f", about {words(left)} left" if left else "")

    def left(self, name: str) -> float:
        """Expected seconds of the tutorials after this one, at the pace of those that have run; 0 if unknown."""
        later = NAMES[NAMES.index(name) + 1 :]
        known = [each for each in self.seconds if each in self.expected]
        if not known or any(each not in self.expected for each in later):
            return 0.0
        pace = sum(self.seconds[each] for each in known) / sum(self.expected[each] for each in known)
        return pace * sum(self.expected[each] for each in later)


def read_expected(file: Path = MEASURED) -> dict[str, float]:
    """Seconds per tutorial from the last measurement; none without a file."""
    if not file.exists():
        return {}
    return {name: row["seconds"] for name, row in json.loads(file.read_text())["tutorials"].items()}


TIMES = Times(read_expected())


def progress(gallery_conf: dict[str, Any], fname: str, when: str) -> None:
    """Print the line; sphinx-gallery calls this before and after each tutorial that runs."""
    name = Path(fname).stem
    if when == "before":
        print(TIMES.before(name), end="", flush=True)
    else:
        print(TIMES.after(name), flush=True)


def on_finished(app: Sphinx, exception: Exception | None) -> None:
    """Print the total and write the times."""
    total = time.perf_counter() - TIMES.began
    if exception is None:
        ran = f"{len(TIMES.seconds)} of {len(NAMES)} tutorials ran in {words(sum(TIMES.seconds.values()))}"
        print(f"site built in {words(total)}; {ran}")
        rows = {name: _row(seconds, TIMES.cpu[name]) for name, seconds in TIMES.seconds.items()}
        content = {"site": _row(total, cpu_seconds()), "tutorials": rows}
        (Path(app.outdir) / FILE).write_text(json.dumps(content, indent=1) + "\n")


def _row(seconds: float, cpu: float) -> dict[str, float]:
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", on_finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
