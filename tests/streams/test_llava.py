"""LLaVA: loading, the right tokens in the loss, the right modules adapted, answers that padding does not change."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manifold_cl import adapters_of, inject_adapters, merge_adapters
from manifold_cl.adapters import LoRALinear
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import InputMoment, collect_statistics
from manifold_cl.files import FileError
from manifold_cl.streams import TEMPLATES, Instruction, Template, published_layout
from manifold_cl.streams.llava import IGNORED, Collator, answers, load_llava, load_processor, loss
from manifold_cl.streams.templates import template

pytest.importorskip("transformers")
from PIL import Image

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def model(tiny: Path) -> nn.Module:
    return load_llava(str(tiny / "model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Any:
    return load_processor(str(tiny / "model"), local_files_only=True)


@pytest.fixture(scope="module")
def collator(tiny: Path, processor: Any) -> Collator:
    return Collator(processor, template("vicuna_v1"), lambda image: tiny / "data" / image, max_length=128)


def item(*turns: tuple[str, str], image: str = "datasets/IconQA/train/0000.png", **more: Any) -> Instruction:
    return Instruction("k", (image,) if image else (), turns, (turns[-1][1],), 3, **more)


def test_a_conversation_is_written_as_the_model_was_trained() -> None:
    prompt = TEMPLATES["vicuna_v1"].written([("Q", "A"), ("R", "B")], images=1, image_token="<image>", end="</s>")
    assert prompt.text == f"{VICUNA} USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT: B</s>"
    assert [prompt.text[start:end] for start, end in prompt.answers] == [" A</s>", " B</s>"]
    asked = TEMPLATES["vicuna_v1"].asked([("Q", "A"), ("R", "B")], images=1, image_token="<image>", end="</s>")
    assert asked == f"{VICUNA} USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"
    assert Template("").asked([("Q", "")], images=0, image_token="<image>", end="") == "USER: Q ASSISTANT:"
    with pytest.raises(
        ValueError, match=r"unknown template 'vicuna', did you mean vicuna_v1\? \(have: vicuna_v1, plain"
    ):
        template("vicuna")


def test_labels_are_exactly_the_answers(collator: Collator, processor: Any) -> None:
    talk = item(("What?", "a red box"), ("Which icon is shown?", "heart"))
    batch = collator.for_training([talk, item(("Describe the photo.", "snow"), image=""), item(("Q", "A"))])
    said = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert said == [" a red box</s> heart</s>", " snow</s>", " A</s>"]
    kept = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert bool(batch["attention_mask"][kept].all())
    images = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert images.tolist() == [4, 0, 4]  # 16 pixels in patches of 8
    assert batch["pixel_values"].shape == (2, 3, 16, 16)


def test_the_loss_is_the_cross_entropy_of_the_answer_s_tokens(model: nn.Module, collator: Collator) -> None:
    batch = collator.for_training([item(("Which icon is shown?", "heart")), item(("Q", "a red box"))])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    spots = targets != IGNORED
    expected = -torch.log_softmax(logits[spots], dim=-1).gather(1, targets[spots][:, None]).mean()
    assert loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order


def test_texts_are_cut_and_a_question_that_fills_everything_is_named(collator: Collator, processor: Any) -> None:
    long = item(("Q", "heart " * 200))
    assert collator.for_training([long])["input_ids"].shape == (1, 128)
    with pytest.raises(
        ValueError, match=r"item k \(line 3\) has \d+ tokens, none of the first 128 in an answer: raise"
    ):
        collator.for_training([item(("why " * 200, "heart"))])


def test_images_are_made_square_with_the_mean_colour(collator: Collator, processor: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 8), (255, 0, 0)).save(tmp_path / "wide.png")
    squared = Collator(processor, template("plain"), lambda _: tmp_path / "wide.png", max_length=128)
    pixels = squared.for_training([item(("Q", "A"))])["pixel_values"][0]
    # A mean-coloured bar is zero after normalisation, up to the rounding of the colour to a byte.
    assert pixels[:, :4].abs().max() < 0.02
    assert pixels[0, 7:9].min() > 1.5  # full red is (1 - 0.48) / 0.27
    cropped = Collator(processor, template("plain"), lambda _: tmp_path / "wide.png", aspect="crop", max_length=128)
    assert cropped.for_training([item(("Q", "A"))])["pixel_values"][0, 0].min() > 1.5


def test_images_that_cannot_be_read_are_named(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for name, said in (("bad.png", "cannot identify image file"), ("none.png", "No such file")):
        one = Collator(processor, template("plain"), lambda _, name=name: tmp_path / name)
        with pytest.raises(FileError, match=rf"{name}, the image of item k \(line 3\), cannot be read: .*{said}"):
            one.for_training([item(("Q", "A"))])


def test_answers_do_not_depend_on_batch_mates(model: nn.Module, collator: Collator, processor: Any) -> None:
    items = [
        item(("Which icon is shown?", "")),
        item(("Q", "")),
        item(("Describe the photo of the box.", ""), image=""),
    ]
    together = answers(model, collator.for_answering(items), processor, max_new_tokens=6)
    alone = [answers(model, collator.for_answering([one]), processor, max_new_tokens=6)[0] for one in items]
    assert together == alone
    assert len(set(together)) == 3
    batch = collator.for_answering(items)
    assert bool(batch["attention_mask"][:, -1].all())  # padded on the left


@pytest.mark.parametrize("stream", ["ucit", "mllm-dcl"])
def test_adapters_go_into_the_language_model_only(tiny: Path, stream: str) -> None:
    model = load_llava(str(tiny / "model"), dtype=torch.float32)
    adapters = inject_adapters(model, published_layout(stream).targets, lambda _, linear: LoRALinear(linear, 2))
    assert len(adapters) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in adapters)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{key}" for name in adapters_of(model) for key in ("left", "right")}


def test_a_bf16_base_trains_float32_adapters(tiny: Path, collator: Collator) -> None:
    model = load_llava(str(tiny / "model"), targets=published_layout("ucit").targets)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"{name}.weight" for name in target_linears(model, published_layout("ucit").targets)}
    assert {p.dtype for name, p in model.named_parameters() if name not in wide} == {torch.bfloat16}
    draw = torch.Generator().manual_seed(0)
    inject_adapters(model, published_layout("ucit").targets, lambda _, linear: LoRALinear(linear, 2, generator=draw))
    exact = load_llava(str(tiny / "model"), dtype=torch.float32)
    batch = collator.for_training([item(("Which icon is shown?", "heart"))])
    found = loss(model, batch)
    found.backward()
    # bf16 keeps 8 bits; two layers and a loss of about 6 lose a few hundredths.
    assert found.item() == pytest.approx(loss(exact, batch).item(), rel=0.02)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert {grad.dtype for grad in grads if grad is not None} == {torch.float32}
    assert sum(float(grad.norm()) for grad in grads if grad is not None) > 0


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_small_updates_survive_the_merge_where_they_should(tiny: Path, precision: torch.dtype) -> None:
    targets = published_layout("ucit").targets
    model = load_llava(str(tiny / "model"), targets=targets, merged_dtype=precision)
    before = {name: layer.weight.clone() for name, layer in target_linears(model, targets).items()}
    draw = torch.Generator().manual_seed(0)

    def make(_: str, linear: nn.Linear) -> LoRALinear:
        adapter = LoRALinear(linear, 4, generator=draw)
        with torch.no_grad():  # updates of 2 in 1000 of the weights, as a gentle task leaves them
            adapter.left.copy_(torch.randn(adapter.left.shape, generator=draw))
            adapter.left.mul_(2e-3 * float(linear.weight.float().norm() / adapter.factors().delta_weight().norm()))
        return adapter

    inject_adapters(model, targets, make)
    rounds = pytest.warns(UserWarning, match="of the merged update over 14 layers")
    with nullcontext() if precision == torch.float32 else rounds:
        added = merge_adapters(model)
    wanted = {name: factors.delta_weight() for name, factors in added.items()}
    after = {name: layer.weight for name, layer in target_linears(model, targets).items()}
    lost = [
        float((after[name].double() - before[name].double() - wanted[name]).norm() / wanted[name].norm())
        for name in wanted
    ]
    # A merge rounds by half a unit in the last place of the weight: 2^-24, 2^-11, 2^-8 beside an update of 2^-9.
    bounds = {torch.float32: (0, 1e-4), torch.float16: (0.01, 0.25), torch.bfloat16: (0.5, 2)}
    assert bounds[precision][0] <= min(lost)
    assert max(lost) <= bounds[precision][1]


def test_checkpointing_changes_no_gradient_and_no_statistic(tiny: Path, collator: Collator) -> None:
    batch = collator.for_training([item(("Which icon is shown?", "heart")), item(("Q", "a red box"))])
    found = []
    for checkpointing in (False, True):
        model = load_llava(str(tiny / "model"), dtype=torch.float32, checkpointing=checkpointing)
        targets = published_layout("ucit").targets
        layers = target_linears(model, targets)
        moments = {name: InputMoment(layer.in_features, weighted=True) for name, layer in layers.items()}
        collect_statistics(layers, [lambda model=model: loss(model, batch)], moments)
        draw = torch.Generator().manual_seed(0)
        inject_adapters(model, targets, lambda _, linear, draw=draw: LoRALinear(linear, 2, generator=draw))
        loss(model, batch).backward()
        assert not any(module.training for module in layers.values())
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([*grads, *(moment.importance() for moment in moments.values())])
        assert answers(model, collator.for_answering([item(("Q", ""))]), collator.processor, max_new_tokens=2)
    assert len(found[0]) == len(found[1]) == 14 * 2 + 14
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the same operations, run twice, in float32


def test_what_is_no_llava_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"model \./nowhere does not exist: give a folder or a name such as llava-hf/"):
        load_llava("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty has no config\.json: a model folder as written by save_pretrained"):
        load_processor(str(tmp_path / "empty"))
    shutil.copytree(tiny / "model", tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileError, match=r"llama holds a model of type 'llama', 'llava' is needed"):
        load_llava(str(tmp_path / "llama"))


def test_without_transformers_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.2' 'pillow>=11'"):
        load_llava("llava-hf/llava-1.5-7b-hf")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_loss_of_the_cpu(tiny: Path, collator: Collator) -> None:
    batch = collator.for_training([item(("Which icon is shown?", "heart"))])
    model = load_llava(str(tiny / "model"), dtype=torch.float32)
    here = loss(model, batch).item()
    assert loss(model.cuda(), batch).item() == pytest.approx(here, rel=1e-3)  # TF32 may be on


def test_a_checkpoint_that_lacks_weights_is_refused(model: nn.Module, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    weights = {name: w.clone() for name, w in model.state_dict().items() if "multi_modal_projector" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.raises(FileError, match=r"model lacks 4 weights of the model, such as model\.multi_modal_projector"):
        load_llava(str(tmp_path / "model"), local_files_only=True)
