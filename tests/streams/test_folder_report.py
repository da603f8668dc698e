"""Checking a folder: what is missing, what is broken, where it belongs; one bad task does not hide the others."""

import json
import shutil
from pathlib import Path

import pytest

from manifold_cl.cli import main
from manifold_cl.files import FileError
from manifold_cl.streams import open_stream, published_layout, verify_folder

pytest.importorskip("transformers", reason="the miniature folder is written beside a model")
NAMES = ("ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llava import write_ucit

    return write_ucit(tmp_path_factory.mktemp("whole"), train=4, test=4)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ucit"))


def test_a_whole_folder_is_complete(whole: Path) -> None:
    reports = verify_folder(whole, published_layout("ucit"))
    assert tuple(report.task for report in reports) == NAMES
    assert all(report.complete for report in reports)
    assert [report.images for report in reports] == [8] * 6
    counts = [[(file.part, file.items) for file in report.files] for report in reports]
    assert counts[0] == [("train", 4), ("test", 4)]
    assert counts[2] == [("train", 4), ("test", 4), ("captions", 4)]


def test_what_is_wrong_with_some_tasks_is_told_and_the_others_are_checked(folder: Path) -> None:
    (folder / "instructions/ArxivQA/train_4w.json").unlink()
    broken = folder / "instructions/IconQA/test_3000.json"
    lines = broken.read_text().split("\n")
    lines[8] = lines[8].replace('"question_id"', '"question_id')
    broken.write_text("\n".join(lines))
    for number in range(3):
        (folder / f"datasets/CLEVR-Math/train/{number:04d}.png").unlink()
    captions = folder / "instructions/Flickr30k/val_coco_type_3000.json"
    content = json.loads(captions.read_text())
    content["images"].pop()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    captions.write_text(json.dumps(content))
    reports = {report.task: report for report in verify_folder(folder, published_layout("ucit"))}
    assert {name for name, report in reports.items() if report.complete} == {"ImageNet-R", "VizWiz"}
    (absent,) = reports["ArxivQA"].files[0].problems
    wanted = folder / "instructions/ArxivQA"
    assert absent == f"missing: {wanted}/train_4w.json (or instructions/ArxivQA/train.json)"
    (malformed,) = reports["IconQA"].files[1].problems
    assert malformed.startswith(f"{broken}:9:18: malformed JSON: ")
    assert reports["CLEVR-Math"].missing_images == tuple(f"./datasets/CLEVR-Math/train/{i:04d}.png" for i in range(3))
    assert reports["CLEVR-Math"].image_problem == (
        f"3 images are missing: {', '.join(reports['CLEVR-Math'].missing_images)}; "
        f"they belong under {folder} or {folder / 'datasets'}"
    )
    (unlike,) = reports["Flickr30k"].files[2].problems
    assert unlike == f"{captions}: captions of 3 images for 4 test items"


def test_many_missing_images_are_counted(folder: Path) -> None:
    shutil.rmtree(folder / "datasets/IconQA")
    report = verify_folder(folder, published_layout("ucit"), tasks=["IconQA"])[0]
    assert report.image_problem.startswith("8 images are missing: ")
    assert " and 3 more; they belong under " in report.image_problem


def test_broken_captions_are_named(folder: Path) -> None:
    path = folder / "instructions/VizWiz/val_coco_type_3000.json"
    path.write_text('{"annotations":\n}')
    (report,) = verify_folder(folder, published_layout("ucit"), tasks=["VizWiz"])
    assert report.files[2].problems[0].startswith(f"{path}:2: malformed JSON")
    path.unlink()
    (report,) = verify_folder(folder, published_layout("ucit"), tasks=["VizWiz"])
    assert report.files[2].problems == (f"missing: {path}",)


def test_opening_a_folder_with_a_missing_file_points_to_the_check(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")  # missing scorers are named first
    with pytest.raises(FileError, match=r"task ImageNet-R lacks its train file: .*'manifold-cl streams check' lists"):
        open_stream("ucit", folder=tmp_path, model="some/model")


def test_the_command_prints_json_and_ends_with_2_where_something_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["streams", "check", str(folder), "--json"])
    assert [report["complete"] for report in json.loads(capsys.readouterr().out)] == [True] * 6
    (folder / "instructions/ArxivQA/test_3000.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["streams", "check", str(folder)])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "incomplete" in said.out
    assert f"missing: {folder}/instructions/ArxivQA/test_3000.json" in said.err.replace("\n", "")


def test_the_command_names_a_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["streams", "check", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert (
        "none does not exist: give a folder; create it, and put the data of ucit there"
        in capsys.readouterr().err.replace("\n", " ")
    )


def test_the_command_shows_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["streams", "presets", "--stream", "mllm-dcl", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["published"]["options"]["rank"] == 32
    main(["streams", "presets"])
    said = capsys.readouterr().out
    assert "deviation" in said
    assert "--train-projector" in said
