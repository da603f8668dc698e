"""The report in a real browser: it opens, sorts its tables, and asks for nothing."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis import StudyResults, write_report, write_study_report

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
)
PROBE = """
<script>
const seen = { errors: [], title: document.title };
addEventListener("error", event => seen.errors.push(String(event.message)));
addEventListener("load", () => {
  const images = [...document.images];
  seen.images = images.length;
  seen.broken = images.filter(image => image.naturalWidth === 0).length;
  const asked = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.asked = asked.filter(name => !name.startsWith("data:"));
  seen.colours = getComputedStyle(document.body).backgroundColor;
  seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  seen.wideOpen = null;
  seen.findings = [...document.querySelectorAll(".finding h3")].map(node => node.textContent);
  seen.levels = [...document.querySelectorAll(".finding")].map(node => node.className);
  const parts = [...document.querySelectorAll("details.part")];
  const count = () => parts.filter(part => part.open).length;
  seen.parts = parts.length;
  seen.folded = [count()];
  for (const how of ["open", "close", "open"]) {
    document.querySelector(`[data-fold=${how}]`)?.click();
    seen.folded.push(count());
  }
  seen.wideOpen = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.querySelector("[data-fold=close]")?.click();
  dispatchEvent(new Event("beforeprint"));
  seen.printed = [...document.querySelectorAll("details")].filter(fold => !fold.open).length;
  dispatchEvent(new Event("afterprint"));
  seen.afterwards = count();
  if (parts.length) {
    parts[0].querySelector("summary").click();
    seen.one = count();
    location.hash = "#glossary";
  }
  const explained = document.querySelector("th[data-tip]"), tip = document.getElementById("tip");
  for (let node = explained; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  explained.focus();
  const described = explained.getAttribute("aria-description");
  seen.tip = [tip.hidden, tip.textContent === explained.dataset.tip, described.length > 10];
  dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  seen.tip.push(tip.hidden);
  const tables = [...document.querySelectorAll("table")];
  const table = tables.find(t => t.tHead.rows[0].cells[0].textContent === "FIRST");
  const column = place => [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
  const head = table.tHead.rows[0].cells[PLACE];
  seen.before = column(PLACE);
  head.click();
  seen.up = column(PLACE);
  seen.sort = head.getAttribute("aria-sort");
  head.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  seen.down = column(PLACE);
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>
</head>
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[..., dict[str, object]]]:
    """Opens a page with a probe in it and returns what the probe saw.

    The probe sorts the table whose first heading is `first` by the column at `place`.
    """
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as profile:

        def show(page: Path, *flags: str, first: str = "layer", place: int = 1) -> dict[str, object]:
            probed = page.with_name("probed.html")
            probe = PROBE.replace("FIRST", first).replace("PLACE", str(place))
            probed.write_text(page.read_text(encoding="utf-8").replace("</head>", probe, 1), encoding="utf-8")
            command = [program, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", probed.as_uri()]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
            ) as process:
                try:
                    dom, _ = process.communicate(timeout=90)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    pytest.fail(f"{program} did not finish within 90 seconds")
            found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
            assert found is not None, "the probe left nothing: the page's script did not run"
            seen: dict[str, object] = json.loads(html.unescape(found[1]))
            return seen

        yield show


def test_the_page_opens_sorts_and_asks_for_nothing(
    browser: Callable[..., dict[str, object]], tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    page = write_report(tmp_path / "report.html", write_run(tmp_path / "run"), title="A run & its tables")
    seen = browser(page, "--window-size=1280,900")
    assert seen["title"] == "A run & its tables"
    assert (seen["errors"], seen["asked"], seen["broken"], seen["wide"]) == ([], [], 0, False)
    assert seen["images"] == page.read_text().count("<img ")
    before = seen["before"]
    assert isinstance(before, list)
    assert seen["up"] == sorted(before, key=float)
    assert seen["up"] != before  # there was something to sort
    assert seen["down"] == sorted(before, key=float, reverse=True)
    assert seen["sort"] == "ascending"


def test_findings_come_first_and_parts_fold_and_unfold(
    browser: Callable[..., dict[str, object]], tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    page = write_report(tmp_path / "report.html", write_run(tmp_path / "run"))
    seen = browser(page, "--window-size=1280,900")
    assert seen["errors"] == []
    findings, levels = seen["findings"], seen["levels"]
    assert isinstance(findings, list)
    assert isinstance(levels, list)
    assert 3 <= len(findings) <= 5
    assert "“news” lost 10.0 points" in findings[0]
    assert levels[0] == "finding act"
    parts = seen["parts"]
    assert seen["folded"] == [0, parts, 0, parts]  # closed at first; unfolded, folded, unfolded by the buttons
    assert (seen["printed"], seen["afterwards"], seen["one"]) == (0, 0, 1)
    assert seen["tip"] == [False, True, True, True]  # shown on focus, with its text, described, hidden by Escape
    assert seen["wideOpen"] is False
    telephone = browser(page, "--window-size=500,900")
    assert telephone["wideOpen"] is False


def test_it_is_dark_where_the_reader_wants_it_dark_and_fits_a_telephone(
    browser: Callable[..., dict[str, object]], tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    page = write_report(tmp_path / "report.html", write_run(tmp_path / "run"))
    light = browser(page)
    dark = browser(page, "--blink-settings=preferredColorScheme=0", "--window-size=500,900")
    assert light["colours"] == "rgb(255, 255, 255)"
    assert dark["colours"] == "rgb(21, 24, 28)"
    assert dark["wide"] is False  # tables scroll in their own frames


def test_the_page_of_a_study_opens_and_sorts_means_by_number(
    browser: Callable[..., dict[str, object]], tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    final = {"plain": [8.0, 9.0], "ours": [60.0, 66.0], "late": [10.5, 10.5], "new": [None, None]}
    runs = {
        label: [None if last is None else [[60.0, 40, 30], [50, 70, 30], [last] * 3] for last in found]
        for label, found in final.items()
    }
    page = write_study_report(tmp_path / "study.html", StudyResults.load(write_study(tmp_path / "study", runs)))
    seen = browser(page, "--window-size=1280,900", first="method", place=3)
    assert (seen["errors"], seen["asked"], seen["broken"], seen["wide"]) == ([], [], 0, False)
    assert seen["images"] == page.read_text().count("<img ")
    assert seen["before"] == ["8.5 ± 6.4", "63.0 ± 38.1", "10.5 ± 0.0"]  # t 12.7062 with one degree of freedom
    assert seen["up"] == ["8.5 ± 6.4", "10.5 ± 0.0", "63.0 ± 38.1"]  # as text, 8.5 would come last
    assert seen["down"] == ["63.0 ± 38.1", "10.5 ± 0.0", "8.5 ± 6.4"]
    telephone = browser(page, "--window-size=500,900", first="method")
    assert telephone["wide"] is False
