"""A checkpoint without a usable model is refused by name, before any metric is computed with it."""

import math
import shutil

import numpy as np
import pytest
import torch

import siglit
from siglit.cache import EmbeddingCache
from siglit.errors import UserError
from siglit.runs.trained import open_trained
from tests.conftest import parse, run_siglit


@pytest.fixture
def state(classed_run, tmp_path, monkeypatch):
    """The checkpoint of a copy of the run, in which the test works; `save` writes it with the test's changes."""
    shutil.copytree(classed_run, tmp_path / "copy", ignore=shutil.ignore_patterns("images"))
    monkeypatch.chdir(tmp_path / "copy")
    return torch.load("runs/small/checkpoints/last.ckpt", map_location="cpu", weights_only=True)


def save(state):
    torch.save(state, "other.ckpt")
    return parse("search", "red", "--eval.checkpoint", "other.ckpt")


@pytest.mark.parametrize("part", ["text_tower.", "logit_bias", "log_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_diverged_is_refused(state, part, value):
    """Its texts are NaN, and a ranking by them has metrics like any other."""
    name = next(name for name in state["state_dict"] if name.startswith(part))
    state["state_dict"][name].view(-1)[0] = value
    with pytest.raises(UserError, match=rf"other.ckpt has weights that are not finite \({name}\).*metrics.csv"):
        open_trained(save(state))


def test_what_is_not_the_text_tower_is_named(state):
    """In one line, however long torch's list of missing weights is."""
    weights = state["state_dict"]
    text = {name: weights.pop(name) for name in list(weights) if name.startswith("text_tower.")}
    with pytest.raises(UserError, match=r"^other.ckpt does not fit the text towers of this version[^\n]{,300}$"):
        open_trained(save(state))
    weights |= text
    state["siglit"]["text_tower"]["later"] = 1
    with pytest.raises(UserError, match=r"does not fit the text towers .* unexpected keyword argument 'later'"):
        open_trained(save(state))
    del state["siglit"]["text_tower"]["later"], weights["log_scale"]
    with pytest.raises(UserError, match=r"other.ckpt has no log_scale"):
        open_trained(save(state))


def test_probabilities_of_a_large_scale_raise_no_warning(state):
    """A float32 exp overflows from 88 on, and the paper's own t of 117 goes beyond."""
    state["state_dict"]["log_scale"].fill_(math.log(2000.0))
    state["state_dict"]["logit_bias"].fill_(-1000.0)
    result = siglit.search(save(state), "a red square")
    for score, probability in zip(result.scores, result.probabilities, strict=True):
        assert probability == pytest.approx(1 / (1 + math.exp(-min(700, 2000 * score - 1000))) if score > 0.2 else 0.0)
    assert min(result.probabilities) < 1e-30


CENTER = ("--image_tower.center", "true")


@pytest.mark.parametrize("head", [(), ("--image_tower.head", "8")])
def test_held_out_images_are_centered_by_the_mean_of_the_training_images(cached, head):
    siglit.train(parse("train", *CENTER, *head, "--train.steps", "2"))
    run = open_trained(parse("eval-retrieval", *CENTER, *head))
    train, val = (EmbeddingCache(cached.cache_folder / split) for split in ("train", "val"))
    rows = [cache.gather(np.arange(len(cache))).astype(np.float64) for cache in (train, val)]
    expected = rows[1] - rows[0].mean(axis=0)
    if head:
        assert run.image_head is not None
        expected = expected @ run.image_head.numpy().astype(np.float64).T
    np.testing.assert_allclose(run.zimg, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_a_run_is_not_evaluated_or_resumed_with_another_center(cached):
    siglit.train(parse("train", *CENTER, "--train.steps", "2"))
    with pytest.raises(UserError, match=r"was trained with image_tower.center true, but the experiment has false"):
        open_trained(parse("eval-retrieval"))
    again = ("--train.resume", "true", "--train.resume_changed", "true", "--train.steps", "3")
    with pytest.raises(UserError, match="cannot resume: the checkpoint was made with image_center True"):
        siglit.train(parse("train", *again))
    assert siglit.train(parse("train", *CENTER, *again)).steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_center_like_one(cached, strategy):
    siglit.train(parse("train", *CENTER, "--train.steps", "2"))
    one = open_trained(parse("eval-retrieval", *CENTER))
    words = (*CENTER, "--train.steps", "2", "--output_dir", f"runs/{strategy}", "--train.strategy", strategy)
    run_siglit("train", "-c", "experiment.yaml", *words, "--train.devices", "2", cwd=".", check=0)
    two = open_trained(parse("eval-retrieval", *words))
    np.testing.assert_array_equal(two.zimg, one.zimg)
    assert two.logit_bias == pytest.approx(one.logit_bias, rel=1e-5)
