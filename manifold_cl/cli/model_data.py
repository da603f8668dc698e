"""Options ``--model``, ``--data`` and ``--examples`` of commands that run a model: their declarations and reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from manifold_cl.cli.options import at_least, require_path

if TYPE_CHECKING:
    from torch import Tensor, nn

Model = Annotated[
    str | None,
    Option("--model", help="The base model, for what updates do on --data: a folder, or a name on the hub."),
]
Data = Annotated[
    list[str] | None,
    Option(
        "--data",
        metavar="FILE",
        help="JSONL file of examples that --model reads, or NAME=FILE to name them, such as after a task; repeatable.",
    ),
]
Examples = Annotated[int, Option(callback=at_least(1), help="Examples of each --data file to use.")]


def read_model_data(
    model: str | None, data: Sequence[str] | None, *, examples: int = 128, device: str = "cpu"
) -> tuple[nn.Module, dict[str, list[dict[str, Tensor]]]] | None:
    """The model, and the batches of each file by its name; None where neither option is given.

    Files are read before the model, so that wrong rows are found early.

    Raises:
        ValueError: one option without the other, a name twice, or rows that the model does not read.
        FileNotFoundError: a file is missing.
    """
    if model is None and not data:
        return None
    if model is None or not data:
        raise ValueError("--model and --data belong together: give the base model, and the examples that it reads")
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.continual.finite_weights import validate_finite_weights
    from manifold_cl.streams.model_inputs import is_causal, load_text_model, load_text_tokenizer, read_batches

    model = analysis.formats.reachable_model(model)
    files, causal, tokenizer = named_files(data), is_causal(model), load_text_tokenizer(model)
    batches = {name: read_batches(path, tokenizer, causal=causal, examples=examples) for name, path in files.items()}
    on_device = {
        name: [{key: value.to(device) for key, value in batch.items()} for batch in each]
        for name, each in batches.items()
    }
    network = load_text_model(model).to(device)
    validate_finite_weights(network)
    return network, on_device


def named_files(data: Sequence[str]) -> Mapping[str, Path]:
    """Name to file, from ``FILE`` or ``NAME=FILE``; a file without a name is called like itself."""
    files: dict[str, Path] = {}
    for given in data:
        name, separator, path = given.partition("=")
        if not separator or Path(given).exists():
            name, path = Path(given).stem, given
        require_path(Path(path), "for --data a JSONL file, or NAME=FILE")
        if not name or name in files:
            raise ValueError(f"--data {given!r}: every file needs a name of its own, write NAME={path}")
        files[name] = Path(path)
    return files
