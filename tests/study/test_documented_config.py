"""The study file that the documentation shows is one that can be read."""

import json
import re
from pathlib import Path

import pytest

from manifold_cl.study import read_plan

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


@pytest.mark.slow
def test_the_file_on_the_page_is_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "rates.toml").write_text(shown, encoding="utf-8")
    assert read_plan(tmp_path / "rates.toml").entries[0].options == {}  # the defaults
    (tmp_path / "rates.toml").write_text(shown.replace("# winner_of", "winner_of"), encoding="utf-8")
    trial = {"options": {"lr": 0.006, "energy": 0.97}, "mfn": 80.0}
    search = {"method": "eblora", "stream": "text-val", "winner": trial["options"], "trials": [trial]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tuning-eblora.json").write_text(json.dumps(search))
    plan = read_plan(tmp_path / "rates.toml")
    assert plan.name == "rates"
    assert len(plan.cells) == 3 * 2 * 3  # methods, orders, seeds
    assert plan.entries[0].options == {"lr": 0.006, "energy": 0.97}
    assert plan.orders["backward"] == list(reversed(plan.orders["forward"]))
