"""The one GPU call is prepared: every job of it runs to its end at tiny sizes on the CPU."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
JOBS = ["tests", "step", "llava", "plan", "stream", "bf16", "layer", "analysis", "subspace", "retractions"]
"""In the order of their worth."""


@pytest.mark.slow
def test_every_job_runs_at_tiny_sizes(tmp_path: Path):
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry", "--budget", "850", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    jobs = json.loads((tmp_path / "summary.json").read_text())["jobs"]
    assert {name: job.get("exit_code") for name, job in jobs.items()} == dict.fromkeys(jobs, 0), done.stdout[-4000:]
    assert list(jobs) == JOBS
    cpu_seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    assert cpu_seconds < 2 * 240  # four minutes on two cores
    written = {path.stem for path in tmp_path.glob("*.json")} - {"summary"}
    assert written == jobs.keys() - {"tests"}


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.slow
def test_a_job_that_passes_its_limit_is_ended_with_its_processes(benchmarks, tmp_path: Path):
    import gpu

    mark = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    job = gpu.Job(["-c", parent], ["-c", parent], limit=1)
    found = gpu.run("slow", job, tmp_path, dry=True, limit=1)
    assert found["exit_code"] == 124
    time.sleep(3)
    assert not mark.exists()


def test_a_cut_leaves_the_finished_jobs_and_the_name_of_the_running_one(benchmarks, tmp_path: Path, monkeypatch):
    import gpu

    def cut(name, *_, **__):
        if name == "second":
            raise KeyboardInterrupt
        return {"exit_code": 0}

    job = gpu.Job([], [], 1)
    monkeypatch.setattr(gpu, "JOBS", {"first": job, "second": job})
    monkeypatch.setattr(gpu, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_all(["first", "second"], tmp_path, dry=True, end=time.monotonic() + 60)
    jobs = json.loads((tmp_path / "summary.json").read_text())["jobs"]
    assert jobs == {"first": {"exit_code": 0}, "second": {"running": True}}


def test_all_jobs_fit_into_nine_minutes(benchmarks):
    import gpu

    assert gpu.BUDGET <= 540
    assert list(gpu.JOBS) == JOBS
    assert all(job.limit <= gpu.BUDGET for job in gpu.JOBS.values())
    for job in gpu.JOBS.values():  # the scripts and files that commands name exist
        for part in [*job.command, *job.dry]:
            assert not part.startswith(str(SCRIPT.parent)) or Path(part).exists(), part


@pytest.mark.parametrize(("change", "within"), [(0.0, True), (1.0, True), (-6.0, False), (6.0, False)])
def test_accuracies_are_compared_with_those_of_the_cpu(benchmarks, change, within):
    from stream import RESULTS, compared

    reference = json.loads((RESULTS / "stream-text-six.json").read_text())["runs"]
    accuracy = [[value + change for value in row] for row in reference[0]["methods"]["eblora"]["accuracy"]]
    run = {"seed": 0, "methods": {"eblora": {"accuracy": accuracy}, "other": {"accuracy": accuracy}}}
    (row,) = compared([run], reference)
    assert row["mfn_difference"] == pytest.approx(change)
    assert (row["method"], row["within_noise"]) == ("eblora", within)
    assert 1 < row["noise"] < 5
    assert compared([{**run, "seed": 99}], reference) == []
