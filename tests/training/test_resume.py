"""A run that is stopped or killed and resumed equals an undisturbed one, bit for bit: weights and metrics.csv."""

import csv
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

import siglit
from siglit.cache import CacheError
from siglit.errors import UserError
from siglit.models.text_tower import TextTower
from siglit.runs import checkpoints
from siglit.runs.trained import open_trained
from siglit.runtime.signals import Terminated
from siglit.training.data import CacheDataModule
from siglit.training.module import SigLiT
from tests.conftest import ROOT, parse, run_siglit
from tests.runtime.test_signals import ROUNDS, gone

MODES = {"locked": [], "unlocked": ["--mode", "unlocked", "--data.random_crop", "0.5", "--data.random_flip", "true"]}
"""What to add to the command line for each mode of training."""
WORDS = [
    *("--tokenizer.path", "tokenizer.model", "--train.steps", "7"),
    *("--train.log_every", "2", "--train.val_every", "3", "--train.keep_every", "2"),
]
"""Two steps per epoch; rows, checkpoints, kept weights and epochs end at different steps."""

DRIVER = """
import os, signal, subprocess, time
from siglit.training.module import SigLiT

real = SigLiT.training_step
def step(self, batch, number):
    at = self.trainer.global_step + 1
    if os.environ["STEP"] == str(at) and os.environ.get("LOCAL_RANK", "0") == "0":
        if os.environ["GROUP"]:  # from another process: workers handle a signal from their parent differently
            subprocess.run(["kill", "-" + os.environ["NUMBER"], "--", str(-os.getpgrp())])
            time.sleep(0.5)
        else:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
    with open("steps", "a") as file:
        file.write(f"{at}\\n")
    return real(self, batch, number)
SigLiT.training_step = step

from siglit.cli import main
main()
"""
"""The command, with signal $NUMBER to its first process, or to all if $GROUP is not empty, in step $STEP."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, prepared):
    """The project with caches and a tokenizer, in which this file trains all its runs."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("resume") / "copy")
    shutil.copy(folder / "runs/small/tokenizer.model", folder / "tokenizer.model")
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """A function that returns the folder of an undisturbed run, made once."""

    def finished_run(mode="locked", devices=1):
        name = f"whole-{mode}-{devices}"
        if not (place / "runs" / name).exists():
            run_siglit("train", "-c", "experiment.yaml", *words(name, mode, devices), cwd=place, check=0)
        return place / "runs" / name

    return finished_run


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    """With one thread, as `siglit` has: sums in another order have other bits."""
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(place):
    """Folder of a run that does not exist yet."""
    path = place / "runs" / "stopped"
    shutil.rmtree(path, ignore_errors=True)
    return path


def words(name, mode="locked", devices=1):
    return [*WORDS, *MODES[mode], "--train.devices", str(devices), "--output_dir", f"runs/{name}"]


def experiment(name, mode="locked", *more):
    return parse("train", *words(name, mode), *more)


