"""``manifold-cl analyze many`` as a user calls it, on a folder with members that cannot be read."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import Call

from analysis.formats import save_lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six members of two families, and a damaged one."""
    draw = torch.Generator().manual_seed(0)
    families = torch.randn(2, 30, 3, generator=draw)
    updates = []
    for number in range(7):
        right = torch.randn(30, 3, generator=draw) + 2 * families[number % 2]
        updates.append((f"member-{number}", [("", f"h.{k}.q", torch.randn(12, 3), right) for k in range(2)]))
    saved = save_lora(tmp_path / "members", updates)
    (saved / "tasks.json").unlink()
    file = saved / "07-member-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return saved


def test_a_folder_gives_tables_a_page_and_the_names_of_what_is_left_out(
    call: Call, folder: Path, tmp_path: Path
) -> None:
    code, out, err = call("analyze", "many", folder, "--out", tmp_path / "out", "--processes", "1")
    assert code == 0, err
    assert "07-member-6" in err
    assert "2 clusters" in out
    found = pd.read_csv(tmp_path / "out" / "members.csv").set_index("member")
    assert found["cluster"].tolist() == [1, 2, 1, 2, 1, 2]
    assert len(pd.read_csv(tmp_path / "out" / "pairs.csv")) == 15
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not tested: fewer than 8 members" in page
    assert "No member was found" not in page
    assert "no cluster." not in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []


def test_json_holds_counts_paths_and_reasons(call: Call, folder: Path, tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--processes", "1", "--clusters", "3", "--side", "output", "--curves", "1")
    code, out, err = call("analyze", "many", folder, *arguments, "--layers", r"h\.0\.", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["members"], result["pairs"]) == (6, 15)
    assert [each["task"] for each in result["left_out"]] == ["07-member-6"]
    assert pd.read_csv(result["paths"]["layers"])["layer"].tolist() == ["h.0.q"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "no-such-folder does not exist"),
        (["FOLDER", "--clusters", "9"], "from 1 to 6"),
        (["FOLDER", "--device", "abacus"], "abacus"),
        (["FOLDER", "--layers", "nothing"], "nothing"),
        (["FOLDER", "--memory-budget", "lots"], "--memory-budget"),
        (["FOLDER", "--processes", "0"], "processes is 0"),
    ],
)
def test_wrong_input_ends_with_two_and_writes_nothing(
    call: Call, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [str(folder) if each == "FOLDER" else each for each in arguments]
    code, _, err = call("analyze", "many", *given, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
