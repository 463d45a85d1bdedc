"""What a resumed run may change, and that two trainings never share a folder."""

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

import siglit
from siglit.cli import main
from siglit.commands import train as training
from siglit.config import DataConfig, Experiment, ImageTowerConfig, OptimConfig, SourceSpec, TrainConfig
from siglit.errors import UserError
from siglit.runs import folder, resume
from siglit.training.module import SigLiT
from tests.conftest import parse


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared):
    """A project with caches and a run of three steps by the command; each test works in a copy."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("resuming") / "copy")
    shutil.rmtree(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("--train.steps", "3") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The run's folder."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy/runs/small"


def command(*words):
    """Exit code of `siglit train`."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml", *words])
    return stop.value.code


def content(folder):
    """{file: bytes} of a run's folder."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_change_of_the_curve_is_listed_and_refused(run, capsys):
    before = content(run)
    assert command("--resume", "--optim.lr", "5e-4", "--train.steps", "5", "--train.log_every", "1") == 2
    assert capsys.readouterr().err.splitlines() == [
        "changed since training: optim.lr: 0.003 → 0.0005, which changes the training curve",
        "changed since training: train.steps: 3 → 5, which changes the training curve",
        "changed since training: train.log_every: 2 → 1",
        "siglit: runs/small was trained with other values of optim.lr, train.steps: resuming with the new ones "
        "changes the training curve. Change them back, add --train.resume_changed true to accept that, or choose "
        "another --output_dir",
    ]
    assert content(run) == before


def test_a_change_that_is_accepted_keeps_the_earlier_experiment(run, capsys):
    """Twice; a field that no longer differs is not listed again."""
    first = (run / "experiment.yaml").read_bytes()
    changed = ["--resume", "--train.resume_changed", "true", "--optim.lr", "5e-4", "--train.steps", "5"]
    assert command(*changed) == 0
    assert "changed since training: train.steps: 3 → 5" in capsys.readouterr().err
    second = (run / "experiment.yaml").read_bytes()
    assert (run / "experiment.1.yaml").read_bytes() == first
    assert yaml.safe_load(second)["train"]["steps"] == 5
    assert command(*changed) == 0
    assert "changed since training" not in capsys.readouterr().err
    assert command("--resume", "--train.resume_changed", "true", "--optim.lr", "5e-4", "--train.steps", "6") == 0
    assert (run / "experiment.1.yaml").read_bytes() == first
    assert (run / "experiment.2.yaml").read_bytes() == second
    assert not list(run.rglob("*.tmp*"))


def test_the_same_experiment_is_resumed_without_a_message(run, capsys, monkeypatch):
    """By hand, and where SLURM restarts it without --resume."""
    before = content(run)
    assert command("--train.steps", "3", "--resume") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command("--train.steps", "3") == 0
    assert "changed since" not in capsys.readouterr().err
    assert content(run) == before


def test_other_names_and_places_are_listed_only(run, capsys):
    """The folder was renamed, and validation takes place more often."""
    run.rename("runs/renamed")
    words = ["--train.steps", "3", "--resume", "--name", "renamed", "--cache.path", "cache/small"]
    assert command(*words, "--train.val_every", "1") == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
    assert messages == [
        "changed since training: name: small → renamed",
        "changed since training: output_dir: runs/small → runs/renamed",
        "changed since training: train.val_every: 3 → 1",
    ]


def forget(run):
    """Take the experiment out of the checkpoint, as in one of an older siglit."""
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["siglit"]["experiment"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("record", ["missing", "older"])
def test_what_an_older_run_does_not_record_is_not_compared(run, capsys, record):
    forget(run)
    path = run / "experiment.yaml"
    if record == "missing":
        path.unlink()
    else:
        earlier = yaml.safe_load(path.read_text())
        del earlier["train"]["resume_changed"], earlier["loss"], earlier["optim"]["name"]
        path.write_text(yaml.safe_dump(earlier))
    assert command("--train.steps", "3", "--resume") == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if "changed" in line or "is missing" in line]
    unknown = "runs/small/experiment.yaml is missing: cannot tell what has changed since the run was trained"
    assert messages == ([unknown] if record == "missing" else [])
    assert yaml.safe_load(path.read_text())["optim"]["lr"] == 0.003


def test_an_older_run_is_compared_with_its_file(run, capsys):
    forget(run)
    assert command("--train.steps", "5", "--resume") == 2
    assert "changed since training: train.steps: 3 → 5, which changes the training curve" in capsys.readouterr().err


def test_a_record_that_is_not_yaml_is_refused(run, capsys):
    forget(run)
    (run / "experiment.yaml").write_text("name: [unclosed\n")
    assert command("--train.steps", "3", "--resume") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "runs/small/experiment.yaml is not YAML" in lines[0]


def test_an_edited_record_is_compared_with_what_was_trained(run, capsys):
    """Resumed with the run's own file, which is the most natural one to edit."""
    path = run / "experiment.yaml"
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 0.3"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", str(path), "--resume"])
    assert stop.value.code == 2
    assert "changed since training: optim.lr: 0.003 → 0.3, which changes the training curve" in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False])
