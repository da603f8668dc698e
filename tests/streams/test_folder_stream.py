"""A stream in a folder: what is read, what is scored, what the record says, and a loop that survives being killed."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_cl import ContinualRunner, RunRecord, TaskStream
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.runner import Progress
from manifold_cl.files import FileError
from manifold_cl.streams import InstructionTask, Layout, llava, open_folder, open_stream
from manifold_cl.streams.folder_stream import FolderOptions
from manifold_cl.streams.layout import PROJECTOR

pytest.importorskip("transformers")

EBLORA = {"rank": 4, "alpha": 8.0, "lr": 9e-3, "scale_lr": 2e-2, "statistic_examples": 8}


def task(stream: TaskStream, index: int = 0) -> InstructionTask:
    found = stream.tasks[index]
    assert isinstance(found, InstructionTask)
    return found


def runner(
    stream: TaskStream, folder: Path, method: str = "eblora", *, epochs: int = 1, **more: Any
) -> ContinualRunner:
    options = EBLORA if method == "eblora" else {}
    training = Training(epochs=epochs, batch_size=8)
    return ContinualRunner(stream, make_method(method, **options), folder, training=training, **more)


def test_it_has_the_folder_s_items_and_says_where_they_come_from(stream: TaskStream, tiny: Path) -> None:
    assert stream.task_names == ("ImageNet-R", "IconQA")
    assert [(t.size("train"), t.size("test")) for t in stream.tasks] == [(16, 8)] * 2
    assert isinstance(stream.targets, str)
    assert stream.additional_parameters is None
    assert stream.provenance["projector"] == "frozen"
    files = stream.provenance["files"]["IconQA"]
    assert set(files) == {str(tiny / "data/instructions/IconQA" / name) for name in ("train.json", "test_3000.json")}
    assert all(len(digest) == 64 for digest in files.values())
    json.dumps(dict(stream.provenance))


def test_a_run_does_not_go_on_with_other_items(stream: TaskStream, tmp_path: Path) -> None:
    other = replace(stream, tasks=tuple(map(copy.copy, stream.tasks)))
    first = task(other)
    first.parts = {**first.parts, "train": first.parts["train"][1:]}
    runner(stream, tmp_path / "run", "zero_shot").run()
    with pytest.raises(FileError, match="data"):
        runner(other, tmp_path / "run", "zero_shot").run(resume=True)


def test_batches_are_a_pass_over_the_items_of_similar_length(stream: TaskStream) -> None:
    some = task(stream)
    batches = list(some.batches("train", batch_size=5, generator=torch.Generator().manual_seed(0)))
    assert sorted(item.key for batch in batches for item in batch) == sorted(item.key for item in some.parts["train"])
    assert sorted(map(len, batches)) == [1, 5, 5, 5]
    ordered = [item for batch in some.batches("test", batch_size=3) for item in batch]
    assert tuple(ordered) == some.parts["test"]
    again = list(some.batches("train", batch_size=5, generator=torch.Generator().manual_seed(0)))
    assert batches == again
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(some.batches("train", batch_size=0))
    with pytest.raises(ValueError, match="task 'ImageNet-R' has no split 'validation', choose from train, test"):
        some.size("validation")


def test_fewer_examples_are_spaced_evenly(tiny: Path, layout: Layout, options: FolderOptions) -> None:
    few = open_folder(tiny / "data", layout, replace(options, tasks=["IconQA"], examples=4, test_examples=2))
    assert [item.key for item in task(few).parts["train"]] == ["0", "4", "8", "12"]
    assert [item.key for item in task(few).parts["test"]] == ["IconQA-0", "IconQA-4"]


def test_validation_reads_no_test_item(tiny: Path, layout: Layout, options: FolderOptions, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny / "data", tmp_path / "data"))
    for path in data.glob("instructions/*/test_3000.json"):
        path.write_text("broken")
    held = open_folder(data, layout, replace(options, evaluate_on="validation"))
    parts = task(held).parts
    assert parts["test"] == parts["validation"]
    assert (len(parts["train"]), len(parts["test"])) == (13, 3)
    assert not {item.key for item in parts["train"]} & {item.key for item in parts["test"]}
    with pytest.raises(FileError, match=r"ImageNet-R/test_3000\.json:1: a JSON list was expected"):
        open_folder(data, layout, options)


def test_reference_captions_take_the_place_of_answers(
    tmp_path: Path, options: FolderOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_llava import write_layout, write_ucit

    from manifold_cl.streams import captions, read_layout

    pytest.importorskip("pycocoevalcap")
    write_ucit(tmp_path, tasks=["Flickr30k"], train=4, test=4)
    layout = read_layout(write_layout(tmp_path / "l.toml", tasks=["Flickr30k"]))
    found = task(open_folder(tmp_path, layout, options)).parts["test"][0]
    assert found.references == ("Two people wear red coats.", "In this picture, two people wear red coats.")
    path = tmp_path / "instructions/Flickr30k/test_3000.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    with pytest.raises(FileError, match=r"captions of 4 images for 3 test items"):
        open_folder(tmp_path, layout, options)
    # What scores captions is looked for when the stream is opened, not after hours of training.
    monkeypatch.setattr(captions, "_package", lambda: (_ for _ in ()).throw(ImportError("no pycocoevalcap")))
    with pytest.raises(ImportError, match="no pycocoevalcap"):
        open_folder(tmp_path, layout, options)


def test_wrong_requests_are_named(tiny: Path, layout: Layout, options: FolderOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stream 'tiny-ucit': unknown task 'Iconqa', did you mean IconQA"):
        open_folder(tiny / "data", layout, replace(options, tasks=["Iconqa"]))
    with pytest.raises(TypeError, match="tasks must be a sequence of names, got the string 'IconQA'"):
        replace(options, tasks="IconQA")
    with pytest.raises(ValueError, match=r"^dtype is one of bfloat16, float32, got 'float16'"):
        replace(options, dtype="float16")
    with pytest.raises(ValueError, match="merged_dtype is one of bfloat16, float32, float16, got 'int8'"):
        replace(options, merged_dtype="int8")
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        replace(options, examples=0)
    with pytest.raises(ValueError, match="evaluate_on must be 'test' or 'validation', got 'dev'"):
        replace(options, evaluate_on="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass train_projector=AdditionalParameters"):
        open_folder(tiny / "data", replace(layout, presets={}), replace(options, train_projector=True))
    with pytest.raises(
        ValueError, match=r"stream 'ucit' reads data that you download: name their folder, in Python as"
    ):
        open_stream("ucit")
    with pytest.raises(TypeError, match=r"stream 'text-six' has its own data and model and takes no folder; ucit"):
        open_stream("text-six", folder=tmp_path)
    data = Path(shutil.copytree(tiny / "data", tmp_path / "data"))
    (data / "datasets/IconQA/train/0003.png").unlink()
    few = open_folder(data, layout, replace(options, tasks=["IconQA"]))
    batches = list(few.tasks[0].batches("train", batch_size=4))
    with pytest.raises(
        FileError, match=r"image \./datasets/IconQA/train/0003\.png is missing: it belongs under .*data"
    ):
        task(few).collator.for_training(batches[0])


def test_scores_come_with_files_of_what_was_said(stream: TaskStream, tmp_path: Path) -> None:
    model = stream.make_model()
    found = task(stream).evaluate(model, "test", tmp_path)
    assert set(found) == {"score"}
    assert found == task(stream).scores(model, "test")
    lines = [json.loads(line) for line in (tmp_path / "answers-0.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines[1:]) == list(range(8))
    right = [line["answer"].lower() in [r.lower() for r in line["references"]] for line in lines[1:]]
    assert found["score"] == 100 * sum(right) / 8
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["scores"], scores["items"], scores["weights"]) == (dict(found), 8, lines[0]["weights"])


def test_answers_already_given_are_not_asked_again_unless_the_model_changed(
    stream: TaskStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = llava.answers

    def counting(model: Any, batch: Any, *args: Any, **kwargs: Any) -> list[str]:
        asked.append(len(batch["input_ids"]))
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(llava, "answers", counting)
    one, model = task(stream), stream.make_model()
    one.answer_batch = 3
    first = one.evaluate(model, "test", tmp_path)
    assert asked == [3, 3, 2]
    path = tmp_path / "answers-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:-9])  # killed while the fourth answer was written
    assert one.evaluate(model, "test", tmp_path) == first
    assert asked[3:] == [3, 2]
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 2)[0, 0] += 1e-3
    one.evaluate(model, "test", tmp_path)
    assert asked[5:] == [3, 3, 2]
    one.max_new_tokens = 4
    one.evaluate(model, "test", tmp_path)
    assert asked[8:] == [3, 3, 2]


def test_ranks_share_the_questions_that_the_first_one_found_open(
    stream: TaskStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Ranks):
        """Rank 1 of 2, which looks into the folder when rank 0 has answered half of its share already."""

        def barrier(self) -> None:
            pass

        def all_gather(self, value: Any) -> list[Any]:
            return [list(range(8)) if isinstance(value, list) else {"score": 25.0}, value]

    one, model = task(stream), stream.make_model()
    alone = one.evaluate(model, "test", tmp_path / "alone")
    assert set(alone) == {"score"}
    lines = (tmp_path / "alone/answers-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two").mkdir()
    early = [line for line in lines[1:] if json.loads(line)["index"] in (0, 2)]
    (tmp_path / "two/answers-0.jsonl").write_text("".join([lines[0], *early]))
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: Second(1, 2)))
    assert one.evaluate(model, "test", tmp_path / "two") == {"score": 25.0}
    given = [json.loads(line) for line in (tmp_path / "two/answers-1.jsonl").read_text().splitlines()[1:]]
    assert sorted(entry["index"] for entry in given) == [1, 3, 5, 7]


class KilledError(Exception):
    """Stands for a process that ends."""


def killer(index: int, phase: str, step: int) -> Callable[[Progress], None]:
    def on_progress(state: Progress) -> None:
        if (state.index, state.phase, state.step) == (index, phase, step):
            raise KilledError

    return on_progress


@pytest.mark.slow
def test_the_loop_learns_and_goes_on_after_a_kill_to_the_same_bits(stream: TaskStream, tmp_path: Path) -> None:
    whole = runner(stream, tmp_path / "whole", epochs=6).run()
    assert whole.matrix().shape == (2, 2)
    assert all(sum(losses[-2:]) < sum(losses[:2]) for losses in whole.losses)  # the last epoch against the first
    assert max(error for errors in whole.constraints for error in errors.values()) < 2e-6  # the documented bound
    results = sorted(
        str(p.relative_to(tmp_path / "whole/results")) for p in (tmp_path / "whole/results").rglob("*.json*")
    )
    assert results == [
        f"{done:02d}/{name}/{file}"
        for done in range(3)
        for name in ("IconQA", "ImageNet-R")
        for file in ("answers-0.jsonl", "scores.json")
    ]
    for moment in ((1, "train", 2), (1, "evaluate", 1)):
        folder = tmp_path / moment[1]
        with pytest.raises(KilledError):
            runner(stream, folder, epochs=6, on_progress=killer(*moment)).run()
        phases: list[str] = []
        again = runner(stream, folder, epochs=6, on_progress=lambda state, phases=phases: phases.append(state.phase))
        record = again.run(resume=True)
        assert ("train" in phases) == (moment[1] == "train")  # what was learned is not learned again
        for name in ("accuracy", "losses", "constraints", "capacity", "metrics"):
            assert getattr(record, name) == getattr(whole, name)
        for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
            assert (folder / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_trained_projector_is_reported_saved_and_restored(
    tiny: Path, layout: Layout, options: FolderOptions, tmp_path: Path
) -> None:
    stream = open_folder(tiny / "data", layout, replace(options, train_projector=True))
    assert stream.additional_parameters == AdditionalParameters(PROJECTOR, lr=1e-3)
    assert stream.provenance["projector"] == "trained"
    before = dict(stream.additional_parameters.find(stream.make_model()))
    whole = runner(stream, tmp_path / "whole", "sequential_merge").run()
    assert whole.provenance["companions"]["parameters"] == sum(p.numel() for p in before.values())
    assert whole.config["companions"] == {"pattern": PROJECTOR, "lr": 1e-3, "weight_decay": 0.0}
    after = stream.make_model()
    stream.additional_parameters.load(after, tmp_path / "whole/tasks/02-IconQA")
    moved = [float((p - before[name]).abs().max()) for name, p in stream.additional_parameters.find(after).items()]
    assert min(moved) > 1e-4  # every tensor of it has learned
    with pytest.raises(KilledError):
        runner(stream, tmp_path / "cut", "sequential_merge", on_progress=killer(1, "train", 1)).run()
    resumed = runner(stream, tmp_path / "cut", "sequential_merge").run(resume=True)
    assert (resumed.losses, resumed.accuracy) == (whole.losses, whole.accuracy)
    frozen = RunRecord.load(tmp_path / "whole")
    assert "companions" in frozen.config
    plain = open_folder(tiny / "data", layout, options)
    with pytest.raises(FileError, match=r"another configuration: companions: .* there, 'unset' here"):
        runner(plain, tmp_path / "whole", "sequential_merge").validate(resume=True)