def table(folder):
    """Rows of metrics.csv, without what a clock has measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "train/examples_per"))} for row in rows]


def kept(folder):
    """Files of the weights that a run has kept, in the order of their steps."""
    return sorted((folder / "checkpoints").glob("step-*.ckpt"))


def saved(folder):
    """{name: step} of the checkpoints to resume from."""
    files = {path.name: path for path in (folder / "checkpoints").iterdir() if path not in kept(folder)}
    return {name: checkpoints.steps_taken(path) for name, path in files.items()}


def assert_equal(folder, whole):
    assert [path.name for path in kept(folder)] == [path.name for path in kept(whole)]
    for one, other in zip(kept(folder), kept(whole), strict=True):
        weights, expected = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items()), one.name
    one, other = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
    assert one["global_step"] == other["global_step"] == 7
    for name, weight in other["state_dict"].items():
        assert torch.equal(one["state_dict"][name], weight), name
    for name, moments in other["optimizer_states"][0]["state"].items():
        for kind, value in moments.items():
            assert torch.equal(one["optimizer_states"][0]["state"][name][kind], value), (name, kind)
    assert table(folder) == table(whole)
    assert {"1", "3", "5", "2", "6"} == {row["step"] for row in table(folder)}


def start(place, name, devices=1, step=0, number=0, *more, mode="locked", group=""):
    """Start training in a separate session; see DRIVER."""
    return subprocess.Popen(
        [sys.executable, "driver.py", "train", "-c", "experiment.yaml", *words(name, mode, devices), *more],
        cwd=place,
        env={
            **os.environ,
            **{
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "STEP": str(step),
                "NUMBER": str(int(number)),
                "GROUP": group,
            },
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps_begun(place):
    """Of all processes together, see DRIVER."""
    return len((place / "steps").read_text().split()) if (place / "steps").exists() else 0


def at_step(monkeypatch, step, act):
    """Call `act` in one training step."""
    real = SigLiT.training_step

    def called(self, batch, number):
        if self.trainer.global_step + 1 == step:
            act()
        return real(self, batch, number)

    monkeypatch.setattr(SigLiT, "training_step", called)


class PowerCutError(RuntimeError):
    pass


def cut_off_in_step(step, *more):
    """Train until an exception that nothing catches."""

    def cut():
        raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, cut)
        with pytest.raises(PowerCutError):
            siglit.train(experiment("stopped", "locked", *more))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_stopped_at_every_step_in_turn(mode, place, folder, monkeypatch):
    """With dropout in the text tower; inside and at the end of a pass, with and without a checkpoint of its own."""
    real = TextTower.forward
    dropped = lambda self, ids: F.dropout(real(self, ids), 0.2, self.training)  # noqa: E731
    monkeypatch.setattr(TextTower, "forward", dropped)
    siglit.train(experiment(f"dropout-{mode}", mode))
    for step in range(1, 7):
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt) as stopped:
                siglit.train(experiment("stopped", mode, *(["--train.resume", "true"] if step > 1 else [])))
        assert str(stopped.value) == f"stopped at step {step} of 7; add --resume to continue"
        assert checkpoints.steps_taken(folder / "checkpoints/last.ckpt") == step
        rows = [int(row["step"]) for row in table(folder)] if step > 1 else []
        assert rows == [n for n in (1, 2, 3, 5, 5) if n < step]
    siglit.train(experiment("stopped", mode, "--train.resume", "true"))
    assert_equal(folder, place / f"runs/dropout-{mode}")
    losses = [row["train/loss"] for row in table(folder) if row["train/loss"]]
    plain = experiment(f"plain-{mode}", mode)
    monkeypatch.setattr(TextTower, "forward", real)
    siglit.train(plain)
    assert losses != [row["train/loss"] for row in table(place / f"runs/plain-{mode}") if row["train/loss"]]


@pytest.mark.parametrize(
    ("devices", "number", "code"),
    [
        pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_first_process_saves_and_stops_all(place, folder, whole, number, code, devices):
    process = start(place, "stopped", devices, 4, number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    # No rank waits for the others at the end of a step: they learn of the signal at the end of the next one.
    step = 4 if devices == 1 else 5
    messages = [line for line in err.splitlines() if "stopped" in line]
    assert messages == [f"stopped at step {step} of 7; add --resume to continue"], err
    assert "Traceback" not in err
    assert gone(process.pid, 8)
    assert checkpoints.steps_taken(folder / "checkpoints/last.ckpt") == step
    run_siglit("train", "-c", "experiment.yaml", *words("stopped", devices=devices), "--resume", cwd=place, check=0)
    assert_equal(folder, whole(devices=devices))


@pytest.mark.slow
def test_a_signal_to_all_processes_finds_the_workers_at_work_until_the_step_is_saved(place, folder, whole):
    """As `timeout` and SLURM send it; a worker that went before would take the batch with it."""
    process = start(place, "stopped", 1, 4, signal.SIGTERM, mode="unlocked", group="all")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    assert [line for line in err.splitlines() if "stopped" in line] == [
        "stopped at step 4 of 7; add --resume to continue"
    ]
    assert gone(process.pid, 8)
    run_siglit("train", "-c", "experiment.yaml", *words("stopped", "unlocked"), "--resume", cwd=place, check=0)
    assert_equal(folder, whole("unlocked"))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_at_once_even_with_busy_workers(place, folder, number, group):
    """In the middle of a pass, where the workers have batches in hand."""
    process = start(place, "stopped", 1, 4, number, "--train.batch_size", "4", mode="unlocked", group=group)
    while process.poll() is None and not (folder / "checkpoints/last.ckpt").exists():
        time.sleep(0.1)
    _, err = process.communicate(timeout=15)
    assert "stopped at step 4 of 7" in err


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(place, folder, whole, mode):
    """SIGKILL to the first process of 1 and 2 in turn, which no other outlives; SIGLIT_KILL_ROUNDS kills."""
    chance = random.Random(0)
    for number in range(ROUNDS):
        devices = 1 + number % 2
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(2):
            (place / "steps").unlink(missing_ok=True)
            process = start(place, "stopped", devices, 0, 0, "--resume", mode=mode)
            until = chance.randint(1, 5 * devices)
            while process.poll() is None and steps_begun(place) < until:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
            process.wait()
            assert gone(process.pid, 10)
            process.communicate()
        run_siglit("train", "-c", "experiment.yaml", *words("stopped", mode, devices), "--resume", cwd=place, check=0)
        assert_equal(folder, whole(mode, devices))
        assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(how, folder, whole, capsys):
    """Training resumes from the previous one and ends the same; evaluation uses the previous one too."""
    cut_off_in_step(7)
    last = folder / "checkpoints/last.ckpt"
    content = bytearray(last.read_bytes())
    if how == "cut":
        last.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        last.write_bytes(content)
    siglit.eval_retrieval(experiment("stopped"))
    assert capsys.readouterr().err.count("last.ckpt is damaged; previous.ckpt, the checkpoint before it, is used") == 1
    siglit.train(experiment("stopped", "locked", "--train.resume", "true"))
    assert capsys.readouterr().err.count("is damaged") == 1
    assert_equal(folder, whole())


def test_two_damaged_checkpoints_are_reported_in_one_line(place, folder):
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / "checkpoints" / name).write_bytes(b"torn")
    done = run_siglit("train", "-c", "experiment.yaml", *words("stopped"), "--resume", cwd=place, check=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "are damaged" in done.stderr


@pytest.mark.parametrize("step", [4, 6, 7])
def test_weights_that_are_not_finite_are_never_saved(step, folder, monkeypatch):
    """Not at the checkpoint that is due, not at the end, not when a signal comes, not in a file of its step."""
    real = SigLiT.optimizer_step

    def corrupted(self, *given, **options):
        real(self, *given, **options)
        if self.trainer.global_step + 1 == step:
            self.log_scale.data.fill_(float("nan"))
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(SigLiT, "optimizer_step", corrupted)
    with pytest.raises(RuntimeError, match=f"no longer finite after step {step}.*last good checkpoint is .*last.ckpt"):
        siglit.train(experiment("stopped"))
    assert saved(folder) == ({"last.ckpt": 6, "previous.ckpt": 3} if step == 7 else {"last.ckpt": 3})
    assert [checkpoints.steps_taken(path) for path in kept(folder)] == [n for n in (0, 2, 4, 6) if n < step]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_before_the_first_step_ends_at_once(number, kind, folder, whole, monkeypatch):
    """With the exit code of the signal; the existing checkpoint stays."""
    shutil.copytree(whole(), folder)
    before = (folder / "checkpoints/last.ckpt").read_bytes()
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(CacheDataModule, "prepare_data", lambda self: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt) as stopped:
        siglit.train(experiment("stopped", "locked", "--train.resume", "true"))
    assert type(stopped.value) is kind
    assert (folder / "checkpoints/last.ckpt").read_bytes() == before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_second_signal_ends_at_once(folder, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 5, twice)
    with pytest.raises(Terminated):
        siglit.train(experiment("stopped"))
    assert checkpoints.steps_taken(folder / "checkpoints/last.ckpt") == 3


def test_a_run_restarted_by_slurm_resumes_by_itself(folder, whole, monkeypatch):
    cut_off_in_step(5)
    with pytest.raises(UserError, match="--resume"):
        siglit.train(experiment("stopped"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    siglit.train(experiment("stopped"))
    assert_equal(folder, whole())


def test_there_need_not_be_a_checkpoint_to_resume_from(folder, whole, capsys):
    """Rows of a run that was killed before its first checkpoint are not kept."""
    cut_off_in_step(3)
    assert [row["step"] for row in table(folder)] == ["1"]
    siglit.train(experiment("stopped", "locked", "--train.resume", "true"))
    assert "holds no checkpoint: training starts at the first step" in capsys.readouterr().err
    assert_equal(folder, whole())


def test_checkpoints_are_saved_without_held_out_data_too(folder):
    siglit.train(experiment("stopped", "locked", "--data.val", "null"))
    assert saved(folder) == {"last.ckpt": 7, "previous.ckpt": 6}
    assert [path.name for path in kept(folder)] == [f"step-0000000{step}.ckpt" for step in (0, 2, 4, 6, 7)]
    assert [checkpoints.steps_taken(path) for path in kept(folder)] == [0, 2, 4, 6, 7]


def test_kept_weights_are_those_of_their_step_without_optimizer_state(place, whole):
    """The first ones are the initial ones, and the last ones those of the last checkpoint."""
    start, *_, end = (torch.load(path, weights_only=True) for path in kept(whole()))
    last = torch.load(whole() / "checkpoints/last.ckpt", weights_only=True)
    assert start["state_dict"]["log_scale"] == torch.tensor(math.log(10))
    assert start["state_dict"].keys() == end["state_dict"].keys() == last["state_dict"].keys()
    assert all(torch.equal(end["state_dict"][name], weight) for name, weight in last["state_dict"].items())
    assert end["siglit"] == last["siglit"]
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & (start.keys() | end.keys())
    rest = {name: value for name, value in end.items() if name != "state_dict"}
    assert len(pickle.dumps(rest)) < 10_000, "no position of each row"
    path = str(kept(whole())[1])
    trained = open_trained(parse("eval-retrieval", *words(whole().name), "--eval.checkpoint", path))
    assert (trained.checkpoint, trained.step) == (path, 2)


def test_a_resumed_run_keeps_each_step_once_and_no_step_of_a_course_it_does_not_take(folder, whole):
    """Cut off after step 5, resumed from step 3: the weights of step 4 are written again, those before are not."""
    cut_off_in_step(6)
    (folder / "checkpoints/step-00000002.ckpt.tmp-0123456789abcdef").touch()
    assert [checkpoints.steps_taken(path) for path in kept(folder)[:3]] == [0, 2, 4]
    before = [path.stat().st_mtime_ns for path in kept(folder)[:3]]
    later = folder / "checkpoints/step-00000005.ckpt"  # of an earlier train.keep_every
    shutil.copy(folder / "checkpoints/step-00000004.ckpt", later)
    siglit.train(experiment("stopped", "locked", "--train.resume", "true"))
    after = [path.stat().st_mtime_ns for path in kept(folder)[:3]]
    assert after[:2] == before[:2]
    assert after[2] > before[2]
    assert_equal(folder, whole())


def test_a_new_run_does_not_delete_the_kept_weights_of_another(folder, whole):
    """Only those of the start, which say nothing: a run that is stopped before its first step can be started again."""
    cut_off_in_step(3)
    assert not checkpoints.exist(folder / "checkpoints")
    with pytest.raises(UserError, match=r"holds the checkpoints of an earlier run; continue it with --resume"):
        siglit.train(experiment("stopped"))
    (folder / "checkpoints/step-00000002.ckpt").unlink()
    siglit.train(experiment("stopped"))
    assert_equal(folder, whole())


def test_epochs_are_counted_through_resumes_at_their_ends(place, folder):
    """Two steps are an epoch, after which the run is saved and cut off, again and again."""
    words = ("--train.val_every", "2")
    siglit.train(experiment("epochs", "locked", *words))
    for step in (3, 5, 7):
        cut_off_in_step(step, *words, *(["--train.resume", "true"] if step > 3 else []))
    siglit.train(experiment("stopped", "locked", *words, "--train.resume", "true"))
    resumed, undisturbed = (place / "runs" / name for name in ("stopped", "epochs"))
    assert table(resumed) == table(undisturbed)
    loops = [torch.load(path / "checkpoints/last.ckpt", weights_only=True)["loops"] for path in (resumed, undisturbed)]
    assert loops[0]["fit_loop"]["epoch_progress"] == loops[1]["fit_loop"]["epoch_progress"]


def test_a_shard_that_is_overwritten_while_it_is_trained_on_ends_the_run_unsaved(place, folder, monkeypatch):
    """Its embeddings would be those of other images, and the captions would stay."""
    first, second = sorted((place / "cache/small/train").glob("shard-*.h5"))[:2]
    whole = first.read_bytes()

    def overwrite(content):
        with first.open("r+b") as file:  # never shorter, which would end this process
            file.write(content)

    at_step(monkeypatch, 5, lambda: overwrite(second.read_bytes()))
    try:
        with pytest.raises(CacheError, match=r"shard-000000\.h5 was written to while it was in use"):
            siglit.train(experiment("stopped"))
    finally:
        overwrite(whole)
    assert checkpoints.steps_taken(folder / "checkpoints/last.ckpt") == 3
    assert [checkpoints.steps_taken(path) for path in kept(folder)] == [0, 2, 4]
