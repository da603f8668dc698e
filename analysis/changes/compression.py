"""Adapters truncated to a rank per layer, by singular triples or by the outputs on given inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from analysis.activations import InputMoments
from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.interventions import changed_set
from analysis.numerics.decomposition import Triples, triples


def compressed(
    adapters: AdapterSet, ranks: Mapping[str, Mapping[str, int]], *, moments: InputMoments | None = None
) -> AdapterSet:
    """The adapters truncated to a rank per task and layer; layers without one, or of no higher rank, stay.

    The leading singular triples stay, or with `moments` the leading directions of the outputs on the inputs that they
    are about. In both cases the update is projected on its output side.

    Raises:
        ValueError: a rank is below 1.
    """

    def change(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        rank = ranks.get(task, {}).get(layer)
        if rank is None:
            return left, right
        if rank < 1:
            raise ValueError(f"{task}, {layer}: rank is {rank}, at least 1 was expected")
        if rank >= left.shape[1]:
            return left, right
        if moments is None:
            return truncated_factors(triples(left[None], right[None]), rank)
        basis, core = output_moments(left, moments.block(layer, task))
        axes = basis @ leading(core.sum(0))[:, :rank]
        return axes, right @ (left.mT @ axes)

    return changed_set(adapters, change)


def output_moments(left: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (m, k) of the update's outputs, and sums (groups, k, k) of ``(ΔW x)(ΔW x)ᵀ`` in it.

    `inputs` holds sums (groups, r, r) of ``(Rᵀx)(Rᵀx)ᵀ`` for the right factor R.
    """
    q, core = torch.linalg.qr(left.double())
    return q, core @ inputs.to(core) @ core.mT


def leading(moment: Tensor) -> Tensor:
    """Eigenvectors (k, k) of a symmetric matrix, the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(-1)


def truncated_factors(update: Triples, rank: int) -> tuple[Tensor, Tensor]:
    """Left (m, k) and right (n, k) of the k leading singular triples of one update."""
    return update.left[0, :, :rank] * update.values[0, :rank], update.right[0, :, :rank]
