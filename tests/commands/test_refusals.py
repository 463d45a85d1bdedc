"""What is refused leaves nothing behind, and is refused before work is done: folders, quickstart, plan, checkpoints."""

import re

import pytest
import torch

import siglit
from siglit import cli
from siglit.cache import CacheError
from siglit.commands import COMMANDS, Command, plan, quickstart
from siglit.errors import UserError
from siglit.runs import trained
from tests.conftest import parse
from tests.test_cli import fails

BASE = "name: small\ndata: {train: {format: csv, path: none.csv}}\nimage_tower: {model: nonsense}\n"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with an experiment whose data and tower do not exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text(BASE)
    return tmp_path


def folders(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_dir())


class TestFolders:
    @pytest.mark.parametrize("command", [name for name, about in COMMANDS.items() if about.folders is None])
    def test_a_refused_command_leaves_none(self, command, base, capsys):
        """Every command that takes an experiment, of which nothing is there."""
        words = ["red"] if command == "search" else []
        fails(capsys, *command.split(), *words, "-c", "experiment.yaml")
        assert folders(base) == []

    def test_a_precompute_that_locked_its_cache_leaves_none(self, project, monkeypatch, capsys):
        monkeypatch.chdir(project)
        fails(capsys, "precompute", "-c", "experiment.yaml", "--image_tower.weights", "none.safetensors")
        assert folders(project) == ["images"]

    @pytest.mark.parametrize("error", [UserError("no"), CacheError("no"), OSError(28, "full"), RuntimeError("bug")])
    def test_existing_folders_and_folders_with_files_stay(self, error, base, monkeypatch):
        (base / "runs/small/mine").mkdir(parents=True)
        (base / "cache").mkdir()

        def stage(experiment):
            (base / "runs/small/checkpoints/new").mkdir(parents=True)
            (base / "runs/small/embeddings/deep").mkdir(parents=True)
            (base / "runs/small/embeddings/file").write_text("kept")
            (base / "cache/small/train").mkdir(parents=True)
            raise error

        monkeypatch.setattr(Command, "load", lambda _: stage)
        with pytest.raises(SystemExit):
            cli.main(["precompute", "-c", "experiment.yaml"])
        assert folders(base) == ["cache", "runs", "runs/small", "runs/small/embeddings", "runs/small/mine"]

    def test_a_command_that_is_done_keeps_its_empty_folders(self, base, monkeypatch):
        monkeypatch.setattr(Command, "load", lambda _: lambda experiment: (base / "runs/small").mkdir(parents=True))
        with pytest.raises(SystemExit) as stop:
            cli.main(["precompute", "-c", "experiment.yaml"])
        assert stop.value.code == 0
        assert folders(base) == ["runs", "runs/small"]

    def test_a_refused_merge_leaves_none(self, base, capsys):
        fails(capsys, "cache", "merge", "new/out", "a", "b")
        assert folders(base) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train.nodes", "2"), "train.nodes is 2, but quickstart runs on one machine"),
        (("--cache.nodes", "2"), "cache.nodes is 2, but quickstart runs on one machine"),
        (("--train.batch_size", "9000"), "train.batch_size 9000 is larger than the 8,000 images of data.train"),
        (("--train.devices", "7"), "cannot be shared evenly by 7 devices"),
        (("--mode", "scratch"), "mode is scratch, but quickstart runs locked training"),
        (("--optim.warmup_steps", "999999"), "a warm-up of 999,999 steps"),
        (("--train.steps", "3", "--train.epochs", "2"), "set exactly one of train.steps"),
    ],
)
def test_quickstart_refuses_before_it_draws(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_draw", lambda *_: pytest.fail("drawn"))
    assert message in fails(capsys, "quickstart", *words)
    assert list(tmp_path.iterdir()) == []


class TestPlan:
    @pytest.mark.parametrize("command", ["rows", "listing"])
    def test_a_batch_larger_than_the_data_is_refused(self, command, experiment, capsys):
        """Whether the number of images is given or counted."""
        words, images = (["--rows", "30"], 30) if command == "rows" else ([], 40)
        options = ["--train.batch_size", "64", "--train.steps", "null", "--train.epochs", "3"]
        error = fails(capsys, "plan", "-c", "experiment.yaml", *options, *words)
        assert f"train.batch_size 64 is larger than the {images} images of data.train; lower it to {images}" in error

    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [
            (0.3, "0.3 s"),
            (23.24, "23.2 s"),
            (119, "119 s"),
            (120, "2 minutes"),
            (5400, "90 minutes"),
            (3 * 3600, "3 hours"),
            (47 * 3600, "47 hours"),
            (2.06 * 86_400, "2.06 days"),
            (3081.2 * 86_400, "3,081 days"),
        ],
    )
    def test_time_has_a_unit_that_fits(self, seconds, expected):
        assert plan._duration(seconds) == expected

    def test_the_time_of_a_short_training_is_in_seconds(self, experiment, capsys):
        expected = str(siglit.plan(experiment, rows=400, examples_per_second=4))
        assert re.search(r"^time +about 24 s on 1 device$", expected, re.MULTILINE)


@pytest.mark.parametrize(
    "content", [b"garbage", b"", b"PK\x03\x04 cut off", {"weights": 1}, {"siglit": {"mode": 1}}, 3]
)
def test_garbage_for_a_checkpoint_is_refused_by_name(content, experiment, project, monkeypatch):
    monkeypatch.setattr(trained, "open_cache", lambda *_: None)
    path = project / "garbage.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    advice = "set eval.checkpoint to one, such as runs/small/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=f"^garbage.ckpt is not a checkpoint of siglit, or is damaged; {advice}$"):
        siglit.eval_retrieval(parse("eval-retrieval", "--eval.checkpoint", "garbage.ckpt"))


def test_a_checkpoint_without_read_permission_is_reported_as_that(experiment, project, monkeypatch, capsys):
    monkeypatch.setattr(trained, "open_cache", lambda *_: None)
    (project / "mine.ckpt").write_bytes(b"")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "mine.ckpt")

    monkeypatch.setattr("torch.load", refuse)
    words = ("eval-retrieval", "-c", "experiment.yaml", "--eval.checkpoint", "mine.ckpt")
    assert fails(capsys, *words) == "siglit: mine.ckpt: Permission denied"
