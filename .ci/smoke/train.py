"""Two tasks of a tiny decoder in transformers' Trainer, its answers scored, or an adapter trained by Lightning."""

import sys

import torch


def transformers() -> None:
    """`ContinualTrainer`, into a folder."""
    from tiny_tasks import trainer

    record = trainer("run").train()
    assert record.status == "complete", record.status


def answers() -> None:
    """The scores of the packages behind ``llm``, and a run whose answers are scored."""
    from manifold_cl.streams import RULES, score

    for rule in RULES:
        assert 0.0 <= score({"": rule}, ["one two"], [["one two"]], ["one two"])["score"] <= 100.0, rule
    transformers()


def lightning() -> None:
    """A module with adapters, and the callback that logs their geometry."""
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from manifold_cl import RiemannianAdamW, eblora_adapters, inject_adapters, param_groups
    from manifold_cl.integrations.lightning import GeometryCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
            inject_adapters(self.model, "all-linear", eblora_adapters(rank=2, alpha=4.0))

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return RiemannianAdamW(param_groups(self.model, lr=0.02), weight_decay=0.0)

    data = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                                callbacks=[GeometryCallback()])  # fmt: skip
    trainer.fit(Module(), data)


{"transformers": transformers, "answers": answers, "lightning": lightning}[sys.argv[1]]()
