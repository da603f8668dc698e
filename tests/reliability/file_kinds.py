"""Every kind of file that the project reads: how the tests write one, and what a reader makes of it."""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from killed_jobs import METHODS, OURS, adapted_model, memory_of, run_state, search_run, study_run, training_watched
from safetensors.torch import save_file
from text_folders import write_jsonl, write_olora, write_superni, write_trace
from torch import Tensor
from toy import frozen_model, toy_stream

import analysis
from analysis.studies import StudyFile
from manifold_cl import ContinualRunner, RunRecord, SubspaceMemory, export_lora, load_adapters, save_adapters
from manifold_cl.adapters import read_adapters
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.causes.changed_updates import open_results
from manifold_cl.files import write_json
from manifold_cl.planning.skeleton import open_config
from manifold_cl.streams import load_causal_lm, load_tokenizer, read_instructions, read_layout
from manifold_cl.streams.answers import AnswerBook
from manifold_cl.streams.captions import read_captions
from manifold_cl.streams.causal_tasks import read_source
from manifold_cl.streams.model_inputs import load_text_model, load_text_tokenizer
from manifold_cl.streams.text_layouts import find_layout
from manifold_cl.streams.text_rows import RowReader
from manifold_cl.study import StudyPlan, read_plan
from manifold_cl.study.search import read_search
from manifold_cl.study.trials import Search
from manifold_cl.tensor_files import read_tensors

Write = Callable[[Path], object]
Read = Callable[[Path], Any]


@dataclass(frozen=True)
class FileKind:
    """One kind of file and one reader of it.

    Args:
        write: writes the file, and what the reader needs beside it, into an empty folder.
        file: its path in the folder.
        read: the value of the file, from the folder; what is written meanwhile is of no account.
        readers: the public functions that are tested here, as ``module.name`` or ``Class.name``.
        family: kinds of one family have one format, so that one is no foreign file to another.
        verified: the file has checksums: a damaged one is refused, or is read as the same value. Without them a
            flipped bit in a number is another number, as in all files of other tools.
        subset: the value may lack entries of the intact one, which the caller computes again.
    """

    write: Write
    file: str
    read: Read
    readers: tuple[str, ...]
    family: str
    verified: bool = False
    subset: bool = False


def toy_run(folder: Path, *, tasks: int | None = None) -> None:
    """A run of EBLoRA, stopped after some tasks."""
    runner = ContinualRunner(toy_stream(), make_method("eblora", **OURS), folder, training=Training(epochs=1))
    if tasks is None:
        runner.run()
        return

    class StoppedError(Exception):
        """Stands for a process that ends."""

    def stop(progress: Any) -> None:
        if (progress.index, progress.phase) == (tasks, "prepare"):
            raise StoppedError

    runner.on_progress = stop
    try:
        runner.run()
    except StoppedError:
        return


def resumed(folder: Path) -> Any:
    """The numbers and files of a run that goes on from a copy of its folder."""
    copy = folder.with_name(f"{folder.name}-resumed")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    runner = ContinualRunner(toy_stream(), make_method("eblora", **OURS), copy, training=Training(epochs=1))
    runner.run(resume=True)
    return run_state(copy)


def gpm_run(folder: Path) -> None:
    ContinualRunner(toy_stream(), make_method("gpm", **METHODS["gpm"]), folder, training=Training(epochs=1)).run()


def loaded_into_model(folder: Path) -> dict[str, Tensor]:
    model = adapted_model(5)
    load_adapters(model, folder)
    return dict(model.state_dict())


def all_updates(*paths: Path, **options: Any) -> Any:
    adapters = analysis.AdapterSet.load(*paths, **options)
    return [(each.task, each.layer, each.left, each.right) for each in adapters], adapters.notices


def exported(folder: Path) -> Any:
    """The factors of the export of a folder."""
    return {name: (f.left, f.right, f.magnitude) for name, f in export_lora(folder, folder.parent / "exported").items()}