def test_kept_weights_in_the_place_of_the_last_checkpoint_are_refused(run, first, monkeypatch):
    """By all ranks, before anything is changed."""
    path = run / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    for name in ("optimizer_states", "lr_schedulers", "callbacks"):
        del state[name]
    torch.save(state, path)
    before = content(run)
    monkeypatch.setattr(training, "is_first_process", lambda: first)
    message = r"^runs/small/checkpoints/last\.ckpt holds weights without optimizer state, as the files of [^\n]*$"
    with pytest.raises(UserError, match=message):
        siglit.train(parse("train", "--train.steps", "3", "--train.resume", "true"))
    assert content(run) == before


def test_a_change_is_accepted_once(run):
    """Not by the file that the accepted run wrote."""
    assert command("--resume", "--train.resume_changed", "true", "--train.steps", "5") == 0
    kept = yaml.safe_load((run / "experiment.yaml").read_text())["train"]
    assert (kept["resume"], kept["resume_changed"]) == (False, False)


def test_the_record_of_a_complete_run_is_kept(run):
    before = (run / "experiment.yaml").read_bytes()
    assert command("--resume", "--train.resume_changed", "true", "--train.steps", "3", "--optim.lr", "9") == 0
    assert (run / "experiment.yaml").read_bytes() == before


def test_a_hand_written_experiment_file_is_kept(run):
    """A hand-written experiment may lie where the run's results go."""
    (run.parent / "new").mkdir()
    (run.parent / "new/experiment.yaml").write_text("# mine\n")
    assert command("--train.steps", "1", "--output_dir", "runs/new", "--optim.warmup_steps", "0") == 0
    assert (run.parent / "new/experiment.1.yaml").read_text() == "# mine\n"


def test_a_record_reads_back_as_the_experiment(tmp_path):
    """Every field of an experiment from Python, whose folder may be a Path; how the run began is left out."""
    experiment = Experiment(
        data=DataConfig(train=SourceSpec("csv", "a.csv", fold="0-8/10"), corrupt=["text"], corrupt_share=0.5),
        image_tower=ImageTowerConfig(model_args={"depth": 2, "img_size": [32, 32]}, mean=[0.5, 0.4, 0.3]),
        output_dir=tmp_path / "run",
        optim=OptimConfig(lr=1e-5, betas=(0.8, 0.9)),
        train=TrainConfig(examples="200M", resume=True, resume_changed=True),
    )
    resume.write_record(tmp_path, experiment)
    started = replace(experiment, train=TrainConfig(examples="200M"))
    assert siglit.load_experiment(tmp_path / "experiment.yaml") == started.with_default_folders()


def test_all_ranks_are_refused_together(run, monkeypatch):
    """One alone would leave the others waiting for it, where SLURM has started them."""
    monkeypatch.setattr(training, "is_first_process", lambda: False)
    for words in (["--train.steps", "3"], ["--train.steps", "5", "--train.resume", "true"]):
        with pytest.raises(UserError, match="runs/small (holds the checkpoints|was trained with other values)"):
            siglit.train(parse("train", *words))


def test_other_images_change_the_curve_where_images_are_decoded():
    for mode, changes in (("locked", False), ("unlocked", True), ("scratch", True)):
        now = {"mode": mode, "data": {"train": {"images": "b"}}}
        (difference,) = resume.differences({**now, "data": {"train": {"images": "a"}}}, now)
        assert difference.changes_curve == changes, mode


def test_counts_are_compared_by_what_they_mean():
    assert resume.differences({"train": {"examples": "200M"}}, {"train": {"examples": 200_000_000}}) == []


def test_a_field_that_was_unset_is_compared():
    """Unset fields are not written: a missing field was unset, unless it is newer than the file."""
    earlier = {"data": {"train": {"format": "csv", "path": "a.csv"}}, "train": {"steps": 3}}
    now = {
        "data": {"train": {"format": "csv", "path": "b.csv", "fold": "0/2"}, "val": {"format": "csv", "path": "v.csv"}},
        "image_tower": {"model_args": {"depth": 2}},
        "train": {"epochs": 2.0, "resume": True},
    }
    changes = {difference.field: difference.changes_curve for difference in resume.differences(earlier, now)}
    assert changes == {
        "data.train.path": False,
        "data.train.fold": True,
        "data.val.format": False,
        "data.val.path": False,
        "train.steps": True,
        "train.epochs": True,
    }


def test_an_initial_value_does_not_change_the_curve_but_learning_no_bias_does():
    """The checkpoint holds the learned t and b."""
    for before, now in ((-10.0, "auto"), ("auto", -5.0)):
        assert not resume.Difference("loss.logit_bias", before, now).changes_curve
    for before, now in ((-10.0, None), (None, "auto")):
        assert resume.Difference("loss.logit_bias", before, now).changes_curve
    assert not resume.Difference("loss.logit_scale", 10.0, 5.0).changes_curve


