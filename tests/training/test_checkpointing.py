"""Checkpoint files: whole or absent, whenever the process is killed and however the bytes are damaged."""

import os
import random
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siglit.cache import CacheError
from siglit.errors import UserError
from siglit.runs import checkpoints
from siglit.runs.checkpoints import newest, prepare, steps_taken
from siglit.training.checkpointing import AtomicCheckpointIO, CheckpointSaver


def write(folder, step):
    AtomicCheckpointIO().save_checkpoint(
        {"global_step": step, "weights": torch.full((300,), float(step))}, folder / "last.ckpt"
    )


def steps(folder):
    """{name: step} of the files that are whole."""
    return {path.name: steps_taken(path) for path in folder.glob("*.ckpt") if checkpoints.is_undamaged(path)}


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / "new", step)
    assert steps(tmp_path / "new") == {"last.ckpt": 3, "previous.ckpt": 2}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("calls", range(5))
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path, monkeypatch, calls):
    """Killed before or after each call that changes the folder; the next start finds step 2 or 3 and tidies up."""
    for step in (1, 2):
        write(tmp_path, step)
    done = 0

    def counted(real):
        def call(*words, **options):
            nonlocal done
            if done == calls:
                os._exit(9)
            done += 1
            return real(*words, **options)

        return call

    child = os.fork()
    if child == 0:
        for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        write(tmp_path, 3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    path = newest(tmp_path)
    assert steps_taken(path) == (3 if calls == 4 else 2)
    assert prepare(tmp_path) == tmp_path / "last.ckpt"
    assert steps_taken(tmp_path / "last.ckpt") == (3 if calls == 4 else 2)
    assert not list(tmp_path.glob("*.tmp"))


def test_any_damage_to_the_content_is_noticed(tmp_path):
    """Every cut, and every flipped bit that changes what is read; the rest of the file is padding and dates."""
    path = tmp_path / "last.ckpt"
    write(tmp_path, 7)
    whole = path.read_bytes()
    assert newest(tmp_path) == path
    chance = random.Random(0)
    for length in [0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:length])
        assert not checkpoints.is_undamaged(path), length
    noticed = 0
    for _ in range(400):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        if checkpoints.is_undamaged(path):
            read = torch.load(path, weights_only=True)
            assert read["global_step"] == 7
            assert torch.equal(read["weights"], torch.full((300,), 7.0))
        else:
            noticed += 1
    assert noticed > 100


def test_the_previous_checkpoint_replaces_a_damaged_last_one(tmp_path, capsys):
    """The next save does not overwrite the good one; one line says which one is used."""
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04")
    assert newest(tmp_path) == tmp_path / "previous.ckpt"
    message = f"{tmp_path}/last.ckpt is damaged; previous.ckpt, the checkpoint before it, is used\n"
    assert capsys.readouterr().err == message
    prepare(tmp_path)
    assert steps(tmp_path) == {"last.ckpt": 1}
    write(tmp_path, 2)
    assert steps(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}


def test_where_all_are_damaged_nothing_is_changed(tmp_path):
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"last.ckpt and .*previous.ckpt are damaged and there is no other") as error:
        prepare(tmp_path)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "previous.ckpt").unlink()
    with pytest.raises(UserError, match=r"last.ckpt is damaged"):
        newest(tmp_path)


def test_weights_that_are_kept_replace_no_checkpoint_to_resume_from(tmp_path):
    """Nor do leftovers of their writers stay, or a file of another name go."""
    for step in (1, 2):
        write(tmp_path, step)
    for step in (2, 2):
        AtomicCheckpointIO().save_checkpoint({"global_step": step}, checkpoints.kept(tmp_path, step))
    assert steps(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1, "step-00000002.ckpt": 2}
    names = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "step-00000004.ckpt.tmp-0123456789abcdef").touch()
    prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_kept_weights_of_later_steps_are_found_by_their_number(tmp_path):
    for name in ("step-00000004.ckpt", "step-00000010.ckpt", "step-123456789.ckpt", "step-5.ckpt", "step-mine.ckpt"):
        (tmp_path / name).touch()
    found = sorted(path.name for path in checkpoints.kept_after(tmp_path, 4))
    assert found == ["step-00000010.ckpt", "step-123456789.ckpt"]
    assert checkpoints.kept(tmp_path, 123456789).name == "step-123456789.ckpt"
    assert checkpoints.kept_after(tmp_path / "missing", 0) == []


def test_no_checkpoint_is_no_error(tmp_path):
    assert prepare(tmp_path / "missing") is None
    assert not checkpoints.exist(tmp_path / "missing")


@pytest.mark.parametrize(("weights", "limit"), [(10, 500), (10_000, 5000)])
def test_a_full_disk_is_named_and_leaves_the_files_as_they_were(tmp_path, weights, limit):
    """Also where torch has an error of its archive instead, as it has beyond the file's buffer."""
    for step in (1, 2):
        write(tmp_path, step)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(weights)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Module:
    device = torch.device("cpu")


def saver_of(rank, size, signals, checks):
    """A CheckpointSaver on one of `size` ranks, its trainer, and the list of what is saved."""
    saved = []
    data = SimpleNamespace(check_unchanged=checks)
    trainer = SimpleNamespace(world_size=size, global_step=3, loggers=[], datamodule=data, save_checkpoint=saved.append)
    saver = CheckpointSaver(
        Path("last.ckpt"), 3, 9, SimpleNamespace(received=signals), keep_every=3, check_finite=lambda _: None
    )
    return saver, trainer, saved


def save_with_one_changed_cache(rank, size, name):
    def check():
        if rank == 1:
            raise CacheError("shard-000000.h5 was written to")

    saver, trainer, saved = saver_of(rank, size, [], check)
    try:
        getattr(saver, name)(trainer, Module)
    except CacheError as error:
        return str(error), saved
    return None, saved


@pytest.mark.parametrize("name", ["_save", "_keep"])
def test_where_one_rank_finds_its_cache_changed_none_saves(ranks, name):
    (first, saved), (second, saved_too) = ranks.run(save_with_one_changed_cache, 2, name, timeout=30)
    assert "rank 1: shard-000000.h5 was written to" in first
    assert second == "shard-000000.h5 was written to"
    assert saved == saved_too == []


def stop_at(rank, size, wait):
    """Whether each of three steps ends with a stop, where rank 1 has a signal from the first one on."""
    saver, trainer, _ = saver_of(rank, size, [15] if rank == 1 else [], lambda: None)
    stopping = []
    for _ in range(3):
        saver._note_signals(trainer, Module, wait=wait)
        stopping.append(saver._stopping)
    return stopping


def test_all_ranks_learn_of_a_signal_a_step_late_and_at_once_where_they_wait_anyway(ranks):
    assert ranks.run(stop_at, 2, False) == [[False, True, True]] * 2
    assert ranks.run(stop_at, 2, True) == [[True, True, True]] * 2
