"""Main effects and interactions of the factors of a study, paired within replicates."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.statistics import holm
from analysis.studies import StudyResults, paired_test

Levels = Mapping[str, Sequence[str]]


def factor_effects(
    study: StudyResults,
    levels: Levels,
    factors: Mapping[str, Mapping[str, str]],
    *,
    figures: Sequence[str] = ("mft", "mfn", "bwt"),
    level: float = 0.95,
) -> pd.DataFrame:
    """One row per figure and effect: effect, kind, n, estimate, low, high, p, p_holm.

    A main effect is the mean over all other factors of (level − first level). An interaction of two factors is the
    difference of one's effect between the other's levels. Each replicate, a pair of order and seed, gives one number,
    since all cells of a replicate share data, order and seed. Intervals are Student's over the replicates that have
    every cell, NaN for one. Holm's adjustment is over the effects of one figure.

    Args:
        study: the results.
        levels: factor → its levels, the one to compare with first.
        factors: label → factor → level. Labels of the study without an entry do not count.
        figures: as in `StudyResults.figures`.
        level: of the intervals.

    Raises:
        ValueError: a cell of the design has no label, or two, or a level or figure is unknown.
    """
    cells = _design(levels, factors)
    table = study.figures()
    known = list(dict.fromkeys(table["figure"]))
    if known and (unknown := [figure for figure in figures if figure not in known]):
        raise ValueError(f"figure is {unknown[0]!r}, choose from {', '.join(known)}")
    grid = table[table["figure"].isin(list(figures))].set_index(["figure", "order", "seed", "label"])["value"].unstack()
    missing = [label for label in cells.values() if label not in grid.columns]
    rows = []
    for figure in figures:
        part: pd.DataFrame = grid.iloc[:0] if missing else grid.loc[[figure]]
        part = part.dropna(subset=[label for label in cells.values() if label in part.columns])
        effects = []
        for name, kind, weights in _contrasts(levels):
            added, taken = np.zeros((2, len(part)), dtype=np.float64)
            for cell, weight in weights.items() if len(part) else ():
                (added if weight > 0 else taken)[:] += abs(weight) * part[cells[cell]].to_numpy(dtype=np.float64)
            test = paired_test(added, taken, level=level)
            effects.append((figure, name, kind, test.n, test.difference, test.low, test.high, test.p))
        adjusted = holm([effect[-1] for effect in effects]).tolist()
        rows += [(*effect, p) for effect, p in zip(effects, adjusted, strict=True)]
    return pd.DataFrame(rows, columns=["figure", "effect", "kind", "n", "estimate", "low", "high", "p", "p_holm"])


def _design(levels: Levels, factors: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, ...], str]:
    """Levels of all factors → the label of this cell."""
    cells: dict[tuple[str, ...], str] = {(): ""}
    for name in levels:
        cells = {(*cell, each): "" for cell in cells for each in levels[name]}
    for label, chosen in factors.items():
        cell = tuple(chosen[name] for name in levels)
        if cell not in cells:
            raise ValueError(f"{label} has the levels {', '.join(cell)}, which are no cell of the design")
        if cells[cell]:
            raise ValueError(f"{label} and {cells[cell]} are the same cell of the design")
        cells[cell] = label
    if empty := [cell for cell, label in cells.items() if not label]:
        raise ValueError(
            f"no label has the levels {', '.join(empty[0])}: {len(empty)} of {len(cells)} cells are missing"
        )
    return cells


def _contrasts(levels: Levels) -> list[tuple[str, str, dict[tuple[str, ...], float]]]:
    """Name, kind and weights per cell of every main effect and every interaction of two factors."""
    names = list(levels)
    single = {
        (name, other): {each: float(each == other) - float(each == levels[name][0]) for each in levels[name]}
        for name in names
        for other in levels[name][1:]
    }
    contrasts = []
    for sources in (*((key,) for key in single), *combinations(single, 2)):
        used = [name for name, _ in sources]
        if len(set(used)) < len(used):
            continue
        weights: dict[tuple[str, ...], float] = {(): 1.0}
        for name in names:
            own = next((single[key] for key in sources if key[0] == name), None)
            each = own or dict.fromkeys(levels[name], 1 / len(levels[name]))
            weights = {(*cell, value): w * each[value] for cell, w in weights.items() for value in levels[name]}
        name = " × ".join(f"{factor}: {other} − {levels[factor][0]}" for factor, other in sources)
        contrasts.append((name, "main" if len(sources) == 1 else "interaction", weights))
    return contrasts
