"""Tasks for language models from the user's data: forms of rows, parts, and what is wrong with data."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_decoder import tokenizer

from manifold_cl.files import FileError
from manifold_cl.streams import CausalLMTask, causal_lm_tasks
from manifold_cl.streams.text_rows import RowReader

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"say {word} :", "answer": word} for word in ("red", "green", "blue", "one", "two")]
CHAT = [
    {"role": "system", "content": "name the colour"},
    {"role": "user", "content": "the sky ?"},
    {"role": "assistant", "content": "blue"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(rows: Any, **options: Any) -> CausalLMTask:
    (task,) = causal_lm_tasks({"one": rows}, options.pop("tokenizer", tokenizer()), **options)
    return task


def test_files_become_tasks_in_their_order_with_a_part_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", ROWS * 4) for name in ("two", "one")}
    with caplog.at_level(logging.INFO, "manifold_cl"):
        two, first = causal_lm_tasks(files, tokenizer())
    assert [two.name, first.name] == ["two", "one"]
    assert (two.size("train"), two.size("test")) == (16, 4)
    held = [example.source for example in two.parts["test"]]
    assert len(held) == 4
    assert not {*held} & {example.source for example in two.parts["train"]}
    assert not {e.source for e in two.parts["train"]} & {e.source for e in two.parts["test"]}
    assert "task two: 4 of 20 training rows are held out as test part" in caplog.text
    assert [task.name for task in causal_lm_tasks(tmp_path, tokenizer())] == ["one", "two"]  # alphabetical
    assert [task.name for task in causal_lm_tasks(list(files.values()), tokenizer())] == ["two", "one"]
    assert [task.name for task in causal_lm_tasks(files["two"], tokenizer())] == ["two"]


def test_parts_are_found_under_their_usual_names(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS), ("dev", ROWS[:2]), ("test", ROWS[:3])):
        write(tmp_path / "one" / f"{name}.jsonl", rows)
    task = one(tmp_path / "one")
    assert {split: task.size(split) for split in task.parts} == {"train": 5, "validation": 2, "test": 3}
    held = one(ROWS * 4, held_out=("test", "validation"))
    assert {split: held.size(split) for split in held.parts} == {"train": 13, "test": 4, "validation": 3}


def test_data_sets_and_lists_give_what_the_file_gives(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    texts = [(e.prompt, e.answer) for e in one(write(tmp_path / "one.jsonl", ROWS)).parts["train"]]
    for given in (ROWS, made, datasets.DatasetDict(train=made), {"train": tmp_path / "one.jsonl"}):
        assert [(e.prompt, e.answer) for e in one(given).parts["train"]] == texts
    split = one(datasets.DatasetDict(train=made, valid=made.select([0]), test=made.select([1, 2])))
    assert (split.size("validation"), split.size("test")) == (1, 2)


def test_messages_go_through_the_chat_template() -> None:
    prompted = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    for row in ({"messages": CHAT}, prompted, {"prompt": CHAT[:2], "answer": "blue"}):
        example = one([row] * 2).parts["train"][0]
        assert example.prompt == (
            "<s> system : name the colour </s> <s> user : the sky ? </s> <s> assistant : "
        )  # with what the template puts in front of an answer
        assert example.answer == "blue"
    given = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    assert one([{"messages": CHAT}] * 2, chat_template=given).parts["train"][0].prompt == (
        "system name the colour user the sky ? assistant "
    )


@pytest.mark.parametrize("answer", ["d", "e", "end", "im", "blue", "|", "t"])
def test_an_answer_that_occurs_in_the_marks_of_the_template_is_found_where_it_stands(answer: str) -> None:
    given = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    rows = [{"messages": [CHAT[1], {**CHAT[2], "content": each}]} for each in ("blue", answer, answer)]
    for example in one(rows, chat_template=given).parts["train"]:
        assert example.prompt == "<|im_start|>user the sky ?<|im_end|> <|im_start|>assistant "
        assert example.answer in ("blue", answer)
    first = one(rows[1:], chat_template=given).parts["train"][0]  # without an earlier row
    assert (first.prompt, first.answer) == ("<|im_start|>user the sky ?<|im_end|> <|im_start|>assistant ", answer)


def test_a_template_with_another_end_mark_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    given = "{% for m in messages %}{{ m.content }} stop {% endfor %}"
    one([{"messages": CHAT}] * 3, chat_template=given)
    assert [record.levelname for record in caplog.records if "'stop'" in record.message] == ["WARNING"]


def test_plain_text_is_learned_completely_and_scored_by_its_loss(caplog: pytest.LogCaptureFixture) -> None:
    task = one([{"text": "red sky"}, {"text": "  "}, {"text": "one cat"}, {"text": "two"}])
    assert (task.score_by, task.size("train"), task.size("test")) == ("loss", 2, 1)
    words = tokenizer()("two", add_special_tokens=False)["input_ids"]
    assert task.encode("train")[1]["labels"] == [-100, *words, 2]  # after the first token, with the end token
    assert "1 of 4 train rows have an empty text and are left out (first: one, train row 1)" in caplog.text
    with pytest.raises(ValueError, match="plain text, which are scored by 'loss', got 'generation'"):
        one([{"text": "red"}] * 2, score_by="generation")


def test_options_and_references_of_rows_reach_the_examples() -> None:
    row = {"prompt": "colour :", "answer": " red", "options": ["red", "green"], "references": ["red", "scarlet"]}
    example = one([row] * 2).parts["train"][0]
    assert (example.options, example.references) == ((" red", " green"), ("red", "scarlet"))
    assert one(ROWS, options={"one": ["red", "green", "blue", "one", "two"]}).options[0] == "red"


def test_settings_of_single_tasks_and_fewer_rows() -> None:
    tasks = causal_lm_tasks({"a": ROWS * 4, "b": ROWS * 4}, tokenizer(), rule={"b": "rouge_l"}, examples=3)
    assert [(task.rule, task.size("train"), task.size("test")) for task in tasks] == [
        ("exact", 3, 4),
        ("rouge_l", 3, 4),
    ]
    assert one(ROWS * 4, examples={"test": 1}).size("test") == 1
    with pytest.raises(ValueError, match=r"unknown task 'c' \(have: a\)"):
        causal_lm_tasks({"a": ROWS}, tokenizer(), rule={"c": "exact"})


def test_keys_that_are_not_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "manifold_cl"):
        one([{**row, "id": 1, "topic": "x"} for row in ROWS])
    assert "task one: keys that are not used: id, topic" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"one\.jsonl:2: 'prompt' without 'completion' or 'answer' \(the row has 'prompt'\)"),
        ('{"question": "a"}', r"one\.jsonl:2: none of 'prompt' .* \(the row has 'question'\)"),
        ('{"prompt": "a", "answer": }', r"one\.jsonl:2:27: malformed JSON: Expecting value"),
        ('["a"]', r"one\.jsonl:2: a row is a JSON object, got a list"),
        ('{"prompt": "a", "answer": " "}', r"one\.jsonl:2: the answer is empty"),
        ('{"prompt": "a", "answer": null}', r"one\.jsonl:2: 'answer' is text, got null"),
        ('{"prompt": "a", "answer": "b", "completion": "b"}', r"one\.jsonl:2: both 'completion' and 'answer'"),
        ('{"text": "a"}', r"one\.jsonl:2: a row of form 'text' among rows of form 'prompt'"),
        ('{"prompt": "a", "answer": "b", "options": "b"}', r"one\.jsonl:2: 'options' is a list of texts"),
        ('{"prompt": "a", "answer": "b", "options": ["c"]}', r"one\.jsonl:2: the answer 'b' is none of its options c"),
        ('{"messages": []}', r"one\.jsonl:2: .*'messages'"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(ValueError, match=message):
        one(path, held_out=("test",))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "'messages' is a list of messages, got a list"),
        ([{"role": "user"}], "message 1 of 'messages' has null under 'content'"),
        ([{"content": "a"}], "message 1 of 'messages' has no text under 'role'"),
        ([{"role": "user", "content": ["a"]}], "has a list under 'content', text is needed"),
        (CHAT[:2], "its role is 'assistant', got 'user'"),
        (CHAT[2:], "no message before the assistant's"),
        (
            [CHAT[0], {**CHAT[1], "role": "usr"}, CHAT[2]],
            r"message 2 of 'messages' has the role 'usr', did you mean 'user'\? \(usual: system, user, .*, tool\)",
        ),
        ([{**CHAT[1], "role": "User"}, CHAT[2]], "message 1 of 'messages' has the role 'User', did you mean 'user'"),
        ([{**CHAT[1], "role": "narrator"}, CHAT[2]], r"the role 'narrator' \(usual: .*the chat template does not name"),
    ],
)
def test_wrong_messages_are_named(messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"one, train row 0: .*{message}"):
        one([{"messages": messages}] * 2)


def test_a_role_that_the_template_names_passes_and_one_in_a_prompt_is_read_alike() -> None:
    asked = {**CHAT[1], "role": "developer"}
    names = "{% for m in messages %}{% if m.role == 'developer' %}# {% endif %}{{ m.content }} {% endfor %}"
    read = one([{"messages": [asked, CHAT[2]]}] * 2, chat_template=names)
    assert read.parts["train"][0].prompt == "# the sky ? "
    with pytest.raises(ValueError, match="train row 0: message 1 of 'prompt' has the role 'developer'"):
        one([{"prompt": [asked], "completion": "blue"}] * 2)


def test_a_message_that_the_template_leaves_out_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Such as a template with a branch for user and one for assistant: a system message then has no effect."""
    users = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    read = one([{"messages": CHAT}] * 3, chat_template=users)
    assert read.parts["train"][0].prompt == "the sky ? "
    said = [record.getMessage() for record in caplog.records if "does not write" in record.getMessage()]
    assert len(said) == 1
    assert "train row 0" in said[0]
    assert "message 1 of 'messages', of role 'system'" in said[0]
    caplog.clear()
    one([{"messages": CHAT}] * 3)
    assert "does not write" not in caplog.text


