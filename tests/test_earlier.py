"""A cache and two runs that an earlier commit made (tests/earlier) open, evaluate and resume with this one."""

import json
import shutil

import pytest

import siglit
from tests.conftest import ROOT, parse

UNLOCKED = ("--mode", "unlocked", "--name", "unlocked")


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of the folder, where the test works."""
    folder = shutil.copytree(ROOT / "tests/earlier", tmp_path / "earlier")
    monkeypatch.chdir(folder)
    return folder


def test_an_earlier_cache_is_complete_sound_and_not_encoded_again(earlier):
    before = {path: path.read_bytes() for path in sorted((earlier / "cache").rglob("*")) if path.is_file()}
    result = siglit.precompute(parse("precompute"))
    assert {split: (done.rows, done.encoded_now) for split, done in result.splits.items()} == {
        "train": (16, 0),
        "val": (8, 0),
    }
    assert siglit.cache_verify("cache/small").exit_code == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("command", "file", "words"),
    [
        ("eval-retrieval", "runs/locked/retrieval.json", ()),
        ("eval-retrieval", "runs/unlocked/retrieval.json", UNLOCKED),
        ("eval-zeroshot", "runs/locked/zeroshot.json", ("--eval.classes", "colours.json")),
        ("eval-fewshot", "runs/locked/fewshot.json", ()),
        ("eval-probe", "runs/locked/probe.json", ()),
        ("eval-logits", "runs/locked/logits.json", ()),
    ],
)
def test_an_earlier_run_has_the_results_that_it_had(earlier, command, file, words):
    before = {
        name.replace("of/", "provenance/", 1) if name.startswith("of/") else name: value
        for name, value in numbers(json.loads((earlier / file).read_text())).items()
    }
    getattr(siglit, command.replace("-", "_"))(parse(command, *words))
    now = numbers(json.loads((earlier / file).read_text()))
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("words", [(), UNLOCKED])
def test_an_earlier_run_is_resumed(earlier, words):
    resumed = ("--train.resume", "true", "--train.resume_changed", "true", "--train.steps", "6")
    assert siglit.train(parse("train", *words, *resumed)).steps == 6
    run = earlier / "runs" / (words[-1] if words else "locked")
    steps = [line.partition(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert list(dict.fromkeys(steps)) == [*"012345"]


def numbers(result, prefix=""):
    """{path: value} of all numbers in a result."""
    items = result.items() if isinstance(result, dict) else enumerate(result)
    values = {}
    for name, value in items:
        if isinstance(value, dict | list):
            values |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            values[f"{prefix}{name}"] = value
    return values
