"""Metrics of an accuracy matrix, one function per convention.

``a[i, j]`` is the score on task j after learning task i (both from 0), in percent. Unknown entries are NaN, and a
metric that needs one is NaN. Conventions differ between code bases, even in sign: docs/method.md, "Metrics".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.ArrayLike


def _square(a: Matrix) -> npt.NDArray[np.float64]:
    matrix = np.asarray(a, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"an accuracy matrix is square, (tasks, tasks), got shape {matrix.shape}")
    return matrix


def _mean(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def mft(a: Matrix) -> float:
    """Mean fine-tune accuracy: the mean of ``a[i, i]``, each task just learned."""
    return _mean(np.diag(_square(a)))


def mfn(a: Matrix) -> float:
    """Mean final accuracy: the mean of the last row."""
    return _mean(_square(a)[-1])


def maa(a: Matrix) -> float:
    """Mean average accuracy: after each task the mean over the tasks learned so far, averaged over tasks."""
    matrix = _square(a)
    return _mean([row[: i + 1].mean() for i, row in enumerate(matrix)])


def bwt(a: Matrix) -> float:
    """Backward transfer: mean of ``a[-1, j] − a[j, j]`` over all tasks but the last; negative is forgetting.

    Equal to (MFN − MFT) T / (T − 1). NaN for a single task. Source: lopezpaz2017gem.

    >>> bwt([[90.0, 50.0], [80.0, 70.0]])
    -10.0
    """
    matrix = _square(a)
    return _mean((matrix[-1] - np.diag(matrix))[:-1])


def bwt_over_all(a: Matrix) -> float:
    """Backward transfer divided by the number of all tasks: mean of ``a[-1, j] − a[j, j]``, the last task's 0 included.

    Equal to MFN − MFT, and to `bwt` (T − 1) / T. TRACE (wang2023trace) reports this one, `bwt` is that of GEM; both are
    called BWT, so compare a published number with the one of its own divisor. 0 for a single task.

    >>> bwt_over_all([[90.0, 50.0], [80.0, 70.0]])
    -5.0
    """
    matrix = _square(a)
    return _mean(matrix[-1] - np.diag(matrix))


def fwt(a: Matrix) -> float:
    """Forward transfer as a level, the "transfer" average over the tasks from the second on.

    For each of them the mean score before it was learned, without the pre-trained model's. NaN for a single task.
    Source: zheng2023zscl.
    """
    matrix = _square(a)
    return _mean([matrix[:j, j].mean() for j in range(1, len(matrix))])


def fwt_flat(a: Matrix) -> float:
    """Forward transfer as a level, the flat mean of the entries above the diagonal. NaN for a single task."""
    matrix = _square(a)
    return _mean(matrix[np.triu_indices(len(matrix), k=1)])


def forgetting(a: Matrix) -> float:
    """Mean drop from each task's best score at any time to its last, all tasks but the last; positive is worse.

    The convention by *maximum*, which never falls below `forgetting_just_learned`. NaN for a single task.
    """
    matrix = _square(a)
    return _mean((matrix.max(axis=0) - matrix[-1])[:-1])


def forgetting_just_learned(a: Matrix) -> float:
    """Mean drop ``a[j, j] − a[-1, j]`` from just learned to the end, all tasks but the last; negative is a gain.

    The convention by *just-learned* score, `bwt` with the opposite sign. NaN for a single task.

    >>> forgetting_just_learned([[90.0, 50.0], [80.0, 70.0]])
    10.0
    """
    return 0.0 - bwt(a)  # 0.0, not -0.0, where nothing changed


def general_delta(rows: Mapping[str, Sequence[float]], tasks: int) -> float:
    """General ability delta: the mean over sets of the score after all tasks minus the pre-trained model's.

    Negative is a loss of ability. Source: wang2023trace.

    Args:
        rows: set → its scores: of the pre-trained model, then after each task.
        tasks: number of tasks of the stream; NaN until all are learned.

    >>> general_delta({"facts": [50.0, 48.0, 45.0], "sums": [20.0, 21.0, 21.0]}, tasks=2)
    -2.0
    """
    complete = all(len(row) == tasks + 1 for row in rows.values())
    return _mean([row[-1] - row[0] for row in rows.values()]) if complete else float("nan")


METRICS = {
    m.__name__: m for m in (mft, mfn, maa, bwt, bwt_over_all, fwt, fwt_flat, forgetting, forgetting_just_learned)
}
"""The metrics of a record, by name."""
