"""Layouts of TRACE, O-LoRA and SuperNI: they are found, and prompts, orders and rules are the published ones."""

import json
import logging
from pathlib import Path

import pytest
import text_folders as folders
from text_folders import write
from tiny_decoder import tokenizer

from manifold_cl.files import FileError
from manifold_cl.streams import RULES, benchmark_tasks
from manifold_cl.streams.scorers import SARI
from manifold_cl.streams.text_layouts import LAYOUTS, find_layout

NI = ("task1572_samsum_summary", "task363_sst2_polarity_classification")
OLORA_DATA = {"dbpedia", "amazon", "yahoo", "agnews", "yelp", "MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE"}
OLORA_DATA |= {"IMDB", "SST-2", "MultiRC"}


def test_each_layout_is_found_in_its_folder_or_the_one_above(tmp_path: Path) -> None:
    made = {
        "trace": folders.write_trace(tmp_path / "a" / "trace"),
        "olora": folders.write_olora(tmp_path / "b" / "CL_Benchmark"),
        "superni": folders.write_superni(tmp_path / "c" / "SuperNI", NI),
        "jsonl": folders.write_jsonl(tmp_path / "d" / "mine"),
    }
    for name, folder in made.items():
        for given in (folder, folder.parent):
            layout, base = find_layout(given)
            assert (layout.name, base) == (name, folder)


def test_folders_of_no_layout_or_of_two_are_named(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(FileError, match=r"none holds no tasks that can be read.*jsonl: .*trace: .*olora: .*superni: "):
        find_layout(tmp_path / "none")
    folders.write_trace(tmp_path / "two")
    folders.write_jsonl(tmp_path / "two")
    with pytest.raises(FileError, match=r"fits several layouts \(jsonl in .*, trace in .*\)"):
        find_layout(tmp_path / "two")
    assert find_layout(tmp_path / "two", "trace")[0].name == "trace"
    with pytest.raises(ValueError, match=r"unknown layout 'tracy'.*trace"):
        find_layout(tmp_path / "two", "tracy")
    with pytest.raises(FileError, match="is no folder"):
        find_layout(tmp_path / "missing")


def test_trace_has_the_published_order_and_rules(tmp_path: Path) -> None:
    tasks = benchmark_tasks(folders.write_trace(tmp_path), tokenizer())
    assert [task.name for task in tasks] == list(folders.TRACE)
    assert {task.name: task.rule for task in tasks} == {
        "C-STANCE": "exact_text",
        "FOMC": "exact_text",
        "MeetingBank": "rouge_l",
        "Py150": "edit_similarity",
        "ScienceQA": "first_letter",
        "NumGLUE-cm": "exact_text",
        "NumGLUE-ds": "exact_text",
        "20Minuten": "sari",
    }
    assert tasks[0].options == ("A", "B", "C")
    assert (tasks[0].encoder.max_length, tasks[0].max_new_tokens) == (1024 + 512, 512)
    assert {split: tasks[0].size(split) for split in tasks[0].parts} == {"train": 6, "validation": 6, "test": 6}
    few = benchmark_tasks(tmp_path, tokenizer(), tasks=["fomc", "C-STANCE"], max_length=64, max_new_tokens=4)
    assert [(t.name, t.encoder.max_length, t.max_new_tokens) for t in few] == [("FOMC", 64, 4), ("C-STANCE", 64, 4)]


def test_olora_writes_the_published_prompt(tmp_path: Path) -> None:
    tasks = benchmark_tasks(folders.write_olora(tmp_path), tokenizer(), order="2")
    assert [task.name for task in tasks] == ["dbpedia", "amazon", "agnews", "yahoo"]
    example = tasks[0].parts["train"][1]
    assert example.prompt + example.answer == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: red, green, blue \nthis is green\nAnswer: green"
    )
    assert (example.references, example.options) == (("green",), (" red", " green", " blue"))
    assert (tasks[0].rule, tasks[0].encoder.max_length, tasks[0].max_new_tokens) == ("exact_words", 562, 50)
    (copa,) = benchmark_tasks(tmp_path, tokenizer(), tasks=["copa"])
    assert copa.parts["test"][0].prompt == "this is red\nAnswer:"
    with pytest.raises(FileError, match=r"lacks the tasks MNLI, CB, .*\(it has COPA, amazon, yelp, "):
        benchmark_tasks(tmp_path, tokenizer(), order="4")


