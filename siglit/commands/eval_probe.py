"""`siglit eval-probe`: logistic regression on all labelled training images, tested on the held-out ones.

Knows the run's files; `siglit.evaluation.linear_probe` defines the metric.
"""

from dataclasses import dataclass
from typing import Any

from siglit.config import Experiment
from siglit.evaluation.linear_probe import probe
from siglit.runs.folder import result_path
from siglit.runs.labelled import open_splits
from siglit.runs.launch import choose_device
from siglit.runtime.files import write_json
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.progress import Meter
from siglit.runtime.text import plural


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of the probe, as written to probe.json."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    mean_per_class: float
    l2: float
    """Weight of the L2 penalty with the best accuracy on a held-out tenth of the training images."""
    held_out: dict[str, float]
    """{weight of the penalty: accuracy on that tenth}."""
    gradient: float
    """Largest component of the objective's gradient at the end, 0 at the optimum."""
    train_images: int
    images: int
    classes: int
    provenance: dict[str, Any]
    """Caches, and checkpoint and step of a trained image tower."""

    def to_json(self) -> dict[str, Any]:
        """Content of the file, without top5 if it is None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        """Accuracies in percent, and the penalty."""
        lines = [
            f"{plural(self.images, 'image')}, {plural(self.classes, 'class')}, trained on "
            f"{plural(self.train_images, 'image')}; percent",
            f"top-1           {100 * self.top1:5.1f}",
            *([] if self.top5 is None else [f"top-5           {100 * self.top5:5.1f}"]),
            f"mean per class  {100 * self.mean_per_class:5.1f}",
            f"L2 penalty {self.l2:g}, best of {', '.join(self.held_out)} on a held-out tenth of the training images",
        ]
        return "\n".join(lines)


@reusing_freed_memory()
def eval_probe(experiment: Experiment) -> ProbeResult:
    """Fit the probe to the image tower's outputs for data.train and test it on data.val; write probe.json.

    Raises:
        UserError: a split has no cache or no labels.
    """
    device = choose_device("eval", experiment.eval.accelerator)
    splits = open_splits(experiment)
    with Meter("linear probe", None, "epochs") as meter:
        probed = probe(
            splits.train.embeddings(),
            splits.class_indices(splits.train),
            splits.val.embeddings(),
            splits.class_indices(splits.val),
            len(splits.classes),
            device=device,
            on_pass=lambda: meter.advance(1),
        )
    result = ProbeResult(
        top1=probed.test.top[1],
        top5=probed.test.top.get(5),
        mean_per_class=probed.test.mean_per_class,
        l2=probed.l2,
        held_out={f"{l2:g}": share for l2, share in probed.held_out.items()},
        gradient=probed.gradient,
        train_images=len(splits.train.rows),
        images=probed.test.images,
        classes=len(splits.classes),
        provenance=splits.origin,
    )
    write_json(result_path(experiment.folder, experiment.eval, "probe"), result.to_json())
    return result