def lora_folder(folder: Path, seed: int = 0) -> None:
    export_lora(adapted_model(seed), folder)


def checkpoint(folder: Path, *, shards: bool = False, torch_file: bool = False) -> None:
    tensors = {name: tensor.clone() for name, tensor in frozen_model().state_dict().items()}
    if torch_file:
        torch.save(tensors, folder / "pytorch_model.bin")
    elif not shards:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def weights(folder: Path) -> Any:
    read = analysis.Checkpoint.load(folder)
    return {name: read.tensor(name) for name in read.shapes}


def kohya(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"lora_down.weight": (4, 24), "lora_up.weight": (16, 4)}
    tensors = {f"lora_unet_inner.{name}": torch.randn(size, generator=draw) for name, size in sizes.items()}
    save_file({**tensors, "lora_unet_inner.alpha": torch.tensor(2.0)}, folder / "kohya.safetensors")


def loha(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 24), "hada_w2_a": (16, 2), "hada_w2_b": (2, 24)}
    tensors = {f"lycoris_inner.{name}": torch.randn(size, generator=draw) for name, size in sizes.items()}
    save_file({**tensors, "lycoris_inner.alpha": torch.tensor(2.0)}, folder / "loha.safetensors")


def several_tasks(folder: Path) -> None:
    for seed in (0, 1):
        lora_folder(folder / f"{seed}", seed)
    tasks = [{"name": f"task {seed}", "path": f"{seed}"} for seed in (0, 1)]
    described = {"format": "analysis.tasks", "version": 1, "tasks": tasks}
    (folder / "tasks.json").write_text(json.dumps(described))


def study_folder(folder: Path) -> None:
    """A finished study, with its folder in place of ``study/``."""
    job = study_run()
    job.prepare(folder)
    job.work(folder)
    for path in (folder / "study").iterdir():
        path.rename(folder / path.name)
    (folder / "study").rmdir()


def searched(folder: Path) -> None:
    job = search_run()
    job.prepare(folder)
    job.work(folder)


def text_rows(folder: Path) -> Any:
    layout, base = find_layout(folder)
    options = {"tasks": list(layout.folders(base))} if layout.name != "jsonl" else {}
    sources = layout.sources(base, lambda: RowReader(None), **options)
    return [(source.name, read_source(source)) for source in sources]


def instructions(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    items = [{"id": i, "image": f"pictures/{i}.png", "conversations": turns} for i in range(4)]
    (folder / "train.json").write_text(json.dumps(items))
    images = [{"id": i} for i in range(4)]
    captions = [{"image_id": i, "caption": f"caption {i}"} for i in range(4)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))


def layout_file(folder: Path) -> None:
    from manifold_cl.streams.layout import published_text

    (folder / "layout.toml").write_text(published_text("ucit"))


def answers(folder: Path) -> None:
    book = AnswerBook(folder, {"task": "first", "model": "toy"})
    with book.open() as file:
        for index in range(6):
            book.add(file, {"index": index, "answer": f"answer {index}"})


def own(name: str, write: Write, file: str, read: Read, *readers: str, **options: Any) -> tuple[str, FileKind]:
    """A file of ours, with checksums."""
    return name, FileKind(write, file, read, readers, file.rpartition("/")[2], verified=True, **options)


def other(name: str, write: Write, file: str, read: Read, *readers: str, **options: Any) -> tuple[str, FileKind]:
    """A file of a user or of another tool."""
    return name, FileKind(write, file, read, readers, options.pop("family", file.rpartition("/")[2]), **options)


def adapter_folder(folder: Path) -> None:
    save_adapters(adapted_model(0), folder, task="first")


def memory_folder(folder: Path) -> None:
    memory_of(0).save(folder)


def memory_values(folder: Path) -> Any:
    memory = SubspaceMemory.load(folder)
    return {name: subspace.basis for name, subspace in memory.items()}, memory.tasks, memory.full


