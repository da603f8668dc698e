"""A LLaVA of 100 000 random weights and a miniature UCIT: what `llava_continual.py --tiny` and the tests run on.

The model is made of transformers' own classes, the tokenizer is trained on the spot, the images are coloured squares
whose colour decides the answer. Nothing is downloaded. Scores on it mean nothing beyond "the loop works".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # the image processor that needs no torchvision
    from transformers import CLIPImageProcessorPil
except ImportError:  # its name in the first versions of transformers 5
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 210), "white": (235, 235, 235)}
QUESTIONS = {
    "ImageNet-R": "What is the object in the image?",
    "ArxivQA": "Which option describes the figure?",
    "VizWiz": "What is happening in the image?",
    "IconQA": "Which icon is shown?",
    "CLEVR-Math": "How many things are left?",
    "Flickr30k": "Describe the photo.",
}
ANSWERS: Mapping[str, Mapping[str, str]] = {
    "ImageNet-R": {"red": "goldfish", "green": "tree frog", "blue": "hammerhead", "white": "polar bear"},
    "ArxivQA": {"red": "A", "green": "B", "blue": "C", "white": "D"},
    "VizWiz": {colour: f"a {colour} box on the table" for colour in COLOURS},
    "IconQA": {"red": "heart", "green": "clover", "blue": "drop", "white": "snow"},
    "CLEVR-Math": {"red": "3", "green": "5", "blue": "0", "white": "8"},
    "Flickr30k": {colour: f"two people wear {colour} coats" for colour in COLOURS},
}
CAPTIONED = ("VizWiz", "Flickr30k")
FILES = {  # task: training file, test file, reference captions
    "ImageNet-R": ("ImageNet-R/train.json", "ImageNet-R/test_3000.json", None),
    "ArxivQA": ("ArxivQA/train_4w.json", "ArxivQA/test_3000.json", None),
    "VizWiz": ("VizWiz/train.json", "VizWiz/test_3000.json", "VizWiz/val_coco_type_3000.json"),
    "IconQA": ("IconQA/train.json", "IconQA/test_3000.json", None),
    "CLEVR-Math": ("CLEVR/train_4w.json", "CLEVR/test_3000.json", None),
    "Flickr30k": ("Flickr30k/train_brief_4w.json", "Flickr30k/test_3000.json", "Flickr30k/val_coco_type_3000.json"),
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a LLaVA with random weights, its tokenizer and its image processor to ``folder``."""
    tokenizer = train_tokenizer([SYSTEM, *QUESTIONS.values(), *(a for task in ANSWERS.values() for a in task.values())])
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,  # so that a random model of this width has something to say
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # transformers initialises from the global generator
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with LLaMA's special tokens, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def write_ucit(folder: Path, *, tasks: Iterable[str] = tuple(QUESTIONS), train: int = 48, test: int = 16) -> Path:
    """Write a miniature UCIT to ``folder``, in the published layout, with ``train`` and ``test`` items per task."""
    for task in tasks:
        training, testing, captions = FILES[task]
        for part, count, file in (("train", train, training), ("test", test, testing)):
            items = [_item(folder, task, part, number) for number in range(count)]
            _write(folder / "instructions" / file, items)
        if captions is not None:
            _write(folder / "instructions" / captions, _coco(task, test))
    return folder


def _item(folder: Path, task: str, part: str, number: int) -> dict[str, Any]:
    colour = list(COLOURS)[number % len(COLOURS)]
    image = f"./datasets/{task}/{part}/{number:04d}.png"
    _draw(folder / image, COLOURS[colour], seed=number + 1000 * (part == "test"))
    answer = ANSWERS[task][colour]
    if part == "test":
        return {"question_id": f"{task}-{number}", "image": image, "text": QUESTIONS[task], "answer": answer}
    said = [{"from": "human", "value": f"<image>\n{QUESTIONS[task]}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": image, "conversations": said}


def _draw(path: Path, colour: tuple[int, int, int], *, seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(16, 25)), int(draw.integers(16, 25)), 3)
    pixels = np.clip(np.array(colour) + draw.normal(0, 20, shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _coco(task: str, count: int) -> dict[str, Any]:
    """Two reference captions per image, in COCO's annotation format."""
    images = [{"id": number, "file_name": f"{number:04d}.png"} for number in range(count)]
    annotations = []
    for number in range(count):
        answer = ANSWERS[task][list(COLOURS)[number % len(COLOURS)]]
        for caption in (answer.capitalize() + ".", f"In this picture, {answer}."):
            annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
    return {"images": images, "annotations": annotations}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_layout(path: Path, *, tasks: Iterable[str]) -> Path:
    """Write a layout file for some of the tasks: answers end early, and the projector has a rate of its own."""
    lines = [
        'name = "tiny-ucit"',
        "max_length = 128",
        "max_new_tokens = 8",
        'image_roots = ["."]',
        r"targets = '.*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)'",
    ]
    for task in tasks:
        training, testing, captions = FILES[task]
        lines += ["", "[[tasks]]", f'name = "{task}"']
        lines += [f'train = ["instructions/{training}"]', f'test = ["instructions/{testing}"]']
        lines += (
            [f'captions = ["instructions/{captions}"]', 'scorer = "captions"'] if captions else ['scorer = "exact"']
        )
    lines += ["", "[presets.tiny]", 'method = "eblora"', "total_batch = 8", "[presets.tiny.options]", "rank = 4"]
    lines += ["[presets.tiny.training]", "batch_size = 4", "[presets.tiny.projector]", "lr = 1e-3"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
