"""An adapter trained under FSDP2 on two processes is saved through a full state dict and reads back the same."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from tiny_models import llama, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from manifold_cl.adapters import eblora_layers, protect
from manifold_cl.adapters.peft import EBLoraConfig

# PEFT asks transformers 5 for a property under its old name.


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model = get_peft_model(llama(), EBLoraConfig(r=4, target_modules=["q_proj", "down_proj"], initial_scale=-0.3))
        names = list(eblora_layers(model))
        protect(model, {names[0]: torch.randn(32, 5, generator=torch.Generator().manual_seed(1))}, strict=False)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        ids = tokens(4, 9, seed=rank)
        with torch.no_grad():  # anything that differs from the start; steps are the optimizer's own tests
            for layer in eblora_layers(model).values():
                layer.eblora_scale["default"].mul_(3.0)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=tokens()).logits
        if rank == 0:
            model.save_pretrained(f"{folder}/adapter", state_dict=full)
            torch.save(logits, f"{folder}/logits.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_shards_save_one_adapter(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
    # Two processes shard the same numbers; only sums over shards could round differently, and a forward has none.
    assert torch.equal(found, torch.load(tmp_path / "logits.pt"))
    (first, *_) = eblora_layers(model).values()
    assert [manifold.k for _, _, manifold in first.manifold_parameters()] == [0, 5]
    assert max(max(m.constraint_error(p)) for _, p, m in first.manifold_parameters()) <= 2e-6  # float32
