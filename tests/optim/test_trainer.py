"""`TrainerOptimizer` in a real transformers Trainer: groups, schedule, checkpoints, resume."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from problems import Net  # noqa: E402

from manifold_cl import RiemannianSGD, TrainerOptimizer  # noqa: E402


class Regression(nn.Module):
    """What Trainer asks of a model: a loss from a batch."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = Net(seed=seed)

    def forward(self, x, labels):
        out = self.net.head(self.net.second(torch.tanh(self.net.first(x))))
        return {"loss": ((out - labels) ** 2).mean(), "logits": out}


def examples():
    net = Net()
    return [{"x": x, "labels": y} for x, y in zip(net.x, net.y, strict=True)]


def trainer(folder, model, *, steps, **kwargs):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=7,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 1e-2, "scale_lr": 2e-2, **kwargs}),
    )


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_trainer_trains_on_the_manifold_and_resumes_to_the_same_bits(tmp_path):
    straight = Regression()
    run = trainer(tmp_path / "a", straight, steps=6)
    before = float(straight(torch.stack([e["x"] for e in examples()]), straight.net.y)["loss"].detach())
    run.train()
    after = float(straight(straight.net.x, straight.net.y)["loss"].detach())
    assert after < before
    assert straight.net.worst() <= 2e-6  # float32 bound
    roles = {group["role"]: group for group in run.optimizer.param_groups}
    assert roles["points"]["initial_lr"] == 1e-2
    assert roles["scales"]["initial_lr"] == 2e-2
    assert roles["points"]["lr"] == 0.0  # Trainer's linear schedule has ended
    later = Regression()
    trainer(tmp_path / "b", later, steps=6).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for a, b in zip(straight.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(torch.optim.NAdam, "RiemannianNAdam"), ("SGD", "RiemannianSGD"), (RiemannianSGD, "RiemannianSGD")],
)
def test_any_base_optimizer_can_be_asked_for(optimizer, name):
    made = TrainerOptimizer()(Net(), lr=1e-3, optimizer=optimizer, polish_every=10)
    assert type(made).__name__ == name
    assert made.param_groups[0]["polish_every"] == 10


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"torch\.optim has no 'AdamZ'"):
        TrainerOptimizer()(Net(), lr=1e-3, optimizer="AdamZ")


def test_trainer_takes_the_class_for_a_factory():
    from transformers.trainer_optimizer import is_optimizer_factory

    assert is_optimizer_factory(TrainerOptimizer)
