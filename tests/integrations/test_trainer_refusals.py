"""`ContinualTrainer` refuses by name what a run cannot follow: options, models, tasks, tokenizers."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_decoder import decoder  # noqa: E402
from tiny_tasks import arguments, task, tasks, trainer  # noqa: E402
from toy import ToyTask, toy_stream  # noqa: E402

from manifold_cl import memory_plan  # noqa: E402
from manifold_cl.files import FileError  # noqa: E402
from manifold_cl.integrations.transformers import ContinualTrainer  # noqa: E402


def test_a_task_without_labels_or_test_examples_is_refused(tmp_path: Path) -> None:
    empty = task("colour")
    empty.parts["test"] = ()
    with pytest.raises(ValueError, match="no test examples of colour"):
        trainer(tmp_path / "test", tasks=[empty]).train()
    masked = task("colour")
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in masked.encode("train")]
    masked.encode = lambda split: rows  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'colour': 24 of 24 train examples have no label but -100"):
        trainer(tmp_path / "labels", "sequential_merge", tasks=[masked]).train()


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer .* does not fit the model: .*embedding's 20 rows"):
        trainer(tmp_path, model=lambda: decoder(vocabulary=20)).train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) * float("nan")

    stream = toy_stream(tasks=["first"])
    stream.tasks[0].__class__ = Broken
    args = arguments(tmp_path)
    with pytest.raises(FloatingPointError, match="the loss of first became nan at step 1"):
        ContinualTrainer(None, stream, {"name": "sequential_merge", "rank": 2}, args).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("deepspeed", "zero2.json"), ("fsdp", "full_shard"), ("push_to_hub", True), ("load_best_model_at_end", True)),
        *(("auto_find_batch_size", True), ("save_only_model", True), ("resume_from_checkpoint", "somewhere")),
        ("enable_jit_checkpoint", True),
    ],
)
def test_options_that_a_run_cannot_follow_are_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)  # as parsed; most need another library at construction
    with pytest.raises(ValueError, match=f"^{name}="):
        trainer(tmp_path, args=args)


def test_options_that_a_task_without_encode_would_ignore_are_refused(tmp_path: Path) -> None:
    method = {"name": "sequential_merge", "rank": 2}
    for options, given in (
        ({"label_smoothing_factor": 0.1}, {}),
        ({"dataloader_drop_last": True}, {}),
        ({}, {"compute_loss_func": lambda *_: None}),
    ):
        name = next(iter({**options, **given}))
        with pytest.raises(ValueError, match=rf"^{name}: ignored by first, second, third, .*no encode"):
            ContinualTrainer(None, toy_stream(), method, arguments(tmp_path, **options), **given)
        assert trainer(tmp_path, args=arguments(tmp_path, **options), **given).folder == tmp_path


def test_an_engine_of_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp"):
        trainer(tmp_path, args=args)


def test_options_of_the_trainers_optimizer_are_named_as_ignored(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e-4, weight_decay=0.01)
    with pytest.warns(UserWarning, match=r"learning_rate=0.0001, weight_decay=0.01: ignored.*eblora.*lr=0.006"):
        trainer(tmp_path, args=args)
    same = arguments(tmp_path, learning_rate=2e-3)
    assert trainer(tmp_path, {"name": "eblora", "lr": 2e-3}, args=same).method.options()["lr"] == 2e-3


def test_statistics_of_scaled_gradients_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True  # as on a GPU
    with pytest.raises(ValueError, match=r"^fp16=True .* statistics_during=0"):
        trainer(tmp_path, {"name": "eblora", "rank": 4, "lr": 0.03, "statistics_during": 0.5}, args=args)
    assert trainer(tmp_path, {"name": "eblora", "rank": 4, "lr": 0.03}, args=args).args.fp16


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    whole = decoder()
    weights = {name: w for name, w in whole.state_dict().items() if "layers.1.mlp" not in name}
    whole.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(FileError, match=r"partial lacks 3 weights .* such as model\.layers\.1\.mlp\.down_proj"):
        trainer(tmp_path, model=str(tmp_path / "partial"))


def test_choices_that_cannot_be_followed_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="likelyhood"):
        trainer(tmp_path / "a", score_by="likelyhood")
    bare = tasks()
    for each in bare:
        del each.parts["validation"]
    with pytest.raises(ValueError, match=r"eval_strategy .*held_out"):
        trainer(tmp_path / "b", tasks=bare, args=arguments(tmp_path / "b", eval_strategy="epoch"))
    lora = pytest.importorskip("peft").LoraConfig
    with pytest.raises(ValueError, match="target_modules"):
        trainer(tmp_path / "c", targets=["v_proj"], peft_config=lora(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="init_lora_weights"):
        trainer(tmp_path / "d", peft_config=lora(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tasks": {"colour": "colour.jsonl"}},
            r"tasks is a list of Task objects, got a dict: give what causal_lm_tasks\(",
        ),
        ({"tasks": "colour.jsonl"}, r"got 'colour\.jsonl': give what causal_lm_tasks\("),
        ({"tasks": task("colour")}, r"got a CausalLMTask: give what causal_lm_tasks\("),
        ({"tasks": ["colour.jsonl"]}, r"a task is a Task with a name, got 'colour\.jsonl'"),
        ({"args": "runs/eblora"}, r"args is a TrainingArguments, got 'runs/eblora': give TrainingArguments\("),
        ({"args": {"output_dir": "runs"}}, "args is a TrainingArguments, got a dict"),
    ],
)
def test_arguments_of_another_kind_are_answered_with_what_to_give(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path, **given)


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "some/absent/model"])
def test_a_model_that_is_not_there_is_no_name_of_the_hub(model: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"model {model} does not exist: give a folder, or a name of the hub"):
        trainer(tmp_path, model=model)
    with pytest.raises(FileNotFoundError, match=f"{model} does not exist: give a config.json, its folder, or"):
        memory_plan(model)


def test_a_model_is_given_as_a_path_too(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "tiny")
    assert trainer(tmp_path / "run", model=tmp_path / "tiny").folder == tmp_path / "run"
