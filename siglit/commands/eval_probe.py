"""`siglit eval-probe`: logistic regression on all labelled training images, tested on the held-out ones.

Knows the run's files; what a figure means is `siglit.evaluation.linear_probe`.
"""

from dataclasses import dataclass
from typing import Any

from siglit.config import Experiment
from siglit.evaluation.linear_probe import probe
from siglit.runs.folder import result_path
from siglit.runs.labelled import open_splits
from siglit.runs.launch import choose_device
from siglit.runtime.files import write_json
from siglit.runtime.progress import Meter


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of the probe, as written to probe.json."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    mean_per_class: float
    l2: float
    """Penalty that did best on the held-out tenth of the training images."""
    held_out: dict[str, float]
    """{penalty: accuracy there}."""
    gradient: float
    """Largest component of the objective's gradient at the end, 0 at the optimum."""
    train_images: int
    images: int
    classes: int
    of: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What there is; top5 is left out where it says nothing."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        """Accuracies in per cent, and the penalty."""
        lines = [
            f"{self.images:,} images, {self.classes:,} classes, learnt from {self.train_images:,} images; per cent",
            f"top-1           {100 * self.top1:5.1f}",
            *([] if self.top5 is None else [f"top-5           {100 * self.top5:5.1f}"]),
            f"mean per class  {100 * self.mean_per_class:5.1f}",
            f"penalty {self.l2:g}, the best of {', '.join(self.held_out)} on a held-out tenth of the training images",
        ]
        return "\n".join(lines)


def eval_probe(experiment: Experiment) -> ProbeResult:
    """Fit the probe to the image tower's outputs for data.train, test it on data.val; write probe.json.

    Raises:
        UserError: a split cannot be opened or has no labels.
    """
    device = choose_device("eval.accelerator", experiment.eval.accelerator)
    splits = open_splits(experiment)
    with Meter("linear probe", None, "passes over the training images") as meter:
        probed = probe(
            splits.train.embeddings(),
            splits.class_indices(splits.train),
            splits.val.embeddings(),
            splits.class_indices(splits.val),
            len(splits.classes),
            device=device,
            told=lambda: meter.advance(1),
        )
    result = ProbeResult(
        top1=probed.found.top[1],
        top5=probed.found.top.get(5),
        mean_per_class=probed.found.mean_per_class,
        l2=probed.l2,
        held_out={f"{l2:g}": share for l2, share in probed.held_out.items()},
        gradient=probed.gradient,
        train_images=len(splits.train.rows),
        images=probed.found.images,
        classes=len(splits.classes),
        of=splits.origin,
    )
    write_json(result_path(experiment.folder, experiment.eval, "probe"), result.to_json())
    return result
