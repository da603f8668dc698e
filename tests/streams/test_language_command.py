"""``manifold-cl streams check`` and ``run`` on folders of text, with a tiny decoder, and models that do not fit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import text_folders as folders
import torch
from tiny_decoder import WORDS, decoder, tokenizer
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from manifold_cl.cli import main
from manifold_cl.files import FileError
from manifold_cl.streams import (
    LanguageOptions,
    load_causal_lm,
    load_tokenizer,
    open_language_stream,
    validate_tokenizer,
    verify_texts,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny decoder and its tokenizer; not to be written to."""
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(folder: Path, *more: str) -> None:
    main(["streams", "run", str(folder), "--device", "cpu", *more])


def errors(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_folder_of_rows_runs_to_a_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "manifold_cl")
    folders.write_jsonl(tmp_path / "mine", rows=60)
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"text": "the sky is blue"}) + "\n")
    options = ["--model", str(model), "--method", "sequential_merge", "--set", "lr=0.01", "--epochs", "16"]
    options += ["--batch-size", "4", "--general", str(facts), "--out", str(tmp_path / "runs")]
    run(tmp_path / "mine", *options)
    shown = capsys.readouterr()
    assert "drift" in shown.out
    assert "general" in shown.out
    assert "task colours: 12 of 60 training rows are held out as test part" in caplog.text
    assert "Loading weights" not in shown.err
    record = json.loads((tmp_path / "runs/mine-sequential_merge-seed0/record.json").read_text())
    assert (record["tasks"], record["primary"]) == (["colours", "animals"], "score")
    assert record["accuracy"]["score"][0][0] == record["accuracy"]["score"][1][1] == 100  # both are learned
    assert record["accuracy"]["drift"][0] == [0, 100]  # animals are named as colours
    assert len(record["general"]["facts"]) == 3
    assert record["provenance"]["sizes"]["colours"] == {"train": 48, "test": 12}
    assert list((tmp_path / "runs").glob("report-*.html"))
    run(tmp_path / "mine", *options, "--resume", "--json")
    (again,) = json.loads(capsys.readouterr().out)
    assert again["metrics"] == record["metrics"]


def test_a_published_order_runs_on_a_miniature(model: Path, tmp_path: Path) -> None:
    folders.write_olora(tmp_path / "CL_Benchmark")
    options = LanguageOptions(str(model), order="3", examples=4, test_examples=2, max_length=60, max_new_tokens=2)
    stream = open_language_stream(tmp_path / "CL_Benchmark", options)
    assert (stream.name, stream.task_names) == ("olora-order3", ("yahoo", "amazon", "agnews", "dbpedia"))
    assert [(task.size("train"), task.size("test")) for task in stream.tasks] == [(4, 2)] * 4
    made = stream.make_model()
    assert stream.tasks[0].scores(made).keys() == {"score", "drift"}
    trace = folders.write_trace(tmp_path / "TRACE")
    few = LanguageOptions(str(model), tasks=["20Minuten", "Py150"], evaluate_on="validation", max_new_tokens=2)
    scores = open_language_stream(trace, few).tasks[0].scores(made, "validation")
    assert 0 <= scores["score"] <= 100


def test_check_reports_every_problem_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.write_trace(tmp_path / "TRACE")
    main(["streams", "check", str(tmp_path / "TRACE")])
    assert capsys.readouterr().out.count("complete") == 8
    (tmp_path / "TRACE/FOMC/train.json").unlink()
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a"}, {"prompt": "a", "answer": ""}]
    folders.write(tmp_path / "TRACE/Py150/test.json", rows)
    found = errors(capsys, "streams", "check", str(tmp_path / "TRACE"))
    assert "test.json:6: 'prompt' without 'completion' or 'answer'" in found
    assert "test.json:9: the answer is empty" in found
    assert "FOMC has no training file" in found
    with pytest.raises(SystemExit):
        main(["streams", "check", str(tmp_path / "TRACE"), "--json", "--order", "1"])
    reports = {report["task"]: report for report in json.loads(capsys.readouterr().out)}
    assert {name for name, report in reports.items() if not report["complete"]} == {"FOMC", "Py150"}
    folders.write_superni(tmp_path / "SuperNI", ("task1572_samsum_summary",))
    ordered = verify_texts(tmp_path / "SuperNI", order="1")
    assert [report.complete for report in ordered] == [True] + [False] * 14
    (tmp_path / "o/TC/yahoo").mkdir(parents=True)
    folders.write(tmp_path / "o/TC/yahoo/train.json", [])
    folders.write(tmp_path / "o/TC/yahoo/labels.json", "red")
    (broken,) = verify_texts(tmp_path / "o")
    assert "a JSON list was expected" in broken.files[0].problems[0]