def test_without_a_tokenizer_an_unusual_role_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    reader = RowReader(None)
    for number in (1, 2):
        reader({"messages": [{**CHAT[1], "role": "usr"}, CHAT[2]]}, f"rows.jsonl:{number}")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rows.jsonl:1: message 1 of 'messages' has the role 'usr', did you mean 'user'? (usual: ")


def test_chat_templates_that_are_missing_unknown_or_refuse(tmp_path: Path) -> None:
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"messages need a chat template, and the tokenizer .* has none"):
        one([{"messages": CHAT}] * 2, tokenizer=bare)
    with pytest.raises(ValueError, match="unknown chat template 'chatml'"):
        one([{"messages": CHAT}] * 2, chat_template="chatml")
    with pytest.raises(ValueError, match="the chat template refuses these messages: roles alternate"):
        one([{"messages": CHAT}] * 2, chat_template="{{ raise_exception('roles alternate') }}")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    named = one([{"messages": CHAT}] * 2, chat_template=str(tmp_path / "t.jinja"))
    assert named.parts["train"][0].prompt == "name the colour the sky ? "


def test_data_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    for given, error, message in (
        ({}, ValueError, "data has no tasks"),
        ({"train": ROWS, "test": ROWS}, ValueError, "data has the splits train, test where names of tasks are needed"),
        (ROWS, TypeError, "data maps names of tasks to their data, or lists paths, got a list"),
        ([tmp_path / "a.jsonl", tmp_path / "b/a.jsonl"], ValueError, "two tasks have the name a"),
        ({"one": tmp_path / "none.jsonl"}, FileError, r"none\.jsonl, the data of one, does not exist"),
        ({"one": 3}, TypeError, "one, train rows are a data set or a list of dictionaries, got a int"),
        ({"one": []}, ValueError, "task 'one' has no rows for training"),
        ({"one": {"train": ROWS, "test": []}}, ValueError, "task 'one' has no rows for the test"),
        ({"one": {"train": ROWS, "dev": ROWS, "val": ROWS}}, ValueError, "two validation parts, one of them 'val'"),
        ({"one": ROWS[:1]}, ValueError, "1 row for training, too few"),
    ):
        with pytest.raises(error, match=message):
            causal_lm_tasks(given, tokenizer())
    with pytest.raises(ValueError, match="task 'one' has no rows for the test: give a part 'test'"):
        one(ROWS, held_out=())
    with pytest.raises(ValueError, match="held_out names validation or test, got 'train'"):
        one(ROWS, held_out=("train",))
    with pytest.raises(TypeError, match=r"tokenizer is .*, got 'tiny': give AutoTokenizer\.from_pretrained\(name\)"):
        one(ROWS, tokenizer="tiny")
    with pytest.raises(ValueError, match="unknown rule 'rogue_l'"):
        one(ROWS, rule="rogue_l")


def test_a_part_of_another_name_is_named(caplog: pytest.LogCaptureFixture) -> None:
    one({"train": ROWS, "test": ROWS, "unsupervised": ROWS})
    assert "task one: the part 'unsupervised' is not used" in caplog.text


def test_a_part_that_is_held_out_does_not_follow_the_order_of_classes() -> None:
    rows = [{"prompt": "say ", "completion": ("red", "green", "blue", "yes", "no")[i % 5]} for i in range(100)]
    held = {example.answer for example in one(rows).parts["test"]}
    few = {example.answer for example in one(rows, examples=20).parts["train"]}
    assert len(held) > 2
    assert len(few) > 2


@pytest.mark.parametrize("wrong", [{"examples": 0}, {"examples": -1}])
def test_numbers_of_rows_are_at_least_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        one(ROWS * 4, **wrong)
