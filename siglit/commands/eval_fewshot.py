"""`siglit eval-fewshot`: ridge regression on a few labelled training images per class, tested on the held-out ones.

Knows the run's files; what a figure means is `siglit.evaluation.fewshot`.
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
from siglit.runtime.progress import Meter


@dataclass(frozen=True)
class Accuracies:
    """Accuracy over draws of the shots, fractions."""

    mean: float
    std: float | None
    """Sample standard deviation; None for a single draw."""
    seeds: list[float]
    """Of seed 0, 1, …"""


@dataclass(frozen=True)
class FewshotResult:
    """Accuracy by shots per class, as written to fewshot.json."""

    shots: dict[str, Accuracies]
    images: int
    """Held-out images."""
    classes: int
    l2: float
    of: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it stands."""
        return asdict(self)

    def __str__(self) -> str:
        """A line per number of shots, in per cent."""
        lines = [f"{self.images:,} images, {self.classes:,} classes; per cent", "shots  top-1  ± over seeds"]
        for shots, found in self.shots.items():
            spread = "" if found.std is None else f"  ±{100 * found.std:.1f}"
            lines.append(f"{shots:>5}{100 * found.mean:7.1f}{spread}")
        return "\n".join(lines)


def eval_fewshot(experiment: Experiment) -> FewshotResult:
    """Evaluate the image tower on eval.shots images per class of data.train; write fewshot.json.

    Raises:
        UserError: a split cannot be opened or has no labels, or a class has too few images.
    """
    config = experiment.eval
    splits = open_splits(experiment)
    _check_shots(splits, config.shots)
    labels, wanted = splits.class_indices(splits.train), splits.class_indices(splits.val)
    classes, held_out = len(splits.classes), splits.val.embeddings()
    right: dict[int, list[float]] = {shots: [] for shots in config.shots}
    with Meter("few-shot", config.seeds * len(right), "regressions") as meter:
        for seed in range(config.seeds):
            for shots, drawn in draw_shots(labels, np.arange(classes), list(right), seed).items():
                model = fit_ridge(splits.train.cache.gather(splits.train.rows[drawn]), labels[drawn], classes)
                right[shots].append(float((model.predict(held_out) == wanted).mean()))
                meter.advance(1)
    result = FewshotResult(
        shots={
            str(shots): Accuracies(statistics.mean(found), statistics.stdev(found) if found[1:] else None, found)
            for shots, found in right.items()
        },
        images=len(wanted),
        classes=classes,
        l2=L2,
        of=splits.origin,
    )
    write_json(result_path(experiment.folder, experiment.eval, "fewshot"), result.to_json())
    return result


def _check_shots(splits: LabelledSplits, shots: list[int]) -> None:
    found, counts = np.unique(splits.train.labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < max(shots):
        raise UserError(
            f"eval.shots asks for {max(shots)} images of each class, but class {found[fewest]} has {counts[fewest]} in "
            f"{splits.train.cache.path}; take fewer, such as --eval.shots [{counts[fewest]}]"
        )
