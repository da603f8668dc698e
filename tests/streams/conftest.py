"""A tiny random LLaVA and a miniature UCIT, written once for all tests of vision-language streams."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from blank_figures import figures

from manifold_cl import TaskStream
from manifold_cl.streams import Layout, corpora, open_folder, read_layout
from manifold_cl.streams.folder_stream import FolderOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

TASKS = ("ImageNet-R", "IconQA")


@pytest.fixture(autouse=True, scope="module")
def _blank_figures() -> Iterator[None]:
    """Pages with blank figures, until the file ends."""
    with figures(drawn=False):
        yield


@pytest.fixture(autouse=True, scope="session")
def _wordnet_is_read_once() -> Iterator[None]:
    """A second for all nouns, in each of a dozen tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "read_synsets", cache(corpora.read_synsets))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``data`` (two tasks) and ``ucit.toml``; not to be written to."""
    from tiny_llava import write_layout, write_model, write_ucit
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_ucit(folder / "data", tasks=TASKS, train=16, test=8)
    write_layout(folder / "ucit.toml", tasks=TASKS)
    return folder


@pytest.fixture(scope="session")
def layout(tiny: Path) -> Layout:
    return read_layout(tiny / "ucit.toml")


@pytest.fixture(scope="session")
def options(tiny: Path) -> FolderOptions:
    return FolderOptions(model=str(tiny / "model"), dtype="float32", local_files_only=True)


@pytest.fixture
def stream(tiny: Path, layout: Layout, options: FolderOptions) -> TaskStream:
    return open_folder(tiny / "data", layout, options)
