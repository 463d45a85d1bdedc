"""The mode changes what is trained, and nothing else: locked with a head, unlocked, scratch; trained and evaluated."""

import json

import numpy as np
import pytest
import torch

import siglit
from siglit.cache import EmbeddingCache
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from siglit.runs.trained import open_trained
from tests.commands.test_train import losses, weights
from tests.conftest import on, parse, run_siglit

TRAINED_MODES = ("unlocked", "scratch")


def image_weights(folder):
    prefix = "image_tower.tower."
    return {k.removeprefix(prefix): v for k, v in weights(folder).items() if k.startswith(prefix)}


@pytest.mark.parametrize("mode", TRAINED_MODES)
def test_a_trained_image_tower_is_what_is_evaluated(experiment, project, mode, device):
    """The rows that eval-retrieval searches in are the trained tower's, embedded once for each checkpoint."""
    experiment = parse("train", "--mode", mode, "--train.steps", "40", *on(device))
    result = siglit.train(experiment)
    folder = project / "runs/small"
    curve = losses(folder)
    assert curve[39] < 0.85 * curve[1]
    assert result.metrics["val/text_to_image/R@1"] > 0
    evaluated = siglit.eval_retrieval(experiment)
    assert json.loads((folder / "retrieval.json").read_text())["images"] == 12
    trained = open_trained(experiment)
    tower = ImageTower(experiment.image_tower)
    tower.load_state_dict(image_weights(folder))
    cache = EmbeddingCache(next((folder / "embeddings").glob("*/val-*")))
    assert trained.cache.digest == cache.digest
    from PIL import Image

    pixels = torch.stack([tower.transform()(Image.open(project / key).convert("RGB")) for key in cache.keys])
    with torch.inference_mode():
        rows = tower.eval()(pixels).numpy()
    np.testing.assert_allclose(cache.gather(np.arange(12)), rows, atol=2e-3)
    assert evaluated.metrics["text_to_image/R@1"] == pytest.approx(result.metrics["val/text_to_image/R@1"], abs=0.1)
    assert siglit.search(experiment, "a red square").keys
    assert len(list((folder / "embeddings").iterdir())) == 1


def test_unlocked_starts_from_the_weights_and_scratch_does_not(experiment, project, tower_weights):
    from safetensors.torch import load_file

    start = load_file(tower_weights)["patch_embed.proj.weight"]
    for mode in TRAINED_MODES:
        siglit.train(
            parse(
                "train",
                "--mode",
                mode,
                "--train.steps",
                "1",
                "--optim.lr",
                "1e-30",
                "--output_dir",
                f"runs/{mode}",
                "--optim.warmup_steps",
                "0",
            )
        )
        actual = image_weights(project / "runs" / mode)["backbone.patch_embed.proj.weight"]
        assert torch.equal(actual, start) == (mode == "unlocked")


@pytest.mark.slow
def test_two_devices_train_both_towers_like_one(experiment, project):
    siglit.train(parse("train", "--mode", "unlocked", "--output_dir", "runs/1"))
    words = ["--mode", "unlocked", "--output_dir", "runs/2", "--tokenizer.path", "runs/1/tokenizer.model"]
    run_siglit("train", "-c", "experiment.yaml", *words, "--train.devices", "2", cwd=project, check=0)
    assert losses(project / "runs/2") == pytest.approx(losses(project / "runs/1"), rel=1e-3)


def test_micro_batches_of_both_towers_train_like_whole_ones(experiment, project, device):
    siglit.train(parse("train", "--mode", "unlocked", "--output_dir", "runs/1", *on(device)))
    words = ["--output_dir", "runs/2", "--tokenizer.path", "runs/1/tokenizer.model", "--train.micro_batch_size", "5"]
    siglit.train(parse("train", "--mode", "unlocked", *words, *on(device)))
    assert losses(project / "runs/2") == pytest.approx(losses(project / "runs/1"), rel=1e-4)


