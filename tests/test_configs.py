"""Every file of configs/evaluation can follow an experiment file, and its class names and prompts are complete."""

import json

import pytest

from siglit.data.prompts import class_names, templates
from tests.conftest import ROOT, parse

FOLDER = ROOT / "configs" / "evaluation"
FILES = sorted(FOLDER.glob("*.yaml"))
CLASSES = {"cifar10": 10, "cifar100": 100, "pets": 37, "imagenet": 1000}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_evaluation_config_keeps_the_run_and_its_towers(project, monkeypatch, path):
    """It changes the data and the cache alone."""
    monkeypatch.chdir(project)
    text = (project / "experiment.yaml").read_text()
    (project / "experiment.yaml").write_text(text.replace("val.csv}", "val.csv, separator: ',', fold: 9/10}"))
    alone, over = parse("precompute"), parse("precompute", "-c", str(path))
    for part in ("name", "output_dir", "image_tower", "text_tower", "tokenizer", "loss", "mode"):
        assert getattr(over, part) == getattr(alone, part), part
    assert alone.data.val.fold == "9/10"
    assert over.data.val.fold is None
    assert over.data.val.separator is None
    assert over.data.workers == alone.data.workers
    assert over.cache.splits == ["val"]
    assert over.cache.path != alone.cache.path
    assert over.eval.name == path.stem
    assert f"-c configs/evaluation/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_class_names_and_templates_are_complete(monkeypatch, tmp_path, name):
    """Wherever the command is run."""
    monkeypatch.chdir(tmp_path)
    config = parse("eval-zeroshot", config=str(FOLDER / f"{name}.yaml")).eval
    if config.classes.startswith("open_clip:"):
        pytest.importorskip("open_clip")
    names = class_names(config.classes)
    assert len({name for of in names for name in of}) >= CLASSES[name] - 2, "open_clip has two names twice"
    assert len(names) == CLASSES[name]
    assert templates(config.templates)


def test_classes_are_in_the_order_of_their_labels():
    """CIFAR's and the pets' labels follow the alphabet, whatever the case."""
    for path in (ROOT / "siglit/assets/classes").glob("*.json"):
        names = [name.lower().replace(" ", "_") for name in json.loads(path.read_text())]
        assert names == sorted(names), path.name


def test_prompts_are_canonical_where_classes_are_named_and_nowhere_else(project, monkeypatch):
    monkeypatch.chdir(project)
    canonical = {path.stem: parse("eval-zeroshot", "-c", str(path)).eval.canonicalize for path in FILES}
    assert canonical == {name: name in CLASSES for name in canonical}
    assert set(CLASSES) < set(canonical)
    assert parse("eval-zeroshot").eval.canonicalize is False
