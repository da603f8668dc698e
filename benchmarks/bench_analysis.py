"""Time and memory of spectra of a 7B model's adapters and interference of eight of them, reading included.

    python benchmarks/bench_analysis.py

Adapters with the shapes of LLaVA-1.5-7B's 224 linear layers are written as PEFT folders of float32 factors, then read
back and analysed. The dense way, ΔW and its SVD, is timed on one layer of each size and scaled by their number.
Accuracy is against the float64 SVD of dense updates whose spectra decay to 1e-6. Memory is the largest anonymous
resident set of a fresh process beyond what it was before, sampled every 5 ms. ``command_s`` is `manifold-cl analyze`
on the first two tasks in a process of its own: imports, tables, figures and report included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analysis import AdapterSet, against_chance, interference_table, principal_angles, singular_values, spectrum_table
from analysis.formats import save_lora
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

AIMS = {
    "spectra_s": "under 2 s on two CPU cores, under 0.2 s on a GPU",
    "dense_over_factored": "at least 500",
    "relative_error": "below 1e-5",
    "interference_s": "under 10 s on two CPU cores, under 1 s on a GPU",
    "command_s": "under 30 s on two CPU cores",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096, help="of the model; its other sizes scale")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-dense", action="store_true", help="skip the dense SVDs, a minute or more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "analysis.json")
    options = parser.parse_args()
    device = options.device
    with tempfile.TemporaryDirectory() as place:
        folders = sorted(write_adapters(Path(place) / "tasks", options).glob("0*"))
        spectra = [lap(lambda: spectrum_table(AdapterSet.load(folders[0]), device), device) for _ in laps(options.laps)]
        dense = {} if options.no_dense else dense_seconds(folders[0], options, device)
        everything = AdapterSet.load(*folders)
        busy = time.process_time()
        meetings = [lap(lambda: all_pairs(everything, device), device) for _ in laps(options.laps)]
        busy = (time.process_time() - busy) / (options.laps + 1)
        angles = lap(lambda: principal_angles(everything, device), device)
        command = [
            lap(lambda: analyze(folders[:2], Path(place) / "report", device), device) for _ in range(options.laps)
        ]
        budget = 2**28
        memory = {}
        for blocks in (max(1, options.blocks // 4), options.blocks):
            # a process of its own each time: what one has freed, the next would use unseen
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                memory[str(7 * blocks)] = pool.submit(peak, folders, blocks, device, budget).result()
    spectra_s, meetings_s = statistics.median(spectra[1:]), statistics.median(meetings[1:])
    result = {
        "what": f"{7 * options.blocks} layers of LLaVA-1.5-7B's shapes, rank {options.rank}, float32 factors in PEFT "
        f"folders, {options.tasks} tasks; seconds include reading",
        "width": options.width,
        "device": device,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "laps": options.laps,
        "spectra_s": spectra_s,
        "spectra_min_s": min(spectra[1:]),
        "dense": dense,
        "dense_over_factored": sum(dense.values()) / spectra_s if dense else None,
        "relative_error": relative_error(device),
        "interference_s": meetings_s,
        "interference_min_s": min(meetings[1:]),
        "interference_cpu_s": busy,
        "principal_angles_s": angles,
        "command_s": statistics.median(command),
        "budget_bytes": budget,
        "peak_bytes_by_layers": memory,
        "aims": AIMS,
        "versions": library_versions(),
        "machine": machine(),
    }
    table = Table(title=f"{device}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    for column in ("", "measured", "aim"):
        table.add_column(column)
    for name, aim in AIMS.items():
        value = result[name]
        table.add_row(name, "–" if value is None else f"{value:.3g}", aim)
    table.add_row("peak memory by layers", ", ".join(f"{n}: {b / 2**20:.0f} MiB" for n, b in memory.items()), "equal")
    Console().print(table)
    write_json(options.out, result)


def laps(count: int) -> range:
    """One more than asked for: the first reads the files from the disk and is not counted."""
    return range(count + 1)


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's linear layers; 11008 × 4096 for the MLP at width 4096."""
    inner = 11008 * width // 4096
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    return square | {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}


def write_adapters(folder: Path, options: argparse.Namespace) -> Path:
    draw = torch.Generator().manual_seed(0)
    sigma = torch.logspace(0, -2, options.rank)

    def layers() -> Iterator[tuple[str, str, Tensor, Tensor]]:
        for block in range(options.blocks):
            for module, (m, n) in shapes(options.width).items():
                name = f"language_model.layers.{block}.{module}"
                left, right = (torch.randn(size, options.rank, generator=draw) for size in (m, n))
                yield "", name, left * sigma / m**0.5, right / n**0.5

    return save_lora(folder, [(f"task-{number}", layers()) for number in range(options.tasks)])


def analyze(folders: list[Path], out: Path, device: str) -> None:
    code = "from manifold_cl.cli import main; main()"
    paths = [str(folder) for folder in folders]
    arguments = ["analyze", *paths, "--out", str(out), "--device", device]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def all_pairs(adapters: AdapterSet, device: str) -> None:
    against_chance(interference_table(adapters, device))


def dense_seconds(folder: Path, options: argparse.Namespace, device: str) -> dict[str, float]:
    """Seconds of ΔW and its singular values in float32 for all layers: one of each size, times their number.

    4096 × 11008 costs what its transpose costs, so it is not measured again.
    """
    adapters = AdapterSet.load(folder)
    kinds = shapes(options.width)
    sizes = {kinds["q_proj"]: 4 * options.blocks, kinds["up_proj"]: 3 * options.blocks}
    seconds = {}
    for shape, count in sizes.items():
        layer = next(name for name in adapters.layers if adapters.shape(adapters.tasks[0], name)[:2] == shape)
        left, right = (factor.to(device) for factor in adapters.factors(adapters.tasks[0], layer))
        once = lap(lambda left=left, right=right: torch.linalg.svdvals(left @ right.mT), device)  # type: ignore[misc]
        seconds[f"{shape[0]} × {shape[1]}: one layer, times {count}"] = once * count
    return seconds


def relative_error(device: str) -> float:
    """Largest relative error of singular values that decay to 1e-6, against dense float64."""
    draw = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(8):
        left, right = (torch.linalg.qr(torch.randn(size, 16, generator=draw)).Q for size in (512, 384))
        mix = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q
        pair = (left * torch.logspace(0, -6, 16) @ mix, right @ mix)
        exact = np.linalg.svd((pair[0].double() @ pair[1].double().mT).numpy(), compute_uv=False)[:16]
        found = singular_values(AdapterSet.from_factors({"a": {"x": pair}}), device)
        found = found[found["update"] == "task"]["value"].to_numpy()
        worst = max(worst, float(np.abs(found / exact - 1).max()))
    return worst


def cut(adapters: AdapterSet, blocks: int) -> AdapterSet:
    kept = tuple(layer for layer in adapters.layers if int(layer.split(".")[2]) < blocks)
    return AdapterSet(tuple(source.picked(kept) for source in adapters.sources), adapters.memories)


def lap(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(folders: list[Path], blocks: int, device: str, budget: int) -> int:
    """Bytes by which the anonymous resident set rises at most while the first blocks' interference is computed."""
    adapters = cut(AdapterSet.load(*folders), blocks)
    before = resident()
    with sampled() as seen:
        interference_table(adapters, device, memory_budget=budget)
    return max(seen) - before


@contextmanager
def sampled() -> Iterator[list[int]]:
    seen, stop = [resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def resident() -> int:
    """Bytes of anonymous memory; mapped files do not count, the system takes them back when it likes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


if __name__ == "__main__":
    main()