def test_a_head_on_locked_rows_is_trained_and_evaluated(cached, project, device):
    cached = parse("train", "--image_tower.head", "24", *on(device))
    result = siglit.train(cached)
    head = weights(project / "runs/small")["image_tower.head.weight"]
    assert head.shape == (24, 48)
    trained = open_trained(cached)
    rows = torch.from_numpy(trained.cache.gather(np.arange(12))).float()
    expected = torch.nn.functional.normalize(rows @ head.T, dim=1)
    np.testing.assert_allclose(trained.zimg, expected.numpy(), atol=1e-6)
    metrics = siglit.eval_retrieval(cached).metrics
    assert metrics["text_to_image/R@1"] == pytest.approx(result.metrics["val/text_to_image/R@1"])
    with pytest.raises(UserError, match=r"image_tower.head 24"):
        siglit.eval_retrieval(parse("eval-retrieval"))


def test_what_does_not_fit_a_mode_is_refused(experiment, project):
    with pytest.raises(UserError, match="nothing to precompute"):
        siglit.precompute(parse("precompute", "--mode", "scratch"))
    words = ["--image_tower.pretrained", "false", "--image_tower.weights", "null"]
    with pytest.raises(UserError, match="mode: scratch"):
        siglit.train(parse("train", "--mode", "unlocked", *words))
    siglit.train(parse("train", "--mode", "unlocked"))
    with pytest.raises(UserError, match="trained with mode unlocked"):
        siglit.eval_retrieval(parse("eval-retrieval", "--mode", "scratch"))


def test_a_locked_run_decodes_no_image(cached, project, monkeypatch):
    for picture in (project / "images").iterdir():
        picture.unlink()
    assert siglit.train(cached).steps == 6


def test_noise_images_reach_training_on_a_cache(cached, project):
    words = ["--data.corrupt", "[image, text, alignment]", "--data.corrupt_share", "0.5"]
    siglit.train(parse("train", *words))
    pool = np.load(next((project / "runs/small").glob("noise-*.npy")))
    assert pool.shape == (256, 48)
    random = ["--cache.path", "other", "--image_tower.weights", "null", "--image_tower.pretrained", "false"]
    siglit.precompute(parse("precompute", *random))
    with pytest.raises(UserError, match="noise images need the same weights"):
        siglit.train(parse("train", *words, *random, "--output_dir", "runs/other"))


@pytest.mark.parametrize("mode", TRAINED_MODES)
@pytest.mark.parametrize("listing", ["images/0040.png,", "train.csv,not an image"])
def test_held_out_data_without_a_usable_pair_is_refused(experiment, project, mode, listing):
    (project / "val.csv").write_text(f"filepath,title\n{listing}\n")
    with pytest.raises(UserError, match="val.csv has no usable image with a caption"):
        siglit.train(parse("train", "--mode", mode))


def test_held_out_data_may_have_a_batch_without_a_usable_image(experiment, project):
    for number in (44, 45, 46, 47):
        (project / f"images/00{number}.png").write_text("not an image")
    result = siglit.train(parse("train", "--mode", "scratch", "--cache.batch_size", "4"))
    assert 0 <= result.metrics["val/text_to_image/R@1"] <= 1


def test_a_run_is_not_resumed_with_a_changed_listing(experiment, project):
    words = ["--mode", "unlocked", "--train.val_every", "3"]
    siglit.train(parse("train", *words))
    listing = (project / "train.csv").read_text()
    (project / "train.csv").write_text(listing.replace("a red square", "a big red square"))
    with pytest.raises(UserError, match="cannot resume.*source"):
        siglit.train(
            parse("train", *words, "--train.steps", "8", "--train.resume", "true", "--train.resume_changed", "true")
        )


def test_unusable_images_are_reported(experiment, project, capsys):
    (project / "images" / "0003.png").write_bytes(b"no image")
    siglit.train(parse("train", "--mode", "unlocked", "--data.max_skipped", "0.5"))
    assert "could not be used and were replaced by others: " in capsys.readouterr().err


def test_a_run_is_evaluated_on_another_set_without_losing_the_first(experiment, project):
    siglit.train(parse("train", "--mode", "unlocked"))
    siglit.eval_retrieval(parse("eval-retrieval", "--mode", "unlocked"))
    evaluated = siglit.eval_retrieval(parse("eval-retrieval", "--mode", "unlocked", "--data.val.path", "train.csv"))
    assert evaluated.images == 40
    assert len(list((project / "runs/small/embeddings").glob("*/val-*"))) == 2
