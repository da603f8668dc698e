"""Three tasks of a few words for the tiny decoder, learned in a second."""

from typing import Any

from tiny_decoder import decoder, tokenizer
from transformers import TrainingArguments

from manifold_cl.integrations.transformers import ContinualTrainer
from manifold_cl.streams.causal_lm import CausalLMTask, TextExample

SUBJECTS = ("cat", "dog", "cow", "sky", "sea", "sun", "red", "green")
ANSWERS = {"colour": ("red", "green", "blue"), "number": ("one", "two", "three"), "animal": ("yes", "no")}


def task(name: str, *, examples: int = 24, **options: Any) -> CausalLMTask:
    """The answer depends on the subject's index; train, validation and test are the same pairs in other orders."""
    answers = ANSWERS[name]
    made = [
        TextExample(f"what {name} is {SUBJECTS[i % 8]} ?", answers[i % 8 % len(answers)], options=answers)
        for i in range(examples)
    ]
    parts: Any = {"train": made, "validation": made[:8], "test": made[:8]}
    return CausalLMTask(name, parts, tokenizer=tokenizer(), **{"max_length": 16, "max_new_tokens": 2, **options})


def tasks(*names: str, **options: Any) -> list[CausalLMTask]:
    return [task(name, **options) for name in names or ("colour", "number")]


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    chosen = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "save_strategy": "no", **options}
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **chosen)


def trainer(folder: Any, method: Any = "eblora", *, keep: bool = False, **options: Any) -> ContinualTrainer:
    """A run of two tasks with small adapters."""
    if isinstance(method, str):
        method = {"name": method, **({} if method in ("gpm", "zero_shot") else {"rank": 4, "alpha": 8.0})}
    given = {"tasks": tasks(), "args": arguments(folder), "merge": "keep" if keep else "merge", **options}
    return ContinualTrainer(given.pop("model", decoder), given.pop("tasks"), method, given.pop("args"), **given)