def test_no_bias_is_recorded_as_no_bias(experiment):
    """Unset fields are left out of the record, but null is not this one's default."""
    assert (
        yaml.safe_load(resume.experiment_yaml(parse("train", "--loss.logit_bias", "null")))["loss"]["logit_bias"]
        is None
    )


def test_every_exception_is_a_field():
    """A field that was renamed would change the curve in silence; so would one that is taken for another's section."""

    def names(section, prefix=""):
        kinds = get_type_hints(section)
        for field in fields(section):
            yield prefix + field.name
            for kind in (kinds[field.name], *get_args(kinds[field.name])):
                if is_dataclass(kind):
                    yield from names(kind, f"{prefix}{field.name}.")

    known = set(names(Experiment))
    assert {name for names_of_reason in resume._SAME_CURVE.values() for name in names_of_reason} <= known
    assert set(resume._NOT_COMPARED) <= known
    for name in ("seed", "optim.lr", "train.steps", "train.batch_size", "data.random_crop", "loss.negatives"):
        assert resume.Difference(name, 1, 2).changes_curve, name
    for name in ("train.keep_every", "train.log_every", "eval.checkpoint"):
        assert not resume.Difference(name, 1, 2).changes_curve, name


LOCK = """
import sys, time
from pathlib import Path
from siglit.cache import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_in_a_run_folder_is_refused(run, capsys):
    """Nothing changes there; once the first process ends, even by kill -9, the folder is free."""
    first = subprocess.Popen([sys.executable, "-c", LOCK, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        before = content(run)
        words = ["--train.steps", "5", "--resume", "--train.resume_changed", "true"]
        assert command(*words) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert f"runs/small is being written by host {os.uname().nodename}, process {first.pid}" in message
        assert content(run) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert command(*words) == 0


def test_the_folder_is_held_from_before_the_first_file_to_after_the_last(run, monkeypatch):
    """Tried from within: while looking for checkpoints, in a step, and while writing the summary."""
    tried = []

    def trying(real):
        def call(*words, **options):
            with (run / ".lock").open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tried.append(real.__name__)
            return real(*words, **options)

        return call

    for place, name in (
        (training.checkpoints, "prepare"),
        (SigLiT, "training_step"),
        (training, "add_to_summary"),
    ):
        monkeypatch.setattr(place, name, trying(getattr(place, name)))
    siglit.train(parse("train", "--train.steps", "4", "--train.resume", "true", "--train.resume_changed", "true"))
    assert tried == ["prepare", "training_step", "add_to_summary"]
    assert not (run / ".lock").exists()


def test_only_the_first_process_holds_the_folder(run, monkeypatch):
    """The others would wait for it for ever, or be refused."""
    held = []
    monkeypatch.setattr(training, "exclusive", held.append)
    monkeypatch.setattr(training, "is_first_process", lambda: False)
    monkeypatch.setattr(training, "ending_with_first_process", lambda first: training.contextlib.nullcontext())
    monkeypatch.setattr(training, "_run", lambda *_: "ran")
    assert siglit.train(parse("train")) == "ran"
    assert not held


def test_a_second_run_is_refused_as_a_user_error(run):
    with training.exclusive(run), pytest.raises(UserError, match="is being written by"):
        siglit.train(parse("train"))


@contextlib.contextmanager
def files_of_at_most(size):
    """This process writes no file larger than `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("name", "more"), [("checkpoints/last.ckpt", -100), ("metrics.csv", 10)])
def test_a_full_disk_is_reported_in_one_line_and_the_earlier_checkpoint_stays(run, capsys, monkeypatch, name, more):
    monkeypatch.setattr(resume, "write_record", lambda *_: None)  # the record is larger than this metrics.csv
    last = (run / "checkpoints/last.ckpt").read_bytes()
    words = ["--train.steps", "5", "--resume", "--train.resume_changed", "true"]
    with files_of_at_most((run / name).stat().st_size + more):
        assert command(*words) == 1
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1] == (
        f"siglit: RuntimeError: runs/small/{name}: File too large; free some space, then add --resume to continue "
        "from the last checkpoint, which is intact (add --debug for the traceback)"
    )
    assert "Traceback" not in stderr
    assert (run / "checkpoints/last.ckpt").read_bytes() == last
    assert not list(run.rglob("*.tmp*"))
    assert command(*words) == 0
    assert training.checkpoints.steps_taken(run / "checkpoints/last.ckpt") == 5


def test_a_disk_that_is_full_when_the_summary_is_written(run, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_json", full)
    assert command("--train.steps", "4", "--resume", "--train.resume_changed", "true") == 1
    assert "siglit: RuntimeError: runs/small: No space left on device; free some space" in capsys.readouterr().err