def test_options_that_have_no_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = str(folders.write_jsonl(tmp_path / "mine"))
    for arguments, message in (
        (("run", mine), "--model is needed for a folder of text"),
        (("run", mine, "--model", "m", "--preset", "published"), "--preset has no effect on a folder of text"),
        (("run", mine, "--stream", "ucit", "--method", "eblora"), "--method has no effect on a benchmark of images"),
        (("run", mine, "--stream", "ucit", "--max-length", "9"), "--max-length has no effect on a benchmark of images"),
        (("run", mine, "--stream", "ucit", "--layout", "trace"), "--stream ucit is a benchmark of images"),
        (
            ("check", mine, "--layout", "tracy"),
            "--layout is a file, or one of jsonl, trace, olora, superni, got 'tracy'",
        ),
        (("check", mine, "--stream", "ucit", "--order", "1"), "--order has no effect on a benchmark of images"),
        (("check", mine, "--order", "1"), "--order=1 is one of a published benchmark"),
        (("run", mine, "--model", "./none"), "model ./none does not exist"),
    ):
        assert message in errors(capsys, "streams", *arguments)


def test_tasks_scored_in_two_ways_are_refused_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    folders.write_jsonl(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "red sky"}\n' * 4)
    with pytest.raises(ValueError, match="got animals by generation, text by loss: give score_by='loss'"):
        open_language_stream(tmp_path, LanguageOptions(str(model)))
    assert len(open_language_stream(tmp_path, LanguageOptions(str(model), score_by="loss")).tasks) == 3


def test_a_general_set_is_a_file_or_the_test_part_of_a_folder(model: Path, tmp_path: Path) -> None:
    mine = folders.write_jsonl(tmp_path / "mine")
    colours, animals = mine / "colours.jsonl", mine / "animals"
    options = LanguageOptions(str(model), tasks=["colours"], general=[animals], test_examples=2)
    (general,) = open_language_stream(mine, options).general
    assert (general.name, general.size("test"), general.size("validation")) == ("animals", 2, 2)
    with pytest.raises(ValueError, match="task names must differ, got colours, colours"):
        open_language_stream(mine, LanguageOptions(str(model), tasks=["colours"], general=[colours]))
    with pytest.raises(FileError, match=r"mine, a general set, has no test\.jsonl"):
        open_language_stream(mine, LanguageOptions(str(model), general=[mine]))


def test_a_tokenizer_that_does_not_fit_is_refused_or_named(caplog: pytest.LogCaptureFixture) -> None:
    validate_tokenizer(decoder(), tokenizer())
    assert not caplog.records
    added = tokenizer()
    added.add_tokens(["magenta"])
    with pytest.raises(ValueError, match=rf"1 of its {len(WORDS) + 5} tokens \(such as 'magenta'\) are beyond"):
        validate_tokenizer(decoder(), added)
    wide = decoder(vocabulary=200)
    for _ in range(2):  # each task asks
        validate_tokenizer(wide, tokenizer(eos_token="<pad>"))
    assert len(caplog.records) == 1
    assert "its eos token has the number 0, the model's 2" in caplog.text
    assert f"it has {len(WORDS) + 4} tokens, the embedding 200 rows" in caplog.text


