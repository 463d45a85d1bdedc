"""Recall@K equals what a plain full ranking gives, and cannot be had by collapsing."""

import faiss
import numpy as np
import pytest

from siglit.evaluation import retrieval
from siglit.evaluation.retrieval import (
    label_accuracy,
    metrics_by_language,
    nearest_images,
    retrieval_metrics,
    save_index,
)

KS = (1, 5, 10, 100)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_set(images, texts, dim, seed=0):
    """Texts near their images, several for some and none for others."""
    rng = np.random.default_rng(seed)
    zimg = unit(rng.standard_normal((images, dim)))
    image_of_text = rng.integers(0, images, texts)
    return zimg, unit(zimg[image_of_text] + 0.8 * rng.standard_normal((texts, dim))), image_of_text


def whole_numbers(images, texts, dim, seed=0):
    """Few small whole numbers, whose products are exact and often equal: full of ties."""
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(0, images, texts)
    zimg, ztxt = (rng.integers(-1, 2, (n, dim)).astype(np.float32) for n in (images, texts))
    return zimg, ztxt, image_of_text


def brute_force(zimg, ztxt, image_of_text, ks):
    """Full matrix, query by query: right at K if fewer than K wrong answers are as good as the best right one."""
    scores = zimg.astype(np.float64) @ ztxt.astype(np.float64).T

    def recall(rows, right):
        ranks = []
        for query, row in enumerate(rows):
            correct = right(query)
            if correct.any():
                ranks.append(np.sum(row[~correct] >= row[correct].max() - 1e-6))
        return {k: np.mean([rank < k for rank in ranks]) for k in ks}

    to_text = recall(scores, lambda image: image_of_text == image)
    to_image = recall(scores.T, lambda text: np.arange(len(zimg)) == image_of_text[text])
    return {f"image_to_text/R@{k}": v for k, v in to_text.items()} | {
        f"text_to_image/R@{k}": v for k, v in to_image.items()
    }


@pytest.mark.parametrize("make", [random_set, whole_numbers])
@pytest.mark.parametrize(
    ("images", "texts", "dim"), [(1, 1, 4), (3, 2, 8), (7, 30, 5), (40, 40, 16), (200, 90, 3), (150, 700, 24)]
)
def test_equals_a_full_ranking(make, images, texts, dim):
    """Several captions per image, images without, cut-offs beyond the number of texts, and ties."""
    arrays = make(images, texts, dim)
    assert retrieval_metrics(*arrays, ks=KS) == pytest.approx(brute_force(*arrays, KS))


def test_is_the_same_however_the_queries_are_cut(monkeypatch):
    arrays = random_set(60, 170, 8)
    whole = retrieval_metrics(*arrays, ks=KS)
    monkeypatch.setattr(retrieval, "_QUERIES_AT_ONCE", 7)
    assert retrieval_metrics(*arrays, ks=KS) == whole == pytest.approx(brute_force(*arrays, KS))


def test_order_of_images_and_texts_does_not_matter():
    """Not even where scores tie, which search breaks by position."""
    zimg, ztxt, image_of_text = whole_numbers(50, 120, 4)
    rng = np.random.default_rng(1)
    images, texts = rng.permutation(50), rng.permutation(120)
    place = np.argsort(images)
    shuffled = retrieval_metrics(zimg[images], ztxt[texts], place[image_of_text[texts]], ks=KS)
    assert shuffled == pytest.approx(retrieval_metrics(zimg, ztxt, image_of_text, ks=KS))


@pytest.mark.parametrize("texts_per_image", [1, 5])
@pytest.mark.parametrize(("images", "dim"), [(2, 7), (21, 48), (37, 100), (333, 768)])
def test_a_collapsed_model_scores_nothing(images, dim, texts_per_image):
    """All embeddings equal: 0 at every K smaller than the set of wrong answers."""
    row = unit(np.random.default_rng(0).standard_normal((1, dim)))
    image_of_text = np.repeat(np.arange(images), texts_per_image)
    ks = tuple(k for k in (1, 5, 10, images - 1) if k <= images - 1)
    found = retrieval_metrics(row.repeat(images, 0), row.repeat(len(image_of_text), 0), image_of_text, ks=ks)
    assert set(found.values()) == {0.0}


def test_ties_count_against():
    """A wrong answer as good as the right one stands before it, wherever search happens to put it."""
    zimg = np.eye(3, dtype=np.float32)
    for wrong_first in (True, False):
        ztxt = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
        image_of_text = np.array([2, 0, 1, 2] if wrong_first else [0, 2, 1, 2])
        found = retrieval_metrics(zimg, ztxt, image_of_text, ks=(1, 2))
        # Image 0 has a wrong text as near as its own; image 2 has its second text to itself.
        assert found["image_to_text/R@1"] == pytest.approx(2 / 3)
        assert found["image_to_text/R@2"] == 1.0


