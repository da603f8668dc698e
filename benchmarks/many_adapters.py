"""Time and memory of `manifold-cl analyze many` on hundreds of adapters of a 7B model, and its false alarms.

    python benchmarks/many_adapters.py

Adapters with the shapes of LLaVA-1.5-7B's 224 linear layers, rank 16, are written as PEFT folders of float16 factors,
in families that share a part of their input directions. The command then reads all of them, in a process of its own:
imports, tables, figures and page are included. With ``--files`` fewer than ``--members``, the other members are links:
the work is the same, but files are read from memory, so that the disk is not measured. One member is truncated, and the
command has to name it. Memory is the proportional set of anonymous pages of the command and all its processes (a page
that k processes share counts 1/k in each), sampled twice per second.

False alarms are counted over 1000 collections of random members: any pair beyond chance, any cluster, any outlier.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from analysis.many import AdapterCollection
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

AIMS = {"seconds": "under 180 s on two CPU cores", "peak_bytes": "under 1e9", "left_out": "the damaged member alone"}
LEVEL = "at most 5 % of 1000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=200)
    parser.add_argument("--files", type=int, default=25, help="different files; the other members are links to them")
    parser.add_argument("--families", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="keeps the adapters here, and uses those that are here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "many_adapters.json")
    options = parser.parse_args()
    alarms = false_alarms(options.simulations) if options.simulations else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "adapters"
        if not folder.exists():
            write_members(folder, options)
        measured = run(folder, Path(temporary) / "report", options)
    result = {
        "what": f"{options.members} adapters of {7 * options.blocks} layers of LLaVA-1.5-7B's shapes, rank "
        f"{options.rank}, float16 factors in PEFT folders, and a damaged one; {options.files} different files of "
        f"{options.families} families, the other members are links to them; the command from start to end",
        **measured,
        "false_alarms": alarms,
        "device": options.device,
        "processes": options.processes,
        "load_average": list(os.getloadavg()),
        "aims": {**AIMS, "false_alarms": LEVEL},
        "versions": library_versions(),
        "machine": machine(),
    }
    table = Table(title=f"{options.device}, {options.processes} processes, load {os.getloadavg()[0]:.1f}")
    for column in ("", "measured", "aim"):
        table.add_column(column)
    for name, aim in result["aims"].items():
        table.add_row(name, str(result[name]), aim)
    Console().print(table)
    write_json(options.out, result)


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's linear layers; 11008 × 4096 for the MLP at width 4096."""
    inner = 11008 * width // 4096
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    return square | {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}


def write_members(folder: Path, options: argparse.Namespace) -> None:
    """Adapters in families: half of the energy of the input factors is that of the family. The last one is damaged."""
    rank, draw = options.rank, torch.Generator().manual_seed(0)
    widest = max(n for _, n in shapes(options.width).values())
    families = [torch.randn(rank, widest + options.blocks, generator=draw) for _ in range(options.families)]
    sigma = torch.logspace(0, -1, rank)[:, None]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(shapes(options.width))}
    for member in range(options.members):
        if member >= options.files:
            link(folder / f"adapter-{member % options.files}", folder / f"adapter-{member}")
            continue
        tensors = {}
        for block in range(options.blocks):
            for module, (m, n) in shapes(options.width).items():
                stem = f"base_model.model.model.layers.{block}.{module}.lora_"
                own = torch.randn(rank, n, generator=draw) + families[member % options.families][:, block : block + n]
                tensors[f"{stem}A.weight"] = (sigma * own / n**0.5).half()
                tensors[f"{stem}B.weight"] = (torch.randn(m, rank, generator=draw) / m**0.5).half()
        place = folder / f"adapter-{member}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    damaged = folder / f"adapter-{options.members}"
    shutil.copytree(folder / "adapter-0", damaged)
    with (damaged / "adapter_model.safetensors").open("rb+") as file:
        file.truncate((damaged / "adapter_model.safetensors").stat().st_size // 2)


def link(folder: Path, new: Path) -> None:
    """A folder with hard links to the files of another."""
    new.mkdir(parents=True)
    for file in folder.iterdir():
        os.link(file, new / file.name)


def run(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the command, and what it found."""
    code = "from manifold_cl.cli import main; main()"
    arguments = ["analyze", "many", str(folder), "--out", str(out), "--device", options.device, "--json"]
    if options.device == "cpu":
        arguments += ["--processes", str(options.processes)]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    with sampled(process.pid) as seen:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}")
    seconds = time.perf_counter() - start
    found = json.loads(output)
    return {
        "seconds": round(seconds, 1),
        "peak_bytes": max(seen),
        "left_out": [each["task"] for each in found["left_out"]],
        "members": found["members"],
        "clusters": found["clusters"],
    }


@contextmanager
def sampled(root: int) -> Iterator[list[int]]:
    """Bytes of a process and all its descendants, sampled until the block ends."""
    seen, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            seen.append(sum(anonymous(pid) for pid in family(root)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def family(root: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    members = [root]
    for member in members:
        members += [pid for pid, parent in parents.items() if parent == member]
    return members


def anonymous(pid: int) -> int:
    """Bytes of anonymous pages; a page that k processes share counts 1/k."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")), 0)


def false_alarms(simulations: int) -> dict[str, Any]:
    """Shares of collections of random members in which anything is found, at the 5 % level."""
    found = {"pairs": 0, "clusters": 0, "outliers": 0}
    for seed in range(simulations):
        draw = torch.Generator().manual_seed(seed)
        shapes_ = {f"layers.{number}.q": (48, 64) for number in range(4)}
        members = {
            f"member-{member}": {
                layer: (torch.randn(m, 4, generator=draw), torch.randn(n, 4, generator=draw))
                for layer, (m, n) in shapes_.items()
            }
            for member in range(24)
        }
        tables = AdapterCollection.from_factors(members).measure(curves=0)
        found["pairs"] += tables.related_pairs > 0
        found["clusters"] += int(tables.tree.clusters.max()) > 0
        found["outliers"] += len(tables.found_outliers) > 0
    shares = {name: count / simulations for name, count in found.items()}
    return {"simulations": simulations, "members": 24, "layers": 4, "rank": 4, **shares}


if __name__ == "__main__":
    main()
