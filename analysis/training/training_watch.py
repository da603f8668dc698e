"""`TrainingWatch`: measures a model's adapters every few steps, and keeps a log and a page."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.adapters.adapter_set import AdapterSet
from analysis.tables import need_parquet, write_table
from analysis.tables.training_log import COLUMNS, LOG, log_files, log_step, read_training_log
from analysis.training.live_factors import model_factors
from analysis.training.measurement import INTERFERENCE, SPECTRA, Factors, held, measure_factors

PAGE_SECONDS = 20.0
"""Least time between two versions of the page while training: drawing it takes about a second."""


class TrainingWatch:
    """Measures the adapters of a model while it trains, and writes a log and a page that follow it.

    Per measurement one file of the log is written into `folder`; `read_training_log` reads them all, as
    ``pandas.read_parquet(folder / "log")`` does. The page ``training.html`` reloads itself while the training goes on.

    >>> import tempfile
    >>> from types import SimpleNamespace
    >>> class Layer(nn.Module):
    ...     def factors(self):
    ...         return SimpleNamespace(left=torch.eye(4), right=torch.eye(4), magnitude=torch.tensor(0.5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     watch = TrainingWatch(folder, every=10, file_format="csv", page=False)
    ...     numbers = watch.measure(nn.Sequential(Layer()), step=10)
    ...     log = read_training_log(folder)
    >>> numbers["watch/effective_rank_energy"], len(log)
    (4.0, 10)

    Args:
        folder: where the log and the page go.
        every: steps from one measurement to the next.
        earlier: adapters of earlier tasks, or their paths in order; their factors are kept in memory.
        protected: layer name to orthonormal basis (n, k), for the leakage.
        task: name of the task that trains.
        factors: model to layer to (left, right), all scale in left; `model_factors` by default.
        device: where it is computed; that of the factors by default.
        file_format: of the log: ``"parquet"``, which needs pyarrow, or ``"csv"``.
        page: whether the page is written.
        prefix: start of the names of the returned numbers.

    Raises:
        ValueError: `every` is below 1, an earlier task has the name of the one that trains, or a format is unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 100,
        earlier: AdapterSet | Sequence[str | Path] | None = None,
        protected: Mapping[str, Tensor] | None = None,
        task: str = "now",
        factors: Callable[[nn.Module], Factors] = model_factors,
        device: torch.device | str | None = None,
        file_format: Literal["parquet", "csv"] = "parquet",
        page: bool = True,
        prefix: str = "watch/",
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, at least 1 step was expected")
        if file_format not in ("parquet", "csv"):
            raise ValueError(f"file_format is {file_format!r}, choose 'parquet' or 'csv'")
        if file_format == "parquet":
            need_parquet()
        self.folder, self.every, self.task, self.prefix = Path(folder), every, task, prefix
        self._title = "Training" if task == "now" else f"Training of {task}"
        given = earlier if earlier is None or isinstance(earlier, AdapterSet) else AdapterSet.load(*earlier)
        if given is not None and task in given.tasks:
            raise ValueError(f"an earlier task is called {task!r} like the one that trains: give task= another name")
        self._earlier = None if given is None else held(given)
        self._protected, self._factors, self._device = protected, factors, device
        self._ending, self._page, self._written = f".{file_format}", page, -PAGE_SECONDS

    def due(self, step: int) -> bool:
        """Whether a measurement belongs to this step."""
        return step % self.every == 0

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int, *, extra: Mapping[str, float] | None = None) -> dict[str, float]:
        """Numbers for a logger at this step, each over all layers; the log gets a row per layer as well.

        `extra` are further numbers for the log and the page, such as ``geometry_metrics`` of manifold_cl. They are
        not returned. Measurements of later steps are removed from the log: training was resumed from an earlier one.

        Raises:
            ValueError: as `model_factors`; nothing is written then.
        """
        factors = self._factors(model)
        device = self._device if self._device is not None else next(iter(factors.values()))[0].device
        table = measure_factors(
            factors, task=self.task, earlier=self._earlier, protected=self._protected, device=device
        )
        if extra:
            numbers = pd.DataFrame({"metric": list(extra), "value": [float(value) for value in extra.values()]})
            table = pd.concat([table, numbers.assign(task="", layer="total")], ignore_index=True)
        table = table.assign(step=step)[list(COLUMNS)]
        for path in log_files(self.folder):
            if log_step(path) > step or (log_step(path) == step and path.suffix != self._ending):
                path.unlink()
        write_table(table, self.folder / f"{LOG.format(step)}{self._ending}")
        if self._page and time.monotonic() - self._written >= PAGE_SECONDS:
            self.write_page(live=True)
        return self._numbers(table)

    def write_page(self, *, live: bool = False) -> Path:
        """The path of the page; a `live` one reloads itself."""
        from analysis.report import write_training_report  # the page needs this package

        self._written = time.monotonic()
        log = read_training_log(self.folder)
        return write_training_report(self.folder / "training.html", log, title=self._title, live=live)

    def finish(self) -> None:
        """Write the last page, which no longer reloads itself. For the end of the training."""
        if self._page and log_files(self.folder):
            self.write_page()

    def _numbers(self, table: pd.DataFrame) -> dict[str, float]:
        total = table[(table["layer"] == "total") & table["metric"].isin((*SPECTRA, *INTERFERENCE))]
        names = (total["metric"] + ("/" + total["task"]).where(total["task"] != "", "")).tolist()
        return {f"{self.prefix}{name}": float(value) for name, value in zip(names, total["value"], strict=True)}
