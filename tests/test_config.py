"""Values out of bounds are refused by name before any work; so are contradictions between fields or files."""

import json
import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

import siglit
from siglit.config import COUNTS, Experiment
from siglit.errors import UserError
from siglit.parsing.arguments import parse_command
from siglit.parsing.fields import section_of
from siglit.runs.folder import read_run_summary
from siglit.runs.launch import check_accelerator
from tests.conftest import parse, run_siglit


@pytest.mark.parametrize(
    "words",
    [
        ("cache.shard_size", "0"),
        ("cache.batch_size", "-1"),
        ("cache.devices", "0"),
        ("train.batch_size", "0"),
        ("train.devices", "0"),
        ("train.log_every", "-1"),
        ("eval.top_k", "0"),
        ("loss.logit_scale", "0"),
        ("loss.chunk_size", "0"),
        ("loss.negatives_per_positive", ".inf"),
        ("train.micro_batch_size", "0"),
        ("optim.lr", "-1"),
        ("optim.lr", ".inf"),
        ("optim.weight_decay", ".inf"),
        ("train.epochs", ".inf"),
        ("loss.logit_bias", ".inf"),
        ("optim.betas", "[1.5, 2]"),
        ("tokenizer.length", "1"),
        ("text_tower.depth", "0"),
        ("seed", "-1"),
        ("data.max_skipped", "2"),
        ("data.workers", "-1"),
        ("image_tower.mean", "[0.5]"),
        ("eval.shots", "[]"),
        ("eval.name", "a/b"),
        ("eval.name", "a\nb"),
        ("eval.name", "\udcff"),
        ("eval.name", "é" * 51),
        ("eval.name", "train"),
        ("eval.name", "coco-train"),
        ("eval.shots", "[5, 0]"),
        ("cache.splits", "[]"),
    ],
)
def test_a_value_out_of_bounds_is_named(experiment, words):
    with pytest.raises(UserError, match=f"^{words[0]} is .* must be"):
        parse("train", f"--{words[0]}", words[1])


def test_every_number_has_a_bound():
    def unbounded(section, prefix=""):
        kinds = get_type_hints(section)
        for entry in fields(section):
            name, kind = prefix + entry.name, kinds[entry.name]
            inner = section_of(kind)
            if inner is not None:
                yield from unbounded(inner, f"{name}.")
            elif {int, float} & {kind, *get_args(kind)} and "bound" not in entry.metadata and name not in COUNTS:
                yield name

    assert list(unbounded(Experiment)) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--data.corrupt", "[text]"),
        ("--data.corrupt_share", "0.2"),
        ("--data.corrupt", "[]", "--data.corrupt_share", "1"),
    ],
)
def test_corruption_without_a_share_is_refused(experiment, words):
    with pytest.raises(UserError, match=r"^data.corrupt is .* and data.corrupt_share .*: name what"):
        parse("train", *words)
    assert parse("train", "--data.corrupt", "[text]", "--data.corrupt_share", "0.2").data.corrupt == ["text"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--loss.logit_bias", "-10"), -10.0),
        (("--loss.logit_bias", "auto"), -math.log(511)),
        (("--loss.logit_bias", "auto", "--train.batch_size", "1"), 0.0),
        (
            ("--loss.logit_bias", "auto", "--loss.negatives", "hardest", "--loss.negatives_per_positive", "4"),
            -math.log(4),
        ),
        (("--loss.logit_bias", "auto", "--loss.negatives", "random", "--loss.negatives_per_positive", "0"), 0.0),
        # More than there are: all of them are kept.
        (
            ("--loss.logit_bias", "auto", "--loss.negatives", "random", "--loss.negatives_per_positive", "1e9"),
            -math.log(511),
        ),
        (("--loss.logit_bias", "null"), None),
        (("--loss.name", "softmax"), None),
    ],
)
def test_the_initial_bias_is_the_logarithm_of_the_prior_odds(experiment, words, expected):
    actual = parse("train", "--train.batch_size", "512", *words).initial_bias
    assert actual == expected or math.isclose(actual, expected)


@pytest.mark.parametrize("value", ["automatic", ".nan", "[1]"])
def test_a_bias_that_is_neither_number_nor_auto_is_refused(experiment, value):
    with pytest.raises(UserError, match=r"^loss.logit_bias is .*, but it must be .* or auto"):
        parse("train", "--loss.logit_bias", value)


@pytest.mark.parametrize("words", [("--data.random_crop", "0.5"), ("--data.random_flip", "true")])
def test_augmentation_with_a_locked_tower_is_refused(experiment, words):
    with pytest.raises(UserError, match=r"mode locked takes .* from the cache; leave them out, or set mode"):
        parse("train", *words)
    assert parse("train", *words, "--mode", "unlocked").mode == "unlocked"


@pytest.mark.parametrize("mode", ["unlocked", "scratch"])
def test_a_trained_tower_is_not_centered(experiment, mode):
    with pytest.raises(UserError, match=r"^image_tower.center .*, but mode is .*; leave it out, or set mode: locked"):
        parse("train", "--mode", mode, "--image_tower.center", "true")


def write(path, text):
    path.write_text(path.read_text() + text)


