"""Files that are replaced together: old or new at every moment, whoever reads and whenever the writer is killed."""

import os
from pathlib import Path

import pytest
from kills import killed_at

from manifold_cl import replacing
from manifold_cl.replacing import replaced_together

NAMES = ("tensors", "manifest")


def write(folder: Path, content: str) -> None:
    with replaced_together(folder, NAMES) as new:
        for name in NAMES:
            (new / name).write_text(content)


def read(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in NAMES}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_write_leaves_the_old_files_or_the_new_ones(tmp_path: Path) -> None:
    found = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        write(folder, "old")
        if not killed_at(number, lambda folder=folder: write(folder, "new")):  # type: ignore[misc]
            break
        assert len(read(folder)) == 1, number  # never a mixture
        found += read(folder)
        assert not killed_at(99, lambda folder=folder: write(folder, "third"))  # type: ignore[misc]
        assert read(folder) == {"third"}
        assert visible(folder) == sorted(NAMES)  # nothing of the killed one is left
    assert found == ["old"] * 2 + ["new"] * 3  # two links, the change, two files


def test_a_write_may_be_killed_again_and_again(tmp_path: Path) -> None:
    write(tmp_path, "0")
    for number in (1, 2, 3, 4, 1, 3):
        assert killed_at(number, lambda number=number: write(tmp_path, f"new {number}"))  # type: ignore[misc]
        assert len(read(tmp_path)) == 1
    tmp_path.rename(tmp_path.with_name("elsewhere"))  # links lead within the folder
    assert len(read(tmp_path.with_name("elsewhere"))) == 1


def test_an_error_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "old")
    with pytest.raises(FileNotFoundError), replaced_together(tmp_path, NAMES) as new:
        (new / "tensors").write_text("new")  # the manifest is never written
    assert read(tmp_path) == {"old"}
    assert visible(tmp_path) == sorted(NAMES)


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "old")
    (tmp_path / "manifest").unlink()
    (tmp_path / "manifest").mkdir()
    with pytest.raises(OSError, match=r"manifest is not a regular file"):
        write(tmp_path, "new")
    assert (tmp_path / "tensors").read_text() == "old"


def test_a_file_that_was_alone_is_replaced_with_its_partner(tmp_path: Path) -> None:
    (tmp_path / "manifest").write_text("alone")
    write(tmp_path, "new")
    assert read(tmp_path) == {"new"}
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_without_links_a_killed_write_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(replacing.os, "link", refused)
    write(tmp_path / "whole", "old")
    write(tmp_path / "whole", "new")
    assert read(tmp_path / "whole") == {"new"}
    write(tmp_path / "cut", "old")
    assert killed_at(1, lambda: write(tmp_path / "cut", "new"))
    assert not (tmp_path / "cut" / "manifest").exists()


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "folder", "new")
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "folder").iterdir()}
    assert modes == {"0o640"}
