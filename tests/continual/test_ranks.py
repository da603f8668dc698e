"""Two data-parallel processes: equal bits on both, and the numbers of one process up to rounding."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import start_ranks
from toy import toy_stream
from two_ranks import OPTIONS, work

from manifold_cl import ContinualRunner, RunRecord
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.ranks import Ranks, process_group, tensor_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    found = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(work, (found, port), 2)
    return found


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_has_its_share(results: list[dict[str, Any]]) -> None:
    assert [found["share"] for found in results] == [[0, 2, 4], [1, 3]]
    assert [found["gathered"] for found in results] == [["rank 0", "rank 1"]] * 2
    assert [found["broadcast"] for found in results] == [[0.0] * 3] * 2


def test_gradients_are_summed_where_any_rank_has_one(results: list[dict[str, Any]]) -> None:
    assert [found["gradients"] for found in results] == [[[2.0, 21.0], [5.0, 6.0], None]] * 2


def test_ranks_that_disagree_are_noticed(results: list[dict[str, Any]]) -> None:
    assert [found["unequal"].split(";")[0] for found in results] == [
        "the numbers differ between ranks: rank 1 and rank 0 disagree"
    ] * 2


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_all_ranks_end_with_the_same_bits(method: str, results: list[dict[str, Any]]) -> None:
    assert results[0][method] == results[1][method]


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_two_ranks_are_one_process_with_twice_the_batch(
    method: str, folder: Path, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    training = Training(epochs=1, batch_size=8, accumulation=2)
    alone = ContinualRunner(toy_stream(), make_method(method, **OPTIONS[method]), tmp_path, training=training).run()
    together = RunRecord.load(folder / method)
    assert [len(losses) for losses in together.losses] == [6, 6, 6]
    # The mean of two gradients, added in another order: float32 rounding, grown over six steps a task.
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-3)
    np.testing.assert_allclose(together.matrix(), alone.matrix(), atol=1.3)  # one of 80 test items
    assert together.config["ranks"] == 2
    assert together.status == "complete"
    assert len(list((folder / method).rglob("*.safetensors"))) == (6 if method == "eblora" else 3)


def test_one_process_is_the_only_rank() -> None:
    with process_group("cpu") as ranks:
        assert ranks == Ranks.current() == Ranks(0, 1)
        assert ranks.writes
        assert ranks.share([1, 2]) == [1, 2]
        assert ranks.all_gather("x") == ["x"]
        ranks.validate_equal([torch.zeros(1)], "nothing")


def test_a_device_with_an_index_is_refused_under_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="every rank takes its own GPU: give 'cuda' instead of 'cuda:0'"),
        process_group("cuda:0"),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_a_fingerprint_tells_values_shapes_and_dtypes_apart(dtype: torch.dtype) -> None:
    x = torch.arange(6).to(dtype)
    changed = x.clone()
    changed[4] = 7
    different = [x, changed, x.reshape(2, 3), x.to(torch.float16), x[:5]]
    assert len({tensor_digest([tensor]) for tensor in different}) == 5
    assert tensor_digest([x]) == tensor_digest([x.clone()]) != tensor_digest([x, x])
    assert tensor_digest([x.reshape(2, 3).t()]) == tensor_digest([x.reshape(2, 3).t().contiguous()])
    assert tensor_digest([torch.tensor([0.0])]) != tensor_digest([torch.tensor([-0.0])])
    assert tensor_digest([torch.zeros(0)]) == tensor_digest([torch.zeros(0)])
