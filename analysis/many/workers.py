"""Chunks of layers, measured over all members in this process or in several ones."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import ForkServerContext
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.adapters.batches import Progress
from analysis.formats import Source
from analysis.many.layer_pass import Curve, Factors, Frames, Side, blocked_overlaps, curve, frames, overlaps
from analysis.many.members import Member, Omission, narrowed

CHUNK = 4
"""Layers of one piece of work."""
IMPORTS = 450_000_000
"""Bytes of this process, and of the imports that the others share with it, before any factor is read; as measured."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What is measured of every layer, and with how much memory."""

    shapes: Mapping[str, tuple[int, int]]
    """Layer to (m, n)."""
    side: Side
    curves: Mapping[str, bool]
    """Layers whose curve is measured, and whether random members are measured too."""
    device: str
    block_bytes: int
    """Bytes of the frames of one layer."""


class LayerResult(NamedTuple):
    """The measures of one layer, over the members of the pass."""

    layer: str
    values: Tensor  # (R,), singular values of one member after the other, float64
    widths: Tensor  # (members,), how many of them each member has
    ranks: Tensor  # (members,)
    top: Tensor  # (members, members), ‖V_aᵀ V_b‖², float32 as the products that it sums
    curve: Curve | None


@dataclass
class Measured:
    """The results of all layers over the members that could be read."""

    members: list[Member]
    failed: list[Omission]
    layers: dict[str, LayerResult] = field(default_factory=dict)


class _MemberError(NamedTuple):
    """The index of a member that cannot be read, and its error."""

    position: int
    reason: str


def measure_chunk(work: Pass, chunk: Sequence[str], sources: Sequence[Source]) -> list[LayerResult] | _MemberError:
    """Measures of some layers over the updates of all members, in float64 but for the products of frames."""
    results = []
    for layer in chunk:
        try:
            results.append(_layer(work, layer, sources))
        except _ReadError as error:
            return _MemberError(error.position, error.reason)
    return results


class _ReadError(Exception):
    """A member of a chunk that cannot be read."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


def _factors(sources: Sequence[Source], positions: range, layer: str) -> Iterator[Factors]:
    """The factors of one layer of some members. No file stays open: an open one takes a megabyte."""
    for position in positions:
        try:
            yield next(iter(sources[position].read([layer])))
        except (ValueError, OSError, RuntimeError, StopIteration) as error:
            raise _ReadError(position, str(error) or type(error).__name__) from error


def _layer(work: Pass, layer: str, sources: Sequence[Source]) -> LayerResult:
    width = work.shapes[layer][1 if work.side == "input" else 0]
    ranks = [source.shapes[layer][2] for source in sources]
    blocks = _blocks(ranks, width, work.block_bytes)

    def read(rows: slice) -> Frames:
        factors = _factors(sources, range(rows.start, rows.stop), layer)
        return frames(factors, width, ranks[rows], work.side, device=work.device)

    if len(blocks) == 1:
        parts = read(blocks[0])
        top, seen = overlaps(parts, parts).cpu(), [parts]
        one = curve(parts, random=work.curves[layer]) if layer in work.curves else None
    else:
        top, seen = blocked_overlaps(read, blocks, len(sources))
        one = None
    # one tensor per layer: hundreds of members with one each take more memory than their numbers
    values = torch.cat([each.cpu() for part in seen for each in part.values])
    widths = torch.tensor([width for part in seen for width in part.widths])
    return LayerResult(layer, values, widths, torch.cat([part.ranks.cpu() for part in seen]), top.float(), one)


def _blocks(ranks: Sequence[int], width: int, block_bytes: int) -> list[slice]:
    """Members whose frames fit into the budget, all at once if possible; else half the budget per block."""
    limit = block_bytes // (4 * width)
    if sum(ranks) <= limit:
        return [slice(0, len(ranks))]
    blocks, start, columns = [], 0, 0
    for position, rank in enumerate(ranks):
        if columns + rank > limit // 2 and position > start:
            blocks.append(slice(start, position))
            start, columns = position, 0
        columns += rank
    return [*blocks, slice(start, len(ranks))]


def measure(work: Pass, members: Sequence[Member], *, processes: int, progress: Progress | None) -> Measured:
    """All layers over all members that can be read; a member that cannot be read is named, and layers are repeated.

    RuntimeError: a process ended unexpectedly.
    """
    used = list(range(len(members)))
    failed: list[Omission] = []
    layers = list(work.shapes)
    chunks = [tuple(layers[start : start + CHUNK]) for start in range(0, len(layers), CHUNK)]
    finished: dict[tuple[str, ...], tuple[tuple[int, ...], list[LayerResult]]] = {}
    with _executor(work, processes) as submit:
        pending: dict[Future[list[LayerResult] | _MemberError], tuple[tuple[str, ...], tuple[int, ...]]] = {}
        waiting = list(reversed(chunks))
        while waiting or pending:
            while waiting and len(pending) < processes:
                chunk, present = waiting.pop(), tuple(used)
                sources = [narrowed(members[index].source, chunk) for index in present]
                pending[submit(chunk, sources)] = (chunk, present)
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                chunk, present = pending.pop(future)
                result = _result(future)
                if isinstance(result, _MemberError):
                    index = present[result.position]
                    if index in used:
                        used.remove(index)
                        failed.append(Omission(members[index].name, result.reason))
                    waiting.append(chunk)
                elif present == tuple(used):
                    finished[chunk] = (present, result)
                else:  # a member failed meanwhile: measured again without it
                    waiting.append(chunk)
            stale = [chunk for chunk, (present, _) in finished.items() if present != tuple(used)]
            for chunk in stale:
                del finished[chunk]
                waiting.append(chunk)
            if not used:
                break
            if progress is not None:
                progress(sum(map(len, finished)), len(layers))
    results = {each.layer: each for _, part in finished.values() for each in part}
    return Measured([members[index] for index in used], failed, {name: results[name] for name in layers if used})


def _result(future: "Future[list[LayerResult] | _MemberError]") -> list[LayerResult] | _MemberError:
    try:
        return future.result()
    except BrokenProcessPool as error:
        remedy = "it may have run out of memory: give fewer processes, or a smaller memory budget"
        raise RuntimeError(f"a process that measured layers ended unexpectedly; {remedy}") from error


Submit = Callable[[tuple[str, ...], list[Source]], "Future[list[LayerResult] | _MemberError]"]


class _executor:  # noqa: N801 (a context manager, read as a verb)
    """Runs chunks in processes of their own, or here where one process is enough."""

    def __init__(self, work: Pass, processes: int) -> None:
        self.work, self.processes = work, processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Submit:
        if self.processes == 1:
            return self._here
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        if isinstance(context, ForkServerContext):
            context.set_forkserver_preload([__name__])  # processes share the memory of the imports
        self.pool = ProcessPoolExecutor(
            self.processes, mp_context=context, initializer=_start, initargs=(pickle.dumps(self.work), threads)
        )
        pool = self.pool
        return lambda chunk, sources: pool.submit(_run, chunk, sources)

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _here(self, chunk: tuple[str, ...], sources: list[Source]) -> "Future[list[LayerResult] | _MemberError]":
        future: Future[list[LayerResult] | _MemberError] = Future()
        future.set_result(measure_chunk(self.work, chunk, sources))
        return future


def _start(work: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    _run.work = pickle.loads(work)  # type: ignore[attr-defined]  # our own bytes, from the parent process


def _run(chunk: tuple[str, ...], sources: list[Source]) -> list[LayerResult] | _MemberError:
    return measure_chunk(_run.work, chunk, sources)  # type: ignore[attr-defined]
