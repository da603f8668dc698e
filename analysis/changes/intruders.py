"""Intruder dimensions of changed weights, reduced in the update that brought them in."""

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.interventions import changed_set
from analysis.formats import Checkpoint
from analysis.numerics.decomposition import triples
from analysis.tables.base_relation import INTRUDER_COSINE, INTRUDER_TOP


def intruders_shrunk(
    adapters: AdapterSet,
    base: Checkpoint,
    share: float = 0.25,
    *,
    top: int = INTRUDER_TOP,
    threshold: float = INTRUDER_COSINE,
) -> AdapterSet:
    """Updates from which a share of every intruder dimension is taken: ``ΔW − share Σ_j σ_j u_j v_jᵀ``.

    Triples are those of ``W + ΔW``, and j counts those of its `top` leading ones whose left vector has an absolute
    cosine below `threshold` with every left singular vector of W (shuttleworth2024illusion). PEFT's
    ``reduce_intruder_dimension`` does the same and then truncates to the old rank; its ``mitigation_lambda`` is one
    less `share`. Here the sum is exact: the rank grows by the number of intruders, up to that of the matrix. Each
    update is compared with W itself, without the updates before it.

    Cost: two dense SVDs per layer and update.

    Raises:
        ValueError: share is outside [0, 1], or the checkpoint lacks a layer.

    >>> intruder_dimensions_of(torch.eye(3), torch.zeros(3, 3), top=1, threshold=0.5)[1].shape
    torch.Size([0])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, a number from 0 to 1 was expected")

    def change(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        weight = base.weight(layer, (left.shape[0], right.shape[0]), transposed=layer in adapters.transposed).double()
        u, sigma, v = intruder_dimensions_of(weight, left @ right.mT, top=top, threshold=threshold)
        if not len(sigma):
            return left, right
        wide = triples(torch.cat([left, -share * sigma * u], dim=1)[None], torch.cat([right, v], dim=1)[None])
        rank = int(wide.rank[0])
        return wide.left[0, :, :rank] * wide.values[0, :rank], wide.right[0, :, :rank]

    return changed_set(adapters, change)


def intruder_dimensions_of(
    weight: Tensor, change: Tensor, *, top: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (m, k), singular values (k,) and right vectors (n, k) of the intruders in ``W + ΔW``."""
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    u, sigma, vt = torch.linalg.svd(weight + change, full_matrices=False)
    new = (known.mT @ u[:, :top]).abs().amax(0) < threshold
    return u[:, :top][:, new], sigma[:top][new], vt[:top][new].mT
