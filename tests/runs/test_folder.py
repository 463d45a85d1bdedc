"""A pretrained text tower brings its tokenizer, and a run with one is loaded from its checkpoint alone."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from siglit.commands.tokenizer_train import tokenizer_train as train_tokenizer
from siglit.config import DataConfig, Experiment, SourceSpec, TextTowerConfig, TokenizerConfig
from siglit.errors import UserError
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import load_tokenizer
from siglit.runs import trained
from siglit.runs.folder import add_to_summary, read_run_summary
from siglit.runs.tokenizer import ensure_tokenizer, tokenizer_path
from tests.models.text_models import save_model, save_tokenizer


def experiment_of(folder, **parts):
    return Experiment(data=DataConfig(train=SourceSpec("csv", "train.csv")), output_dir=str(folder / "run"), **parts)


def path_of(experiment):
    """`tokenizer_path` of an experiment."""
    return tokenizer_path(experiment.folder, experiment.tokenizer, experiment.text_tower.pretrained)


def ensure(experiment, captions):
    """`ensure_tokenizer` of an experiment."""
    return ensure_tokenizer(experiment.folder, experiment.tokenizer, experiment.text_tower.pretrained, captions)


class TestTokenizer:
    def test_the_first_that_is_given(self, tmp_path):
        named, pretrained = TokenizerConfig(path="words.model"), TextTowerConfig(pretrained="some/bert")
        assert path_of(experiment_of(tmp_path, tokenizer=named, text_tower=pretrained)) == "words.model"
        assert path_of(experiment_of(tmp_path, text_tower=pretrained)) == "some/bert"
        assert path_of(experiment_of(tmp_path)) == str(tmp_path / "run" / "tokenizer.model")

    def test_none_is_trained_for_a_pretrained_tower(self, tmp_path):
        experiment = experiment_of(tmp_path, text_tower=TextTowerConfig(pretrained="some/bert"))
        assert ensure(experiment, ["a red dog"]) == "some/bert"
        assert list(tmp_path.glob("**/*.model")) == []
        with pytest.raises(UserError, match="'some/bert', which has its own tokenizer"):
            train_tokenizer(experiment)

    def test_the_default_case_is_the_case_that_was_written(self, tmp_path):
        """A tokenizer trained with lowercase set to true matches the default."""
        small = TokenizerConfig(vocab_size=300)
        path = ensure(experiment_of(tmp_path, tokenizer=replace(small, lowercase=True)), ["a red dog"])
        assert ensure(experiment_of(tmp_path, tokenizer=small), ["another"]) == path
        with pytest.raises(UserError, match="trained with tokenizer.lowercase True, but the experiment has False"):
            ensure(experiment_of(tmp_path, tokenizer=replace(small, lowercase=False)), [])

    def test_a_damaged_one_is_named(self, tmp_path):
        """Training would start with other ids, or be refused at its checkpoint without the file's name."""
        experiment = experiment_of(tmp_path, tokenizer=TokenizerConfig(vocab_size=300))
        path = Path(ensure(experiment, ["a red dog"]))
        assert ensure(experiment, []) == str(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(UserError, match=r"tokenizer\.model is damaged: its hash is not the one in tokenizer\.json"):
            ensure(experiment, [])
        path.write_bytes(whole)
        for content in (b"", b'{"vocab_size": 300', b"[3]", b'{"vocab_size": \xb5}'):
            path.with_suffix(".json").write_bytes(content)
            with pytest.raises(UserError, match=r"tokenizer\.json is damaged.*; remove it and tokenizer\.model"):
                ensure(experiment, [])


@pytest.mark.parametrize("content", [b"", b'{"train": {"steps": 4}', b'{"train": \xb5}', b"[1]", b'{"train": 3}'])
def test_a_damaged_summary_is_named_and_does_not_end_the_command_that_adds_to_it(tmp_path, content, capsys):
    (tmp_path / "summary.json").write_bytes(content)
    add_to_summary(tmp_path, "train", {"steps": 6})
    assert f"{tmp_path / 'summary.json'} is damaged" in capsys.readouterr().err
    assert read_run_summary(tmp_path) == {"train": {"steps": 6}}


class ThreeRows:
    """The part of a cache that an evaluation uses."""

    fingerprint, path, dim, digest = {"image_tower": {"model": "vit"}}, "cache", 20, "0" * 32

    def __len__(self):
        return 3

    def gather(self, rows):
        return np.ones((len(rows), 20), np.float16)


@pytest.mark.parametrize("locked", [False, True])
def test_a_run_is_loaded_without_the_weights_it_started_from(tmp_path, monkeypatch, locked):
    """The layout of a sentence-transformers folder: the model, the tokenizer, and files that do not matter."""
    folder = save_tokenizer(save_model(tmp_path / "model"))
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "model" / "modules.json").write_text("[]")
    experiment = experiment_of(
        tmp_path,
        text_tower=TextTowerConfig(pretrained=folder, locked=locked),
        tokenizer=TokenizerConfig(length=8),
    )
    tokenizer = load_tokenizer(path_of(experiment), experiment.tokenizer)
    built = {"vocab_size": tokenizer.vocab_size, "length": 8, "eos_id": 3, "pad_id": 0, "dim": 20}
    assert {name: getattr(tokenizer, name) for name in built if name != "dim"} | {"dim": 20} == built
    tower = TextTower(experiment.text_tower, **built)
    about = {
        "text_tower": asdict(experiment.text_tower),
        "built_for": built | {"architecture": tower.architecture},
        "tokenizer": tokenizer.fingerprint,
        "image_tower": {"model": "vit"},
        "image_head": None,
        "mode": "locked",
    }
    weights = {f"text_tower.{name}": value for name, value in tower.state_dict().items()}
    weights |= {"log_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-10.0)}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(
        {"siglit": json.loads(json.dumps(about)), "state_dict": weights, "global_step": 3},
        tmp_path / "run" / "checkpoints" / "last.ckpt",
    )
    shutil.copytree(folder, tmp_path / "words")
    shutil.rmtree(folder)
    (tmp_path / "words" / "model.safetensors").unlink()
    moved = replace(experiment, tokenizer=replace(experiment.tokenizer, path=str(tmp_path / "words")))
    monkeypatch.setattr(trained, "open_cache", lambda *_: ThreeRows())
    text = trained.open_trained(moved)
    ids = torch.from_numpy(text.tokenizer(["a red dog", "A Red picture of a dog"])).long()
    assert torch.equal(text.tower(ids), tower.eval()(ids))


def test_a_vocabulary_that_came_out_smaller_is_reported_and_recorded(tmp_path, capsys):
    """Once, where it is trained; a note of an earlier version, which has no such key, is as good."""
    experiment = experiment_of(tmp_path, tokenizer=TokenizerConfig(vocab_size=32_000))
    path = ensure(experiment, ["a red circle", "a blue square"])
    pieces = load_tokenizer(path, experiment.tokenizer).vocab_size
    assert capsys.readouterr().err == (
        f"{path} has {pieces:,} pieces, fewer than tokenizer.vocab_size 32,000: the captions do not support more\n"
    )
    note = tmp_path / "run" / "tokenizer.json"
    saved = json.loads(note.read_text())
    assert (saved["vocab_size"], saved.pop("actual_vocab_size")) == (32_000, pieces)
    note.write_text(json.dumps(saved))
    assert ensure(experiment, []) == path
    assert capsys.readouterr().err == ""


def test_a_vocabulary_of_the_requested_size_is_not_mentioned(tmp_path, capsys):
    experiment = experiment_of(tmp_path, tokenizer=TokenizerConfig(vocab_size=275))
    ensure(experiment, ["a red circle and a blue square"])
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["actual_vocab_size"] == 275
    assert capsys.readouterr().err == ""
