"""FSDP2 with two processes on the CPU, compiled towers and bfloat16: each trains as one plain process does."""

import csv
import re
import shutil
import signal

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import siglit
from siglit.errors import UserError
from siglit.loss import sigmoid
from siglit.runs import checkpoints
from siglit.training import trainer
from siglit.training.fsdp import FSDP2Strategy
from tests.commands.test_train import losses, weights
from tests.conftest import make_project, on, parse, run_siglit
from tests.training.test_resume import DRIVER, assert_equal, at_step, kept, start

WORDS = [
    *("--tokenizer.path", "tokenizer.model", "--text_tower.depth", "2"),
    *("--train.steps", "7", "--train.log_every", "2", "--train.val_every", "3", "--eval.batch_size", "5"),
    *("--train.keep_every", "4"),
]
MODES = {
    "locked": ["--image_tower.head", "24", "--optim.name", "lion"],
    "unlocked": ["--mode", "unlocked", "--train.micro_batch_size", "3"],
}
FSDP2 = ["--train.strategy", "fsdp2", "--train.devices", "2"]
TINY = [
    *("--mode", "scratch", "--image_tower.pretrained", "false", "--image_tower.weights", "null"),
    *("--tokenizer.path", "tokenizer.model", "--train.steps", "2", "--train.val_every", "1"),
]