def test_a_key_given_twice_is_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    write(project / "experiment.yaml", "seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"experiment.yaml, line \d+: seed is given twice"):
        parse("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "experiment.yaml is empty"),
        ("data: {train: {format: csv, path: ${HOME}/x.csv}}", "quotes"),
        ("data: {train: {format: csv, path: x.csv}}\ntokenizer:\n", "section tokenizer is empty"),
        ("data: {train: {format: csv, path: x.csv}, val: x.csv}", "data.val"),
        ("data: {train: {format: csv, path: x.csv}, val: {format: csv, path: y, colour: 3}}", "colour"),
    ],
)
def test_what_is_wrong_with_an_experiment_file_is_one_short_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse("train")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_without_a_file_the_option_is_named():
    with pytest.raises(UserError, match="-c FILE"):
        parse_command("train", [])


def test_search_takes_several_words(experiment):
    assert parse_command("search", ["a", "red", "square", "-c", "experiment.yaml"])[1] == {"query": "a red square"}


@pytest.mark.parametrize("query", [" ", "\udcff"])
def test_an_invalid_query_is_refused(experiment, query):
    with pytest.raises(UserError, match="the query is"):
        siglit.search(parse("eval-retrieval"), query)


@pytest.mark.parametrize(("stage", "section"), [("precompute", "cache"), ("train", "train")])
@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_more_devices_than_there_are_are_refused(cached, monkeypatch, stage, section, accelerator):
    """Processes on the CPU may be any number; GPUs may not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    words = (f"--{section}.accelerator", accelerator, f"--{section}.devices", "2")
    with pytest.raises(UserError, match=f"{section}.devices is 2, but this machine has 1 CUDA device; lower"):
        getattr(siglit, stage)(parse("train", *words))
    check_accelerator(section, "cpu", 2)


@pytest.mark.parametrize("stage", ["precompute", "train", "eval_retrieval"])
def test_cuda_is_refused_where_there_is_none(experiment, monkeypatch, stage):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if stage == "eval_retrieval":
        siglit.precompute(experiment)
        siglit.train(experiment)
    section = {"precompute": "cache", "train": "train", "eval_retrieval": "eval"}[stage]
    with pytest.raises(UserError, match=f"{section}.accelerator is cuda"):
        getattr(siglit, stage)(parse("train", f"--{section}.accelerator", "cuda"))


def test_training_notices_that_the_captions_changed(cached, project):
    """The cache holds the captions of the unchanged CSV; if there is no CSV, the cache is trusted."""
    write(project / "train.csv", "images/0000.png,another caption\n")
    with pytest.raises(UserError, match="source"):
        siglit.train(cached)
    (project / "train.csv").unlink()
    siglit.train(cached)


def test_too_many_bad_images_leave_a_cache_that_is_not_complete(experiment, project):
    (project / "images/0000.png").write_bytes(b"")
    with pytest.raises(UserError, match="max_skipped"):
        siglit.precompute(experiment)
    with pytest.raises(UserError, match="not complete"):
        siglit.train(experiment)
    assert siglit.precompute(parse("precompute", "--data.max_skipped", "0.1")).splits["train"].encoded_now == 0


def test_results_of_a_finished_run_are_kept(experiment, project, capsys):
    """Repeating a finished precompute or train changes no value in summary.json."""
    siglit.precompute(experiment)
    result = siglit.train(experiment)
    before = read_run_summary(experiment.folder)
    siglit.precompute(experiment)
    assert "the run is complete" not in capsys.readouterr().err
    assert siglit.train(parse("train", "--train.resume", "true")) == result
    assert "the run is complete: it has taken its 6 steps" in capsys.readouterr().err
    recall = result.metrics["val/text_to_image/R@10"]
    assert f"val/text_to_image/R@10 {100 * recall:.1f} %" in str(result)
    assert read_run_summary(experiment.folder) == before
    with pytest.raises(UserError, match="has taken 6 steps, more than the 3"):
        siglit.train(parse("train", "--train.resume", "true", "--train.resume_changed", "true", "--train.steps", "3"))


def test_a_refused_train_leaves_the_record_of_the_real_one(cached, project):
    run_siglit("train", "-c", "experiment.yaml", cwd=project, check=0)
    record = (project / "runs/small/experiment.yaml").read_text()
    run_siglit("train", "-c", "experiment.yaml", "--optim.lr", "9", cwd=project, check=2)
    assert (project / "runs/small/experiment.yaml").read_text() == record


def test_a_nan_loss_stops_the_run(cached):
    with pytest.raises(RuntimeError, match="the loss is nan at step"):
        siglit.train(parse("train", "--optim.lr", "1e9", "--optim.clip", "0", "--train.steps", "40"))


def test_evaluation_of_the_training_cache_has_a_file_of_its_own(trained, project):
    siglit.eval_retrieval(trained)
    held_out = (project / "runs/small/retrieval.json").read_bytes()
    siglit.eval_retrieval(parse("eval-retrieval", "--eval.split", "train"))
    assert (project / "runs/small/retrieval.json").read_bytes() == held_out
    assert json.loads((project / "runs/small/retrieval-train.json").read_text())["images"] == 40


@pytest.mark.slow
def test_more_devices_than_shards(project):
    words = ["--cache.devices", "2", "--cache.shard_size", "4000"]
    done = run_siglit("precompute", "-c", "experiment.yaml", *words, cwd=project, check=0)
    assert "TypeError" not in done.stderr
    assert "40 rows" in done.stdout
