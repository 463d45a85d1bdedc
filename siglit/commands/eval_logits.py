"""`siglit eval-logits`: the health of the text side: spread and calibration of the logits, and nearest captions.

Knows the run's files; what a figure means is `siglit.evaluation.logits`.
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

_ASKED, _NEIGHBOURS = 12, 5


@dataclass(frozen=True)
class LogitsResult:
    """Logits of held-out pairs, as written to logits.json."""

    value: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What is in the file."""
        return self.value

    def __str__(self) -> str:
        """A table of both kinds of pairs, the calibration, and the nearest caption of a few."""
        value = self.value
        lines = [f"{'logits of':<12}{'pairs':>16}{'mean':>8}{'5 %':>8}{'median':>8}{'95 %':>8}"]
        for kind in ("positive", "negative"):
            quantiles = value[f"{kind}_quantiles"]
            if quantiles:
                numbers = (value[f"{kind}_mean"], *(quantiles[q] for q in ("0.05", "0.5", "0.95")))
                lines.append(f"{kind + 's':<12}{value[f'{kind}s']:>16,}" + "".join(f"{n:8.2f}" for n in numbers))
        lines.append(f"t {value['logit_scale']:.4g}, b {value['logit_bias']:.4g}")
        if value["ece"] is not None:
            lines.append(
                f"expected calibration error {value['ece']:.3g}, where a share of {value['prior']:.3g} is positive "
                f"(batches of {value['batch_size']:,})"
            )
        nearest = [(entry["caption"], entry["nearest"][0]) for entry in value["nearest"] if entry["nearest"]]
        if nearest:
            lines.append("captions, each with its nearest other one:")
            lines += [f"  {best['cosine']:.3f}  {caption}  |  {best['caption']}" for caption, best in nearest]
        return "\n".join(lines)


def eval_logits(experiment: Experiment) -> LogitsResult:
    """Look at all pairs of eval.split and write logits.json.

    The logits of the softmax loss are those of a choice among a batch's images, not of a pair: its scale is shown
    without a bias, and σ of it means nothing, so that nothing is said of its calibration.

    Raises:
        UserError: cache, checkpoint and tokenizer do not fit each other, the cache has no captions, or the embeddings
            are no numbers.
    """
    device = choose_device("eval.accelerator", experiment.eval.accelerator)
    trained = open_trained(experiment)
    cache = trained.cache
    if cache.num_captions == 0:
        raise UserError(f"{cache.path} has no captions to evaluate with; see data.{experiment.eval.split}")
    ids = token_ids(cache, trained.tokenizer)
    _, first, text_ids = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    text_ids = text_ids.reshape(-1)
    distinct = trained.encode_ids(ids[first], device=device)
    softmax = experiment.loss.name == "softmax"
    bias = 0.0 if softmax else trained.logit_bias
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
            f"{trained.checkpoint} gives no logits: {error}; see metrics.csv for where training went wrong, or set "
            "eval.checkpoint"
        ) from error
    if softmax:
        health |= {"calibration": [], "ece": None}
    result = LogitsResult(
        {
            "logit_scale": trained.logit_scale,
            "logit_bias": bias,
            **health,
            "batch_size": batch_size,
            "nearest": _nearest(trained, distinct, first),
            "of": trained.origin(),
        }
    )
    write_json(result_path(experiment.folder, experiment.eval, "logits"), result.to_json())
    return result


def _nearest(trained: TrainedRun, distinct: np.ndarray, first: np.ndarray) -> list[dict[str, Any]]:
    """A few captions, evenly spread, with the nearest other ones.

    Args:
        trained: the run.
        distinct: (G, D) unit rows of the distinct captions.
        first: (G,) number of one caption of each.
    """
    in_order = np.argsort(first)
    asked = in_order[np.unique(np.linspace(0, len(first) - 1, _ASKED).astype(int))]
    caption = trained.cache.caption
    cosines, found = nearest_rows(asked, distinct, _NEIGHBOURS)
    return [
        {
            "caption": caption(int(first[row])),
            "nearest": [
                {"caption": caption(int(first[other])), "cosine": float(cosine)}
                for cosine, other in zip(cosines[number], found[number], strict=True)
            ],
        }
        for number, row in enumerate(asked)
    ]
