"""Spectra of random factors against their law: edge, false alarms, counted directions, and exponents of tails.

    python benchmarks/bench_noise.py [--threads 1]

Five parts, each from dense random matrices. Edge: mean of the largest λ = σ² / mean(σ²), and the limit of its law.
Alarms: how often p is below a level, for normal and for uniform factors. Counts: leading directions that are counted
where some columns of one factor are larger. Tails: how often the interval covers the exponent of a true power law.
Signs: how often the p-value of opposite signs of two updates is below a level.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.statistics import NoiseLaws, ProductNull, alignment_p_value, tail_exponent
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

SHAPES = ((64, 48, 8), (384, 384, 16), (384, 1536, 16), (256, 256, 32), (1024, 1024, 4), (128, 128, 64))
LEVELS = (0.05, 0.01, 0.001)
DRAWS = 4000
SPIKES = ((0, 1.0), (1, 3.0), (2, 3.0), (4, 3.0))
"""Number of larger columns, and how much larger they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "noise.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"what": __doc__.splitlines()[0], "draws": DRAWS}
    found |= {"shapes": [shape_row(*shape) for shape in SHAPES], "counts": counts(), "tails": tails(), "signs": signs()}
    found |= {"threads": options.threads, "versions": library_versions(), "machine": machine()}
    write_json(options.out, found)
    for part in ("shapes", "counts", "tails", "signs"):
        print(*found[part], sep="\n")


def spectra(m: int, n: int, r: int, kind: str, larger: int = 0, factor: float = 1.0) -> NDArray[np.float64]:
    """Singular values (draws, r) of products of dense random factors, through their thin QR."""
    draw = torch.Generator().manual_seed(1)
    triangles = []
    for size in (m, n):
        parts = []
        for start in range(0, DRAWS, 500):
            shape = (min(500, DRAWS - start), size, r)
            entries = torch.randn(shape, generator=draw, dtype=torch.float64)
            if kind == "uniform":
                entries = torch.rand(shape, generator=draw, dtype=torch.float64) - 0.5
            if size == m and not triangles:
                entries[..., :larger] *= factor
            parts.append(torch.linalg.qr(entries, mode="r").R)
        triangles.append(torch.cat(parts))
    return np.asarray(torch.linalg.svdvals(triangles[0] @ triangles[1].mT))


def shape_row(m: int, n: int, r: int) -> dict[str, Any]:
    """Edge, mean and rates of false alarms at one shape."""
    null, law = ProductNull(m, n, r), NoiseLaws().largest(m, n, r)
    row: dict[str, Any] = {"m": m, "n": n, "r": r, "edge": null.edge}
    for kind in ("normal", "uniform"):
        squares = spectra(m, n, r, kind) ** 2
        largest = squares[:, 0] / squares.mean(1)
        p = law.sf(largest)
        row[kind] = {
            "mean": float(largest.mean()),
            "alarms": {str(level): float((p <= level).mean()) for level in LEVELS},
        }
    return row


def counts(m: int = 384, n: int = 384, r: int = 16) -> list[dict[str, Any]]:
    """Shares of updates with too few, all and too many directions counted at the 5 % level."""
    rows = []
    for larger, factor in SPIKES:
        sigma = spectra(m, n, r, "normal", larger, factor)
        counted = np.sum([p <= 0.05 for p in NoiseLaws().p_values(sigma, m, n, level=0.05)], axis=0)
        shares = {"low": counted < larger, "right": counted == larger, "high": counted > larger}
        row = {name: float(share.mean()) for name, share in shares.items()}
        rows.append({"m": m, "n": n, "r": r, "larger": larger, "factor": factor, **row})
    return rows


def tails(exponent: float = 2.5, samples: int = 500) -> list[dict[str, Any]]:
    """By number of values: the share of spectra with an exponent, and of these the share of intervals that cover it."""
    rows = []
    for size in (64, 128, 512):
        draw = np.random.default_rng(size)
        fits = [
            tail_exponent(np.exp(draw.exponential(0.5 / (exponent - 1), size)), samples=100, seed=seed)
            for seed in range(samples)
        ]
        known = [fit for fit in fits if not fit.reason]
        covered = np.mean([fit.low <= exponent <= fit.high for fit in known])
        row = {"values": size, "exponent": exponent, "spectra": samples, "defined": len(known) / samples}
        rows.append({**row, "covered": float(covered)})
    return rows


def signs(m: int = 32, n: int = 24) -> list[dict[str, Any]]:
    """How often the p-value of a share of opposite signs is below a level, for pairs of random updates."""
    rows = []
    for r in (1, 4):
        draw = np.random.default_rng(0)
        first, second = (draw.standard_normal((DRAWS, m, r)) @ draw.standard_normal((DRAWS, r, n)) for _ in range(2))
        z = (np.sign(first) * np.sign(second)).mean((1, 2)) * (m * n) ** 0.5
        squared = 1.0
        for update in (first, second):
            energies = np.linalg.svd(update, compute_uv=False)[:, :r] ** 2
            squared *= ((energies / energies.sum(1, keepdims=True)) ** 2).sum(1)
        p = alignment_p_value(z, 1 / (2 * squared))
        alarms = {str(level): float((p <= level).mean()) for level in LEVELS}
        rows.append({"m": m, "n": n, "r": r, "deviation": float(z.std()), "alarms": alarms})
    return rows


if __name__ == "__main__":
    main()
