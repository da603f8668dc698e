"""The main job on the small real stream, through the command, as a user runs it: minutes, so marked slow."""

import json
import signal
import subprocess
import sys
import time

import pytest
from kills import hear_interrupts

from manifold_cl import RunRecord

pytestmark = [pytest.mark.slow, pytest.mark.stream]
COMMAND = [sys.executable, "-m", "manifold_cl.cli", "run", "--quick", "--tasks", "nouns,authors", "--examples", "120"]
"""Two of the three tasks with a quarter of their training texts, on complete test parts."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    done = subprocess.run([*COMMAND, "--out", out, "--json"], check=True, capture_output=True, text=True)
    return out, json.loads(done.stdout)


def test_both_methods_learn_real_tasks_and_write_a_report(finished):
    out, figures = finished
    assert [one["method"] for one in figures] == ["sequential_merge", "eblora"]
    for one in figures:
        assert one["status"] == "complete"
        assert (one["stream"], one["tasks"]) == ("text-three", ["nouns", "authors"])
        assert 20 < one["metrics"]["zero_shot"] < 80
        # Learning moves two tasks from about 54 to about 70 points; 10 is three standard errors of a 2 × 100 mean.
        assert one["metrics"]["mft"] > one["metrics"]["zero_shot"] + 10
    report = (out / "report-text-three-seed0.html").read_text(encoding="utf-8")
    assert "eblora" in report
    assert "sequential_merge" in report


def test_the_record_keeps_the_promised_constraints_and_names_its_weights(finished):
    out, _ = finished
    record = RunRecord.load(out / "text-three-eblora-seed0")
    assert len(record.constraints) == 2
    assert max(error for errors in record.constraints for error in errors.values()) <= 2e-6
    assert [timing["steps"] for timing in record.timings] == [8, 8]
    assert record.provenance["weights_sha256"]
    assert record.capacity[0]["mean_fraction"] < record.capacity[-1]["mean_fraction"] < 1


def test_an_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path):
    command = [*COMMAND, "--method", "eblora", "--out", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts)
    record = tmp_path / "text-three-eblora-seed0" / "record.json"
    deadline = time.monotonic() + 600
    while not (record.exists() and RunRecord.load(record.parent).done):  # until one task is finished
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    straight, resumed = RunRecord.load(finished[0] / "text-three-eblora-seed0"), RunRecord.load(record.parent)
    assert resumed.losses == straight.losses  # bit for bit
    assert resumed.accuracy == straight.accuracy
