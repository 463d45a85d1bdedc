"""`--help` of a command lists every field that its code reads: reads are recorded while the command runs."""

import shutil
import sys

import pytest

import siglit
from siglit.commands import COMMANDS
from siglit.config import (
    CacheConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    ImageTowerConfig,
    LossConfig,
    OptimConfig,
    TextTowerConfig,
    TokenizerConfig,
    TrainConfig,
)
from siglit.parsing.fields import FIELDS, SECTIONS
from tests.conftest import parse

PREFIXES = {
    Experiment: "",
    DataConfig: "data.",
    ImageTowerConfig: "image_tower.",
    CacheConfig: "cache.",
    TokenizerConfig: "tokenizer.",
    TextTowerConfig: "text_tower.",
    LossConfig: "loss.",
    OptimConfig: "optim.",
    TrainConfig: "train.",
    EvalConfig: "eval.",
}
COPIES = ("dataclasses.py", "siglit/config.py", "siglit/runs/resume.py", "copy.py")
"""Files whose code copies, checks or compares whole sections."""


@pytest.fixture
def reads(monkeypatch):
    """Names of the fields that are read while the test runs."""
    names = set()

    def record(section, prefix):
        def getattribute(self, name):
            field = prefix + name
            if field in FIELDS and field not in SECTIONS and not sys._getframe(1).f_code.co_filename.endswith(COPIES):
                names.add(field)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(section, "__getattribute__", getattribute, raising=False)

    for section, prefix in PREFIXES.items():
        record(section, prefix)
    return names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("precompute", ()),
        ("eval-retrieval", ()),
        ("eval-logits", ()),
        ("search", ("a red square",)),
        ("report", ()),
    ],
)
def test_help_lists_what_is_read(trained, reads, name, words):
    getattr(siglit, name.replace("-", "_"))(trained, *words)
    assert len(reads) > 5
    assert unlisted(reads, name) == set()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval-zeroshot", ("--eval.classes", "colors.json")),
        ("eval-fewshot", ("--eval.shots", "[1]")),
        ("eval-probe", ()),
    ],
)
def test_help_lists_what_classification_reads(classed_run, reads, monkeypatch, tmp_path, name, words):
    monkeypatch.chdir(classed_run)
    shutil.copytree("runs/small", tmp_path / "small")
    experiment = parse(name, "--output_dir", str(tmp_path / "small"), *words)
    reads.clear()
    getattr(siglit, name.replace("-", "_"))(experiment)
    assert len(reads) > 5
    assert unlisted(reads, name) == set()


@pytest.mark.parametrize("mode", ["locked", "unlocked"])
@pytest.mark.parametrize(("name", "function"), [("plan", "plan"), ("train", "train"), ("train", "dry_run")])
def test_help_lists_what_training_reads(cached, reads, name, function, mode):
    experiment = parse("train", "--mode", mode, "--output_dir", "runs/other")
    reads.clear()
    getattr(siglit, function)(experiment)
    assert len(reads) > 20
    assert unlisted(reads, name) == set()


def test_help_lists_what_tokenizer_train_reads(experiment, reads):
    siglit.tokenizer_train(experiment)
    assert len(reads) > 5
    assert unlisted(reads, "tokenizer train") == set()


def unlisted(reads, name):
    """Fields that were read, but are not among those that the command's help lists."""
    listed = COMMANDS[name].reads
    return {field for field in reads if not any(field == x or field.startswith(f"{x}.") for x in listed)}