def weights_of_run(folder: Path) -> Any:
    return read_tensors(folder / "tasks" / "01-first" / "weights.safetensors")


def open_causes(folder: Path) -> Any:
    return open_results(folder / "causes.json", "manifold_cl.causes", {"method": "eblora"})


def read_answers(folder: Path) -> Any:
    return AnswerBook(folder, {"task": "first", "model": "toy"}).read()


def search_winner(folder: Path) -> Any:
    return read_search(folder / "out", "tuning-rates.json", "sequential_merge")


def watched(ending: Literal["parquet", "csv"]) -> Write:
    return training_watched(ending).work


def eblora_folder(folder: Path) -> None:
    """A folder that PEFT writes for our method."""
    from peft import get_peft_model

    from manifold_cl.adapters.peft import EBLoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        get_peft_model(frozen_model(), EBLoraConfig(r=4, target_modules=["inner", "outer"])).save_pretrained(folder)


def superni(folder: Path) -> None:
    write_superni(folder, ("task363_sst2_polarity_classification",))


def causal_model(folder: Path) -> None:
    from tiny_decoder import decoder, tokenizer

    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def language_model(folder: Path) -> Any:
    return load_causal_lm(str(folder), local_files_only=True)


def tokens(folder: Path) -> Any:
    texts = ["red green blue", "what is the colour ?"]
    return [load_tokenizer(str(folder), local_files_only=True)(text)["input_ids"] for text in texts]


def text_model(folder: Path) -> Any:
    return load_text_model(str(folder)), load_text_tokenizer(str(folder))("red green")["input_ids"]


def planned(folder: Path) -> Any:
    return str(open_config(str(folder)))


LOG, LOG_CSV = (f"log/step-{2:010d}.{ending}" for ending in ("parquet", "csv"))
INSTRUCTIONS = ("read_instructions", "list_elements")


def causes_file(folder: Path) -> None:
    content = {"format": "manifold_cl.causes", "version": 1, "method": "eblora", "tasks": ["a"], "seed": 0, "cells": {}}
    write_json(folder / "causes.json", content)


def study_values(folder: Path) -> Any:
    results = analysis.StudyResults.load(folder)
    return [(cell, record.config, record.accuracy, record.metrics) for cell, record in results.records.items()]


