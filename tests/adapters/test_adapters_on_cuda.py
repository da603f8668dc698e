"""The layer, the tuner and the export on a GPU."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import llama, tokens
from torch import nn

from manifold_cl import EBLoRALinear, RiemannianAdamW, export_lora, param_groups
from manifold_cl.adapters import eblora_layers, geometry_metrics, protect
from manifold_cl.adapters.peft import EBLoraConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PEFT asks transformers 5 for a property under its old name.
]


@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
def test_the_layer_is_made_started_merged_and_undone_where_its_base_is(core: str, generator: torch.Generator) -> None:
    linear = nn.Linear(40, 24, device="cuda", dtype=torch.bfloat16)
    weight = linear.weight.clone()
    adapter = EBLoRALinear(
        linear,
        4,
        core=core,
        complement=torch.randn(40, 6, generator=generator),
        start="pretrained",
        compensate=True,
        generator=generator,
    )
    assert {t.device.type for t in adapter.state_dict().values()} == {"cuda"}
    x = torch.randn(7, 40, generator=generator).to("cuda", torch.bfloat16)
    assert torch.equal(adapter(x), linear(x))
    with torch.no_grad():
        adapter.scale.mul_(-50)
    with pytest.warns(UserWarning, match="bfloat16"):  # what the base weight's precision loses of it
        adapter.merge()
    assert not torch.equal(linear.weight, weight)
    adapter.unmerge()
    assert torch.equal(linear.weight, weight)


def test_the_tuner_trains_saves_loads_and_exports(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return llama(dtype=torch.bfloat16).cuda()

    model = get_peft_model(base(), EBLoraConfig(r=4, target_modules=["q_proj", "down_proj"], initial_scale=-0.3))
    name = next(iter(eblora_layers(model)))
    protect(model, {name: torch.randn(32, 5)}, strict=False)
    optimizer = RiemannianAdamW(param_groups(model, lr=0.02), weight_decay=0.0)
    ids = tokens(4, 9).cuda()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    found = geometry_metrics(model, prefix="")
    assert max(found["orthonormality"], found["protection"]) <= 2e-6  # float32
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for low in (False, True):
            again = PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=low)
            assert torch.equal(again(input_ids=ids).logits, expected)
    export_lora(model, tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
