"""Clusters of members by their principal angles: average linkage, and where the tree is cut."""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

Array = NDArray[np.float64]


class Tree(NamedTuple):
    """A tree of members. Heights are distances ``√(1 − overlap)``, in [0, 1]."""

    linkage: Array  # (members − 1, 4), as scipy.cluster.hierarchy has it
    order: NDArray[np.int64]  # members from the first leaf to the last
    cut: float  # height at which the tree is cut; 0 where no member is clustered
    clusters: NDArray[np.int64]  # number of the cluster per member, from 1 on, largest first; 0 for a lone member


def cluster_tree(overlap: Array, chance_overlap: float, *, clusters: int | None = None) -> Tree:
    """Average linkage of ``√(1 − overlap)``, with the cut in the widest gap between merges beyond chance.

    `overlap` (members, members) is the mean squared cosine of principal angles. `chance_overlap` is the value that
    all pairs of random members stay below with 95 % probability: merges at or above its height are not accepted. Of
    the other heights and that of chance, the two neighbours furthest apart are chosen, and the cut lies between them.
    That rule is ours. With `clusters` the tree is cut into that many instead, whatever chance says; fewer, with a
    warning, where merges have equal heights.
    """
    distance = np.sqrt(np.clip(1.0 - overlap, 0.0, 1.0))
    np.fill_diagonal(distance, 0.0)
    distance = (distance + distance.T) / 2
    tree = linkage(squareform(distance, checks=False), "average")
    heights = tree[:, 2]
    if clusters is not None:
        labels = fcluster(tree, clusters, "maxclust")
        if (found := int(labels.max())) < clusters:
            warnings.warn(
                f"{found} clusters instead of {clusters}: merges at the same height, such as those of equal members, "
                "are not cut apart",
                stacklevel=2,
            )
        cut = float((heights[-clusters] + heights[1 - clusters]) / 2) if 1 < clusters <= len(heights) else heights[-1]
        if clusters > len(heights):  # every member alone
            cut = 0.0
    else:
        limit = float(np.sqrt(1.0 - chance_overlap))
        accepted = heights[heights < limit]
        cut = 0.0
        if len(accepted):
            steps = np.append(np.sort(accepted), limit)
            widest = int(np.diff(steps).argmax())
            cut = float(steps[widest : widest + 2].mean())
        labels = fcluster(tree, cut, "distance") if cut else np.arange(len(overlap))
    return Tree(tree, leaves_list(tree).astype(np.int64), float(cut), _numbered(labels))


def _numbered(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels from 1 on, the largest cluster first; 0 for clusters of one."""
    values, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = sorted(range(len(values)), key=lambda index: (-counts[index], first[index]))
    number = {values[index]: position + 1 for position, index in enumerate(order) if counts[index] > 1}
    return np.array([number.get(label, 0) for label in labels], dtype=np.int64)
