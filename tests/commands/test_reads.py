"""`--help` of a command lists every field that its code reads: reads are recorded while the command runs."""

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
COPIES = ("dataclasses.py", "siglit/config.py", "copy.py")
"""Files whose code copies or checks whole sections."""


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
    listed = COMMANDS[name].reads
    assert len(reads) > 5
    assert {field for field in reads if not any(field == x or field.startswith(f"{x}.") for x in listed)} == set()
