"""All tables of one set of adapters, from a single pass over the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY_BUDGET, Progress, layer_batches, protected_bases, protected_energies
from analysis.formats import Checkpoint, LeftOut
from analysis.statistics.nulls import against_chance
from analysis.tables.components import ANGLE_COLUMNS, AngleRow, angle_rows, component_frame, component_frames
from analysis.tables.interference import Row, interference_frame, interference_rows
from analysis.tables.noise import noise_frame
from analysis.tables.spectrum_table import (
    Spectra,
    batch_spectra,
    singular_value_frame,
    spectrum_frame,
    zero_rows,
    zero_updates,
)


class _Parts(NamedTuple):
    """The results of one pass over the layers."""

    spectra: Spectra
    interference: list[Row]
    components: list[pd.DataFrame]
    angles: list[AngleRow]


@dataclass(frozen=True, eq=False)
class AdapterTables:
    """The tables of a set of adapters. Each adapter is read and decomposed once, whatever tables are used.

    The first table that is asked for starts the pass over the layers. Only singular values and rows of tables are
    kept of it, so that memory stays within the budget.

    >>> eye = torch.eye(3)
    >>> updates = {"a": {"x": (eye[:, :1], eye[:, :1])}, "b": {"x": (2 * eye[:, 1:2], eye[:, :1])}}
    >>> tables = AdapterTables(AdapterSet.from_factors(updates))
    >>> tables.singular_values["value"].round(4).tolist()  # a, a alone so far, b, and the sum of both, of rank one
    [1.0, 1.0, 2.0, 2.2361, 0.0]
    >>> tables.interference.query("layer == 'x' and metric == 'input_overlap'")["value"].tolist()
    [1.0]
    """

    adapters: AdapterSet
    device: torch.device | str = "cpu"
    protected: Mapping[str, Tensor] | None = None
    """Layer name to orthonormal basis (n, k), used for every task instead of the bases that a run holds."""
    base: Checkpoint | None = None
    """The model that was adapted; adds norms relative to its weights to `spectra`."""
    memory_budget: int = MEMORY_BUDGET
    """Bytes of one batch of layers."""
    progress: Progress | None = None
    """Called with the number of finished layers and of all layers."""

    @cached_property
    def _parts(self) -> _Parts:
        parts = _Parts([], [], [], [])
        basis_of = protected_bases(self.adapters, self.protected)
        budget, progress = self.memory_budget, self.progress
        for batch in layer_batches(self.adapters, device=self.device, memory_budget=budget, progress=progress):
            energies = protected_energies(batch, basis_of)
            parts.spectra.append(batch_spectra(batch))
            parts.interference.extend(interference_rows(batch, energies))
            parts.components.extend(component_frames(batch, energies))
            parts.angles.extend(angle_rows(batch))
        return parts

    @cached_property
    def singular_values(self) -> pd.DataFrame:
        """The table of `analysis.tables.singular_values`."""
        return singular_value_frame(self.adapters, self._parts.spectra)

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """The table of `analysis.spectrum_table`, without updates that are zero."""
        return spectrum_frame(self.adapters, self._parts.spectra, zeros="omit", base=self.base)

    @cached_property
    def zeros(self) -> list[str]:
        """The updates that `spectra` leaves out, by name."""
        return zero_updates(self.adapters, self.spectra)

    @property
    def judged_spectra(self) -> pd.DataFrame:
        """`spectra` with rows for updates that are zero: norms 0, other metrics NaN, so that a gate sees them."""
        rows = zero_rows(self.adapters, self.spectra)
        return self.spectra if rows.empty else pd.concat([self.spectra, rows], ignore_index=True)

    @property
    def left_out(self) -> pd.DataFrame:
        """Everything in the files that is in no table: task, file, tensor, reason.

        `tensor` is the name of a tensor or of a layer; it is empty for a file as a whole.
        """
        rows = pd.DataFrame(self.adapters.left_out, columns=list(LeftOut._fields), dtype="object")
        return rows[["task", "file", "tensor", "reason"]]

    @cached_property
    def interference(self) -> pd.DataFrame:
        """The table of `analysis.interference_table`."""
        return interference_frame(self.adapters, self._parts.interference)

    @cached_property
    def against_chance(self) -> pd.DataFrame:
        """The rows of `interference` that have a null law, with z, p and p_holm."""
        return against_chance(self.interference)

    @cached_property
    def noise(self) -> pd.DataFrame:
        """The table of `analysis.noise_table`."""
        return noise_frame(self.adapters, self._parts.spectra)

    @cached_property
    def components(self) -> pd.DataFrame:
        """The table of `analysis.component_table`."""
        return component_frame(self.adapters, self._parts.components)

    @cached_property
    def principal_angles(self) -> pd.DataFrame:
        """The table of `analysis.principal_angles`."""
        return pd.DataFrame(self._parts.angles, columns=ANGLE_COLUMNS)
