"""What a dotted layer name says: its module, its block, its place in the order of a model."""

import re
from collections.abc import Sequence


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts ``layer.2`` before ``layer.10``.

    >>> sorted(["h.10.q", "h.2.q"], key=natural_key)
    ['h.2.q', 'h.10.q']
    """
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[./]", name))


def folder_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts the folder ``task-2`` before ``task-10``.

    >>> sorted(["task-10", "task-2"], key=folder_key)
    ['task-2', 'task-10']
    """
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def module_of(layer: str) -> str:
    """The last component of a layer's name.

    >>> module_of("encoder.layer.0.attention.self.query")
    'query'
    """
    return layer.rpartition(".")[2]


def block_of(layer: str) -> int | None:
    """The first component that is a number, the index of the block, or None.

    >>> block_of("encoder.layer.11.output.dense"), block_of("classifier")
    (11, None)
    """
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def short_names(layers: Sequence[str]) -> list[str]:
    """The names without the leading components that all of them share; the last component always stays.

    >>> short_names(["model.h.0.q", "model.h.1.q"])
    ['0.q', '1.q']
    """
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while len({tuple(part[: shared + 1]) for part in parts}) == 1 and all(len(part) > shared + 1 for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def place_of(layer: str) -> tuple[str, str]:
    """Row and column of a layer in a map of the model: its name up to the block's number, and the rest.

    >>> place_of("encoder.layer.0.attention.query"), place_of("head")
    (('encoder.layer.0', 'attention.query'), ('–', 'head'))
    """
    parts = layer.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None or number + 1 == len(parts):
        return "–", layer
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])
