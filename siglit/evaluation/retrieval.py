"""Image–text retrieval in both directions: Recall@K, median rank and mAP@10, from exact ranks.

A rank is one more than the number of answers before it, and counting needs no sorting: each block of scores is compared
with the scores of the correct answers of its rows and of its columns, so that one matrix product serves both directions
and the (I, T) scores are never held at once. Arrays in, numbers out; knows nothing of caches, towers or files.
Shapes: I images, T texts, D embedding width, Q queries, P correct answers of a query that are ranked.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import torch

from siglit.runtime.progress import Meter

# Images and texts per block of scores, 8 MiB: large enough for matrix products at full rate, small enough to stay in
# a processor's cache while it is compared.
_IMAGES, _TEXTS = 1024, 2048
# How much the same dot product of unit rows may differ between positions of a float32 matrix product (observed: 1e-7).
_TIE = 1e-6
# The cut-off of mAP@10: the j-th best correct answer has rank j or more, so that no more than ten of them can count.
_DEPTH = 10


def retrieval_metrics(
    zimg: np.ndarray,
    ztxt: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    *,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> dict[str, float]:
    """Compute Recall@K, median rank and mAP@10 of images → texts and texts → images.

    An image query is correct at K if any of its texts is among the first K; a text query if its image is. The median is
    of the rank of the first correct answer, 1 for the best. mAP@10 is the mean of the queries' average precision: the
    precisions at the correct answers among the first ten, summed and divided by the number of all correct answers.

    An image without texts is searched, but is no query. Ties (to 1e-6) count against the model: a wrong answer that
    scores as high as the correct one is ranked before it, so that a collapsed model scores 0 and not 1. An answer whose
    score is not finite is never retrieved.

    Args:
        zimg: (I, D) unit rows, taken as float32.
        ztxt: (T, D) unit rows, taken as float32.
        image_of_text: (T,) integers, the row of `zimg` that each text describes.
        ks: cut-offs.
        device: where the scores are computed; it holds both arrays and a block of scores.
        quiet: show no progress.

    Returns:
        {"image_to_text/R@1": …, "image_to_text/median_rank": …, "image_to_text/mAP@10": …, "text_to_image/R@1": …};
        all but the ranks are fractions.

    Raises:
        ValueError: there are no images or no texts, or `image_of_text` does not have one row of `zimg` for each text.

    Source: R@K of CLIP_benchmark `zeroshot_retrieval`, whose values these equal where no scores tie; the median rank of
    VSE++ `i2t` and `t2i`, not rounded down where the middle two of an even number differ; `map_cut_10` of trec_eval.
    """
    image_of_text = np.require(image_of_text, np.int64, ["C", "W"])
    if len(zimg) == 0 or len(ztxt) == 0:
        raise ValueError(f"retrieval needs images and texts, got {len(zimg)} images and {len(ztxt)} texts")
    if len(ztxt) != len(image_of_text) or image_of_text.min() < 0 or image_of_text.max() >= len(zimg):
        raise ValueError("image_of_text must have a row of zimg for every row of ztxt")
    images, texts = (torch.from_numpy(np.require(rows, np.float32, ["C", "W"])).to(device) for rows in (zimg, ztxt))
    image_of = torch.from_numpy(image_of_text).to(device)
    # Training validates under autocast, and bfloat16 scores would have other ranks.
    with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
        own = _own_scores(images, texts, image_of).cpu().numpy()
        best = _best_own_scores(own, image_of_text, len(zimg))
        own[~np.isfinite(own)] = np.inf
        with Meter("ranking", len(zimg) * len(ztxt), "scores", quiet=quiet) as meter:
            image_bars, text_bars = (torch.from_numpy(score - np.float32(_TIE)).to(device) for score in (best, own))
            before_best, before_own = _count_before(images, texts, image_of, image_bars, text_bars, meter)
    texts_per_image = np.bincount(image_of_text, minlength=len(zimg))
    queried = texts_per_image > 0
    image_ranks = np.where(np.isfinite(best), before_best + np.arange(1, best.shape[1] + 1), np.inf)
    text_ranks = np.where(np.isfinite(own), before_own + 1, np.inf)
    to_text = _metrics(image_ranks[queried], texts_per_image[queried], len(ztxt), ks)
    to_image = _metrics(text_ranks[:, None], np.ones(len(ztxt)), len(zimg), ks)
    return {f"image_to_text/{k}": v for k, v in to_text.items()} | {
        f"text_to_image/{k}": v for k, v in to_image.items()
    }


def metrics_by_language(
    zimg: np.ndarray,
    ztxt: np.ndarray,
    image_of_text: np.ndarray,
    langs: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Compute the metrics of each language among the images and texts of that language only.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) row of `zimg` of each text.
        langs: (T,) language code of each text.
        ks: cut-offs.
        device: where the scores are computed.

    Returns:
        Language → metrics as of `retrieval_metrics`, sorted by code, and "average" → their unweighted mean, as is used
        for Crossmodal-3600 (arXiv:2205.12522). Empty if no text has a language.
    """
    codes = sorted(set(langs.tolist()) - {""})
    if len(codes) == 0:
        return {}
    table = {}
    with Meter("ranking", len(codes), "languages") as meter:
        for lang in codes:
            texts = np.flatnonzero(langs == lang)
            images, image_of = np.unique(image_of_text[texts], return_inverse=True)
            table[lang] = retrieval_metrics(zimg[images], ztxt[texts], image_of, ks, device=device, quiet=True)
            meter.advance(1)
    return table | {"average": _mean(list(table.values()))}


