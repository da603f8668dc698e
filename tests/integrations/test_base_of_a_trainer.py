"""The pre-trained model that `ContinualTrainer` is given: one with weights that are not finite is refused."""

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_decoder import decoder
from tiny_tasks import trainer


def test_a_model_with_a_weight_that_is_nan_is_refused_before_training(tmp_path: Path) -> None:
    model = decoder()
    model.get_parameter("model.norm.weight").data[3] = math.nan
    with pytest.raises(ValueError, match=r"weight model\.norm\.weight of the pre-trained model has NaN"):
        trainer(tmp_path, model=model).train()
    assert not list(tmp_path.rglob("*.json"))
