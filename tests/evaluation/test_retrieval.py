"""Recall@K, median rank and mAP@10 equal those of a full sort, and a collapsed model scores 0."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from siglit.evaluation import retrieval
from siglit.evaluation.retrieval import fold_metrics, label_accuracy, metrics_by_language, retrieval_metrics
from tests.conftest import ROOT
from tests.evaluation.reference import full_ranking, integer_set, random_set, unit
from tests.loss.reference import MemoryWatch

KS = (1, 5, 10, 100)


@pytest.mark.parametrize("make", [random_set, integer_set])
@pytest.mark.parametrize(
    ("images", "texts", "dim"), [(1, 1, 4), (3, 2, 8), (7, 30, 5), (40, 40, 16), (200, 90, 3), (150, 700, 24)]
)
def test_equals_a_full_ranking(make, images, texts, dim, device):
    """Several captions per image, images without, cut-offs beyond the number of texts, and ties."""
    arrays = make(images, texts, dim)
    actual = retrieval_metrics(*arrays, ks=KS, device=device)
    assert list(actual)[:6] == [f"image_to_text/{n}" for n in ("R@1", "R@5", "R@10", "R@100", "median_rank", "mAP@10")]
    assert actual == pytest.approx(full_ranking(*arrays, KS))


@pytest.mark.parametrize("make", [random_set, integer_set])
def test_metrics_do_not_depend_on_the_blocks(monkeypatch, make, device):
    """Blocks that divide the set evenly and that do not, of single rows and larger than the set."""
    arrays = make(60, 170, 8)
    whole = retrieval_metrics(*arrays, ks=KS)
    assert whole == pytest.approx(full_ranking(*arrays, KS))
    for images, texts in ((7, 11), (1, 170), (60, 1), (20, 17), (59, 169)):
        monkeypatch.setattr(retrieval, "_IMAGES", images)
        monkeypatch.setattr(retrieval, "_TEXTS", texts)
        assert retrieval_metrics(*arrays, ks=KS, device=device) == whole, (images, texts)


def test_order_of_images_and_texts_does_not_matter():
    """Not even where scores tie, which search breaks by position."""
    zimg, ztxt, image_of_text = integer_set(50, 120, 4)
    rng = np.random.default_rng(1)
    images, texts = rng.permutation(50), rng.permutation(120)
    place = np.argsort(images)
    shuffled = retrieval_metrics(zimg[images], ztxt[texts], place[image_of_text[texts]], ks=KS)
    assert shuffled == pytest.approx(retrieval_metrics(zimg, ztxt, image_of_text, ks=KS))


def recall_at_k(scores, positive_pairs, k):
    """CLIP_benchmark's definition, from its zeroshot_retrieval.py: share of the positives among the first K."""
    best = torch.topk(scores, k, dim=1)[1]
    one_hot = torch.nn.functional.one_hot(best, num_classes=scores.shape[1])
    true_positives = (one_hot * positive_pairs[:, None]).sum(dim=(1, 2))
    return true_positives / positive_pairs.sum(dim=1)


@pytest.mark.parametrize("whose", ["transcribed", "installed"])
def test_recall_equals_clip_benchmarks(whose):
    """Five captions an image, as COCO and Flickr30k have them."""
    theirs = recall_at_k
    if whose == "installed":
        theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    rng = np.random.default_rng(0)
    image_of_text = rng.permutation(np.repeat(np.arange(80), 5))
    zimg = unit(rng.standard_normal((80, 12)))
    ztxt = unit(zimg[image_of_text] + rng.standard_normal((400, 12)))
    scores = torch.from_numpy(ztxt @ zimg.T)
    positive = torch.from_numpy(image_of_text[:, None] == np.arange(80))
    actual = retrieval_metrics(zimg, ztxt, image_of_text, ks=(1, 5, 10, 50))
    for k in (1, 5, 10, 50):
        to_image, to_text = theirs(scores, positive, k), theirs(scores.T, positive.T, k)
        assert actual[f"text_to_image/R@{k}"] == pytest.approx((to_image > 0).float().mean().item())
        assert actual[f"image_to_text/R@{k}"] == pytest.approx((to_text > 0).float().mean().item())
    assert 0 < actual["image_to_text/R@1"] < actual["image_to_text/R@10"] < 1


