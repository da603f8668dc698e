"""Data-parallel ranks: the share of this process, and communication with the others.

A process that was not started by torchrun or Accelerate is the only rank, for which everything here does nothing.
Ranks step on the same summed gradient from the same start, so their parameters stay equal bit for bit.
`Ranks.validate_equal` verifies that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")

TIMEOUT = timedelta(hours=3)
"""Longest wait for other ranks. It is long, since answering is uneven and only the first rank scores captions."""


@dataclass(frozen=True)
class Ranks:
    """This process, number ``index`` from 0, among the ``count`` processes that train together."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of torch's default process group, or the only rank where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files."""
        return self.index == 0

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """The items of this rank: every ``count``-th from ``index`` on."""
        return items[self.index :: self.count]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()

    def all_gather(self, value: _T) -> list[_T]:
        """The value of every rank, in order; a picklable value."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in one reduction per dtype and device.

        A gradient that is missing on some ranks counts as zero there; one that is missing on all stays missing.
        """
        if self.count == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        for (dtype, device), same in kinds.items():
            present = torch.tensor([float(p.grad is not None) for p in same], dtype=dtype, device=device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
            flat = torch.cat([present, *(grad.reshape(-1) for grad in grads)])
            dist.all_reduce(flat)
            sizes = [len(same), *(grad.numel() for grad in grads)]
            anywhere, *summed = flat.split(sizes)  # type: ignore[no-untyped-call]
            for p, seen, total in zip(same, anywhere.tolist(), summed, strict=True):
                p.grad = total.view_as(p) if seen else None

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values to every rank."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def validate_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raise RuntimeError, with ``what`` and their numbers, for ranks whose bits differ from those of the first."""
        if self.count == 1:
            return
        digests = self.all_gather(tensor_digest(tensors))
        if off := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise RuntimeError(
                f"{what} differ between ranks: rank {', '.join(map(str, off))} and rank 0 disagree; run all ranks on "
                "devices of one kind with the same library versions, from the same files"
            )


@contextmanager
def process_group(device: torch.device | str) -> Iterator[Ranks]:
    """A context in which this process is a rank, where torchrun or ``accelerate launch`` started it.

    Both launchers set environment variables. Ranks communicate through NCCL on CUDA devices, one device per rank, and
    through Gloo elsewhere.

    Raises:
        ValueError: for a device with an index under several ranks, which would put all of them on one GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    device = torch.device(device)
    if device.index is not None:
        raise ValueError(f"every rank takes its own GPU: give {device.type!r} instead of {str(device)!r}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the tensors' exact values: of shapes, dtypes and the sums of bit patterns, computed on their device.

    Integer sums wrap but do not round, so the digest does not depend on the order of summation. It distinguishes
    models that were trained differently; it does not protect against forgery.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1)
        if bits.is_floating_point():
            bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        total = int(bits.sum(dtype=torch.int64)) if bits.numel() else 0
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}{total};".encode())
    return digest.hexdigest()
