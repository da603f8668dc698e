"""The embedded streams of a small decoder: prompts, parts, and the real model with its quick stream."""

import hashlib

import pytest

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.streams import STREAMS, open_stream
from manifold_cl.streams.decoder_streams import FOUR, QUESTIONS


def test_a_prompt_has_the_cut_text_and_all_options():
    question = QUESTIONS["sentiment"]
    prompt = question.prompt(" ".join(f"w{i}" for i in range(50)))
    assert "w31\n" in prompt
    assert "w32" not in prompt
    assert "negative, positive<|im_end|>\n<|im_start|>assistant\n" in prompt


@pytest.mark.parametrize("name", FOUR)
def test_no_option_is_the_beginning_of_another(name):
    answers = [answer.lower() for answer in QUESTIONS[name].answers.values()]
    assert not [(a, b) for a in answers for b in answers if a != b and b.startswith(a)]


def test_streams_name_their_tasks_without_reading_data():
    assert STREAMS["lm-four"].task_names == FOUR
    assert STREAMS["lm-two"].task_names == FOUR[:2]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tasks": ["glosses", "films"]}, ValueError, "films"),
        ({"examples": 481}, ValueError, "480"),
        ({"folder": "x"}, TypeError, "folder"),
        ({"evaluate_on": "train"}, ValueError, "evaluate_on"),
    ],
)
def test_wrong_options_are_refused_before_a_download(options, error, words):
    with pytest.raises(error, match=words):
        open_stream("lm-four", **options)


@pytest.mark.stream
@pytest.mark.slow
def test_the_parts_are_the_same_everywhere():
    stream = open_stream("lm-four")
    for task in stream.tasks:
        assert [task.size(split) for split in ("train", "validation", "test")] == [480, 80, 100]
        seen = {e.prompt for e in task.part("train")} & {e.prompt for e in task.part("test")}
        assert not seen
        assert not [t for t in task._encoded("train") if t.cut]
    digest = hashlib.sha256(repr([task.part("train") for task in stream.tasks]).encode()).hexdigest()
    assert digest[:16] == "5d77f5cfe6c63d51"


@pytest.mark.stream
@pytest.mark.long
def test_the_quick_stream_is_learned_and_kept(tmp_path):
    stream = open_stream("lm-two", evaluate_on="validation")
    method = make_method("eblora")
    record = ContinualRunner(stream, method, tmp_path / "run", training=Training(evaluate_on="validation")).run()
    assert record.zero_shot["drift"][0] > 20  # before training, many answers are none of the options
    assert record.accuracy["drift"][-1][0] <= 5
    assert record.metrics["mfn"] > sum(record.zero_shot["score"]) / 2 + 10
    assert record.constraints[-1]["protection"] <= 2e-6
