"""Any number of processes, also started by several machines' launchers: ranks share the folder of the cache alone."""

import csv
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

import siglit
from siglit.errors import UserError
from tests.commands.test_precompute import rows_by_key
from tests.conftest import parse
from tests.runtime.test_signals import ENV, committed, start, wait_until_committed


@pytest.fixture
def whole(project, monkeypatch):
    """Shards of one image and the undisturbed cache of one process, in whole/; the test works in its folder."""
    monkeypatch.chdir(project)
    text = (project / "experiment.yaml").read_text().replace("shard_size: 8, batch_size: 5", "shard_size: 1")
    (project / "experiment.yaml").write_text(text)
    # As OMP_NUM_THREADS=1 of the processes that are compared with it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    siglit.precompute(parse("precompute", "--cache.path", "whole"))
    yield project / "whole"
    torch.set_num_threads(threads)


def assert_equal(folder, whole):
    """The same rows by key and the same index, byte for byte, with nothing unfinished beside them."""
    for split in ("train", "val"):
        assert rows_by_key(folder / split) == rows_by_key(whole / split)
        assert (folder / split / "index.json").read_bytes() == (whole / split / "index.json").read_bytes()
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.slow
def test_two_restarts_with_other_numbers_of_processes_give_the_same_cache(project, whole):
    """4 processes are killed amid their work, then 3 are, and 1 finishes."""
    before = 0
    for devices, shards in ((4, 8), (3, 24)):
        process = start(project, "killed", "--cache.devices", str(devices))
        wait_until_committed(project / "killed", shards, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert before < committed(project / "killed") < committed(whole)
        before = committed(project / "killed")
    result = siglit.precompute(parse("precompute", "--cache.path", "killed"))
    assert sum(split.encoded_now for split in result.splits.values()) == committed(whole) - 2 - before
    assert_equal(project / "killed", whole)


@pytest.mark.slow
def test_two_nodes_of_two_processes_give_the_same_cache(project, whole):
    """Launched as in cache/README.md, where some shards are committed: 4 processes continue where 1 stopped."""
    siglit.precompute(parse("precompute", "--cache.path", "four"))
    for name in ("index.json", *(f"shard-{number:06d}.h5" for number in range(1, 40, 3))):
        (project / "four/train" / name).unlink()
    output = on_two_nodes(
        project, 2, "precompute", "--cache.path", "four", "--cache.nodes", "2", "--cache.devices", "2"
    )
    assert "train: 40 rows in four/train, 13 encoded now" in output
    assert_equal(project / "four", whole)


@pytest.mark.slow
def test_two_nodes_train_like_one_process(project, whole):
    words = ["--cache.path", "whole", "--train.steps", "6", "--train.log_every", "1"]
    alone = siglit.train(parse("train", *words, "--output_dir", "runs/one"))
    output = on_two_nodes(project, 1, "train", *words, "--output_dir", "runs/two", "--train.nodes", "2")
    assert "6 steps" in output
    for step in zip(losses(project / "runs/one"), losses(project / "runs/two"), strict=True):
        assert step[1] == pytest.approx(step[0], rel=1e-4)
    assert alone.steps == len(losses(project / "runs/two")) == 6


@pytest.mark.parametrize(
    ("stage", "command", "field"), [(siglit.precompute, "precompute", "cache"), (siglit.train, "train", "train")]
)
def test_several_machines_without_a_launcher_are_refused(project, monkeypatch, stage, command, field):
    monkeypatch.chdir(project)
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # Lightning leaves it after a run of several processes
    with pytest.raises(UserError, match=rf"^{field}.nodes is 2, but .*torchrun --nnodes 2"):
        stage(parse(command, f"--{field}.nodes", "2"))


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def on_two_nodes(project, devices, *words):
    """What the first of two nodes prints, both launched here as in cache/README.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(devices)]
    nodes = [
        subprocess.Popen(
            [
                *torchrun,
                *("--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)),
                *("-m", "siglit", words[0], "-c", "experiment.yaml", *words[1:]),
            ],
            cwd=project,
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # the launcher takes its own with it
    assert [node.returncode for node in nodes] == [0, 0], outputs
    return outputs[0]
