"""Two ranks on gloo: DDP with owners and FSDP2 by rows equal one process; what cannot be right is refused."""

import re

import pytest
import ranks
import torch
from forks import start_ranks
from old_versions import needs_sharding

from manifold_cl import param_groups
from manifold_cl.optim import assert_ranks_equal, clip_riemannian_grad_norm_


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found, and the folder with their files."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(ranks.work, (2, str(folder / "store"), str(folder)), 2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)], folder


# Float32 on another order of summation; where a gradient is near zero Adam turns its rounding into a step.
NEAR = 2e-5


@pytest.mark.slow
def test_ddp_with_owners_equals_one_process(found):
    for rank in found[0]:
        assert rank["ddp"]["gap"] < NEAR
        assert rank["ddp"]["error"] <= 2e-6  # float32 bound


@pytest.mark.slow
def test_owners_share_the_points_between_them(found):
    first, second = (rank["ddp"]["owned"] for rank in found[0])
    assert sum(first) + sum(second) == 10  # five adapters, two frames each
    assert min(sum(first), sum(second)) >= 4


@pytest.mark.slow
def test_the_clipped_norm_is_that_of_one_process(found):
    net = ranks.Net()
    optimizer = ranks.adamw(param_groups(net, lr=1e-2))
    ranks.loss(net, slice(None)).backward()
    alone = float(clip_riemannian_grad_norm_(optimizer, 1e6))
    for rank in found[0]:
        assert rank["ddp"]["norm"] == pytest.approx(alone, rel=1e-5)  # float32 sums


@pytest.mark.slow
def test_a_rank_that_has_no_use_for_a_point_still_steps_it(found):
    moved = [rank["ddp"]["spare moved"] for rank in found[0]]
    assert moved[0] == moved[1] > 1e-4


@pytest.mark.slow
def test_owners_serve_every_kind_of_base_optimizer(found):
    for rank in found[0]:
        assert rank["owners"]["Adafactor"] < NEAR
        assert rank["owners"]["matrix"] < NEAR


@pytest.mark.slow
@needs_sharding
@pytest.mark.parametrize("kind", ["adamw", "transport", "sgd", "matrix", "exact", "spel", "intrinsic", "projected"])
def test_rows_over_two_ranks_equal_one_process(found, kind):
    for rank in found[0]:
        assert rank["rows"][kind] < NEAR
        assert rank["rows"][f"{kind} error"] <= 2e-6  # float32 bound


@pytest.mark.slow
@needs_sharding
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_no_leak_grows_over_rows_on_two_ranks(found, kind):
    for rank in found[0]:
        assert rank["coherent"][kind] <= 2e-6  # float32 bound, long steps whose gradients agree


@pytest.mark.slow
@needs_sharding
def test_no_rank_holds_more_than_its_rows(found):
    assert found[0][0]["rows"]["rows"] == [(17, 4), (17, 4), (33, 4)]
    assert found[0][1]["rows"]["rows"] == [(16, 4), (16, 4), (33, 4)]


@pytest.mark.slow
@needs_sharding
def test_resume_on_two_ranks_is_bit_exact(found):
    assert [rank["resume"] for rank in found[0]] == [0.0, 0.0]


@pytest.mark.slow
@needs_sharding
def test_one_process_resumes_what_two_ranks_saved(found):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    saved = torch.load(found[1] / "half.pt", weights_only=True)
    net = ranks.Net()
    net.spare.requires_grad_(False)
    optimizer = ranks.adamw(param_groups(net, lr=1e-2))
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    for _ in range(4):
        optimizer.zero_grad()
        ranks.loss(net, slice(None)).backward()
        optimizer.step()
    assert ranks.gap(torch.load(found[1] / "end.pt", weights_only=True), ranks.whole(net)) < NEAR


REFUSED = {
    "qr": "rows retract by 'polar' .* got 'qr'",
    "adafactor": "Adafactor takes statistics over whole matrices",
    "nan": r"1 of 8 points have NaN or infinite entries",
    "missing": "1 points have a gradient on some ranks only, .*find_unused_parameters=True",
    "unequal": "RuntimeError: ranks hold different values of head.weight",
    "tensors": "different values of tensor 0",
    "columns": "its rows may be split over one mesh dimension",
}


@pytest.mark.slow
@needs_sharding
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_rank_refuses_what_cannot_be_right(found, name):
    for rank in found[0]:
        assert re.search(REFUSED[name], rank["refusals"][name]), rank["refusals"][name]
    assert found[0][0]["refusals"]["unchanged"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at construction", "at the first step", "flat"])
def test_flat_parameters_are_refused(found, when):
    for rank in found[0]:
        assert "FSDP1, DeepSpeed ZeRO" in rank["flattened"][when]


@pytest.mark.slow
def test_an_optimizer_with_owners_is_not_copied(found):
    assert "cannot be copied or pickled" in found[0][0]["ddp"]["pickled"]


def test_ranks_are_compared_only_where_there_are_ranks():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        assert_ranks_equal(ranks.Net())