def fold_metrics(
    zimg: np.ndarray,
    ztxt: np.ndarray,
    image_of_text: np.ndarray,
    folds: int,
    ks: Sequence[int] = (1, 5, 10),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Average the metrics over `folds` equal parts of the images, in order, each among its own images and texts.

    Five folds of the 5,000 images of COCO's Karpathy test split are the field's "1k" figures.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) row of `zimg` of each text.
        folds: number of parts, 1 or more.
        ks: cut-offs.
        device: where the scores are computed.

    Raises:
        ValueError: the number of images is not divisible by `folds`, or a part has no text.

    Source: VSE++ `evalrank(fold5=True)`.
    """
    if len(zimg) % folds:
        raise ValueError(f"{len(zimg):,} images cannot be cut into {folds} equal parts")
    size = len(zimg) // folds
    table = []
    with Meter("ranking", folds, "folds") as meter:
        for first in range(0, len(zimg), size):
            texts = np.flatnonzero((image_of_text >= first) & (image_of_text < first + size))
            if len(texts) == 0:
                raise ValueError(f"images {first:,} to {first + size - 1:,} have no text")
            part = slice(first, first + size)
            image_of = image_of_text[texts] - first
            table.append(retrieval_metrics(zimg[part], ztxt[texts], image_of, ks, device=device, quiet=True))
            meter.advance(1)
    return _mean(table)


def label_accuracy(zimg: np.ndarray, ztxt: np.ndarray, image_labels: np.ndarray, text_labels: np.ndarray) -> float:
    """Compute the share of labelled images whose nearest text belongs to their own class.

    Args:
        zimg: (I, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows, one for each distinct text.
        image_labels: (I,) class, −1 for none.
        text_labels: (T,) class of the images that the text describes.
    """
    known = np.flatnonzero(image_labels >= 0)
    _, nearest = faiss.knn(np.ascontiguousarray(zimg[known]), ztxt, 1, metric=faiss.METRIC_INNER_PRODUCT)
    # faiss returns row −1 if it has no answer, as for a query with NaN.
    correct = (nearest[:, 0] >= 0) & (text_labels[nearest[:, 0]] == image_labels[known])
    return float(correct.mean())


def _own_scores(images: torch.Tensor, texts: torch.Tensor, image_of: torch.Tensor) -> torch.Tensor:
    """Return the (T,) score of each text with its own image."""
    scores = torch.empty(len(texts), device=texts.device)
    # One buffer for all parts: with a new one for each, an allocator was observed to keep as much as the texts take.
    buffer = torch.empty((min(len(texts), _TEXTS), texts.shape[1]), device=texts.device)
    for start in range(0, len(texts), _TEXTS):
        part = slice(start, start + _TEXTS)
        rows = buffer[: len(texts[part])]
        torch.index_select(images, 0, image_of[part], out=rows)
        torch.sum(rows.mul_(texts[part]), 1, out=scores[part])
    return scores


def _best_own_scores(own: np.ndarray, image_of_text: np.ndarray, images: int) -> np.ndarray:
    """Return (I, P) scores of each image's best texts, best first; inf for those it lacks or that are not finite."""
    finite = np.flatnonzero(np.isfinite(own))
    order = finite[np.lexsort((-own[finite], image_of_text[finite]))]
    image = image_of_text[order]
    place = np.arange(len(order)) - np.searchsorted(image, image)
    kept = place < _DEPTH
    best = np.full((images, min(_DEPTH, int(np.bincount(image_of_text).max()))), np.inf, np.float32)
    best[image[kept], place[kept]] = own[order[kept]]
    return best


def _count_before(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_of: torch.Tensor,
    image_bars: torch.Tensor,
    text_bars: torch.Tensor,
    meter: Meter,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the wrong answers that score at least as high as the bars.

    Args:
        images: (I, D) rows.
        texts: (T, D) rows.
        image_of: (T,) row of each text's own image.
        image_bars: (I, P) scores.
        text_bars: (T,) scores.
        meter: counts the scores.

    Returns:
        (I, P) numbers of wrong texts that reach each bar of an image; (T,) of wrong images that reach a text's bar.
    """
    before_best = torch.zeros(image_bars.shape, dtype=torch.int64, device=images.device)
    before_own = torch.zeros(text_bars.shape, dtype=torch.int64, device=images.device)
    most = min(len(images), _IMAGES) * min(len(texts), _TEXTS)
    scores = torch.empty(most, device=images.device)
    reached = torch.empty(most, dtype=torch.bool, device=images.device)
    for first in range(0, len(images), _IMAGES):
        part = slice(first, first + _IMAGES)
        rows, bars, counts = images[part], image_bars[part], before_best[part]
        for start in range(0, len(texts), _TEXTS):
            columns = slice(start, start + _TEXTS)
            shape = (len(rows), len(texts[columns]))
            block, mask = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (scores, reached))
            torch.mm(rows, texts[columns].T, out=block)
            _mask_own(block, image_of[columns] - first)
            before_own[columns] += torch.ge(block, text_bars[columns], out=mask).sum(0, dtype=torch.int32)
            for place in range(bars.shape[1]):
                torch.ge(block, bars[:, place : place + 1], out=mask)
                counts[:, place] += mask.sum(1, dtype=torch.int32)
            meter.advance(block.numel())
    return before_best.cpu().numpy(), before_own.cpu().numpy()


def _mask_own(block: torch.Tensor, row_of_column: torch.Tensor) -> None:
    """Set the score of each column's own row to −inf in place, where that row is within the block."""
    row = row_of_column.clamp(0, len(block) - 1)
    column = torch.arange(len(row), device=block.device)
    # Not by a list of the columns within: on a GPU, its length would force a synchronization.
    block[row, column] = torch.where(row == row_of_column, -torch.inf, block[row, column])


def _metrics(ranks: np.ndarray, answers: np.ndarray, searched: int, ks: Sequence[int]) -> dict[str, float]:
    """Compute the metrics of one direction.

    Args:
        ranks: (Q, P) ranks of the best correct answers of each query, ascending, from 1; inf if never retrieved.
        answers: (Q,) number of all correct answers of each query.
        searched: rows that were searched; in the median, an answer that is never retrieved is ranked behind all.
        ks: cut-offs.
    """
    first = ranks[:, 0]
    precision = np.arange(1, ranks.shape[1] + 1) / ranks
    return {f"R@{k}": float((first <= k).mean()) for k in ks} | {
        "median_rank": float(np.median(np.minimum(first, searched + 1))),
        "mAP@10": float((np.where(ranks <= _DEPTH, precision, 0).sum(1) / answers).mean()),
    }


def _mean(table: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([metrics[name] for metrics in table])) for name in table[0]}
