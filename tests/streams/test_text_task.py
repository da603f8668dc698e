"""TextTask: batches, loss and scores, with a small model that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from manifold_cl.continual.task import Task
from manifold_cl.streams.text_task import TextBatch, TextTask


class Bag(nn.Module):
    """Unit vectors: the normalised sum of the vectors of a text's letters."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Parameter(torch.randn(128, 8, generator=torch.Generator().manual_seed(0)))
        self.calls: list[tuple[Sequence[str], int]] = []

    def forward(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        self.calls.append((texts, max_tokens))
        rows = [self.letters[[ord(c) for c in text]].sum(dim=0) for text in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


def batch(*texts: str, targets: Sequence[int]) -> TextBatch:
    return TextBatch(texts, tuple(targets))


@pytest.fixture
def task() -> TextTask:
    train = TextBatch(tuple("w " * (1 + i % 37) + str(i) for i in range(200)), (0, 1) * 100)
    return TextTask(
        "letters",
        ("aaa", "bbb"),
        candidates=("aaa", "zzz", "bbb", "zzz"),
        max_tokens=16,
        parts={
            "train": train,
            "validation": batch("aa", "bb", targets=[1, 1]),
            "test": batch("aaaa", "b", "bb", "zz", targets=[0, 1, 0, 1]),
        },
    )


def test_it_is_a_task_with_named_sizes(task: TextTask) -> None:
    assert isinstance(task, Task)
    assert [task.size(split) for split in ("train", "validation", "test")] == [200, 2, 4]
    assert task.candidates == ("aaa", "zzz", "bbb")


def test_without_a_generator_batches_come_in_stored_order(task: TextTask) -> None:
    batches = list(task.batches("train", batch_size=64))
    assert [len(b) for b in batches] == [64, 64, 64, 8]
    assert tuple(t for b in batches for t in b.texts) == task.parts["train"].texts


def test_shuffled_batches_hold_every_text_once_with_its_own_target(task: TextTask) -> None:
    batches = list(task.batches("train", batch_size=16, generator=torch.Generator().manual_seed(0)))
    stored = dict(zip(task.parts["train"].texts, task.parts["train"].targets, strict=True))
    drawn = [pair for b in batches for pair in zip(b.texts, b.targets, strict=True)]
    assert len(drawn) == 200
    assert dict(drawn) == stored


def test_the_generator_alone_decides_the_shuffle(task: TextTask) -> None:
    def draw(seed: int) -> list[TextBatch]:
        return list(task.batches("train", batch_size=16, generator=torch.Generator().manual_seed(seed)))

    torch.manual_seed(1)
    first = draw(0)
    state = torch.get_rng_state()
    assert draw(0) == first
    assert draw(1) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffled_batch_mates_are_alike_in_length(task: TextTask) -> None:
    def length(text: str) -> int:
        return min(len(text.split()), task.max_tokens)

    def padded(batches: list[TextBatch]) -> int:
        return sum(len(b) * max(length(text) for text in b.texts) for b in batches)

    generator = torch.Generator().manual_seed(0)
    needed = sum(length(text) for text in task.parts["train"].texts)
    # A batch of a full window spans a sixth of the lengths; the last window holds 8 texts.
    assert padded(list(task.batches("train", batch_size=16, generator=generator))) < 1.15 * needed
    assert padded(list(task.batches("train", batch_size=16))) > 1.2 * needed


def test_lengths_are_measured_once_and_capped_where_texts_are_cut() -> None:
    measured: list[int] = []

    def count(texts: Sequence[str]) -> list[int]:
        measured.append(len(texts))
        return [len(text) for text in texts]

    part = TextBatch(tuple("x" * (10 + i) for i in range(32)), (0,) * 32)
    task = TextTask("t", ("a",), candidates=("a",), max_tokens=8, parts={"train": part}, count_tokens=count)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(task.batches("train", batch_size=32, generator=torch.Generator().manual_seed(0)))
    list(task.batches("train", batch_size=32, generator=torch.Generator().manual_seed(1)))
    assert measured == [32]
    # All texts are cut to the same length, and sorting is stable: the random order stays.
    assert batches[0].texts == tuple(part.texts[i] for i in order)


def test_the_loss_is_the_cross_entropy_of_twenty_cosines(task: TextTask) -> None:
    model = Bag()
    texts, labels = model(("ab", "bb"), 16), model(("aaa", "bbb"), 32)
    expected = torch.log_softmax(20 * texts @ labels.T, dim=1)[[0, 1], [0, 1]].mean().neg()
    assert task.loss(model, batch("ab", "bb", targets=[0, 1])).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_moves_the_labels_too(task: TextTask) -> None:
    model = Bag()
    task.loss(model, batch("cc", "dd", targets=[0, 1])).backward()
    assert model.letters.grad is not None
    assert all(model.letters.grad[ord(letter)].norm() > 0 for letter in "abcd")


def test_training_lowers_the_loss(task: TextTask) -> None:
    model = Bag()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    some = batch("cc", "dd", "ce", "df", targets=[0, 1, 0, 1])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.loss(model, some)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_scores_are_percentages_among_own_and_among_all_labels(task: TextTask) -> None:
    model = Bag()
    scores = task.scores(model)
    # aaaa -> aaa right, b -> bbb right, bb -> bbb wrong; zz is nearest to zzz, which only the union has.
    nearest = (model(("zz",), 16) @ model(("aaa", "bbb"), 32).T).argmax().item()
    assert dict(scores) == {"known": 50.0 + 25.0 * (nearest == 1), "union": 50.0}
    assert next(iter(scores)) == "known"
    assert task.scores(model, "validation")["known"] == 50.0
    each = task.example_scores(model)  # in stored order, not in the order of scoring
    assert each == [100.0, 100.0, 0.0, 100.0 * (nearest == 1)]
    assert sum(each) / len(each) == scores["known"]


def test_scoring_keeps_no_gradient_and_cuts_texts_but_not_labels(task: TextTask) -> None:
    model = Bag()
    task.scores(model)
    assert [max_tokens for _, max_tokens in model.calls] == [32, 16]
    assert model.letters.grad is None


def test_scoring_goes_from_short_to_long_in_batches_of_64(task: TextTask) -> None:
    model = Bag()
    task.scores(model, "train")
    sizes = [len(texts) for texts, _ in model.calls[1:]]
    lengths = [len(text.split()) for texts, _ in model.calls[1:] for text in texts]
    assert sizes == [64, 64, 64, 8]
    assert [min(n, 16) for n in lengths] == sorted(min(n, 16) for n in lengths)


def test_wrong_values_are_named(task: TextTask) -> None:
    with pytest.raises(ValueError, match=r"task 'letters' has no split 'dev', choose from train, validation, test"):
        task.size("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        next(task.batches("train", batch_size=0))
    with pytest.raises(ValueError, match=r"candidates of task 't' must include its labels, 'b' is missing"):
        TextTask("t", ("a", "b"), candidates=("a",), max_tokens=8, parts={})


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_measurement_in_one_pass_is_that_of_two(task: TextTask, batch_size: int) -> None:
    model = Bag()
    found, expected = (
        measure(task, model, "train", batch_size=batch_size) for measure in (TextTask.measure, Task.measure)
    )
    assert found["score"] == expected["score"] == task.scores(model, "train")["known"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert len({len(texts) for texts, _ in model.calls}) > 1
