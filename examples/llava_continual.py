"""Continual visual instruction tuning of LLaVA: all tasks are evaluated after each task.

    python examples/llava_continual.py --tiny                      # a random model on coloured squares, a minute
    python examples/llava_continual.py --data UCIT --device cuda   # the real thing: docs/vision-language.md
    torchrun --nproc_per_node 2 examples/llava_continual.py --tiny # data-parallel; accelerate launch does as well

The loop is the library's own: a stream, a method, a runner. A killed run resumes with ``--resume``, in the middle of
an evaluation too.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.ranks import Ranks, process_group
from manifold_cl.streams import open_folder, published_layout, read_layout
from manifold_cl.streams.folder_stream import FolderOptions
from manifold_cl.streams.published import DEFAULT_MODEL

TINY_TASKS = ("ImageNet-R", "ArxivQA", "IconQA")
TINY_METHODS = {
    "sequential_merge": {"rank": 8, "alpha": 16.0, "lr": 3e-3},
    "eblora": {"rank": 8, "alpha": 16.0, "lr": 9e-3, "scale_lr": 2e-2, "energy": 0.99, "statistic_examples": 48},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random LLaVA on a miniature UCIT, made here")
    parser.add_argument("--data", type=Path, help="folder with the downloaded data")
    parser.add_argument("--stream", default="ucit", help="ucit or mllm-dcl")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder, or a LLaVA checkpoint's name")
    parser.add_argument("--preset", default="published", help="published configuration")
    parser.add_argument("--method", action="append", help="with --tiny: sequential_merge, eblora; both by default")
    parser.add_argument("--batch-size", type=int, help="examples per process and forward pass")
    parser.add_argument("--train-projector", action="store_true", help="train the projector too, unprotected")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/llava"), help="where runs go")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    given = parser.parse_args(arguments)
    if given.tiny == (given.data is not None):
        parser.error("give either --tiny or --data FOLDER")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with process_group(given.device) as ranks:
        runners = tiny_runners(given, ranks) if given.tiny else [published_runner(given, ranks)]
        for runner in runners:
            record = runner.run(resume=given.resume)
            if ranks.writes:
                show(runner.folder, record.tasks, record.matrix().tolist(), record.metrics)


def tiny_runners(given: argparse.Namespace, ranks: Ranks) -> list[ContinualRunner]:
    """One runner per method, on a model and data that the first rank writes."""
    from tiny_llava import write_layout, write_model, write_ucit

    folder = given.out / "tiny"
    if ranks.writes and not (folder / "ucit.toml").exists():
        write_model(folder / "model")
        write_ucit(folder / "data", tasks=TINY_TASKS)
        write_layout(folder / "ucit.toml", tasks=TINY_TASKS)
    ranks.barrier()
    stream = open_folder(
        folder / "data",
        read_layout(folder / "ucit.toml"),
        FolderOptions(model=str(folder / "model"), dtype="float32", train_projector=given.train_projector),
    )
    return [
        ContinualRunner(
            stream,
            make_method(name, **TINY_METHODS[name]),
            given.out / name,
            training=Training(epochs=8, batch_size=8 // ranks.count),
            device=given.device,
        )
        for name in given.method or TINY_METHODS
    ]


def published_runner(given: argparse.Namespace, ranks: Ranks) -> ContinualRunner:
    """A runner of a published configuration on the downloaded data."""
    layout = published_layout(given.stream)
    preset = layout.preset(given.preset)
    options = FolderOptions(
        model=given.model,
        train_projector=preset.additional_parameters() if given.train_projector else False,
        checkpointing=True,
    )
    return ContinualRunner(
        open_folder(given.data, layout, options),
        make_method(preset.method, **preset.options),
        given.out / f"{layout.name}-{given.preset}",
        training=preset.training_for(ranks.count, batch_size=given.batch_size),
        device=given.device,
    )


def show(folder: Path, tasks: list[str], matrix: list[list[float]], metrics: dict[str, float]) -> None:
    """Print the accuracy matrix: rows after each task, columns the tasks."""
    width = max(map(len, tasks)) + 2
    print(f"\n{folder}")
    print("after".ljust(width) + "".join(task.rjust(width) for task in tasks))
    for task, row in zip(tasks, matrix, strict=True):
        print(task.ljust(width) + "".join(f"{score:.1f}".rjust(width) for score in row))
    print("  ".join(f"{name.upper()} {metrics[name]:.1f}" for name in ("mft", "mfn", "bwt")))


if __name__ == "__main__":
    main()