def test_embeddings_that_are_not_numbers_find_nothing():
    """A diverged model scores 0, also at a K larger than the set and for the image of the last text."""
    zimg, ztxt, image_of_text = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), np.arange(4)
    broken = np.full_like(zimg, np.nan)
    assert set(retrieval_metrics(broken, broken, image_of_text, ks=KS).values()) == {0.0}
    one = ztxt.copy()
    one[3] = np.nan
    assert set(retrieval_metrics(zimg, one, image_of_text, ks=(1, 10)).values()) == {0.75}
    assert set(retrieval_metrics(one, one, image_of_text, ks=(1, 10)).values()) == {0.75}


@pytest.mark.parametrize(
    ("images", "texts", "image_of_text"), [(0, 2, [0, 0]), (2, 0, []), (2, 2, [0]), (2, 2, [0, 2]), (2, 2, [-1, 0])]
)
def test_arrays_that_do_not_fit_raise(images, texts, image_of_text):
    with pytest.raises(ValueError, match=r"retrieval needs|must name a row"):
        retrieval_metrics(
            np.ones((images, 3), np.float32), np.ones((texts, 3), np.float32), np.array(image_of_text, np.int64)
        )


def test_languages_are_ranked_by_themselves_and_averaged_without_weights():
    zimg, ztxt, image_of_text = random_set(60, 200, 6)
    langs = np.random.default_rng(2).choice(["de", "en", "ja", ""], 200, p=[0.5, 0.3, 0.1, 0.1])
    table = metrics_by_language(zimg, ztxt, image_of_text, langs, ks=(1, 5))
    assert list(table) == ["de", "en", "ja", "average"]
    for lang in ("de", "en", "ja"):
        texts = langs == lang
        images = sorted(set(image_of_text[texts]))
        numbers = np.array([images.index(i) for i in image_of_text[texts]])
        assert table[lang] == pytest.approx(brute_force(zimg[images], ztxt[texts], numbers, (1, 5)))
    for name, value in table["average"].items():
        assert value == pytest.approx(np.mean([table[lang][name] for lang in ("de", "en", "ja")]))


def test_texts_without_language_make_no_table():
    zimg, ztxt, image_of_text = random_set(5, 5, 4)
    assert metrics_by_language(zimg, ztxt, image_of_text, np.array([""] * 5)) == {}


def test_label_accuracy_counts_labelled_images_only():
    zimg = unit(np.array([[1, 0.1], [0.1, 1], [1, 0], [0, 1], [0.2, 1]]))
    ztxt = np.eye(2, dtype=np.float32)
    labels = np.array([7, 3, 3, -1, 3])  # right, right, wrong, unlabelled, right
    assert label_accuracy(zimg, ztxt, labels, np.array([7, 3])) == 0.75


def test_a_saved_index_finds_what_the_full_matrix_finds(tmp_path):
    zimg, ztxt, _ = random_set(80, 20, 12)
    save_index(zimg, tmp_path / "images.index")
    scores, rows = nearest_images(tmp_path / "images.index", ztxt, 6)
    matrix = ztxt @ zimg.T
    assert np.array_equal(rows, np.argsort(-matrix, axis=1)[:, :6])
    assert scores == pytest.approx(-np.sort(-matrix, axis=1)[:, :6], abs=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["images.index"]


def test_more_answers_than_images_are_cut_to_the_images(tmp_path):
    zimg, ztxt, _ = random_set(4, 2, 12)
    save_index(zimg, tmp_path / "images.index")
    scores, rows = nearest_images(tmp_path / "images.index", ztxt, 10)
    assert scores.shape == rows.shape == (2, 4)
    assert sorted(rows[0]) == [0, 1, 2, 3]


def test_a_failed_save_leaves_the_old_index(tmp_path, monkeypatch):
    """What breaks off in the middle of writing does not touch the file of before."""
    path = tmp_path / "images.index"
    zimg, ztxt, _ = random_set(10, 3, 4)
    save_index(zimg, path)
    before = path.read_bytes()

    def full_disk(_, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(faiss, "write_index", full_disk)
    with pytest.raises(RuntimeError, match="no space"):
        save_index(-zimg, path)
    assert path.read_bytes() == before
    assert nearest_images(path, ztxt, 1)[1].shape == (3, 1)