ASTRAY = """
import os
from siglit.training.module import SigLiT

build = SigLiT.build
def astray(self, data):
    build(self, data)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        for parameter in self.parameters():
            parameter.data.normal_()
SigLiT.build = astray
"""
"""Other weights on the second process, which are not to count."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tower_weights):
    """The project with caches and a tokenizer, in which this file trains all its runs."""
    folder = make_project(tmp_path_factory.mktemp("strategies"), tower_weights)
    # Half of the held-out images share a caption, so that equal shares of captions are not equally many to embed.
    listing = (folder / "val.csv").read_text()
    (folder / "val.csv").write_text(re.sub(r"picture (4[6-9]|5\d) is \w+", "picture", listing))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        siglit.precompute(parse("precompute"))
        siglit.train(parse("train", "--train.steps", "2", "--output_dir", "runs/first"))
    shutil.copy(folder / "runs/first/tokenizer.model", folder / "tokenizer.model")
    (folder / "driver.py").write_text(ASTRAY + DRIVER)
    (folder / "shallow.yaml").write_text((folder / "experiment.yaml").read_text().replace("depth: 2", "depth: 1"))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def words(name, mode):
    return [*WORDS, *MODES[mode], "--output_dir", f"runs/{name}"]


@pytest.fixture(scope="module")
def plain(place):
    """A function that returns the folder of an undisturbed run of one process, made once."""

    def finished_run(mode):
        if not (place / f"runs/plain-{mode}").exists():
            siglit.train(parse("train", *words(f"plain-{mode}", mode)))
        return place / f"runs/plain-{mode}"

    return finished_run


@pytest.fixture(scope="module")
def sharded(place):
    """The same with FSDP2 on two."""

    def finished_run(mode):
        if not (place / f"runs/sharded-{mode}").exists():
            process = start(place, f"sharded-{mode}", 2, 0, 0, *words(f"sharded-{mode}", mode), *FSDP2)
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            assert "Warning" not in err
        return place / f"runs/sharded-{mode}"

    return finished_run


def assert_close(folder, other):
    """The same weights, optimizer state and metrics but for rounding."""
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, other))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert one["optimizer_states"][0]["param_groups"] == two["optimizer_states"][0]["param_groups"]
    assert one["optimizer_states"][0]["state"].keys() == two["optimizer_states"][0]["state"].keys()
    for name, weight in two["state_dict"].items():
        # Attention does not depend on the keys' bias: its gradient is rounding noise, which becomes steps.
        if not name.endswith(("k_proj.bias", "qkv.bias")):
            torch.testing.assert_close(one["state_dict"][name], weight, atol=2e-5, rtol=1e-3, msg=name)
    shown = ("step", "train/loss", "train/grad_norm", "train/update_norm", "train/logit_bias")
    shown += ("train/text_tower/update_norm",)
    rows = []
    for run in (folder, other):
        with (run / "metrics.csv").open(newline="") as file:
            rows.append([{k: float(row[k]) for k in shown if row[k]} for row in csv.DictReader(file)])
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_two_sharded_devices_train_like_one(mode, plain, sharded):
    """Weights, moments, losses and norms: with a head on cached rows and Lion; both towers in micro-batches, AdamW."""
    assert_close(sharded(mode), plain(mode))


@pytest.mark.slow
def test_a_sharded_run_evaluates(plain, sharded):
    one, two = (
        siglit.eval_retrieval(parse("eval-retrieval", *words(finished_run("unlocked").name, "unlocked")))
        for finished_run in (plain, sharded)
    )
    assert two.metrics == pytest.approx(one.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_the_kept_weights_of_a_sharded_run_are_whole_and_evaluate(mode, plain, sharded):
    """Those of the start are the same bit for bit, the others but for rounding."""
    assert [path.name for path in kept(sharded(mode))] == [f"step-0000000{step}.ckpt" for step in (0, 4, 7)]
    for one, two in zip(kept(sharded(mode)), kept(plain(mode)), strict=True):
        of_one, of_two = (torch.load(path, weights_only=True) for path in (one, two))
        assert of_one["state_dict"].keys() == of_two["state_dict"].keys()
        assert "optimizer_states" not in of_one
        exactly = {"atol": 0, "rtol": 0} if of_one["global_step"] == 0 else {"atol": 2e-5, "rtol": 1e-3}
        for name, weight in of_two["state_dict"].items():
            if not name.endswith(("k_proj.bias", "qkv.bias")):  # see `assert_close`
                torch.testing.assert_close(of_one["state_dict"][name], weight, msg=f"{one.name} {name}", **exactly)
    name = sharded(mode).name
    path = str(kept(sharded(mode))[1])
    result = siglit.eval_retrieval(parse("eval-retrieval", *words(name, mode), "--eval.checkpoint", path))
    assert (result.provenance["checkpoint"], result.provenance["step"]) == (path, 4)


@pytest.mark.slow
def test_a_sharded_run_stopped_within_an_epoch_resumes_exactly_or_unsharded(place, plain, sharded):
    """With FSDP2 bit for bit; in one process, and from one process's checkpoint, but for rounding."""
    process = start(place, "stopped", 2, 4, signal.SIGTERM, *words("stopped", "unlocked"), *FSDP2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    assert checkpoints.steps_taken(place / "runs/stopped/checkpoints/last.ckpt") == 5
    shutil.copytree(place / "runs/stopped", place / "runs/alone")
    run_siglit("train", "-c", "experiment.yaml", *words("stopped", "unlocked"), *FSDP2, "--resume", cwd=place, check=0)
    assert_equal(place / "runs/stopped", sharded("unlocked"))
    siglit.train(parse("train", *words("alone", "unlocked"), "--train.resume", "true"))
    assert_close(place / "runs/alone", plain("unlocked"))


@pytest.mark.slow
def test_a_plain_run_resumes_sharded(place, plain):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            siglit.train(parse("train", *words("shared", "unlocked")))
    run_siglit("train", "-c", "experiment.yaml", *words("shared", "unlocked"), *FSDP2, "--resume", cwd=place, check=0)
    assert_close(place / "runs/shared", plain("unlocked"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_device_in_a_group_trains_like_one_without(plain, place, monkeypatch, strategy, device):
    """Also stopped and resumed: with a group, NCCL on a GPU and gloo on a CPU reduce, gather and save."""
    expected = losses(plain("locked"))
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")  # Lightning sets them for good; now they are as before after the test
        monkeypatch.delenv(name)
    made = {"ddp": lambda: DDPStrategy(gradient_as_bucket_view=True), "fsdp2": lambda: FSDP2Strategy(1)}[strategy]
    monkeypatch.setattr(trainer, "_strategy", lambda _: made())
    name = f"{strategy}-{device}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                siglit.train(parse("train", *words(name, "locked"), *on(device)))
        siglit.train(parse("train", *words(name, "locked"), *on(device), "--train.resume", "true"))
        assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
    finally:
        torch.distributed.destroy_process_group()
    assert losses(place / "runs" / name) == pytest.approx(expected, rel=1e-3)
    siglit.eval_retrieval(parse("eval-retrieval", *words(name, "locked"), *on(device)))


def test_one_device_has_nothing_to_share(plain):
    siglit.train(parse("train", *words("single", "locked"), "--train.strategy", "fsdp2"))
    assert_equal(plain("locked").parent / "single", plain("locked"))


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(UserError, match="no 16-mixed"):
        siglit.train(parse("train", *words("half", "locked"), *FSDP2, "--train.precision", "16-mixed"))


def tiny(command, name, *more):
    return parse(command, *TINY, "--output_dir", f"runs/{name}", *more, config="shallow.yaml")


@pytest.fixture(scope="module")
def eager(place):
    """Folder of a plain run of two tiny towers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        siglit.train(tiny("train", "eager"))
    return place / "runs/eager"


@pytest.mark.slow
def test_compiled_towers_train_like_plain_ones(place, eager, device):
    """Both towers, in micro-batches, with validation; nothing of it is seen in the checkpoint, which evaluates."""
    name = f"compiled-{device}"
    more = ["--train.compile", "true", "--train.micro_batch_size", "8", *on(device)]
    if device == "cpu":  # in a process of its own, which forgets what it has compiled
        run_siglit("train", "-c", "shallow.yaml", *TINY, *more, "--output_dir", f"runs/{name}", cwd=place, check=0)
    else:
        siglit.train(tiny("train", name, *more))
    folder = place / "runs" / name
    assert weights(folder).keys() == weights(eager).keys()
    assert losses(folder) == pytest.approx(losses(eager), rel=1e-4 if device == "cpu" else 1e-3)
    metrics = siglit.eval_retrieval(tiny("eval-retrieval", name)).metrics
    assert metrics == pytest.approx(siglit.eval_retrieval(tiny("eval-retrieval", "eager")).metrics)


def test_in_bfloat16_the_logits_are_float32(place, eager, monkeypatch, device):
    """And so are the weights that are kept."""
    name = f"bf16-{device}"
    dtypes = []

    def watched(own, visiting):
        logits = real(own, visiting)
        dtypes.append((own.dtype, logits.dtype))
        return logits

    real = sigmoid.cosines
    monkeypatch.setattr(sigmoid, "cosines", watched)
    siglit.train(tiny("train", name, *on(device), "--train.precision", "bf16-mixed"))
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert losses(place / "runs" / name) == pytest.approx(losses(eager), rel=2e-2)
    assert {w.dtype for w in weights(place / "runs" / name).values() if w.is_floating_point()} == {torch.float32}
