"""Tasks in sequence on a base that cannot be merged into: start, training, memory, updates that act beside."""

import torch
from torch import Tensor, nn

from manifold_cl import (
    RiemannianAdamW,
    SubspaceMemory,
    eblora_adapters,
    grow_memory,
    inject_adapters,
    param_groups,
    start_from_task,
)
from manifold_cl.adapters import keep_adapters, kept_updates


class EightBits(nn.Linear):
    """Rows of int8 with a scale each, unpacked in the forward pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        size = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / size).round().to(torch.int8), requires_grad=False)
        self.register_buffer("size", size)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.size)


class Model(nn.Module):
    """Two quantised layers and a loss, as transformers' models return it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = EightBits(nn.Linear(24, 48)), EightBits(nn.Linear(48, 8))

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        out = self.second(torch.tanh(self.first(x)))
        return {"out": out} if y is None else {"loss": (out - y).square().mean()}


def learn_two_tasks(*, protected: bool) -> float:
    """How far the second task moves the outputs for inputs of the first, relative to their size."""
    torch.manual_seed(0)
    model, targets = Model(), ["first", "second"]
    layers = {name: model.get_submodule(name) for name in targets}
    packed = {name: layer.weight.clone() for name, layer in layers.items()}
    memory = SubspaceMemory.empty(layers)
    inputs, outputs = [], []
    for _ in range(2):
        x = torch.randn(64, 5) @ torch.randn(5, 24)
        batch = {"x": x, "y": torch.randn(64, 8)}
        inject_adapters(model, targets, eblora_adapters(rank=3, memory=memory, start="task", initial_scale=-0.05))
        start_from_task(model, [batch])
        optimizer = RiemannianAdamW(param_groups(model, lr=1e-2, scale_lr=2e-2))
        losses = []
        for _ in range(40):
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        if protected:
            memory = grow_memory(memory, layers, lambda b=batch: [lambda: model(**b)["loss"]], energy=0.99, rank=3)
        before = model(x)["out"].detach()
        keep_adapters(model)
        torch.testing.assert_close(model(x)["out"], before, rtol=1e-5, atol=1e-5)  # the same update, beside
        inputs.append(x)
        outputs.append(before)
    assert all(torch.equal(layer.weight, packed[name]) for name, layer in layers.items())
    assert [len(updates) for updates in kept_updates(model).values()] == [2, 2]
    return float((model(inputs[0])["out"] - outputs[0]).norm() / outputs[0].norm())


def test_two_tasks_on_a_quantised_base_protect_the_first_and_leave_the_weights() -> None:
    assert learn_two_tasks(protected=True) < 0.4 * learn_two_tasks(protected=False)
