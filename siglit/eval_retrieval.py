"""`siglit eval-retrieval`: encodes the captions of a cache, indexes its images and reports Recall@K.

Knows the run's files; what a figure means is `siglit.evaluation`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from siglit import run as run_folder
from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.evaluation import retrieval
from siglit.evaluation.encoding import encode_ids
from siglit.trained import open_trained


@dataclass(frozen=True)
class RetrievalResult:
    """Recall@K of one cache, as written to retrieval.json."""

    images: int
    captions: int
    metrics: dict[str, float]
    """{"image_to_text/R@1": …}, fractions."""
    by_language: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for each language, and their mean as "average"."""
    label_accuracy: float | None = None
    """Share of labelled images whose nearest distinct caption is one of their class."""

    def to_json(self) -> dict:
        """Flat metrics, then the rest."""
        value: dict = {**self.metrics, "images": self.images, "captions": self.captions}
        if self.label_accuracy is not None:
            value["label_accuracy"] = self.label_accuracy
        if self.by_language:
            value["by_language"] = self.by_language
        return value

    def __str__(self) -> str:
        """A table in per cent: all captions, then each language."""
        names = list(self.metrics)
        heads = [n.replace("image_to_text/", "i→t ").replace("text_to_image/", "t→i ") for n in names]
        rows = [("all", self.metrics), *self.by_language.items()]
        width = max(len("average"), *(len(name) for name, _ in rows))
        lines = [f"{self.images:,} images, {self.captions:,} captions; per cent"]
        lines.append(" " * width + "".join(f"{h:>10}" for h in heads))
        lines += [f"{name:<{width}}" + "".join(f"{100 * m[n]:10.1f}" for n in names) for name, m in rows]
        if self.label_accuracy is not None:
            lines.append(f"class of the nearest distinct caption is right: {100 * self.label_accuracy:.1f}")
        return "\n".join(lines)


def run(experiment: Experiment) -> RetrievalResult:
    """Evaluate the run on its cache; write retrieval.json (of the training cache: retrieval-train.json) and the index.

    Raises:
        UserError: cache, checkpoint and tokenizer do not fit each other, or the cache has no captions.
    """
    trained = open_trained(experiment)
    cache, zimg = trained.cache, trained.zimg
    if cache.num_captions == 0:
        raise UserError(f"{cache.path} has no captions to evaluate with; see data.{experiment.eval.split}")
    device = _device(experiment.eval.accelerator)
    ids = token_ids(cache, trained.tokenizer)
    ztxt = encode_ids(trained.tower.to(device), ids, batch_size=experiment.eval.batch_size, device=device)
    image_of_text = np.asarray(cache.caption_rows)
    langs = cache.langs
    result = RetrievalResult(
        images=len(cache),
        captions=cache.num_captions,
        metrics=retrieval.retrieval_metrics(zimg, ztxt, image_of_text),
        by_language={}
        if langs is None
        else retrieval.metrics_by_language(zimg, ztxt, image_of_text, np.asarray(langs)),
        label_accuracy=_label_accuracy(cache, zimg, ztxt, ids),
    )
    run_folder.write_json(run_folder.result_path(experiment, "retrieval"), result.to_json())
    return result


def _label_accuracy(cache: EmbeddingCache, zimg: np.ndarray, ztxt: np.ndarray, ids: np.ndarray) -> float | None:
    """Class of the nearest distinct caption, where images have labels and no caption stands for two classes."""
    labels = cache.labels
    if labels is None:
        return None
    text_labels = labels[cache.caption_rows]
    _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    unambiguous = text_labels == text_labels[first][inverse.reshape(-1)]
    if not unambiguous.all():
        return None
    return retrieval.label_accuracy(zimg, ztxt[first], labels, text_labels[first])


def _device(accelerator: str) -> torch.device:
    run_folder.check_accelerator("eval.accelerator", accelerator)
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
