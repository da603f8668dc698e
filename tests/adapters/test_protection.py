"""Protected subspaces that adapters get after they were injected."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import bert
from torch import nn

from manifold_cl import EBLoRALinear, RiemannianAdamW, eblora_adapters, inject_adapters, param_groups
from manifold_cl.adapters import LoRALinear, eblora_layers, protect
from manifold_cl.adapters.peft import EBLoraConfig

N, M, R = 12, 8, 3


@pytest.fixture
def model(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, M))
    inject_adapters(model, ["0", "2"], eblora_adapters(rank=R, initial_scale=0.5, generator=generator))
    return model


def leak(layer: EBLoRALinear) -> float:
    return max(manifold.constraint_error(frame).protection for _, frame, manifold in layer.manifold_parameters())


def test_an_existing_optimizer_steps_on_the_new_manifolds(model: nn.Sequential, generator: torch.Generator) -> None:
    optimizer = RiemannianAdamW(param_groups(model, lr=0.05), weight_decay=0.0)
    memory = {"0": torch.randn(N, 4, generator=generator), "2": torch.randn(M, 2, generator=generator)}
    for _ in range(3):
        model(torch.randn(16, N, generator=generator)).square().mean().backward()
        optimizer.step()
        protect(model, memory, output_memory={"0": torch.randn(M, 5, generator=generator)}, strict=False)
    assert [(layer.left_manifold.k, layer.right_manifold.k) for layer in (model[0], model[2])] == [(5, 4), (0, 2)]
    model(torch.randn(16, N, generator=generator)).square().mean().backward()
    optimizer.step()
    assert max(map(leak, (model[0], model[2]))) <= 2e-6  # float32


def test_a_compensated_adapter_still_changes_nothing_when_it_is_protected(generator: torch.Generator) -> None:
    base = nn.Linear(N, M)
    model = nn.Sequential(EBLoRALinear(base, R, compensate=True, initial_scale=0.5, generator=generator))
    protect(model, {"0": torch.randn(N, 4, generator=generator)})
    x = torch.randn(5, N, generator=generator)
    assert torch.equal(model(x), base(x))
    assert leak(model[0]) <= 2e-6  # float32


def test_protection_that_cannot_be_is_refused_by_name_and_changes_nothing(model: nn.Sequential) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    free, full = torch.eye(N)[:, :2], torch.eye(M)[:, :6]
    for memory, message in (
        ({"0": free, "2": full}, r"^2: complement leaves 2 free directions in R\^8, too few for rank 3"),
        ({"0": free}, "no entry for 1 adapted layers, .*: 2"),
        ({"1": free}, "no adapted layer '1'; there are 0, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            protect(model, memory)
    with pytest.raises(ValueError, match="no layer has an adapter 'two'"):
        protect(model, {"0": free}, adapter="two")
    with pytest.raises(ValueError, match="the model has no balanced adapters"):
        protect(nn.Sequential(LoRALinear(nn.Linear(N, M), R)), {"0": free})
    model[0].merge()
    with pytest.raises(ValueError, match=r"^0: adapter 'default' is merged .* unmerge\(\)"):
        protect(model, {"0": free}, strict=False)
    model[0].unmerge()
    assert list(eblora_layers(model)) == ["0", "2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("columns", [0, 3])
def test_parameters_that_train_beside_protected_adapters_are_named(columns: int) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    inject_adapters(model, ["0"], eblora_adapters(rank=2))
    model[1].requires_grad_(True)
    memory = {"0": torch.eye(12)[:, :columns]}
    if columns:
        with pytest.warns(UserWarning, match=r"2 parameters train without protection, such as 1\.weight"):
            protect(model, memory)
    else:
        protect(model, memory)  # nothing is promised yet


def test_a_head_that_peft_trains_is_named() -> None:
    model = get_peft_model(bert(), EBLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    name = next(iter(eblora_layers(model)))
    with pytest.warns(UserWarning, match=r"2 parameters train without protection, such as .*classifier"):
        protect(model, {name: torch.randn(32, 5)}, strict=False)
    for name_of_p, p in model.named_parameters():
        if "classifier" in name_of_p:
            p.requires_grad_(False)
    protect(model, {name: torch.randn(32, 5)}, strict=False)
