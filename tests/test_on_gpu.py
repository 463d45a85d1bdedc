"""`python -m benchmarks.on_gpu`: nothing that was measured is lost, and what was not measured is named."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import record as records
from benchmarks.on_gpu.record import Record
from tests.conftest import ROOT


def read(path):
    return json.loads(path.read_text())


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_error_is_recorded_and_the_next_measurement_runs(tmp_path):
    """Out of memory is a result; anything else is a problem. Rows are in the file before the measurement ends."""
    path = tmp_path / "found.json"
    record = Record(path, "cpu")

    def full():
        record.row("first", "1 ms", "2 ms")
        assert read(path)["measurements"]["full"]["rows"] == [{"name": "first", "figure": "1 ms", "expected": "2 ms"}]
        assert not read(path)["measurements"]["full"]["finished"]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def wrong():
        assert record.attempt("a contender", lambda: 1 / 0) is None
        record.row("the next contender", "3 ms")

    record.measure("full", full)
    record.measure("wrong", wrong)
    found = read(path)["measurements"]
    assert [row["figure"] for row in found["full"]["rows"]] == ["1 ms", "out of memory"]
    assert found["full"]["problems"] == []
    assert [row["figure"] for row in found["wrong"]["rows"]] == ["3 ms"]
    assert found["wrong"]["problems"] == ["a contender failed: ZeroDivisionError: division by zero"]
    assert found["full"]["finished"]
    assert found["wrong"]["finished"]


PROCESS = """#!/bin/sh
while [ "$1" != --json ]; do shift; done
echo '{"stamp": {}, "measurements": {"vit_b16": {"finished": false, "seconds": null,
  "rows": [{"name": "rate", "figure": "5 images/s", "expected": ""}], "figures": {}, "problems": []}}}' > "$2"
END
"""


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("sleep 9; touch LATE", "not finished after"),
        ("kill -9 $$", "ended with status -9"),
        ("rm $2; exit 3", "status 3"),
    ],
)
def test_a_process_that_is_killed_leaves_what_it_had_measured(tmp_path, monkeypatch, end, problem):
    """Whether its time is over, the system kills it, or it cannot even begin; the table names what is left out."""
    script, late = tmp_path / "python", tmp_path / "late"
    script.write_text(PROCESS.replace("END", end.replace("LATE", str(late))))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "_LEAST", 0.0)
    budget = 0.5 if "sleep" in end else 60
    words = ["--out", str(tmp_path), "--part", "precompute", "--budget-seconds", str(budget)]
    assert on_gpu.main(words) == 1
    found = read(tmp_path / "precompute.json")
    assert read(tmp_path / "on_gpu.json") == {"parts": {"precompute": found}}
    first = found["measurements"]["vit_b16"]
    assert problem in first["problems"][0]
    assert bool(first["rows"]) is ("rm" not in end)
    table = (tmp_path / "on_gpu.md").read_text()
    assert f"| vit_b16: PROBLEM | {first['problems'][0]}" in table
    if "sleep" in end:
        assert [left["name"] for left in found["left_out"]] == ["vit_b8"]
        assert "| vit_b8 | left out: " in table
    assert not late.exists(), "it was waited for, not killed"


def test_parts_that_were_measured_elsewhere_are_merged_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    part = {"stamp": {}, "command": "…", "measurements": {}, "left_out": []}
    for name in ("train", "loss"):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert on_gpu.main(["--merge", "--out", str(tmp_path)]) == 0
    assert list(read(tmp_path / records.MERGED)["parts"]) == ["loss", "train"]
    assert "**loss**" in capsys.readouterr().out


def test_host_syncs_are_those_of_unlogged_steps_alone(monkeypatch):
    """Not of the first steps, which compile, and not of the step after a logged one, in which its row is written."""
    from benchmarks.on_gpu import train

    logged = [False, False, False, True, False, False]
    syncs = [7, 6, 1, 5, 4, 2]

    def fake(experiment, after_step):
        for step, count in enumerate(syncs):
            for _ in range(count):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally …)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            trainer = SimpleNamespace(logged=logged[step])
            assert after_step(SimpleNamespace(trainer=trainer)) is (step == len(syncs) - 1)

    monkeypatch.setattr(train, "train_until", fake)
    monkeypatch.setattr(train, "is_logged_step", lambda trainer: trainer.logged)
    steps = train.watch(None, len(syncs), "cpu")
    assert [len(step.syncs) for step in steps] == syncs
    assert {place.rpartition("/")[2].partition(":")[0] for step in steps for place in step.syncs} == {"test_on_gpu.py"}
    assert [len(step.syncs) for step in train.unlogged(steps)] == [1, 2]


@pytest.mark.slow
def test_everything_runs_through_with_tiny_sizes(tmp_path):
    """Every measurement of every part, on whatever device there is; nothing but the results is left behind."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--tiny", "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=540, check=False)
    log = tmp_path / "on_gpu.log"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log.read_text() if log.exists() else ''}"
    parts = read(tmp_path / records.MERGED)["parts"]
    assert {part: tuple(result["measurements"]) for part, result in parts.items()} == on_gpu.MEASUREMENTS
    for result in parts.values():
        assert result["left_out"] == []
        assert {"gpu", "cuda", "cudnn", "versions", "commit", "time"} <= set(result["stamp"])
        for entry in result["measurements"].values():
            assert entry["rows"]
            assert entry["finished"]
    assert len(done.stdout.splitlines()) > sum(len(names) for names in on_gpu.MEASUREMENTS.values())
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{part}.json" for part in records.PARTS),
        records.MERGED,
        records.TABLE,
        "on_gpu.log",
    }
