"""An unlogged step reads nothing from the device and tells the other ranks no more than it must."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import siglit
from siglit.loss.agreement import LateGather
from tests.conftest import ROOT, parse
from tests.training.step_watch import StepWatch

WORDS = [
    *("--tokenizer.path", "tokenizer.model", "--text_tower.depth", "1", "--text_tower.width", "16"),
    *("--train.steps", "6", "--train.log_every", "5", "--train.val_every", "6", "--output_dir", "runs/watched"),
]
RUNS = {
    "locked": ["--optim.name", "lion"],
    "adafactor": ["--optim.name", "adafactor"],
    "adamw": ["--optim.name", "adamw"],
    "softmax": ["--loss.name", "softmax"],
    "hardest": ["--loss.negatives", "hardest", "--loss.negatives_per_positive", "2"],
    "random": ["--loss.negatives", "random", "--loss.negatives_per_positive", "2", "--loss.ambiguous", "positive"],
    "dropped": ["--loss.ambiguous", "drop"],
    "unlocked": ["--mode", "unlocked", "--train.micro_batch_size", "3", "--data.workers", "0"],
    "bf16": ["--train.precision", "bf16-mixed"],
}
DRIVER = """
import json, os
from siglit.cli import main
from siglit.training.module import SigLiT
from tests.training.step_watch import StepWatch

watch = StepWatch()
def write(module):
    with open(f"noted{module.global_rank}.json", "w") as file:
        json.dump({"noted": watch.noted, "steps": watch.steps}, file)
SigLiT.on_train_end = write
main()
"""


@pytest.fixture
def project(tmp_path, prepared, monkeypatch):
    """The project with caches and a tokenizer."""
    folder = shutil.copytree(prepared, tmp_path / "copy")
    shutil.copy(folder / "runs/small/tokenizer.model", folder / "tokenizer.model")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_an_unlogged_step_reads_no_tensor(project, monkeypatch, name):
    watch = StepWatch(monkeypatch.setattr)
    siglit.train(parse("train", *WORDS, *RUNS[name]))
    assert len(watch.steps) >= 4
    # The first step creates the optimizer's counters.
    assert [noted for noted in watch.noted if noted[0] > 1 or name != "adafactor"] == []


@pytest.mark.slow
def test_two_ranks_exchange_blocks_and_two_notes_that_are_read_a_step_late(project):
    """One note that compares what the ranks do, one that says whether a signal came; DDP's own sums are not seen."""
    (project / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py", "train", "-c", "experiment.yaml", *WORDS, "--train.devices", "2"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        watched = json.loads((project / f"noted{rank}.json").read_text())
        assert len(watched["steps"]) >= 4
        for step in watched["steps"]:
            noted = sorted(name for at, name in watched["noted"] if at == step)
            reads = [name for name in noted if name == "tolist"]
            # The first comparison is read at once; the first signals in step 2.
            assert len(reads) == (1 if step <= 2 else 2)
            assert [name.split("_")[0] for name in noted if name != "tolist"] == ["all", "all", "batch"]


def two_steps(rank, size):
    late = LateGather()
    return (
        [late([rank, step], torch.device("cpu")) for step in range(3)],
        late.last(),
        late.last(),
        late([7], torch.device("cpu")),
    )


def test_numbers_are_read_a_step_late_and_the_last_ones_on_demand(ranks):
    for steps, last, empty, again in ranks.run(two_steps, 2):
        assert steps == [None, [[0, 0], [1, 0]], [[0, 1], [1, 1]]]
        assert last == [[0, 2], [1, 2]]
        assert (empty, again) == (None, None)
