"""Loading a model hides progress bars while it lasts, and leaves every switch as it was."""

import pytest

transformers = pytest.importorskip("transformers")

from manifold_cl.streams.language_model import without_progress_bar  # noqa: E402
from manifold_cl.streams.sentence_encoder import silence  # noqa: E402


@pytest.mark.parametrize("context", [without_progress_bar, silence])
@pytest.mark.parametrize(("shown", "of_hub"), [(True, True), (True, False), (False, True), (False, False)])
def test_bars_of_transformers_and_of_the_hub_are_put_back(context, shown, of_hub):
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    def switches() -> tuple[bool, bool]:
        return logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()

    def turn(bars: bool, bars_of_hub: bool) -> None:
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (hub.enable_progress_bars if bars_of_hub else hub.disable_progress_bars)()

    before = switches()
    try:
        turn(shown, of_hub)
        with context(logging):
            assert switches() == (False, False)
        assert switches() == (shown, of_hub)
    finally:
        turn(*before)