def test_map_equals_trec_evals():
    """Images with one to forty texts, of which the cut leaves ten at most."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    image_of_text = rng.permutation(np.repeat(np.arange(12), [1, 1, 2, 3, 5, 5, 8, 10, 11, 20, 30, 40]))
    zimg = unit(rng.standard_normal((12, 16)))
    ztxt = unit(zimg[image_of_text] + 0.9 * rng.standard_normal((len(image_of_text), 16)))
    scores = zimg @ ztxt.T
    positive = image_of_text == np.arange(12)[:, None]
    for direction, rows, correct in (("image_to_text", scores, positive), ("text_to_image", scores.T, positive.T)):
        qrels = {str(q): {str(a): 1 for a in np.flatnonzero(line)} for q, line in enumerate(correct)}
        run = {str(q): {str(a): float(score) for a, score in enumerate(row)} for q, row in enumerate(rows)}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"map_cut.10"}).evaluate(run)
        mean = np.mean([measures["map_cut_10"] for measures in theirs.values()])
        assert 0.1 < mean < 0.9
        assert retrieval_metrics(zimg, ztxt, image_of_text)[f"{direction}/mAP@10"] == pytest.approx(mean)


def test_median_rank_equals_the_place_in_an_argsort():
    zimg, ztxt, _ = random_set(101, 101, 4)
    image_of_text = np.arange(101)
    scores = zimg @ ztxt.T
    actual = retrieval_metrics(zimg, ztxt, image_of_text)
    for direction, rows in (("image_to_text", scores), ("text_to_image", scores.T)):
        place = np.argsort(np.argsort(-rows, axis=1), axis=1).diagonal() + 1
        assert actual[f"{direction}/median_rank"] == np.median(place) > 1


def test_thousands_of_texts_of_an_image_are_compared_by_its_best_ten():
    """Captions written for a class: all of them count as correct answers, the cut of mAP@10 sees ten."""
    rng = np.random.default_rng(0)
    zimg = unit(rng.standard_normal((3, 6)))
    image_of_text = rng.permutation(np.repeat(np.arange(3), [2000, 900, 100]))
    ztxt = unit(zimg[image_of_text] + 0.7 * rng.standard_normal((3000, 6)))
    own = (zimg[image_of_text] * ztxt).sum(1)
    best = retrieval._best_own_scores(own, image_of_text, 3)
    for image in range(3):
        assert np.array_equal(best[image], -np.sort(-own[image_of_text == image])[:10])
    assert retrieval_metrics(zimg, ztxt, image_of_text, KS) == pytest.approx(
        full_ranking(zimg, ztxt, image_of_text, KS)
    )


@pytest.mark.parametrize("texts_per_image", [1, 5])
@pytest.mark.parametrize(("images", "dim"), [(2, 7), (21, 48), (37, 100), (333, 768)])
def test_a_collapsed_model_scores_nothing(images, dim, texts_per_image, device):
    """All embeddings equal: 0 at every K smaller than the set of wrong answers, and correct answers are ranked last."""
    row = unit(np.random.default_rng(0).standard_normal((1, dim)))
    image_of_text = np.repeat(np.arange(images), texts_per_image)
    ks = tuple(k for k in (1, 5, 10, images - 1) if k <= images - 1)
    rows = row.repeat(images, 0), row.repeat(len(image_of_text), 0)
    actual = retrieval_metrics(*rows, image_of_text, ks=ks, device=device)
    assert {value for name, value in actual.items() if "/R@" in name} == {0.0}
    assert actual["image_to_text/median_rank"] == (images - 1) * texts_per_image + 1
    assert actual["text_to_image/median_rank"] == images
    if images > 10:
        assert actual["image_to_text/mAP@10"] == actual["text_to_image/mAP@10"] == 0.0


def test_ties_count_against(device):
    """A wrong answer as good as the correct one is ranked before it, wherever search happens to put it."""
    zimg = np.eye(3, dtype=np.float32)
    for wrong_first in (True, False):
        ztxt = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
        image_of_text = np.array([2, 0, 1, 2] if wrong_first else [0, 2, 1, 2])
        actual = retrieval_metrics(zimg, ztxt, image_of_text, ks=(1, 2), device=device)
        # Image 0 has a wrong text as near as its own; image 2 has its second text to itself.
        assert actual["image_to_text/R@1"] == pytest.approx(2 / 3)
        assert actual["image_to_text/R@2"] == 1.0


def test_embeddings_with_nan_or_inf_retrieve_nothing(device):
    """A diverged model scores 0, also at a K larger than the set and for the image of the last text."""
    zimg, ztxt, image_of_text = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), np.arange(4)

    def values(images, texts, kind):
        actual = retrieval_metrics(images, texts, image_of_text, ks=KS, device=device)
        return {value for name, value in actual.items() if kind in name}

    for bad in (np.nan, np.inf):
        broken = np.full_like(zimg, bad)
        assert values(broken, broken, "/R@") == values(broken, broken, "/mAP") == {0.0}
        assert values(broken, broken, "median") == {5.0}
    one = ztxt.copy()
    one[3] = np.nan
    for images in (zimg, one):
        assert values(images, one, "/R@") == values(images, one, "/mAP") == {0.75}
        assert values(images, one, "median") == {1.0}


def test_a_text_with_nan_is_a_correct_answer_that_is_never_retrieved():
    """The image's other texts keep their places; the lost one stays in mAP's divisor."""
    zimg, image_of_text = np.eye(3, dtype=np.float32), np.array([0, 0, 1, 2])
    ztxt = zimg[image_of_text].copy()
    ztxt[0] = np.nan
    actual = retrieval_metrics(zimg, ztxt, image_of_text, ks=(1,))
    assert actual["image_to_text/R@1"] == 1.0
    assert actual["image_to_text/mAP@10"] == pytest.approx((1 / 2 + 1 + 1) / 3)


@pytest.mark.parametrize(
    ("images", "texts", "image_of_text"), [(0, 2, [0, 0]), (2, 0, []), (2, 2, [0]), (2, 2, [0, 2]), (2, 2, [-1, 0])]
)
def test_arrays_of_inconsistent_lengths_raise(images, texts, image_of_text):
    with pytest.raises(ValueError, match=r"retrieval needs|must have a row"):
        retrieval_metrics(
            np.ones((images, 3), np.float32), np.ones((texts, 3), np.float32), np.array(image_of_text, np.int64)
        )


def test_arrays_of_any_type_and_layout_are_accepted():
    """Read-only, transposed, of other types: as float32, and unchanged."""
    zimg, ztxt, image_of_text = random_set(30, 50, 6)
    expected = retrieval_metrics(zimg, ztxt, image_of_text)
    numbers = image_of_text.astype(np.int32)
    wide, turned = zimg.astype(np.float64), np.asfortranarray(ztxt)
    for array in (numbers, wide, turned):
        array.setflags(write=False)
    assert retrieval_metrics(wide, turned, numbers) == expected
    assert np.array_equal(wide, zimg)


def test_autocast_does_not_round_the_scores(device):
    """bfloat16 scores have 3 digits and would have other ranks."""
    arrays = random_set(200, 300, 32)
    expected = retrieval_metrics(*arrays, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert retrieval_metrics(*arrays, device=device) == expected


@pytest.mark.cuda
def test_metrics_on_a_gpu_are_the_same():
    arrays = random_set(2500, 5000, 64)
    assert retrieval_metrics(*arrays, device="cuda") == pytest.approx(retrieval_metrics(*arrays), abs=1e-3)


def test_no_more_than_a_block_of_scores_is_held(monkeypatch):
    """Of 2,000 × 3,000 scores, 24 MB, all that is held at a time is about 0.7 MB, beside the embeddings."""
    monkeypatch.setattr(retrieval, "_IMAGES", 256)
    monkeypatch.setattr(retrieval, "_TEXTS", 512)
    arrays = random_set(2000, 3000, 4)
    with MemoryWatch() as warm_up:
        retrieval_metrics(*random_set(5, 5, 4), quiet=True)
    tracemalloc.start()
    try:
        with MemoryWatch() as watch:
            retrieval_metrics(*arrays, quiet=True)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    scores, answers = 256 * 512, 10 * 2000
    assert warm_up.largest < watch.largest <= max(scores, answers)
    assert watch.peak < 1.5 * (4 + 1) * scores + 3 * 8 * answers < 2000 * 3000
    assert held < 2000 * 3000, "numpy's arrays, and Python's own objects"


GROWTH = """
import numpy as np, torch
from benchmarks.common import begin_peak, peak
from siglit.evaluation.retrieval import retrieval_metrics
torch.set_num_threads(2)
images, texts = (np.random.default_rng(0).standard_normal((rows, 768), np.float32) for rows in (3_000, 60_000))
retrieval_metrics(images[:100], texts[:100], np.arange(100), quiet=True)
before, how = begin_peak()
assert how == "VmHWM", how
retrieval_metrics(images, texts, np.repeat(np.arange(3_000), 20), quiet=True)
print((peak() - before) / texts.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the process's high-water mark")
def test_the_process_grows_by_less_than_half_of_the_texts():
    """Bytes that the system counts: an allocator that cannot use again what was freed shows nowhere else."""
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def test_each_language_is_ranked_alone_and_their_mean_is_unweighted():
    zimg, ztxt, image_of_text = random_set(60, 200, 6)
    langs = np.random.default_rng(2).choice(["de", "en", "ja", ""], 200, p=[0.5, 0.3, 0.1, 0.1])
    table = metrics_by_language(zimg, ztxt, image_of_text, langs, ks=(1, 5))
    assert list(table) == ["de", "en", "ja", "average"]
    for lang in ("de", "en", "ja"):
        texts = langs == lang
        images = sorted(set(image_of_text[texts]))
        numbers = np.array([images.index(i) for i in image_of_text[texts]])
        assert table[lang] == pytest.approx(full_ranking(zimg[images], ztxt[texts], numbers, (1, 5)))
    assert "text_to_image/mAP@10" in table["average"]
    for name, value in table["average"].items():
        assert value == pytest.approx(np.mean([table[lang][name] for lang in ("de", "en", "ja")]))


def test_texts_without_language_make_no_table():
    zimg, ztxt, image_of_text = random_set(5, 5, 4)
    assert metrics_by_language(zimg, ztxt, image_of_text, np.array([""] * 5)) == {}


def test_folds_are_equal_parts_in_order_each_ranked_alone():
    """Captions in any order, and images without."""
    zimg, ztxt, image_of_text = random_set(60, 200, 6)
    parts = []
    for first in (0, 20, 40):
        texts = (image_of_text >= first) & (image_of_text < first + 20)
        parts.append(full_ranking(zimg[first : first + 20], ztxt[texts], image_of_text[texts] - first, KS))
    expected = {name: np.mean([part[name] for part in parts]) for name in parts[0]}
    assert fold_metrics(zimg, ztxt, image_of_text, 3, KS) == pytest.approx(expected)
    assert fold_metrics(zimg, ztxt, image_of_text, 1, KS) == retrieval_metrics(zimg, ztxt, image_of_text, KS)


def test_folds_of_unequal_size_or_without_texts_raise():
    zimg, ztxt, image_of_text = random_set(60, 200, 6)
    for folds in (7, 120):
        with pytest.raises(ValueError, match=f"60 images cannot be cut into {folds} equal parts"):
            fold_metrics(zimg, ztxt, image_of_text, folds)
    with pytest.raises(ValueError, match="images 30 to 59 have no text"):
        fold_metrics(zimg, ztxt, image_of_text % 30, 2)


def test_label_accuracy_counts_labelled_images_only():
    zimg = unit(np.array([[1, 0.1], [0.1, 1], [1, 0], [0, 1], [0.2, 1]]))
    ztxt = np.eye(2, dtype=np.float32)
    labels = np.array([7, 3, 3, -1, 3])  # correct, correct, wrong, unlabelled, correct
    assert label_accuracy(zimg, ztxt, labels, np.array([7, 3])) == 0.75


def test_an_image_with_nan_has_no_nearest_text():
    """Also where the last text, which row −1 would name, is of its class."""
    zimg = np.array([[1, 0], [np.nan, np.nan]], np.float32)
    assert label_accuracy(zimg, np.eye(2, dtype=np.float32), np.array([7, 3]), np.array([7, 3])) == 0.5
