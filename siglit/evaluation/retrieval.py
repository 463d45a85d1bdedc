"""Image–text retrieval: Recall@K in both directions by exact search.

Arrays in, numbers out; knows nothing of caches, towers or files but the index it is asked to save.
Shapes: I images, T texts, D embedding width, Q queries, N searched rows. No (Q, N) matrix is ever held.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np

_QUERIES_AT_ONCE = 16_384
# The same product of unit rows differs by this much at most with its place in a float32 matrix product (seen: 1e-7).
_TIE = 1e-6
_NOT_FOUND = np.iinfo(np.int64).max


def retrieval_metrics(
    zimg: np.ndarray, ztxt: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@K of images → texts and texts → images.

    An image query is right at K if any of its texts is among the first K; a text query if its image is. An image
    without a text asks nothing but can be found. Equal scores (to 1e-6) count against the model: a wrong answer as good
    as the right one is ranked before it, so that a collapsed model scores 0 and not 1.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) integers, the row of `zimg` that each text describes.
        ks: cut-offs.

    Returns:
        {"image_to_text/R@1": …, "text_to_image/R@1": …}, fractions.

    Raises:
        ValueError: there is nothing to search, or the arrays do not fit each other.

    Source: CLIP_benchmark `zeroshot_retrieval`, whose values these equal where no scores tie.
    """
    image_of_text = np.asarray(image_of_text, dtype=np.int64)
    if len(zimg) == 0 or len(ztxt) == 0:
        raise ValueError(f"retrieval needs images and texts, got {len(zimg)} and {len(ztxt)}")
    if len(ztxt) != len(image_of_text) or image_of_text.min() < 0 or image_of_text.max() >= len(zimg):
        raise ValueError("image_of_text must name a row of zimg for every row of ztxt")
    texts_per_image = np.bincount(image_of_text, minlength=len(zimg))
    asking = np.flatnonzero(texts_per_image)
    to_text = _ranks(
        zimg[asking],
        ztxt,
        lambda query, found: image_of_text[found] == asking[query],
        most_right=int(texts_per_image.max()),
        depth=max(ks),
    )
    to_image = _ranks(ztxt, zimg, lambda query, found: image_of_text[query] == found, most_right=1, depth=max(ks))
    return {
        f"{direction}/R@{k}": float((ranks < k).mean())
        for direction, ranks in (("image_to_text", to_text), ("text_to_image", to_image))
        for k in ks
    }


def metrics_by_language(
    zimg: np.ndarray, ztxt: np.ndarray, image_of_text: np.ndarray, langs: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """Recall@K for each language by itself, among the images and texts of that language only.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) row of `zimg` of each text.
        langs: (T,) language code of each text.
        ks: cut-offs.

    Returns:
        Language → metrics as of `retrieval_metrics`, sorted by code, and under "average" their unweighted mean, as for
        Crossmodal-3600 (arXiv:2205.12522).
    """
    table = {}
    for lang in sorted(set(langs.tolist()) - {""}):
        texts = np.flatnonzero(langs == lang)
        images, image_of = np.unique(image_of_text[texts], return_inverse=True)
        table[lang] = retrieval_metrics(zimg[images], ztxt[texts], image_of, ks)
    if table:
        names = next(iter(table.values()))
        table["average"] = {name: float(np.mean([m[name] for m in table.values()])) for name in names}
    return table


def label_accuracy(zimg: np.ndarray, ztxt: np.ndarray, image_labels: np.ndarray, text_labels: np.ndarray) -> float:
    """Share of labelled images whose nearest text belongs to their own class.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows, one for each distinct text.
        image_labels: (I,) class, −1 for none.
        text_labels: (T,) class of the images that the text describes.
    """
    known = np.flatnonzero(image_labels >= 0)
    _, nearest = faiss.knn(np.ascontiguousarray(zimg[known]), ztxt, 1, metric=faiss.METRIC_INNER_PRODUCT)
    return float((text_labels[nearest[:, 0]] == image_labels[known]).mean())


def save_index(zimg: np.ndarray, path: Path) -> None:
    """Write an exact inner-product index (faiss IndexFlatIP) over (I, D) float32 unit rows, whole or not at all."""
    index = faiss.IndexFlatIP(zimg.shape[1])
    index.add(zimg)
    unfinished = path.with_suffix(".tmp")
    faiss.write_index(index, str(unfinished))
    unfinished.replace(path)


def nearest_images(path: Path, ztxt: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search a saved index; returns (T, k) scores, best first, and (T, k) rows, k = `top_k` or the index's size."""
    index = faiss.read_index(str(path))
    return index.search(ztxt, min(top_k, index.ntotal))


def _ranks(
    queries: np.ndarray,
    base: np.ndarray,
    right: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    most_right: int,
    depth: int,
) -> np.ndarray:
    """Count, for each query, the wrong answers that score as high as its best right one; exact below `depth`.

    Looking `most_right` deeper than `depth` is enough to be exact under ties: if all that is seen ties with the best
    right answer, at least `depth` of it is wrong.
    """
    seen = min(depth + most_right, len(base))
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        block = np.ascontiguousarray(queries[start : start + _QUERIES_AT_ONCE])
        scores, found = faiss.knn(block, base, seen, metric=faiss.METRIC_INNER_PRODUCT)
        numbers = np.arange(start, start + len(block))[:, None]
        # faiss gives row −1 where it found nothing, as for a query that is not a number: no right answer at any K.
        hit = right(np.broadcast_to(numbers, found.shape), found) & (found >= 0)
        best = np.where(hit, scores, -np.inf).max(1, keepdims=True)
        ahead = (~hit & (scores >= best - _TIE)).sum(1)
        ranks[start : start + len(block)] = np.where(hit.any(1), ahead, _NOT_FOUND)
    return ranks
