"""Pages without their figures, for tests of what else a command writes: drawing takes most of a page's time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from analysis.plots import files, study, text, trade_off

REAL = (files.to_svg, text.make_room, text._take_literally)
BLANK = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'


@contextmanager
def figures(*, drawn: bool) -> Iterator[None]:
    """Figures are as they are, or blank: made by the same calls, but neither laid out nor drawn."""
    # names of ticks, which are taken literally, make the ticks
    to_svg, make_room, take_literally = REAL if drawn else (lambda _: BLANK, lambda _: None, lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "to_svg", to_svg)
        patch.setattr(text, "_take_literally", take_literally)
        for module in (study, text, trade_off):
            patch.setattr(module, "make_room", make_room)
        yield
