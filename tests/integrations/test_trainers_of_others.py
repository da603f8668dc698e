"""`ContinualTrainer` with TRL's SFTTrainer and with PEFT's configurations and models."""

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from tiny_decoder import decoder  # noqa: E402
from tiny_tasks import arguments, tasks, trainer  # noqa: E402
from toy import toy_stream  # noqa: E402

from manifold_cl.adapters.peft import EBLoraConfig  # noqa: E402
from manifold_cl.continual import make_method  # noqa: E402
from manifold_cl.integrations.transformers import ContinualTrainer  # noqa: E402

TARGETS = ["q_proj", "v_proj"]


def sft_arguments(folder: Path, **options: Any) -> Any:
    given = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "bf16": False, "max_length": 16, **options}
    return trl.SFTConfig(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **given)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential_merge", "joint"])
def test_trls_trainer_gives_the_losses_of_transformers_own(method: str, tmp_path: Path) -> None:
    args = sft_arguments(tmp_path / "sft", activation_checkpointing=False)
    ours = trainer(tmp_path / "sft", method, trainer_class=trl.SFTTrainer, args=args).train()
    theirs = trainer(tmp_path / "own", method).train()
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # float32: TRL computes the same loss without the logits
    assert ours.config["trainer"] == "SFTTrainer"


@pytest.mark.slow
def test_trls_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def made(name: str) -> ContinualTrainer:
        args = sft_arguments(tmp_path / name, save_steps=1)
        return trainer(tmp_path / name, trainer_class=trl.SFTTrainer, args=args, tasks=tasks("colour"))

    def kill(progress: Any) -> None:
        if (progress.phase, progress.step) == ("train", 3):
            raise KilledError

    expected = made("whole").train()
    killed = made("killed")
    killed.on_progress(kill)
    with pytest.raises(KilledError):
        killed.train()
    record = made("killed").train(resume=True)
    assert (record.losses, record.accuracy) == (expected.losses, expected.accuracy)


def test_examples_that_trl_would_cut_are_refused(tmp_path: Path) -> None:
    args = sft_arguments(tmp_path, max_length=4)
    with pytest.raises(ValueError, match=r"max_length=4 of SFTConfig would cut 24 of 24 examples of task 'colour'"):
        trainer(tmp_path, "sequential_merge", trainer_class=trl.SFTTrainer, args=args).train()


@pytest.mark.parametrize(
    ("of_trl", "expected"), [(True, ["completion_only_loss"]), (False, ["completion_only_loss", "packing"])]
)
def test_options_of_trl_without_effect_are_named(of_trl: bool, expected: list[str], tmp_path: Path) -> None:
    args = sft_arguments(tmp_path, completion_only_loss=False, packing=True)
    options = {"trainer_class": trl.SFTTrainer} if of_trl else {}
    with pytest.warns(UserWarning, match=r"of SFTConfig: ignored") as caught:
        trainer(tmp_path, "sequential_merge", args=args, **options)
    (message,) = [str(each.message) for each in caught if "of SFTConfig: ignored" in str(each.message)]
    assert [name for name in ("completion_only_loss", "packing") if name in message] == expected


def test_trl_needs_tasks_in_tokens(tmp_path: Path) -> None:
    args = sft_arguments(tmp_path)
    with pytest.raises(ValueError, match="SFTTrainer reads tokens, and task 'first' has no encode"):
        ContinualTrainer(
            None, toy_stream(), {"name": "sequential_merge", "rank": 2}, args, trainer_class=trl.SFTTrainer
        ).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoraConfig", "EBLoraConfig", "PeftModel"])
def test_a_peft_configuration_sets_rank_alpha_and_targets(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    if kind != "LoraConfig":
        config = EBLoraConfig(r=4, alpha=8, target_modules=TARGETS)
    options = {"peft_config": config}
    model = decoder()
    if kind == "PeftModel":
        model, options = peft.get_peft_model(model, config), {}
    made = ContinualTrainer(model, tasks("colour"), "eblora", arguments(tmp_path / kind), **options)
    record = made.train()
    assert (record.config["rank"], record.config["alpha"], record.config["targets"]) == (4, 8.0, TARGETS)
    plain = trainer(tmp_path / "plain", tasks=tasks("colour"), targets=TARGETS).train()
    assert record.losses == plain.losses
    assert type(made.model) is type(decoder())


def test_what_a_method_cannot_honour_of_a_configuration_is_refused_by_name(tmp_path: Path) -> None:
    def made(config: Any, method: Any = "eblora") -> ContinualTrainer:
        return ContinualTrainer(decoder(), tasks(), method, arguments(tmp_path), peft_config=config)

    with pytest.raises(ValueError, match=r"LoraConfig\(lora_dropout=0.1\)"):
        made(peft.LoraConfig(lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"LoraConfig\(use_dora=True\)"):
        made(peft.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match=r"EBLoraConfig\(core='full'\)"):
        made(EBLoraConfig(core="full"))
    recipe = made(EBLoraConfig.recipe(r=4)).method.options()
    assert (recipe["rank"], recipe["alpha"], recipe["initial_scale"]) == (4, 8.0, -0.05)
    with pytest.raises(TypeError, match="IA3Config"):
        made(peft.IA3Config())
    with pytest.raises(ValueError, match="the method has rank=16, and peft_config rank=4"):
        made(peft.LoraConfig(r=4), make_method("eblora"))


def test_a_trained_peft_model_is_not_taken_for_its_base(tmp_path: Path) -> None:
    model = peft.get_peft_model(decoder(), peft.LoraConfig(r=2, target_modules=TARGETS))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    with pytest.raises(ValueError, match="trained adapter"):
        ContinualTrainer(model, tasks(), "eblora", arguments(tmp_path))
    fresh = peft.get_peft_model(decoder(), peft.LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="give one of them"):
        ContinualTrainer(fresh, tasks(), "eblora", arguments(tmp_path), peft_config=peft.LoraConfig())
