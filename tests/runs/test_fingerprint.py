"""Whether a cache matches the experiment: reduced decoding and weights are compared, versions are not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import siglit
from siglit.errors import UserError
from siglit.runs.caches import open_cache
from tests.conftest import TOWER, parse

TRAIN = ("--cache.splits", "[train]", "--data.workers", "0")


def change_index(change):
    """Change the fingerprint in index.json, as if another siglit had written the cache."""
    path = Path("cache/small/train/index.json")
    index = json.loads(path.read_text())
    change(index["fingerprint"]["image_tower"])
    path.write_text(json.dumps(index))


def test_training_and_evaluation_compare_how_jpegs_were_decoded(experiment):
    siglit.precompute(parse("precompute", *TRAIN))
    open_cache(experiment, "train")
    other = replace(experiment, image_tower=replace(experiment.image_tower, jpeg_draft=True))
    with pytest.raises(UserError, match=r"image_tower\.transform\.jpeg_draft is False, expected True"):
        open_cache(other, "train")
    change_index(lambda tower: tower["transform"].pop("jpeg_draft"))
    open_cache(other, "train")
    open_cache(experiment, "train")


def test_weights_of_a_file_are_not_those_of_the_name(experiment):
    """A cache made with a weights file does not match an experiment without one, and the other way round."""
    siglit.precompute(parse("precompute", *TRAIN))
    named = replace(experiment, image_tower=replace(experiment.image_tower, weights=None))
    with pytest.raises(UserError, match=r"image_tower\.weights_file is '\w{32}', expected None"):
        open_cache(named, "train")
    change_index(lambda tower: tower.update(weights_file=None))
    open_cache(named, "train")
    with pytest.raises(UserError, match=r"image_tower\.weights_file is None"):
        open_cache(experiment, "train")
    change_index(lambda tower: tower.pop("weights_file"))
    open_cache(named, "train")


def test_weights_that_come_with_the_models_name_are_known_by_their_hash(experiment, project, tower_weights):
    """As the Hub's are: another tensor under the same name is another tower."""
    folder = project / "tower"
    folder.mkdir()
    model = timm.create_model(TOWER["model"], num_classes=0, **TOWER["model_args"])
    config = {"architecture": TOWER["model"], "num_classes": 0, "model_args": TOWER["model_args"]}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    state = {name: value for name, value in load_file(tower_weights).items() if name in model.state_dict()}
    words = (*TRAIN, "--image_tower.model", f"local-dir:{folder}", "--image_tower.weights", "null")

    def run():
        save_file(state, folder / "model.safetensors")
        return siglit.precompute(parse("precompute", *words)).splits["train"]

    assert run().encoded_now == 40
    assert run().encoded_now == 0
    state["norm.bias"] = torch.nextafter(state["norm.bias"], torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"image_tower\.weights is '\w{32}', expected '\w{32}'"):
        run()
