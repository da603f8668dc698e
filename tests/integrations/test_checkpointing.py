"""Checkpoints of activations in evaluation mode: used, and with the numbers of that mode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_tasks import arguments  # noqa: E402

from manifold_cl.continual.checkpointing import checkpointing_method, following_checkpoints  # noqa: E402
from manifold_cl.continual.run_folder import RunFolder  # noqa: E402
from manifold_cl.integrations.transformers.trainer_loop import TrainerLoop  # noqa: E402
from manifold_cl.streams.causal_tokens import Tokens, answer_loss  # noqa: E402

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXAMPLES = [Tokens((1, 5, 6), (7, 2)), Tokens((1, 8, 9, 3), (4, 2))]


def gpt2() -> nn.Module:
    """Drops attention by a function in a part of a layer, and values by modules."""
    config = transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=2, n_head=2, **SPECIAL)
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    """Drops values by a function in the layers that checkpoint."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    config = transformers.OPTConfig(vocab_size=12, dropout=0.5, attention_dropout=0.5, **sizes, **SPECIAL)
    return transformers.OPTForCausalLM(config)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def checkpointed(make: Callable[[], nn.Module]) -> tuple[nn.Module, list[Tensor], list[int]]:
    """A model with checkpoints in evaluation mode, its gradients without them, and a list of the checkpoints taken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    expected = gradients(model, lambda: answer_loss(model, EXAMPLES, 0))
    enable = checkpointing_method(model)
    assert enable is not None
    enable({"use_reentrant": False})
    taken: list[int] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = module._gradient_checkpointing_func

            def counted(*args, checkpoint=checkpoint, **options):
                taken.append(len(taken))
                return checkpoint(*args, **options)

            module._gradient_checkpointing_func = counted
    return model, expected, taken


@pytest.mark.parametrize("make", [gpt2, opt])
def test_checkpoints_are_used_and_nothing_is_dropped(make: Callable[[], nn.Module]) -> None:
    model, expected, taken = checkpointed(make)
    before = torch.get_rng_state()
    found = gradients(model, lambda: answer_loss(model, EXAMPLES, 0))
    assert len(taken) == 2
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())


def test_statistics_of_a_trainer_drop_nothing(tmp_path: Path) -> None:
    model, expected, taken = checkpointed(opt)
    args = arguments(tmp_path, activation_checkpointing=True)
    loop = TrainerLoop(
        args, RunFolder(tmp_path, ["a"]), trainer_class=transformers.Trainer, options={}, targets="q_proj", keep=False
    )
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 3]])
    expected = gradients(model, lambda: model(input_ids=ids, labels=ids).loss)
    assert not taken
    with loop.passes(model):
        found = gradients(model, lambda: model(input_ids=ids, labels=ids).loss)
        assert all(map(torch.equal, found, expected))
    assert not any(module.training for module in model.modules())


def test_a_model_in_training_mode_stays_as_it_is() -> None:
    model, _, taken = checkpointed(opt)
    model.train()
    with following_checkpoints(model):
        assert all(module.training for module in model.modules())
        assert model.model.decoder.layers[0].dropout == 0.5
        answer_loss(model, EXAMPLES, 0)
    assert len(taken) == 2
