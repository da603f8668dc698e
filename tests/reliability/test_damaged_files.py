"""Files of every kind, damaged, swapped or of another version: refused by name, or read as the value they had."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from file_kinds import FILE_KINDS
from mutations import BYTES, edited, of_another_version, outcome

TRIES = int(os.environ.get("RELIABILITY_TRIES", "3"))
"""Number of seeds per kind of file and kind of change; a failed test names the first seed that fails."""
VALUED = (*BYTES, edited, of_another_version)
Make = Callable[[str], tuple[Path, str]]


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The folder of a kind of file, which is written once, and the value that its reader gives."""
    known: dict[str, tuple[Path, str]] = {}

    def make(name: str) -> tuple[Path, str]:
        if name not in known:
            folder = tmp_path_factory.mktemp("intact") / "folder"
            folder.mkdir()
            kind = FILE_KINDS[name]
            kind.write(folder)
            value = outcome(lambda: kind.read(folder), folder / kind.file)
            again = outcome(lambda: kind.read(folder), folder / kind.file)
            steady = value == again != "refused"
            assert steady, name  # not the texts: pytest would compare them for minutes
            known[name] = folder, value
        return known[name]

    return make


def replace(path: Path, content: bytes) -> None:
    """A new file in place of an old one, which a reader may have mapped into memory."""
    new = path.with_name("replacement")
    new.write_bytes(content)
    os.replace(new, path)


def verdict(name: str, content: bytes, intact: Make) -> str:
    """What becomes of a kind of file with this content: ``refused``, ``equal`` or ``another value``."""
    folder, value = intact(name)
    kind = FILE_KINDS[name]
    path = folder / kind.file
    original = path.read_bytes()
    if content == original:
        return "equal"
    replace(path, content)
    try:
        found = outcome(lambda: kind.read(folder), path)
    finally:
        replace(path, original)
    if found in ("refused", value):
        return "refused" if found == "refused" else "equal"
    return "another value"


def is_json(path: Path) -> bool:
    return path.suffix == ".json" or path.suffix == ".safetensors"


@pytest.mark.reliability
@pytest.mark.parametrize("change", VALUED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FILE_KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(
    name: str, change: Callable[[bytes, Random], bytes], intact: Make, tally: Callable[..., None]
) -> None:
    kind = FILE_KINDS[name]
    folder, _ = intact(name)
    if change not in BYTES and not is_json(Path(kind.file)):
        return
    original = (folder / kind.file).read_bytes()
    for seed in range(TRIES if change in BYTES else 2 * TRIES):
        found = verdict(name, change(original, Random(f"{name} {change.__name__} {seed}")), intact)
        tally("mutations", name)
        tally(f"mutations, {found}", f"{name}, {change.__name__}")
        if kind.verified and not kind.subset and change is not edited:
            assert found != "another value", seed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "record", "LoRA, tensors", "training log, csv", "rows, TRACE"])
def test_a_sample_of_damaged_files_is_refused_or_read_as_it_was(name: str, intact: Make) -> None:
    """Other seeds than those of the complete suite."""
    path = Path(FILE_KINDS[name].file)
    for change in VALUED if is_json(path) else BYTES:
        for seed in range(100, 103):
            content = (intact(name)[0] / path).read_bytes()
            found = verdict(name, change(content, Random(f"{name} {seed}")), intact)
            assert found != "another value" or change is edited or not FILE_KINDS[name].verified
