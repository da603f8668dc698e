"""Outliers among many values, by Rosner's generalised test."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
FEWEST = 8
"""Values below which no outlier is tested: Rosner's approximation needs a sample."""


def outlier_p_values(values: ArrayLike, *, most: int | None = None) -> Array:
    """p-value of each value as an outlier of a normal sample, by the generalised test of `rosner1983percentage`.

    The most extreme value is tested against the others and removed, up to `most` times (a quarter of the values).
    Step k's p is Bonferroni's over the values present, times 2^k, so that the steps together keep the level. A value's
    p is the least of its step's and all later steps', so that two outliers cannot hide each other. Values that are
    never the most extreme have p = 1, NaN stays NaN.

    All p are 1 for fewer than 8 known values, or where the others are equal up to rounding.

    >>> import numpy as np
    >>> p = outlier_p_values([*np.linspace(-1, 1, 19), 9.0])
    >>> int(p.argmin()), bool(p.min() < 1e-6), float(p[0])
    (19, True, 1.0)
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    p = np.where(np.isnan(given), np.nan, 1.0)
    present: list[int] = np.flatnonzero(~np.isnan(given)).tolist()
    removed: list[int] = []
    steps: list[float] = []
    if len(present) < FEWEST:
        return p
    for step in range(1, 1 + (len(present) // 4 if most is None else most)):
        sample = given[present]
        centre, spread = sample.mean(), sample.std(ddof=1)
        if spread <= 1e-12 * max(np.abs(sample).max(), 1e-300):  # rounding of equal values
            break
        position = int(np.abs(sample - centre).argmax())
        count, distance = len(present), abs(sample[position] - centre) / spread
        # R² (n − 2) / ((n − 1)²/n − R²) is the square of Student's t with n − 2 degrees of freedom
        room = (count - 1) ** 2 / count - distance**2
        t = np.sqrt(distance**2 * (count - 2) / room) if room > 0 else np.inf
        steps.append(min(1.0, float(2.0**step * count * 2 * special.stdtr(count - 2, -t))))
        removed.append(present.pop(position))
    if steps:
        p[removed] = np.minimum.accumulate(np.array(steps)[::-1])[::-1]
    return p
