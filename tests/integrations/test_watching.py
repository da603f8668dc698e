"""The callbacks that measure adapters: numbers at the loggers of the Trainer and of Lightning."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import TrainingWatch, read_training_log

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_decoder import decoder  # noqa: E402

from manifold_cl.adapters.peft import EBLoraConfig  # noqa: E402
from manifold_cl.integrations.transformers import watch_training  # noqa: E402

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "v_proj"]


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 16, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def test_the_trainers_reporters_get_the_numbers_every_n_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = peft.get_peft_model(decoder(), peft.LoraConfig(r=4, target_modules=TARGETS))
    args = transformers.TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=5,
        report_to=["tensorboard"],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, args, train_dataset=Sentences())
    watch = TrainingWatch(tmp_path / "watch", every=2)
    watch_training(trainer, watch)
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    log = read_training_log(tmp_path / "watch")
    total = log[(log["layer"] == "total") & (log["metric"] == "effective_rank_energy")].set_index("step")["value"]
    assert list(total.index) == [2, 4, 6]
    events = board.Scalars("train/watch/effective_rank_energy")
    assert {event.step: event.value for event in events} == pytest.approx(total.to_dict(), rel=1e-6)
    history = [entry for entry in trainer.state.log_history if "watch/frobenius" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    assert (tmp_path / "watch" / "training.html").exists()
    # the trainer's own logs stay as they are
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [5]


@pytest.mark.filterwarnings("ignore")  # Lightning warns about this machine: workers, loggers, checkpoints
def test_lightnings_loggers_get_the_numbers_and_the_constraint_residuals(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from manifold_cl import RiemannianAdamW, param_groups
    from manifold_cl.integrations.lightning import WatchCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = peft.get_peft_model(decoder(), EBLoraConfig(r=4, target_modules=TARGETS, initial_scale=0.5))

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return RiemannianAdamW(param_groups(self.model, lr=0.02), weight_decay=0.0)

    logger = CSVLogger(tmp_path)
    options = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": logger,
        "log_every_n_steps": 50,
        "accumulate_grad_batches": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = WatchCallback(TrainingWatch(tmp_path / "watch", every=2, file_format="csv"))
    earlier = lightning.Trainer(**options, callbacks=[callback])  # ends at the step of the next one's first measurement
    earlier.fit(Module(), torch.utils.data.DataLoader(Sentences(), batch_size=2))
    shutil.rmtree(tmp_path / "watch")
    trainer = lightning.Trainer(**{**options, "max_steps": 4}, callbacks=[callback])
    module: nn.Module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(Sentences(), batch_size=2))
    log = read_training_log(tmp_path / "watch")
    rows = log[log["layer"] == "total"].pivot_table(index="step", columns="metric", values="value")
    assert list(rows.index) == [2, 4]
    # a scalar core: all singular values are equal
    assert rows["entropy_energy_normalized"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert (rows["geometry/orthonormality"] < 2e-6).all()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"watch/effective_rank_energy", "geometry/orthonormality"} <= set(header)
