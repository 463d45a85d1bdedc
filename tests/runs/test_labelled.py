"""Both splits must have the same classes; where they do not, the message says how they differ."""

from types import SimpleNamespace

import numpy as np
import pytest

from siglit.errors import UserError
from siglit.runs import labelled
from siglit.runs.labelled import open_splits


def cache(labels, path="cache/x", classes=None, tower="vit"):
    """The part of a cache that is used."""
    source = {"format": "class_folders"} | ({"classes": classes} if classes else {})
    return SimpleNamespace(
        labels=None if labels is None else np.array(labels, np.int64),
        path=path,
        digest=path,
        fingerprint={"image_tower": {"model": tower}, "source": source},
        gather=lambda rows: np.array(rows, np.float16)[:, None],
    )


def opened(monkeypatch, train, val, split="val"):
    monkeypatch.setattr(labelled, "open_cache", lambda _, split: {"train": train, "val": val}[split])
    return open_splits(SimpleNamespace(mode="locked", eval=SimpleNamespace(split=split)))


def test_classes_are_numbered_through_and_images_without_one_left_out(monkeypatch):
    splits = opened(monkeypatch, cache([9, -1, 4, 4, 7]), cache([7, -1, 9]))
    np.testing.assert_array_equal(splits.classes, [4, 7, 9])
    np.testing.assert_array_equal(splits.class_indices(splits.train), [2, 0, 0, 1])
    np.testing.assert_array_equal(splits.class_indices(splits.val), [1, 2])
    np.testing.assert_array_equal(splits.train.embeddings()[:, 0], [0, 2, 3, 4])


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (cache([0, 1]), cache(None), r"has no labels to evaluate with; set data.val.label_column"),
        (cache([-1, -1]), cache([0, 1]), r"has no labels to evaluate with; set data.train.label_column"),
        (cache([0, 1]), cache([0, 2, 3]), r"class 2 has images in data.val but none in data.train \(2 in all\)"),
        (cache([1, 1]), cache([1]), "all images of cache/x are of class 1"),
        (cache([0, 1]), cache([0, 1], tower="resnet"), "are of different image towers"),
        (cache([0, 1], classes=["a", "c"]), cache([0, 1], classes=["a", "b"]), "different class folders.*'b'"),
    ],
)
def test_splits_that_do_not_fit_each_other(monkeypatch, train, val, message):
    with pytest.raises(UserError, match=message):
        opened(monkeypatch, train, val)


def test_the_tested_split_is_the_held_out_one(monkeypatch):
    with pytest.raises(UserError, match="set eval.split to val"):
        opened(monkeypatch, cache([0, 1]), cache([0, 1]), split="train")
