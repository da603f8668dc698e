"""The lab: what it measures is right, what it is given is checked, and both screens and files can be used."""

import json
import math
import sys
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from figure_layout import faults, shown_texts, texts_over_data

from manifold_cl import RETRACTIONS, cli
from manifold_cl.geometry.figures import plot_lab
from manifold_cl.geometry.lab import _timed, load_plugin, measure_retractions, peak_bytes
from manifold_cl.geometry.retractions import as_retraction

SMALL = {"shape": (48, 3), "complement": 6, "batch": 2, "steps": 30, "laps": 1}
OPTIONS = ["retractions", "--shape", "48x3", "--complement", "6", "--batch", "2", "--steps", "30"]

PLUGIN = """
import torch
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    name: str = "mine"
    order: tuple = ()
    self_correcting: bool = True
    tangent_only: bool = False

    def __post_init__(self):
        object.__setattr__(self, "order", {"euclidean": 2, "canonical": 1})

    def __call__(self, x, u):
        y = x + u
        sigma, v = torch.linalg.eigh(y.mT @ y)
        return y @ (v * sigma.rsqrt().unsqueeze(-2)) @ v.mT

def halved(x, u):
    return torch.linalg.qr(x + u / 2)[0] * torch.linalg.qr(x + u / 2)[1].diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

number = 3
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my_retraction.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def report():
    return measure_retractions(["polar", "exponential", "qr"], seed=1, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_the_figure_of_the_lab_has_room_for_its_words(report, count):
    names = ["a_rather_long_retraction", *sorted(RETRACTIONS)][:count]
    rows = [replace(report.rows[place % 3], name=name) for place, name in enumerate(names)]
    figure = plot_lab(replace(report, rows=tuple(rows)))
    assert faults(figure) == []
    assert texts_over_data(figure) == []
    lines = [line for line in figure.axes[2].lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == count
    bundles = [text.get_text() for text in shown_texts(figure) if "order, slope" in text.get_text()]
    named = " ".join(" ".join(words.split()) for words in bundles)
    assert all(row.name in named for row in rows if math.isfinite(row.measured["euclidean"]))
    plt.close(figure)


def test_orders_are_measured_and_costs_positive(report):
    rows = {row.name: row for row in report.rows}
    assert rows["polar"].measured["euclidean"] == pytest.approx(2, abs=0.05)  # slopes from steps of 1e-2
    assert rows["qr"].measured["canonical"] == pytest.approx(1, abs=0.05)
    assert math.isinf(rows["exponential"].measured["euclidean"])
    for row in report.rows:
        assert row.failures == ()
        assert row.forward_ms > 0
        assert row.backward_ms is not None
        assert row.memory_mb * 2**20 >= 2 * 48 * 3 * 4  # x + u at least
        assert row.drift <= 2e-6  # the promise
        assert row.drift_steps == (1, 3, 10, 30)
    assert [row.forward_ms for row in report.rows] == sorted(row.forward_ms for row in report.rows)
    assert report.drift_shape == (48, 3, 6)


def test_the_report_is_plain_data_and_a_figure(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    exact = next(row for row in content["rows"] if row["name"] == "exponential")
    assert exact["measured"]["euclidean"] == exact["declared"]["euclidean"] == "exact"
    assert len(content["rows"][0]["to_geodesic"]["canonical"]["errors"]) == 12
    figure = plot_lab(report)
    euclidean, canonical, drift, cost = figure.axes
    assert len(euclidean.lines) == 2  # the geodesic itself has no error to draw
    assert len(canonical.lines) == 3
    assert len(drift.lines) == 4  # three walks and the promise
    assert len(cost.patches) == 6  # forward and backward of three
    assert {text.get_text() for text in cost.get_yticklabels()} == {"polar", "exponential", "qr"}
    plt.close(figure)


@pytest.mark.slow
def test_the_name_of_a_plug_in_is_no_formula(report):
    odd = "price in $ and \\bad{$"
    figure = plot_lab(replace(report, rows=(replace(report.rows[0], name=odd), *report.rows[1:])))
    figure.draw_without_rendering()  # TeX would fail here
    assert odd in {text.get_text() for text in figure.legends[0].get_texts()}
    plt.close(figure)


def test_memory_counts_what_is_alive_at_once_and_forgets_what_died():
    a = torch.ones(1000, dtype=torch.float64)
    assert peak_bytes(lambda: a + 1) == 8000
    assert peak_bytes(lambda: (a + 1) + 1) == 16_000
    assert peak_bytes(lambda: [a + 1 for _ in range(5)]) == 40_000
    assert peak_bytes(lambda: sum(float((a + i)[0]) for i in range(5))) <= 16_100  # freed before the next but one
    assert peak_bytes(lambda: (a + 1)[:10].view(2, 5)) == 8000  # views cost nothing


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dtype": torch.bfloat16}, TypeError, "measures float32 and float64, got torch.bfloat16"),
        ({"complement": 46}, ValueError, "leaves 2 free directions in R\\^48, too few for rank 3"),
        ({"retractions": ["poler"]}, ValueError, "unknown retraction 'poler', did you mean polar"),
    ],
)
def test_wrong_sizes_types_and_names_are_refused(change, error, match):
    with pytest.raises(error, match=match):
        measure_retractions(**{**SMALL, **change})


@pytest.mark.slow
def test_a_retraction_without_gradient_has_no_backward_time():
    def detached(x, u):
        return RETRACTIONS["polar"](x, u.detach())

    row = measure_retractions([detached], **SMALL).rows[0]
    assert (row.name, row.backward_ms) == ("detached", None)


# -- plug-ins ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plugin_from_a_file_is_verified_beside_the_family(plugin, tmp_path, capsys):
    figure = tmp_path / "lab.png"
    cli.main([*OPTIONS, "--only", "polar", "--plugin", f"{plugin}:Mine", "--plot", str(figure), "--json"])
    assert figure.stat().st_size > 10_000
    content = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in content["rows"]} == {"mine", "polar"}
    assert content["machine"]
    mine = next(row for row in content["rows"] if row["name"] == "mine")
    assert mine["measured"]["euclidean"] == pytest.approx(2, abs=0.05)  # slopes from steps of 1e-2
    # Its eigendecomposition has no gradient where the eigenvalues agree, and the lab says so.
    assert mine["failures"] == ["the gradient is off by: nan, wanted < 1e-09"]


@pytest.mark.slow
def test_a_plugin_that_is_no_retraction_in_truth_is_shown_as_broken(plugin, capsys):
    cli.main([*OPTIONS, "--only", "qr", "--plugin", f"{plugin}:halved"])
    shown = capsys.readouterr()
    assert "broken" in shown.out
    assert "qr" in shown.out
    assert "halved violates a law: first-order slope: 1.0" in shown.err


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("nonsense", "module:name or file.py:name, got 'nonsense'"),
        ("no.such.module:X", "cannot be imported: No module named 'no'"),
        ("{folder}/absent.py:X", "cannot be imported: no file"),
        ("{folder}/my_retraction.py:Yours", "unknown name 'Yours'"),
        ("{folder}/my_retraction.py:number", "number' is no retraction: "),
    ],
)
def test_plugins_that_cannot_be_had_are_named(plugin, path, match):
    with pytest.raises(ValueError, match=match):
        load_plugin(path.format(folder=plugin.parent))


def test_plugins_come_from_modules_too():
    assert load_plugin("manifold_cl.geometry.retractions:QR").name == "qr"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "48by3"], "--shape is rows x columns, such as 4096x16, got '48by3'"),
        (["--dtype", "bfloat16"], "--dtype is float32 or float64, got 'bfloat16'"),
        (["--only", "nothing"], "unknown retraction 'nothing'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available here"),
    ],
)
def test_wrong_options_end_with_code_two(options, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*OPTIONS, *options])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_two_rules_of_one_name_are_timed_apart():
    def slow(x, u):
        time.sleep(0.1)
        return x + u

    slow.__name__ = "polar"
    x = torch.eye(6)[:, :2]
    (quick, _), (waiting, _) = _timed([RETRACTIONS["polar"], as_retraction(slow)], x, 0.1 * x, 3, lambda lap: None)
    assert quick < 100 <= waiting  # milliseconds; of three laps the median


def test_a_plugin_may_have_the_name_of_a_module_and_must_be_python(tmp_path):
    (tmp_path / "json.py").write_text(PLUGIN)
    assert load_plugin(f"{tmp_path}/json.py:Mine").name == "mine"
    assert json.dumps([]) == "[]"
    assert sys.modules["json"] is json
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(ValueError, match=r"broken.py:Mine' cannot be imported: invalid syntax"):
        load_plugin(f"{tmp_path}/broken.py:Mine")
