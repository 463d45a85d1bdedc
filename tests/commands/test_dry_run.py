"""`train --dry-run` tells rates, decay and counts of what would be trained, and leaves nothing behind."""

import re

import pytest

import siglit
from siglit.errors import UserError
from tests.conftest import parse, run_siglit


def test_it_prints_every_groups_rate_and_decay_and_writes_nothing(experiment, project):
    before = {path for path in project.rglob("*") if path.is_file()}
    words = ["--mode", "unlocked", "--optim.weight_decay", "0.01", "--optim.lr", "0.002"]
    done = run_siglit("train", "-c", "experiment.yaml", "--dry-run", *words, cwd=project, check=0)
    assert {path for path in project.rglob("*") if path.is_file()} == before
    assert "pretrained" in done.stdout
    # The image tower's matrices: a tenth of the rate, no decay; the text tower's: all of both.
    image = next(line for line in done.stdout.splitlines() if "attn.qkv.weight" in line)
    text = next(line for line in done.stdout.splitlines() if "mlp.fc1.weight" in line and "text_tower" in line)
    assert "0.0002" in image
    assert re.search(r"\b0\.002\b", text)
    assert "0.01" in text
    assert "0.01" not in image
    assert "6 steps of 16 pairs = 96 examples" in done.stdout
    assert "learning rate at step 0: 0" in done.stdout


def test_it_finds_what_training_would_find(experiment):
    with pytest.raises(UserError, match="siglit precompute"):
        siglit.dry_run(experiment)


def test_a_locked_run_has_no_image_parameters(cached, project):
    done = run_siglit("train", "-c", "experiment.yaml", "--dry-run", cwd=project, check=0)
    assert "image_tower" not in done.stdout
    assert "text_tower" in done.stdout
    assert not list((project / "runs").rglob("*.ckpt"))


@pytest.mark.parametrize("words", [["--train.batch_size", "41"], ["--train.devices", "3"]])
def test_it_refuses_a_batch_that_training_would_refuse(experiment, words):
    with pytest.raises(UserError, match="train.batch_size"):
        siglit.dry_run(parse("train", "--mode", "unlocked", *words))
