"""eval-fewshot: accuracies equal a plain computation on the caches alone; classes that are too small are refused."""

import json
import shutil

import numpy as np
import pytest

import siglit
from siglit.cache import EmbeddingCache
from siglit.errors import UserError
from tests.conftest import parse
from tests.evaluation.test_fewshot import big_vision


def test_accuracies_are_those_of_a_plain_computation(classed, tmp_path):
    """Draws, regressions, means and spreads; no checkpoint, tokenizer or text is needed."""
    words = ("--output_dir", str(tmp_path / "new"), "--eval.shots", "[1,5]", "--eval.seeds", "2")
    result = siglit.eval_fewshot(parse("eval-fewshot", *words))
    train, val = EmbeddingCache("cache/small/train"), EmbeddingCache("cache/small/val")
    rows, test = train.gather(np.arange(40)), val.gather(np.arange(12))
    written = json.loads((tmp_path / "new/fewshot.json").read_text())
    for k in (1, 5):
        expected = []
        for seed in (0, 1):
            draw = np.random.default_rng(seed)
            shots = np.concatenate([draw.permutation(np.where(train.labels == c)[0])[:k] for c in range(4)])
            expected.append(big_vision(rows[shots], train.labels[shots], test, val.labels, 2.0**10)[1])
        accuracies = written["shots"][str(k)]
        assert accuracies["seeds"] == expected
        assert accuracies["mean"] == pytest.approx(np.mean(expected))
        assert accuracies["std"] == pytest.approx(np.std(expected, ddof=1))
    assert (written["images"], written["l2"]) == (12, 1024)
    assert written["provenance"] == {
        "cache": "cache/small/val",
        "cache_digest": val.digest,
        "train_cache": "cache/small/train",
        "train_cache_digest": train.digest,
    }
    assert [line.split()[0] for line in str(result).splitlines()[2:]] == ["1", "5"]


def test_one_draw_has_no_spread(classed):
    result = siglit.eval_fewshot(parse("eval-fewshot", "--eval.shots", "[2]", "--eval.seeds", "1"))
    assert result.shots["2"].std is None
    assert "±" not in str(result).splitlines()[-1]


def test_classes_too_small_for_the_shots_are_refused(classed, tmp_path):
    with pytest.raises(UserError, match=r"eval.shots needs 25 images of each class, but class 0 has 10"):
        siglit.eval_fewshot(parse("eval-fewshot"))
    with pytest.raises(UserError, match=r"eval.shots is \[0, 5\], but it must be a list of numbers of 1 or more"):
        parse("eval-fewshot", "--eval.shots", "[0,5]")
    with pytest.raises(UserError, match="eval.split is train, but this evaluation trains a classifier on data.train"):
        siglit.eval_fewshot(parse("eval-fewshot", "--eval.split", "train"))
    with pytest.raises(UserError, match="data.val is not set"):
        siglit.eval_fewshot(parse("eval-fewshot", "--data.val", "null"))
    shutil.copytree(classed / "cache/small/train", tmp_path / "cache/train")
    with pytest.raises(UserError, match="there is no cache at .*val"):
        siglit.eval_fewshot(parse("eval-fewshot", "--cache.path", str(tmp_path / "cache")))