ADAPTER, MEMORY, RECORD = "adapter.safetensors", "memory.safetensors", "record.json"
LORA, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
STOPPED = functools.partial(toy_run, tasks=2)
BASE, KOHYA, LOHA = "model.safetensors", "kohya.safetensors", "loha.safetensors"
STUDY, ROWS = "study.json", ("find_layout", "read_source", "read_rows")
SHARDED = functools.partial(checkpoint, shards=True)
FILE_KINDS: Mapping[str, FileKind] = dict(
    (
        own("adapter", adapter_folder, ADAPTER, read_adapters, "read_adapters"),
        own("adapter into a model", adapter_folder, ADAPTER, loaded_into_model, "load_adapters"),
        own("adapter, analysis", adapter_folder, ADAPTER, all_updates, "AdapterSet.load", "read_adapter"),
        own("adapter, export", adapter_folder, ADAPTER, exported, "export_lora"),
        own("memory", memory_folder, MEMORY, memory_values, "SubspaceMemory.load"),
        own("memory, analysis", memory_folder, MEMORY, analysis.read_protected, "read_protected", "read_bases"),
        own("record", toy_run, RECORD, RunRecord.load, "RunRecord.load"),
        own("record, analysis", toy_run, RECORD, analysis.Record.load, "Record.load", "read_format"),
        own("run, its record", STOPPED, RECORD, resumed),
        own("run, an adapter", STOPPED, f"tasks/01-first/{ADAPTER}", resumed),
        own("run, a memory", STOPPED, f"tasks/02-second/{MEMORY}", resumed, "load_state"),
        own("run, learned.json", STOPPED, "tasks/02-second/learned.json", resumed),
        own("weights", gpm_run, "tasks/01-first/weights.safetensors", weights_of_run, "read_tensors"),
        own("study", study_folder, STUDY, lambda f: StudyPlan.load(f).to_dict(), "StudyPlan.load"),
        own("study, analysis", study_folder, STUDY, StudyFile.load, "StudyFile.load"),
        own("study, record", study_folder, f"cells/ours-seed0/{RECORD}", study_values, "StudyResults.load"),
        own("results of causes", causes_file, "causes.json", open_causes, "open_results"),
        own("answers", answers, "answers-0.jsonl", read_answers, "AnswerBook.read", subset=True),
        other("search, results", searched, "out/tuning-rates.json", search_winner, "read_search"),
        other("search, list", searched, "rates.json", lambda f: Search.read(f / "rates.json", f), "Search.read"),
        other("study, TOML", study_folder, "study.toml", lambda f: read_plan(f / "study.toml").to_dict(), "read_plan"),
        other("training log, parquet", watched("parquet"), LOG, analysis.read_training_log, "read_training_log"),
        other("training log, csv", watched("csv"), LOG_CSV, analysis.read_training_log, "read_training_log"),
        other("LoRA, tensors", lora_folder, LORA, all_updates, "AdapterSet.load", family="safetensors"),
        other("LoRA, configuration", lora_folder, CONFIG_FILE, all_updates),
        other("EBLoRA of PEFT, tensors", eblora_folder, LORA, exported, "load_tensors", family="safetensors"),
        other("EBLoRA of PEFT, configuration", eblora_folder, CONFIG_FILE, exported),
        other("EBLoRA of PEFT, analysis", eblora_folder, LORA, all_updates, family="safetensors"),
        other(
            "Kohya", kohya, "kohya.safetensors", lambda f: all_updates(f / "kohya.safetensors"), family="safetensors"
        ),
        other("LyCORIS", loha, "loha.safetensors", lambda f: all_updates(f / "loha.safetensors"), family="safetensors"),
        other("checkpoint", checkpoint, BASE, weights, "Checkpoint.load", family="safetensors"),
        other("checkpoint, shard", SHARDED, "model-00001-of-00002.safetensors", weights, family="safetensors"),
        other("checkpoint, index", SHARDED, "model.safetensors.index.json", weights),
        other("checkpoint, torch", functools.partial(checkpoint, torch_file=True), "pytorch_model.bin", weights),
        other("language model, weights", causal_model, BASE, language_model, "load_causal_lm", family="safetensors"),
        other("language model, configuration", causal_model, "config.json", language_model),
        other("language model, tokenizer", causal_model, "tokenizer.json", tokens, "load_tokenizer"),
        other("text model, configuration", causal_model, "config.json", text_model, "load_text_model"),
        other("text model, tokenizer", causal_model, "tokenizer_config.json", text_model, "load_text_tokenizer"),
        other("model, plan", causal_model, "config.json", planned, "open_config"),
        other("tasks.json", several_tasks, "tasks.json", all_updates),
        other("rows, JSONL", write_jsonl, "colours.jsonl", text_rows, *ROWS),
        other("rows, TRACE", write_trace, "FOMC/train.json", text_rows, *ROWS),
        other("rows, O-LoRA", write_olora, "TC/dbpedia/train.json", text_rows, *ROWS),
        other("labels, O-LoRA", write_olora, "TC/dbpedia/labels.json", text_rows, *ROWS),
        other("rows, SuperNI", superni, "task363_sst2_polarity_classification/train.json", text_rows, *ROWS),
        other("instructions", instructions, "train.json", lambda f: read_instructions(f / "train.json"), *INSTRUCTIONS),
        other("captions", instructions, "captions.json", lambda f: read_captions(f / "captions.json"), "read_captions"),
        other("layout", layout_file, "layout.toml", lambda f: read_layout(f / "layout.toml"), "read_layout"),
    )
)
"""All kinds, by name."""
