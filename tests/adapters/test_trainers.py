"""Training with transformers' Trainer, Accelerate and Lightning: manifolds, resume, logs and optimizers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from manifold_cl import RiemannianAdamW, TrainerOptimizer, eblora_adapters, inject_adapters, param_groups
from manifold_cl.adapters import eblora_layers, geometry_metrics, protect, target_linears
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.integrations.transformers import log_geometry

pytestmark = [
    # PEFT and Trainer ask transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

LAYER = "model.layers.0.self_attn.q_proj"
PROTECTED = torch.randn(32, 6, generator=torch.Generator().manual_seed(9))


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Counting from different starts."""

    def __init__(self, count: int = 64) -> None:
        self.ids = (torch.arange(count)[:, None] + torch.arange(8)) % 10

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tuned(kind: str = "peft") -> nn.Module:
    model = llama().train()
    if kind == "peft":
        wrapped = get_peft_model(model, EBLoraConfig(r=4, target_modules=["q_proj", "v_proj"], initial_scale=-0.3))
        protect(wrapped, {LAYER: PROTECTED}, strict=False)
        return wrapped
    draw = torch.Generator().manual_seed(0)
    targets = ["q_proj", "v_proj"]
    memory = {**dict.fromkeys(target_linears(model, targets)), LAYER: PROTECTED}
    make = eblora_adapters(rank=4, initial_scale=-0.3, memory=memory, generator=draw)
    inject_adapters(model, targets, make)
    return model


def trainer(model: nn.Module, folder: Path, **arguments: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **given),
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 0.02, "scale_lr": 0.05}),
    )


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def on_manifold(model: nn.Module) -> bool:
    found = geometry_metrics(model, prefix="")
    return max(found["orthonormality"], found["protection"]) <= 2e-6  # float32


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_trainer_builds_our_groups_and_the_loss_falls(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    before = trained(model)
    used = trainer(model, tmp_path, max_steps=30, weight_decay=0.1, lr_scheduler_type="cosine")
    used.train()
    inner = getattr(used.optimizer, "optimizer", used.optimizer)
    assert isinstance(inner, RiemannianAdamW)
    assert [(g["role"], g["weight_decay"], g["initial_lr"]) for g in inner.param_groups] == [
        ("points", 0.0, 0.02),
        ("scales", 0.0, 0.05),
    ]
    losses = [entry["loss"] for entry in used.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert on_manifold(model)
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


FEATURES: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.01},
    "bf16 autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "all": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_every_feature_of_the_trainer_keeps_the_constraint(feature: dict[str, Any], tmp_path: Path) -> None:
    model, plain = tuned(), tuned()
    trainer(model, tmp_path, **feature).train()
    trainer(plain, tmp_path).train()
    assert on_manifold(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    same = all(torch.equal(a, b) for a, b in zip(trained(model), trained(plain), strict=True))
    assert same == (set(feature) == {"gradient_checkpointing", "gradient_checkpointing_kwargs"})  # all others act


@pytest.mark.slow
def test_accumulated_steps_are_the_steps_of_the_large_batch(tmp_path: Path) -> None:
    model, whole = tuned(), tuned()
    trainer(model, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2).train()
    trainer(whole, tmp_path, per_device_train_batch_size=8).train()
    for a, b in zip(trained(model), trained(whole), strict=True):
        # Retracted once an optimizer step, not once a micro-batch. Adam divides by a root of tiny moments, which
        # enlarges rounding: 6 steps of 0.02.
        assert float((a - b).abs().max()) < 2e-3


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_a_resumed_training_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = tuned(kind)
    trainer(whole, tmp_path / kind, **arguments).train()
    again = tuned(kind)
    resumed = trainer(again, tmp_path / kind, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))
    assert on_manifold(again)


def test_a_resumed_training_restores_protection_that_the_script_did_not_ask_for(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = tuned()
    trainer(whole, tmp_path, **arguments).train()
    again = get_peft_model(llama().train(), EBLoraConfig(r=4, target_modules=["q_proj", "v_proj"], initial_scale=-0.3))
    trainer(again, tmp_path, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))
    manifold = eblora_layers(again)[LAYER].manifolds("default")[1]
    assert manifold.k == 6
    assert manifold.constraint_error(eblora_layers(again)[LAYER].eblora_right["default"]).protection <= 2e-6  # float32


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_the_stock_optimizer_is_refused_at_the_first_step(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    before = trained(model)
    used = trainer(model, tmp_path)
    used.optimizer_cls_and_kwargs = None
    with pytest.raises(ValueError, match=r"AdamW would move 8 frames off .*cls_and_kwargs=\(TrainerOptimizer"):
        used.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_a_riemannian_class_given_to_the_trainer_itself_keeps_the_constraint(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    used = trainer(model, tmp_path, weight_decay=0.0)
    used.optimizer_cls_and_kwargs = (RiemannianAdamW, {"lr": 0.02})
    used.train()
    assert on_manifold(model)


def test_the_geometry_goes_wherever_report_to_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = tuned()
    used = trainer(model, tmp_path, report_to=["tensorboard"])
    log_geometry(used)
    used.train()
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    names = ["orthonormality", "protection", "spectral_entropy", "capacity", "scale"]
    # TensorBoard's reporter puts train/ in front of every name that is not of the evaluation.
    for name in names:
        events = board.Scalars(f"train/geometry/{name}")
        assert [event.step for event in events] == [2, 4, 6]
        history = [entry[f"geometry/{name}"] for entry in used.state.log_history if "loss" in entry]
        assert [event.value for event in events] == pytest.approx(history, rel=1e-6)  # float32 in the event file
    final = geometry_metrics(model)
    assert used.state.log_history[-2]["geometry/scale"] == final["geometry/scale"]  # the last entry is the summary
    assert final["geometry/spectral_entropy"] == 1.0
    assert final["geometry/capacity"] == pytest.approx(22 / 28)  # 32 inputs, 6 protected, rank 4
    assert not any("geometry/scale" in entry for entry in used.state.log_history if "train_runtime" in entry)


def test_accelerate_trains_clips_and_restores(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(steps: int, *, restore: bool) -> tuple[nn.Module, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tuned()
        optimizer = RiemannianAdamW(param_groups(model, lr=0.02), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        batches = torch.utils.data.DataLoader(Sentences(), batch_size=4)
        model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
        if restore:
            accelerator.load_state(str(tmp_path / "state"))
        for i, batch in enumerate(batches):
            if restore and i < 8:
                continue
            if i == 2 * steps:
                break
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if steps == 4:
            accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(model), optimizer

    whole, _ = run(8, restore=False)
    run(4, restore=False)
    resumed, _ = run(8, restore=True)
    assert on_manifold(whole)
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(resumed), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning warns about this machine: workers, loggers, checkpoints
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}]
)
def test_lightning_trains_and_logs_the_geometry(options: dict[str, Any], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from manifold_cl.integrations.lightning import GeometryCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tuned()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return RiemannianAdamW(param_groups(self.model, lr=0.02), weight_decay=0.0)

    module = Module()
    before = trained(module)
    logger = CSVLogger(tmp_path)
    used = lightning.Trainer(
        accelerator="cpu",
        max_steps=6,
        logger=logger,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GeometryCallback()],
        **options,
    )
    used.fit(module, torch.utils.data.DataLoader(Sentences(), batch_size=4))
    assert on_manifold(module)
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(module), strict=True))
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"geometry/orthonormality", "geometry/protection", "geometry/capacity"} < set(rows[0].split(","))
    assert len(rows) > 2
