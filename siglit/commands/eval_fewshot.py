"""`siglit eval-fewshot`: ridge regression on a few labelled training images per class, tested on the held-out ones.

Knows the run's files; `siglit.evaluation.fewshot` defines the metric.
"""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.evaluation.fewshot import L2, draw_shots, fit_ridge
from siglit.runs.folder import result_path
from siglit.runs.labelled import LabelledSplits, open_splits
from siglit.runtime.files import write_json
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.progress import Meter
from siglit.runtime.text import plural


@dataclass(frozen=True)
class Accuracies:
    """Accuracy over draws of the shots, fractions."""

    mean: float
    std: float | None
    """Sample standard deviation; None for a single draw."""
    seeds: list[float]
    """Accuracy with seed 0, 1, …"""


@dataclass(frozen=True)
class FewshotResult:
    """Accuracy by shots per class, as written to fewshot.json."""

    shots: dict[str, Accuracies]
    images: int
    """Held-out images."""
    classes: int
    l2: float
    """Weight of the L2 penalty."""
    provenance: dict[str, Any]
    """Caches, and checkpoint and step of a trained image tower."""

    def to_json(self) -> dict[str, Any]:
        """Content of the file."""
        return asdict(self)

    def __str__(self) -> str:
        """A line per number of shots, in percent."""
        lines = [
            f"{plural(self.images, 'image')}, {plural(self.classes, 'class')}; percent",
            "shots  top-1  ± over seeds",
        ]
        for shots, accuracies in self.shots.items():
            spread = "" if accuracies.std is None else f"  ±{100 * accuracies.std:.1f}"
            lines.append(f"{shots:>5}{100 * accuracies.mean:7.1f}{spread}")
        return "\n".join(lines)


@reusing_freed_memory()
def eval_fewshot(experiment: Experiment) -> FewshotResult:
    """Evaluate the image tower on eval.shots images per class of data.train; write fewshot.json.

    Raises:
        UserError: a split cannot be opened or has no labels, or a class has too few images.
    """
    config = experiment.eval
    splits = open_splits(experiment)
    _check_shots(splits, config.shots)
    labels, val_labels = splits.class_indices(splits.train), splits.class_indices(splits.val)
    classes, held_out = len(splits.classes), splits.val.embeddings()
    accuracies: dict[int, list[float]] = {shots: [] for shots in config.shots}
    with Meter("few-shot", config.seeds * len(accuracies), "regressions") as meter:
        for seed in range(config.seeds):
            for shots, drawn in draw_shots(labels, np.arange(classes), list(accuracies), seed).items():
                model = fit_ridge(splits.train.cache.gather(splits.train.rows[drawn]), labels[drawn], classes)
                accuracies[shots].append(float((model.predict(held_out) == val_labels).mean()))
                meter.advance(1)
    result = FewshotResult(
        shots={
            str(shots): Accuracies(
                statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, values
            )
            for shots, values in accuracies.items()
        },
        images=len(val_labels),
        classes=classes,
        l2=L2,
        provenance=splits.origin,
    )
    write_json(result_path(experiment.folder, experiment.eval, "fewshot"), result.to_json())
    return result


def _check_shots(splits: LabelledSplits, shots: list[int]) -> None:
    labels, counts = np.unique(splits.train.labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < max(shots):
        raise UserError(
            f"eval.shots needs {plural(max(shots), 'image')} of each class, but class {labels[fewest]} has "
            f"{counts[fewest]} in {splits.train.cache.path}; use fewer, such as --eval.shots [{counts[fewest]}]"
        )
