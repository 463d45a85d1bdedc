"""Zero-shot accuracies are CLIP_benchmark's; a collapsed model scores 0."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from siglit.evaluation import zeroshot
from siglit.evaluation.zeroshot import class_embeddings, classify

CLASSES, TEMPLATES, WIDTH = 12, 3, 16


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def drawn():
    """(images, unit rows of the prompts of each class in turn, their classes, labels)."""
    rng = np.random.default_rng(0)
    ztxt = unit(rng.normal(size=(CLASSES * TEMPLATES, WIDTH)))
    labels = rng.integers(0, CLASSES - 1, 300)
    own = ztxt.reshape(CLASSES, TEMPLATES, WIDTH).mean(1)[labels]
    return unit(own + 0.35 * rng.normal(size=(300, WIDTH))), ztxt, np.repeat(np.arange(CLASSES), TEMPLATES), labels


def accuracy(logits, labels):
    """CLIP_benchmark's accuracy, transcribed: top-1 and top-5 (the package's own does not run with numpy 2.4)."""
    pred = logits.topk(5, 1, True, True)[1].t()
    correct = pred.eq(torch.from_numpy(labels).view(1, -1).expand_as(pred))
    return {k: float(correct[:k].reshape(-1).float().sum()) / len(labels) for k in (1, 5)}


def logits_of(zimg, ztxt):
    """CLIP_benchmark's zero_shot_classifier and run_classification, transcribed."""
    weights = []
    for prompts in torch.from_numpy(ztxt).reshape(CLASSES, TEMPLATES, WIDTH):
        mean = F.normalize(prompts, dim=-1).mean(dim=0)
        weights.append(mean / mean.norm())
    return 100.0 * torch.from_numpy(zimg) @ torch.stack(weights, dim=1)


def test_accuracy_is_that_of_clip_benchmark(drawn):
    zimg, ztxt, classes, labels = drawn
    actual = classify(zimg, class_embeddings(ztxt, classes, CLASSES), labels)
    expected = accuracy(logits_of(zimg, ztxt), labels)
    assert actual.top == pytest.approx(expected)
    assert 0.2 < expected[1] < expected[5] < 1, "neither of them is trivial"


def test_accuracy_is_that_of_the_package(drawn):
    """The same, from CLIP_benchmark's own functions."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    zimg, ztxt, classes, labels = drawn

    class Model:
        encode_text = staticmethod(lambda numbers: torch.from_numpy(3 * ztxt)[numbers])
        encode_image = staticmethod(lambda images: 7 * images)

    names, tokenizer = [str(c) for c in range(CLASSES)], lambda texts: torch.tensor([int(text) for text in texts])
    # The "prompts" of class c are the numbers of its rows.
    wording = [
        type("Template", (), {"format": lambda self, c, i=i: int(c) * TEMPLATES + i})() for i in range(TEMPLATES)
    ]
    batches = [(torch.from_numpy(zimg[i : i + 64]), torch.from_numpy(labels[i : i + 64])) for i in range(0, 300, 64)]
    classifier = theirs.zero_shot_classifier(Model, tokenizer, names, wording, "cpu", amp=False)
    logits, true = theirs.run_classification(Model, classifier, batches, "cpu", amp=False)
    np.testing.assert_array_equal(true.numpy(), labels)
    actual = classify(zimg, class_embeddings(ztxt, classes, CLASSES), labels)
    assert actual.top == pytest.approx(accuracy(logits, labels))


def test_counts_by_class_agree_with_a_loop(drawn):
    zimg, ztxt, classes, labels = drawn
    zcls = class_embeddings(ztxt, classes, CLASSES)
    actual = classify(zimg, zcls, labels)
    predicted = (zimg @ zcls.T).argmax(1)
    expected = np.zeros((CLASSES, CLASSES), np.int64)
    for label, guess in zip(labels, predicted, strict=True):
        expected[label, guess] += 1
    np.testing.assert_array_equal(actual.confusion, expected)
    recalls = [float((predicted[labels == c] == c).mean()) for c in range(CLASSES - 1)]
    np.testing.assert_allclose(actual.per_class[:-1], recalls)
    assert np.isnan(actual.per_class[-1]), "no image is of the last class"
    assert actual.mean_per_class == pytest.approx(np.mean(recalls))


def test_several_names_of_a_class_share_one_mean(drawn):
    """Prompts count alike, whatever name they are of; their order does not matter."""
    _, ztxt, _, _ = drawn
    classes = np.array([1, 0, 1, 1, 0])
    actual = class_embeddings(ztxt[:5], classes, 2)
    for label, rows in ((0, [1, 4]), (1, [0, 2, 3])):
        mean = ztxt[rows].astype(np.float64).sum(0)
        np.testing.assert_allclose(actual[label], mean / np.linalg.norm(mean), atol=1e-6)


def test_blocks_do_not_change_the_result(drawn, monkeypatch):
    zimg, ztxt, classes, labels = drawn
    zcls = class_embeddings(ztxt, classes, CLASSES)
    whole = classify(zimg, zcls, labels)
    monkeypatch.setattr(zeroshot, "_SCORES_AT_ONCE", 7 * CLASSES)
    parts = classify(zimg, zcls, labels)
    assert whole.top == parts.top
    np.testing.assert_array_equal(whole.confusion, parts.confusion)


def test_images_without_a_label_are_left_out(drawn):
    zimg, ztxt, classes, labels = drawn
    zcls, known = class_embeddings(ztxt, classes, CLASSES), labels.copy()
    known[::3] = -1
    actual, alone = classify(zimg, zcls, known), classify(zimg[known >= 0], zcls, labels[known >= 0])
    assert actual.images == 200
    assert actual.top == alone.top


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_collapsed_model_scores_0(drawn, noise):
    """All images and all classes are equal: with an argmax, the first class would score its share."""
    zimg, ztxt, _, labels = drawn
    rng = np.random.default_rng(1)
    same = ztxt[:1] + noise * rng.normal(size=(CLASSES, WIDTH))
    actual = classify(np.repeat(zimg[:1], len(labels), 0), unit(same), labels)
    assert actual.top == {1: 0.0, 5: 0.0}
    assert actual.mean_per_class == 0
    assert actual.confusion.diagonal().sum() == 0
    assert actual.confusion.sum() == len(labels)


def test_nan_is_correct_nowhere(drawn):
    zimg, ztxt, classes, labels = drawn
    zcls = class_embeddings(ztxt, classes, CLASSES)
    broken = np.full_like(zimg, np.nan)
    assert classify(broken, zcls, labels).top == {1: 0.0, 5: 0.0}


def test_top_5_of_five_classes_is_left_out():
    zimg = np.eye(6, dtype=np.float32)
    assert set(classify(zimg, zimg, np.arange(6)).top) == {1, 5}
    assert classify(zimg[:5], zimg[:5], np.arange(5)).top == {1: 1.0}


def test_invalid_arrays_are_refused():
    zimg = np.eye(3, dtype=np.float32)
    for labels, classes, message in (
        ([0, 1, 3], 3, "label 3"),
        ([-1, -1, -1], 3, "got none"),
        ([0, 0, 0], 1, "two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            classify(zimg, zimg[:classes], np.array(labels))
    with pytest.raises(ValueError, match="needs a prompt"):
        class_embeddings(zimg, np.array([0, 0, 2]), 3)
    with pytest.raises(ValueError, match="3 prompts"):
        class_embeddings(zimg, np.array([0, 1]), 2)
