"""The work of each of two processes in `test_ranks`: runs of the toy stream, and communication."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from toy import toy_stream

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.ranks import process_group, tensor_digest

OPTIONS: dict[str, dict[str, Any]] = {
    "eblora": {"rank": 4, "alpha": 8.0, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "sequential_merge": {"rank": 4, "alpha": 8.0, "lr": 0.03},
}


def work(rank: int, folder: Path, port: int) -> None:
    """Run everything as rank ``rank`` of two and write the results to ``results-<rank>.json``."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    results: dict[str, Any] = {}
    with process_group("cpu") as ranks:
        results["share"] = list(ranks.share([0, 1, 2, 3, 4]))
        results["gathered"] = ranks.all_gather(f"rank {ranks.index}")
        results["gradients"] = gradients(ranks.index, ranks.sum_gradients)
        same = torch.full((3,), float(rank))
        ranks.broadcast([same])
        results["broadcast"] = same.tolist()
        ranks.validate_equal([same], "these")
        try:
            ranks.validate_equal([torch.tensor([1.0, float(rank)])], "the numbers")
        except RuntimeError as error:
            results["unequal"] = str(error)
        for name, options in OPTIONS.items():
            models: list[nn.Module] = []
            stream = toy_stream()
            make = stream.make_model
            object.__setattr__(
                stream, "make_model", lambda make=make, models=models: models.append(make()) or models[-1]
            )
            training = Training(epochs=1, batch_size=8)
            record = ContinualRunner(stream, make_method(name, **options), folder / name, training=training).run()
            results[name] = {"losses": record.losses, "matrix": record.matrix().tolist(), "config": record.config}
            results[name]["weights"] = tensor_digest(models[-1].parameters())
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


def gradients(rank: int, summed: Any) -> list[Any]:
    """Sums of gradients: one on both ranks, one on the second only, one on none."""
    both, second, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 10.0 + rank])
    if rank == 1:
        second.grad = torch.tensor([5.0, 6.0])
    summed([both, second, none])
    return [None if p.grad is None else p.grad.tolist() for p in (both, second, none)]
