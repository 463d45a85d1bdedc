"""`siglit eval-logits`: histogram and calibration of the logits of pairs, and nearest captions.

Knows the run's files; `siglit.evaluation.logits` defines the metrics.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from siglit.config import Experiment
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.evaluation.logits import logit_health, nearest_rows
from siglit.runs.folder import result_path
from siglit.runs.launch import choose_device
from siglit.runs.trained import TrainedRun, open_trained
from siglit.runtime.files import write_json
from siglit.runtime.malloc import reusing_freed_memory

_CAPTIONS, _NEIGHBORS = 12, 5
"""Captions whose nearest other captions are listed, and how many of these."""


@dataclass(frozen=True)
class LogitsResult:
    """Logits of held-out pairs, as written to logits.json."""

    value: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Content of the file."""
        return self.value

    def __str__(self) -> str:
        """A table of positive and negative pairs, the calibration, and the nearest caption of a few."""
        value = self.value
        lines = [f"{'logits of':<12}{'pairs':>16}{'mean':>8}{'5 %':>8}{'median':>8}{'95 %':>8}"]
        for kind in ("positive", "negative"):
            quantiles = value[f"{kind}_quantiles"]
            if len(quantiles) > 0:
                numbers = (value[f"{kind}_mean"], *(quantiles[q] for q in ("0.05", "0.5", "0.95")))
                lines.append(f"{kind + 's':<12}{value[f'{kind}s']:>16,}" + "".join(f"{n:8.2f}" for n in numbers))
        lines.append(f"t {value['logit_scale']:.4g}, b {value['logit_bias']:.4g}")
        if value["ece"] is not None:
            lines.append(
                f"expected calibration error {value['ece']:.3g}, with a share of {value['prior']:.3g} positive "
                f"(batches of {value['batch_size']:,})"
            )
        nearest = [(entry["caption"], entry["nearest"][0]) for entry in value["nearest"] if len(entry["nearest"]) > 0]
        if len(nearest) > 0:
            lines.append("captions, each with its nearest other caption:")
            lines += [f"  {best['cosine']:.3f}  {caption}  |  {best['caption']}" for caption, best in nearest]
        return "\n".join(lines)


@reusing_freed_memory()
def eval_logits(experiment: Experiment) -> LogitsResult:
    """Compute the logits of all pairs of eval.split and write logits.json.

    A logit of the softmax loss belongs to a choice among a batch's images, not to a pair: it has no bias, and its
    sigmoid is not a probability, so no calibration is reported.

    Raises:
        UserError: cache, checkpoint and tokenizer do not match, the cache has no captions, or the embeddings are not
            finite.
    """
    device = choose_device("eval", experiment.eval.accelerator)
    trained = open_trained(experiment)
    cache = trained.cache
    if cache.num_captions == 0:
        raise UserError(f"{cache.path} has no captions to evaluate with; check data.{experiment.eval.split}")
    ids = token_ids(cache, trained.tokenizer)
    _, first, text_ids = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    text_ids = text_ids.reshape(-1)
    distinct = trained.encode_ids(ids[first], device=device)
    is_softmax = experiment.loss.name == "softmax"
    bias = 0.0 if is_softmax else trained.logit_bias
    batch_size = min(experiment.train.batch_size, len(cache))
    try:
        health = logit_health(
            trained.zimg,
            distinct[text_ids],
            np.asarray(cache.caption_rows),
            trained.logit_scale,
            bias,
            batch_size=batch_size,
            text_ids=text_ids,
            device=device,
        ).to_json()
    except ValueError as error:
        raise UserError(
            f"{trained.checkpoint} has no usable logits: {error}; look in metrics.csv where training went wrong, or "
            "set eval.checkpoint"
        ) from error
    if is_softmax:
        health |= {"calibration": [], "ece": None}
    result = LogitsResult(
        {
            "logit_scale": trained.logit_scale,
            "logit_bias": bias,
            **health,
            "batch_size": batch_size,
            "nearest": _nearest(trained, distinct, first),
            "provenance": trained.origin(),
        }
    )
    write_json(result_path(experiment.folder, experiment.eval, "logits"), result.to_json())
    return result


def _nearest(trained: TrainedRun, distinct: np.ndarray, first: np.ndarray) -> list[dict[str, Any]]:
    """A few evenly spaced captions with the nearest other captions.

    Args:
        trained: the run.
        distinct: (G, D) unit rows of the distinct captions.
        first: (G,) number of the first caption with each distinct text.
    """
    in_order = np.argsort(first)
    queries = in_order[np.unique(np.linspace(0, len(first) - 1, _CAPTIONS).astype(int))]
    caption = trained.cache.caption
    cosines, neighbors = nearest_rows(queries, distinct, _NEIGHBORS)
    return [
        {
            "caption": caption(int(first[row])),
            "nearest": [
                {"caption": caption(int(first[other])), "cosine": float(cosine)}
                for cosine, other in zip(cosines[number], neighbors[number], strict=True)
            ],
        }
        for number, row in enumerate(queries)
    ]
