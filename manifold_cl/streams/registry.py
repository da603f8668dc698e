"""The registry of streams: their names, and the builder of a name, which is imported when it is first used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from manifold_cl.plugins import Registry
from manifold_cl.streams.selection import Evaluated

if TYPE_CHECKING:
    from manifold_cl.continual.task import TaskStream

OWN = {
    "text-six": "catalogue:TEXT_SIX",
    "text-six-400": "catalogue:TEXT_SIX_400",
    "text-twelve": "catalogue:TEXT_TWELVE",
    "text-three": "catalogue:TEXT_THREE",
    "text-val": "catalogue:TEXT_VAL",
    "lm-four": "decoder_streams:LM_FOUR",
    "lm-two": "decoder_streams:LM_TWO",
    "vlm-three": "picture_streams:VLM_THREE",
    "vlm-two": "picture_streams:VLM_TWO",
    "ucit": "catalogue:UCIT",
    "mllm-dcl": "catalogue:MLLM_DCL",
}
"""Name of a stream → the file of this package with its builder, and the builder's name there."""


@runtime_checkable
class StreamBuilder(Protocol):
    """Builds one stream."""

    @property
    def name(self) -> str:
        """The name of the stream."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of its tasks in order, without reading data."""

    def __call__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        examples: int | None = None,
        evaluate_on: Evaluated = "test",
        **options: Any,
    ) -> TaskStream:
        """The stream, restricted to ``tasks`` and to ``examples`` training examples per task."""


def _prepare(candidate: Any) -> tuple[str, StreamBuilder]:
    """The name of a stream builder, and the builder."""
    if not isinstance(candidate, StreamBuilder):
        raise TypeError(f"a stream builder needs name, task_names and __call__(tasks=...), got {candidate!r}")
    return candidate.name, candidate


def _advice(name: str) -> str | None:
    """What the name of a file lacks, with or without its ending."""
    file = name if name.endswith(".py") else f"{name}.py"
    if name != file and not Path(file).is_file():
        return None
    return f"a stream in a file is {file}:FUNCTION, with the function's name"


STREAMS: Registry[StreamBuilder] = Registry(
    "stream", _prepare, {name: f"manifold_cl.streams.{place}" for name, place in OWN.items()}, advice=_advice
)
"""Stream builders by name, including those of installed packages (read-only; see `register_stream`)."""


def register_stream(builder: StreamBuilder) -> None:
    """Put a builder into `STREAMS` under its ``name``, for `open_stream` and the command line.

    An installed package offers its builder as an entry point of the group ``manifold_cl.streams`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when it lacks part of the `StreamBuilder` protocol.
    """
    STREAMS.register(builder)


def is_code(stream: str) -> bool:
    """Whether a stream's name is that of a function of the user: ``module:function`` or ``file.py:function``."""
    return ":" in stream


def open_stream(
    name: str,
    *,
    tasks: Sequence[str] | None = None,
    examples: int | None = None,
    evaluate_on: Evaluated = "test",
    **options: Any,
) -> TaskStream:
    """The stream of this name; data of a text stream is downloaded into the cache on first use.

    Args:
        name: one of `STREAMS`.
        tasks: the tasks to take, in the order to learn them; all of them in their own order by default.
        examples: training texts per task, fewer than the stream has; the classes stay balanced.
        evaluate_on: with ``"validation"`` the ``test`` split *is* the validation part.
        **options: for streams in a folder: ``folder`` and the fields of `FolderOptions`.

    Raises:
        ValueError: an unknown stream or task, too many examples, or an unknown part.
        TypeError: an option that the stream does not take.
        FileError: the folder lacks a file, or one is malformed.
        FetchError: the data is not cached and cannot be downloaded.
    """
    return STREAMS[name](tasks=tasks, examples=examples, evaluate_on=evaluate_on, **options)