def test_superni_writes_the_published_prompt_and_the_long_sequence_its_own(tmp_path: Path) -> None:
    folders.write_superni(tmp_path / "ni", NI)
    tasks = benchmark_tasks(tmp_path / "ni", tokenizer(), tasks=NI)
    example = tasks[0].parts["train"][0]
    assert example.prompt + example.answer == (
        "Definition: name the colour\n\nNow complete the following example -\nInput: the red sky\nOutput: red"
    )
    assert (example.references, tasks[0].rule) == (("red", "sky"), "rouge_l_stemmed")
    folders.write_superni(tmp_path / "long", ("yelp", "amazon"))
    long = benchmark_tasks(tmp_path / "long", tokenizer(), tasks=["yelp"])[0]
    assert (long.parts["train"][0].prompt, long.rule) == ("name the colourthe red sky\nOutput:", "exact_words")


def test_orders_hold_the_published_tasks_each_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    olora, superni = LAYOUTS["olora"].facts["orders"], LAYOUTS["superni"].facts["orders"]
    assert list(olora) == ["1", "2", "3", "4", "5", "6"]
    for number in "123":
        assert sorted(olora[number]) == ["agnews", "amazon", "dbpedia", "yahoo"]
    for number in "456":
        assert (set(olora[number]), len(olora[number])) == (OLORA_DATA, 15)
    assert set(superni["1"]) == set(superni["2"])
    assert len(superni["1"]) == len(superni["2"]) == len(set(superni["1"])) == 15
    assert superni["3"] == [name.lower() for name in olora["6"]]
    assert superni["4"] == [name.lower() for name in olora["4"]]
    with pytest.raises(FileError):
        benchmark_tasks(folders.write_olora(tmp_path), tokenizer(), order="5")
    assert "order 5 of olora is not verified" in caplog.text


def test_every_rule_of_a_layout_exists() -> None:
    for layout in LAYOUTS.values():
        tables = [*layout.facts.get("tasks", {}).values(), *(layout.facts.get(k) for k in ("default", "long_sequence"))]
        assert {table["rule"] for table in tables if table} <= {*RULES, SARI}


def test_orders_that_do_not_fit_the_question_are_refused(tmp_path: Path) -> None:
    trace, mine = folders.write_trace(tmp_path / "t"), folders.write_jsonl(tmp_path / "m")
    for folder, options, message in (
        (trace, {"order": "7"}, r"layout trace: unknown order '7' \(have: 1\)"),
        (trace, {"order": "1", "tasks": ["FOMC"]}, "order=1 and tasks= both determine the order"),
        (mine, {"order": "1"}, "order=1 is one of a published benchmark"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark_tasks(folder, tokenizer(), **options)


def test_what_is_wrong_in_a_file_is_named(tmp_path: Path) -> None:
    folders.write_olora(tmp_path / "o")
    path = tmp_path / "o/TC/yahoo/train.json"
    write(path, [{"label": "cat", "sentence": "a"}, {"label": "cat"}, {"label": "pink", "sentence": "b"}])
    with pytest.raises(FileError, match=r"train\.json:6: no 'sentence' .* and 1 more problems"):
        benchmark_tasks(tmp_path / "o", tokenizer())
    write(path, [{"label": "pink", "sentence": "a"}])
    with pytest.raises(FileError, match=r"train\.json:2: the label 'pink' is none of cat, dog, cow"):
        benchmark_tasks(tmp_path / "o", tokenizer())
    write(tmp_path / "o/TC/yahoo/labels.json", {"a": 1})
    with pytest.raises(FileError, match=r"labels\.json:1: a JSON list was expected"):
        benchmark_tasks(tmp_path / "o", tokenizer())
    ni = folders.write_superni(tmp_path / "n", NI) / NI[0] / "test.json"
    for content, message in (
        ({"Definition": ["a"], "Instances": []}, "'Instances' .a list with at least one. are needed"),
        ({"Definition": "a", "Instances": [{"input": "b"}]}, r"test\.json: instance 1: 'output' is text"),
        ({"Definition": "a", "Instances": [{"output": "b"}]}, r"test\.json: instance 1: no 'input'"),
    ):
        write(ni, content)
        with pytest.raises(FileError, match=message):
            benchmark_tasks(tmp_path / "n", tokenizer(), tasks=NI)
    ni.write_text('{"Definition": "a",\n "Instances": }')
    with pytest.raises(FileError, match=r"test\.json:2:15: malformed JSON"):
        benchmark_tasks(tmp_path / "n", tokenizer(), tasks=NI)


def test_a_missing_test_part_is_held_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders.write_trace(tmp_path)
    (tmp_path / "FOMC/test.json").unlink()
    with caplog.at_level(logging.INFO, "manifold_cl"):
        tasks = benchmark_tasks(tmp_path, tokenizer(), tasks=["FOMC"])
    assert (tasks[0].size("train"), tasks[0].size("test")) == (5, 1)
    assert "task FOMC: 1 of 6 training rows are held out as test part" in caplog.text
    assert json.loads((tmp_path / "FOMC/eval.json").read_text())[0]["answer"] == tasks[0].parts["validation"][0].answer
