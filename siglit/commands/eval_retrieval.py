"""`siglit eval-retrieval`: Recall@K, median rank and mAP between the images and the captions of a cache.

Knows the run's files; `siglit.evaluation.retrieval` defines the metrics.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.evaluation import index as indices
from siglit.evaluation import retrieval
from siglit.runs.folder import result_path
from siglit.runs.launch import choose_device
from siglit.runs.trained import TrainedRun, open_trained
from siglit.runtime.files import write_json
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.text import plural

_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval in one cache, as written to retrieval.json."""

    images: int
    captions: int
    metrics: dict[str, float]
    """{"image_to_text/R@1": …}: fractions, and ranks from 1."""
    by_language: dict[str, dict[str, float]] = field(default_factory=dict)
    """The metrics for each language, and their mean as "average"."""
    label_accuracy: float | None = None
    """Share of labelled images whose nearest distinct caption is of their class."""
    folds: dict[str, float] = field(default_factory=dict)
    """If eval.folds is more than 1: "count", the number of folds, and the mean of the metrics over them."""
    index: indices.IndexComparison | None = None
    """The approximate index of eval.index."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Checkpoint, step, cache and its digest."""

    def to_json(self) -> dict[str, Any]:
        """Content of the file: the metrics, then the rest."""
        value: dict[str, Any] = {**self.metrics, "images": self.images, "captions": self.captions}
        if self.label_accuracy is not None:
            value["label_accuracy"] = self.label_accuracy
        if len(self.by_language) > 0:
            value["by_language"] = self.by_language
        if len(self.folds) > 0:
            value["folds"] = self.folds
        if self.index is not None:
            value["index"] = self.index.to_json()
        return {**value, "provenance": self.provenance}

    def __str__(self) -> str:
        """A table: all captions, the mean of the folds, then each language."""
        rows = [("all", self.metrics)]
        if len(self.folds) > 0:
            rows.append((f"mean of {self.folds['count']} folds", self.folds))
        rows += self.by_language.items()
        width = max(len("average"), *(len(name) for name, _ in rows))
        heads = [self._heads(direction) for direction in _DIRECTIONS]
        counts = f"{plural(self.images, 'image')}, {plural(self.captions, 'caption')}"
        lines = [f"{counts}; R@K and mAP in percent, median rank from 1"]
        titles = (f"{title:>{sum(map(len, head))}}" for title, head in zip(_DIRECTIONS.values(), heads, strict=True))
        lines.append(" " * width + "".join(titles))
        lines.append(" " * width + "".join(part for head in heads for part in head))
        lines += [f"{name:<{width}}" + "".join(self._cells(metrics)) for name, metrics in rows]
        if self.label_accuracy is not None:
            lines.append(f"nearest distinct caption is of the image's class: {100 * self.label_accuracy:.1f}")
        if self.index is not None:
            lines.append(str(self.index))
        return "\n".join(lines)

    def _heads(self, direction: str) -> list[str]:
        names = [name.removeprefix(f"{direction}/") for name in self.metrics if name.startswith(f"{direction}/")]
        return [f"{name.replace('median_rank', 'median'):>8}" for name in names]

    def _cells(self, metrics: dict[str, float]) -> list[str]:
        return [f"{metrics[name] * (1 if 'rank' in name else 100):8.1f}" for name in self.metrics]


@reusing_freed_memory()
def eval_retrieval(experiment: Experiment) -> RetrievalResult:
    """Evaluate the run on its cache; write retrieval.json (of the training cache: retrieval-train.json) and the index.

    Raises:
        UserError: cache, checkpoint and tokenizer do not match, the cache has no captions, eval.folds does not divide
            its images, or faiss cannot build eval.index for them.
    """
    device = choose_device("eval", experiment.eval.accelerator)
    trained = open_trained(experiment)
    cache, zimg = trained.cache, trained.zimg
    if cache.num_captions == 0:
        raise UserError(f"{cache.path} has no captions to evaluate with; check data.{experiment.eval.split}")
    _check_folds(experiment.eval.folds, cache)
    built = _build(experiment, trained)
    ids = token_ids(cache, trained.tokenizer)
    ztxt = trained.encode_ids(ids, device=device)
    arrays = zimg, ztxt, np.asarray(cache.caption_rows)
    langs = cache.langs
    result = RetrievalResult(
        images=len(cache),
        captions=cache.num_captions,
        metrics=retrieval.retrieval_metrics(*arrays, device=device),
        by_language={} if langs is None else retrieval.metrics_by_language(*arrays, np.asarray(langs), device=device),
        label_accuracy=_label_accuracy(cache, zimg, ztxt, ids),
        folds=_folds(experiment.eval.folds, arrays, device),
        index=None if built is None else indices.compare(built, *arrays),
        provenance=trained.origin(),
    )
    trained.ensure_exact_index()
    write_json(result_path(experiment.folder, experiment.eval, "retrieval"), result.to_json())
    return result


def _check_folds(folds: int, cache: EmbeddingCache) -> None:
    """Refuse eval.folds before anything is computed."""
    if len(cache) % folds:
        raise UserError(
            f"eval.folds is {folds}, but {folds} does not divide the {len(cache):,} images of {cache.path}; choose a "
            "number that does, or 1 for no folds"
        )


def _folds(folds: int, arrays: tuple[np.ndarray, np.ndarray, np.ndarray], device: torch.device) -> dict[str, float]:
    if folds == 1:
        return {}
    try:
        return {"count": folds, **retrieval.fold_metrics(*arrays, folds, device=device)}
    except ValueError as error:
        raise UserError(f"eval.folds is {folds}, but {error}; choose fewer, or 1 for no folds") from error


def _build(experiment: Experiment, trained: TrainedRun) -> indices.ApproximateIndex | None:
    """The index of eval.index, saved beside the exact one; built before captions are encoded, to fail early."""
    factory = experiment.eval.index
    if factory is None:
        return None
    exact = trained.index_file
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", factory)
    try:
        return indices.load_or_build(trained.zimg, factory, exact.with_name(f"{exact.stem}-{name}{exact.suffix}"))
    except ValueError as error:
        raise UserError(
            f"eval.index: {error}; choose another factory string, such as HNSW32, or leave it out"
        ) from error


def _label_accuracy(cache: EmbeddingCache, zimg: np.ndarray, ztxt: np.ndarray, ids: np.ndarray) -> float | None:
    """Share of images whose nearest distinct caption is of their class; None without labels or if a caption has two."""
    labels = cache.labels
    if labels is None:
        return None
    text_labels = labels[cache.caption_rows]
    _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    unambiguous = text_labels == text_labels[first][inverse.reshape(-1)]
    if not unambiguous.all():
        return None
    return retrieval.label_accuracy(zimg, ztxt[first], labels, text_labels[first])