def test_a_model_is_loaded_frozen_in_the_precisions_asked_for(model: Path) -> None:
    loaded = load_causal_lm(str(model), dtype=torch.bfloat16)
    kinds = {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == (torch.float32, False)  # updates are merged into it
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == (torch.bfloat16, False)
    loaded = load_causal_lm(str(model), checkpointing=True)
    assert loaded.is_gradient_checkpointing


def test_models_and_tokenizers_that_are_missing_or_of_another_kind(model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=16, **small)).save_pretrained(tmp_path / "t5")
    with pytest.raises(FileError, match="holds a model of type 't5', a causal language model is needed"):
        load_causal_lm(str(tmp_path / "t5"))
    partial = decoder()
    weights = {name: w for name, w in partial.state_dict().items() if "layers.1.mlp" not in name}
    partial.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(FileError, match=r"partial lacks 3 weights .* such as model\.layers\.1\.mlp\.down_proj"):
        load_causal_lm(str(tmp_path / "partial"))
    (tmp_path / "partial" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError, match="partial cannot be read by transformers"):
        load_causal_lm(str(tmp_path / "partial"))
    decoder().save_pretrained(tmp_path / "bare")
    with pytest.raises(FileError, match="bare has no tokenizer that can be read"):
        load_tokenizer(str(tmp_path / "bare"), local_files_only=True)
    with pytest.raises(FileError, match=r"has no config\.json"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(FileError, match="does not exist: give a folder"):
        load_causal_lm(str(tmp_path / "none"))
    assert len(load_tokenizer(str(model))) == len(AutoTokenizer.from_pretrained(model))


def test_options_out_of_range_are_refused() -> None:
    for given, message in (
        ({"dtype": "float16"}, "dtype is one of bfloat16, float32, got 'float16'"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"max_length": -1}, "max_length must be at least 1"),
        ({"evaluate_on": "train"}, "evaluate_on must be 'test' or 'validation'"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageOptions("m", **given)


def test_messages_are_verified_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "the sky ?"}, {"role": "assistant", "content": "blue"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}))
    with caplog.at_level(logging.WARNING, "manifold_cl"):
        (report,) = verify_texts(tmp_path)
    assert (report.files[0].items, len(report.files[0].problems)) == (1, 1)
    assert "chat.jsonl:2: the last message is the answer" in report.files[0].problems[0]
    assert not caplog.records


def test_subspaces_are_built_from_rows_of_any_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = folders.write_jsonl(tmp_path / "mine")
    (tmp_path / "facts.jsonl").write_text(json.dumps({"text": "the sky is blue"}) + "\n")
    files = ["--data", str(mine / "colours.jsonl"), "--data", str(tmp_path / "facts.jsonl")]
    built = ["subspace", "build", "--model", str(model), "--rank", "4", "--out", str(tmp_path / "out"), "--json"]
    main([*built, *files])
    entries = json.loads(capsys.readouterr().out)
    assert entries["tasks"] == ["colours", "facts"]
    assert len(entries["history"][0]["layers"]) == 2 * 7  # seven linear layers per block, without the head
    assert all(layer["added"] > 0 for layer in entries["history"][0]["layers"].values())
    main([*built, "--data", str(mine), "--tasks", "animals", "--out", str(tmp_path / "other")])
    assert json.loads(capsys.readouterr().out)["tasks"] == ["animals"]
    for arguments, message in (
        (built[:4], "--model and --data belong together"),
        ([*built[:2], *files], "--model and --data belong together"),
        ([*built, *files, "--stream", "text-val"], "--stream text-val has its own model and data"),
        ([*built, "--data", str(tmp_path / "none.jsonl")], "none.jsonl does not exist: give for --data a JSONL file"),
        ([*built, *files, "--data", str(mine)], "is a folder beside other data"),
        ([*built, *files, "--tasks", "news"], "unknown task 'news' (have: colours, facts)"),
        ([*built, *files, *files], "two files have the same name"),
    ):
        assert message in errors(capsys, *arguments, "--out", str(tmp_path / "new"))
