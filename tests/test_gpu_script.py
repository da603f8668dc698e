"""The one GPU call is prepared: every job of it runs to its end at tiny sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_job_runs_at_tiny_sizes(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path)], capture_output=True, text=True
    )
    jobs = json.loads((tmp_path / "summary.json").read_text())["jobs"]
    assert {name: job.get("exit_code") for name, job in jobs.items()} == dict.fromkeys(jobs, 0), done.stdout[-4000:]
    assert len(jobs) == 9
    written = {path.stem for path in tmp_path.glob("*.json")} - {"summary"}
    assert written == jobs.keys() - {"tests"}


def test_without_a_gpu_it_says_so(tmp_path: Path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
