"""`siglit eval-zeroshot`: classifies the images of a cache by the texts of their classes.

Knows the run's files; what a figure means is `siglit.evaluation.zeroshot`.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.data import prompts
from siglit.data.prompts import Names
from siglit.errors import UserError
from siglit.evaluation import zeroshot
from siglit.reporting.confusion import class_lettering, draw_confusion
from siglit.reporting.curves import save_png
from siglit.runs.folder import result_path
from siglit.runs.labelled import class_folders_of, labels_of
from siglit.runs.launch import choose_device
from siglit.runs.trained import open_trained
from siglit.runtime.files import atomic_write, write_json

_HARDEST = 10


@dataclass(frozen=True)
class ZeroshotResult:
    """Accuracy of the classes' texts, as written to zeroshot.json."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    mean_per_class: float
    images: int
    classes: list[str | list[str]]
    """Names, label 0 first."""
    templates: list[str]
    canonicalize: bool
    """Names and templates were made lower case and free of punctuation first; above they stand as they were given."""
    per_class: dict[str, float | None]
    """Share of a class's images that are right; None for a class without images."""
    mistakes: dict[str, tuple[str, float]]
    """{class: the wrong class that most of its images were taken for, and their share}."""
    of: dict[str, Any]
    confusion: str
    """Where the counts of [class, taken for] are, or what is missing to draw them."""

    def to_json(self) -> dict[str, Any]:
        """What is not in other files; top5 is left out where it says nothing."""
        told = {name: value for name, value in vars(self).items() if name not in ("mistakes", "confusion")}
        return {name: value for name, value in told.items() if value is not None}

    def __str__(self) -> str:
        """Accuracies in per cent, and the classes that are hardest."""
        lines = [
            f"{self.images:,} images, {len(self.classes):,} classes, {len(self.templates)} templates; per cent",
            f"top-1           {100 * self.top1:5.1f}",
            *([] if self.top5 is None else [f"top-5           {100 * self.top5:5.1f}"]),
            f"mean per class  {100 * self.mean_per_class:5.1f}",
        ]
        absent = sum(share is None for share in self.per_class.values())
        if absent:
            lines.append(f"{absent:,} of {len(self.classes):,} classes have no image: are these their names?")
        seen = sorted((share, name) for name, share in self.per_class.items() if share is not None)[:_HARDEST]
        width = max(len("hardest classes"), *(len(name) for _, name in seen))
        lines.append(f"{'hardest classes':<{width}}  right  most often taken for")
        for share, name in seen:
            wrong, often = self.mistakes.get(name, ("", 0.0))
            lines.append(f"{name:<{width}}{100 * share:7.1f}" + (f"  {wrong} ({100 * often:.1f})" if wrong else ""))
        return "\n".join([*lines, self.confusion])


def eval_zeroshot(experiment: Experiment) -> ZeroshotResult:
    """Evaluate the run on the images of eval.split; write zeroshot.json, and the confusions as .npy and .png.

    Raises:
        UserError: cache and checkpoint do not fit each other, images have no labels, or a class has no name.
    """
    device = choose_device("eval.accelerator", experiment.eval.accelerator)
    given = prompts.class_names(experiment.eval.classes) if experiment.eval.classes else None
    templates = prompts.templates(experiment.eval.templates)
    trained = open_trained(experiment)
    labels = labels_of(trained.cache, experiment.eval.split)
    names = _names(experiment, given, trained.cache, labels)
    worded = names, templates
    if experiment.eval.canonicalize:
        worded = prompts.canonical(names, templates, experiment.eval.classes or str(trained.cache.path))
    texts, class_of_prompt = prompts.prompts(*worded)
    ztxt = trained.encode_text(texts, device=device)
    found = zeroshot.classify(trained.zimg, zeroshot.class_embeddings(ztxt, class_of_prompt, len(names)), labels)
    called = _called(names)
    result = ZeroshotResult(
        top1=found.top[1],
        top5=found.top.get(5),
        mean_per_class=found.mean_per_class,
        images=found.images,
        classes=[of[0] if len(of) == 1 else list(of) for of in names],
        templates=templates,
        canonicalize=experiment.eval.canonicalize,
        per_class={n: None if np.isnan(s) else float(s) for n, s in zip(called, found.per_class, strict=True)},
        mistakes=_mistakes(found.confusion, called),
        of=trained.origin(),
        confusion=_keep(experiment, found.confusion, called),
    )
    write_json(result_path(experiment.folder, experiment.eval, "zeroshot"), result.to_json())
    return result


def _names(experiment: Experiment, given: list[Names] | None, cache: EmbeddingCache, labels: np.ndarray) -> list[Names]:
    """The classes' names: those given, else those of the class folders that the images came from."""
    where, names = experiment.eval.classes, given
    if names is None:
        folders = class_folders_of(cache)
        if folders is None:
            raise UserError(
                f"eval.classes is not set, and {cache.path} does not know the names of its classes; set it to a list "
                "of names, label 0 first"
            )
        where, names = f"{cache.path}", [(folder.replace("_", " "),) for folder in folders]
    largest = int(labels.max())
    if largest >= len(names):
        raise UserError(
            f"{where} names {len(names)} classes, but labels of {cache.path} go up to {largest}; name {largest + 1}, "
            "label 0 first"
        )
    if len(names) < 2:
        raise UserError(f"{where} names one class; there is nothing to tell it from")
    return names


def _called(names: list[Names]) -> list[str]:
    """What each class is called, in one line, with its label where several have the same name."""
    first = [" ".join(of[0].split()) for of in names]
    often = Counter(first)
    return [name if often[name] == 1 else f"{name} ({label})" for label, name in enumerate(first)]


def _mistakes(confusion: np.ndarray, called: list[str]) -> dict[str, tuple[str, float]]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    images, most = confusion.sum(1), wrong.argmax(1)
    return {
        called[label]: (called[most[label]], float(wrong[label, most[label]] / images[label]))
        for label in np.flatnonzero(wrong.any(1)).tolist()
    }


def _keep(experiment: Experiment, confusion: np.ndarray, called: list[str]) -> str:
    """Write the counts, and the picture where it can be drawn; say where they are."""
    path = result_path(experiment.folder, experiment.eval, "zeroshot", ".npy")
    with atomic_write(path) as file:
        np.save(file, confusion, allow_pickle=False)
    picture = Path(result_path(experiment.folder, experiment.eval, "zeroshot", ".png"))
    try:
        drawn = draw_confusion(confusion, called)
    except UserError as error:
        return f"confusions: {path}; not drawn: {error}"
    save_png(drawn, picture)
    return "; ".join(filter(None, (f"confusions: {path}, drawn in {picture}", class_lettering(called).note)))
