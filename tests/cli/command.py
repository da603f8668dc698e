"""What calling the command leaves."""

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """Exit code and both streams; the one for people on a single line."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]
