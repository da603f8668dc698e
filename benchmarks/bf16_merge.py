"""The share of an update that is lost when it is merged into bfloat16 weights, by the size of the update.

    python benchmarks/bf16_merge.py              # the real weights of SmolLM2-135M-Instruct (lm-four), under a minute

Updates have random frames of rank 16 and equal singular values. Trained updates have 0.1 at the start of a task, 0.14
to 0.19 at its end (docs/choosing.md). The loss is ``|rounded − exact| / |update|``, as a merge warns.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from torch import nn

from manifold_cl.adapters import target_linears
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.merging import losses_together, merge_into
from manifold_cl.continual.environment import library_versions
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

RANK = 16
SIZES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bf16-merge.json")
    given = parser.parse_args()
    layers = target_linears(open_stream("lm-four").make_model(), "all-linear")
    rows = [lost(layers, size) for size in SIZES]
    for row in rows:
        print(f"singular values {row['singular_value']:<5} lost: {row['median']:.0%} (median of {len(layers)} layers), "
              f"{row['least']:.0%} to {row['most']:.0%}")  # fmt: skip
    what = "share of an update lost by a merge into bfloat16 weights of SmolLM2-135M-Instruct"
    write_json(
        given.out, {"what": what, "rank": RANK, "layers": len(layers), "rows": rows, "versions": library_versions()}
    )


def lost(layers: dict[str, nn.Module], size: float) -> dict[str, float]:
    """The loss over all layers for updates whose singular values are ``size``."""
    draw = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), losses_together() as losses:
        warnings.simplefilter("ignore")
        for name, layer in layers.items():
            m, n = layer.weight.shape
            copy = nn.Linear(n, m, bias=False, dtype=torch.bfloat16).requires_grad_(False)
            copy.weight.copy_(layer.weight)
            frames = [torch.linalg.qr(torch.randn(rows, RANK, generator=draw)).Q for rows in (m, n)]
            merge_into(copy, [Factors(*frames, torch.tensor(size))], layer=name)
        values = list(losses.values())
    return {
        "singular_value": size,
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


if __name__ == "__main__":
    main()
