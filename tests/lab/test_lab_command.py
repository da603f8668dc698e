"""``manifold-cl lab``: screens and files, plug-ins from files, and wrong input."""

import json

import pytest

from manifold_cl import cli

QUICK = ["lab", "--problem", "procrustes", "--evaluations", "12", "--starts", "1", "--gap", "0.5"]
FEW = ["--only", "trust_regions", "--only", "landing"]
PLUGIN = """
import torch

def leaky(x, gradient, rate, manifold):
    return torch.linalg.qr(x - rate * gradient)[0]

def broken(x, u):
    raise RuntimeError("no such luck")

def three(x, u, v):
    return x
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(PLUGIN)
    return path


@pytest.mark.slow
def test_the_command_verifies_measures_and_writes(plugin, tmp_path, capsys):
    out = tmp_path / "results"
    cli.main(
        [*QUICK, *FEW, "--plugin", f"{plugin}:leaky", "--plugin", f"{plugin}:broken", "--out", str(out), "--jobs", "1"]
    )
    shown = capsys.readouterr()
    assert "polar" in shown.out
    assert "trust_regions" in shown.out
    content = json.loads((out / "lab.json").read_text())
    assert set(content["excluded"]) == {"leaky", "momentum + broken"}
    assert f"{max(r['leak'] for r in content['results'] if r['contestant'] == 'leaky'):.1e}" in shown.err
    assert shown.err.count("RuntimeError: no such luck") == 2  # its laws cannot be measured, and its runs raise
    assert content["machine"]["cores"] > 0
    assert "torch" in content["versions"]
    assert (out / "profiles.svg").stat().st_size > 10_000
    assert (out / "curves.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_json_goes_to_standard_output_and_several_jobs_give_the_same_steps(plugin, capsys):
    found = []
    for jobs in ("1", "2"):
        cli.main([*QUICK, *FEW, "--plugin", f"{plugin}:leaky", "--json", "--jobs", jobs])
        content = json.loads(capsys.readouterr().out)
        found.append([(r["contestant"], r["rate"], r["to_gap"]["evaluations"]) for r in content["results"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--problem", "procrustez"], "unknown problem 'procrustez', did you mean procrustes"),
        (["--only", "adamv"], "unknown contestant 'adamv', did you mean adamw"),
        (["--gap", "1.5"], "is a share in (0, 1), got 1.5"),
        (["--evaluations", "2"], "at least 4"),
        (["--jobs", "0"], "at least 1"),
        (["--plugin", "nowhere"], "module:name or file.py:name"),
        (["--plugin", "{plugin}:missing"], "unknown name 'missing' (have: leaky, broken, three)"),
        (["--plugin", "{plugin}:three"], "is neither a retraction"),
        (["--plugin", "manifold_cl.geometry.retractions:QR"], "'qr' has the name of another"),
        (["--out", "{plugin}"], "is a file"),
    ],
)
def test_wrong_input_is_refused_before_the_work(plugin, capsys, options, match):
    with pytest.raises(SystemExit) as stop:
        cli.main([*QUICK, *(option.format(plugin=plugin) for option in options)])
    assert stop.value.code == 2
    assert match in " ".join(capsys.readouterr().err.split())


def test_a_plug_in_file_that_raises_is_named(tmp_path, capsys):
    path = tmp_path / "bad.py"
    path.write_text("1 / 0")
    with pytest.raises(SystemExit):
        cli.main([*QUICK, "--plugin", f"{path}:anything"])
    shown = capsys.readouterr().err
    assert "bad.py:anything" in shown
    assert "ZeroDivisionError" in shown
