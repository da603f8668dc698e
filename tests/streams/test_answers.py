"""Answers on disk: read back whole, of this model and these settings only, cut where a write was interrupted."""

import json
from contextlib import closing
from pathlib import Path

from manifold_cl.streams.answers import AnswerBook


def entry(index: int) -> dict[str, object]:
    return {"index": index, "answer": f"answer\n{index} é"}


def write(book: AnswerBook, *indices: int) -> None:
    with closing(book.open()) as file:
        for index in indices:
            book.add(file, entry(index))


def test_answers_of_all_ranks_are_read_back(tmp_path: Path) -> None:
    for rank, indices in ((0, (0, 2)), (1, (1,))):
        write(AnswerBook(tmp_path, {"weights": "x", "pair": (1, 2)}, rank=rank), *indices)
    write(AnswerBook(tmp_path, {"weights": "x", "pair": (1, 2)}), 3)
    found = AnswerBook(tmp_path, {"weights": "x", "pair": (1, 2)}).read()
    assert found == {index: entry(index) for index in range(4)}
    lines = (tmp_path / "answers-0.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["format"] == "manifold_cl.answers"
    assert len(lines) == 4  # one header, though the file was opened twice


def test_a_line_that_was_interrupted_is_cut_off(tmp_path: Path) -> None:
    book = AnswerBook(tmp_path, {"weights": "x"})
    write(book, 0, 1)
    whole = book.path.read_bytes()
    for cut in range(1, len(json.dumps(entry(1), ensure_ascii=False).encode()) + 1):
        book.path.write_bytes(whole[:-cut])
        assert set(book.read()) == {0}
        book.clear_others()
        write(book, 1)
        assert book.path.read_bytes() == whole


def test_answers_of_another_model_are_removed(tmp_path: Path) -> None:
    write(AnswerBook(tmp_path, {"weights": "old"}), 0)
    (tmp_path / "answers-1.jsonl").write_text("not of our making\n")
    (tmp_path / "answers-2.jsonl").write_text("")
    (tmp_path / "answers-3.jsonl").write_text('[1]\n{"index": 1, "answer": "x"}\n')
    new = AnswerBook(tmp_path, {"weights": "new"})
    assert new.read() == {}
    new.clear_others()
    assert not list(tmp_path.iterdir())


def test_entries_that_are_no_answers_are_not_trusted(tmp_path: Path) -> None:
    book = AnswerBook(tmp_path, {"weights": "x"})
    with closing(book.open()) as file:
        book.add(file, {"index": "0", "answer": "x"})
    assert book.read() == {}


def test_a_changed_answer_is_asked_again_and_a_line_without_checksum_is_read(tmp_path: Path) -> None:
    book = AnswerBook(tmp_path, {"weights": "x"})
    write(book, 0)
    head, line = book.path.read_text().splitlines()
    for changed, read in (
        (line.replace("answer\\n0", "answer\\n9"), {}),
        (json.dumps({**json.loads(line), "checksum": None}), {}),
        (json.dumps(entry(0)), {0: entry(0)}),
    ):
        assert changed != line
        book.path.write_text(f"{head}\n{changed}\n")
        assert book.read() == read
