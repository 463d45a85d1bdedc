"""`siglit eval-zeroshot`: classifies the images of a cache by the texts of their classes.

Knows the run's files; `siglit.evaluation.zeroshot` defines the metric.
"""

import logging
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
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.text import plural

_logger = logging.getLogger(__name__)

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
    """Whether names and templates were lower-cased and stripped of punctuation; above they are as given."""
    per_class: dict[str, float | None]
    """Accuracy on the images of each class; None for a class without images."""
    mistakes: dict[str, tuple[str, float]]
    """{class: the wrong class that most of its images were classified as, and their share}."""
    provenance: dict[str, Any]
    """Checkpoint, step, cache and its digest."""
    confusion: str
    """Files of the confusion matrix, and why it is not drawn if it is not."""

    def to_json(self) -> dict[str, Any]:
        """Content of the file, without top5 if it is None."""
        values = {name: value for name, value in vars(self).items() if name not in ("mistakes", "confusion")}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        """Accuracies in percent, and the hardest classes."""
        lines = [
            f"{plural(self.images, 'image')}, {plural(len(self.classes), 'class')}, "
            f"{plural(len(self.templates), 'template')}; percent",
            f"top-1           {100 * self.top1:5.1f}",
            *([] if self.top5 is None else [f"top-5           {100 * self.top5:5.1f}"]),
            f"mean per class  {100 * self.mean_per_class:5.1f}",
        ]
        empty = sum(accuracy is None for accuracy in self.per_class.values())
        if empty > 0:
            lines.append(f"{empty:,} of {len(self.classes):,} classes have no image; check eval.classes")
        hardest = sorted((value, name) for name, value in self.per_class.items() if value is not None)[:_HARDEST]
        width = max(len("hardest classes"), *(len(name) for _, name in hardest))
        lines.append(f"{'hardest classes':<{width}}  top-1  most often classified as")
        for accuracy, name in hardest:
            wrong, share = self.mistakes.get(name, ("", 0.0))
            lines.append(f"{name:<{width}}{100 * accuracy:7.1f}" + (f"  {wrong} ({100 * share:.1f})" if wrong else ""))
        return "\n".join([*lines, self.confusion])


@reusing_freed_memory()
def eval_zeroshot(experiment: Experiment) -> ZeroshotResult:
    """Evaluate the run on the images of eval.split; write zeroshot.json, and the confusion matrix as .npy and .png.

    Raises:
        UserError: cache and checkpoint do not match, images have no labels, or a label has no class name.
    """
    device = choose_device("eval", experiment.eval.accelerator)
    given = prompts.class_names(experiment.eval.classes) if experiment.eval.classes else None
    templates = prompts.templates(experiment.eval.templates)
    trained = open_trained(experiment)
    labels = labels_of(trained.cache, experiment.eval.split)
    names = _names(experiment, given, trained.cache, labels)
    wording = names, templates
    if experiment.eval.canonicalize:
        wording = prompts.canonical(names, templates, experiment.eval.classes or str(trained.cache.path))
    texts, class_of_prompt = prompts.prompts(*wording)
    ids = trained.tokenizer(texts)
    alike = _classes_with_equal_tokens(ids, class_of_prompt)
    if alike > 0:
        _logger.warning(
            f"{alike:,} of {plural(len(names), 'class')} have a prompt with the same tokens as one of another class; "
            f"prompts are cut off at tokenizer.length {experiment.tokenizer.length}"
        )
    ztxt = trained.encode_ids(ids, device=device)
    classified = zeroshot.classify(trained.zimg, zeroshot.class_embeddings(ztxt, class_of_prompt, len(names)), labels)
    unique = _unique_names(names)
    result = ZeroshotResult(
        top1=classified.top[1],
        top5=classified.top.get(5),
        mean_per_class=classified.mean_per_class,
        images=classified.images,
        classes=[synonyms[0] if len(synonyms) == 1 else list(synonyms) for synonyms in names],
        templates=templates,
        canonicalize=experiment.eval.canonicalize,
        per_class={n: None if np.isnan(s) else float(s) for n, s in zip(unique, classified.per_class, strict=True)},
        mistakes=_mistakes(classified.confusion, unique),
        provenance=trained.origin(),
        confusion=_save_confusion(experiment, classified.confusion, unique),
    )
    write_json(result_path(experiment.folder, experiment.eval, "zeroshot"), result.to_json())
    return result


def _classes_with_equal_tokens(ids: np.ndarray, class_of_prompt: np.ndarray) -> int:
    """Number of classes that share the token ids of a prompt with another class: (P, L) ids, (P,) classes."""
    _, sequence = np.unique(ids, axis=0, return_inverse=True)
    pairs = np.unique(np.stack([sequence.reshape(-1), class_of_prompt]), axis=1)
    shared = np.bincount(pairs[0]) > 1
    return len(np.unique(pairs[1, shared[pairs[0]]]))


def _names(experiment: Experiment, given: list[Names] | None, cache: EmbeddingCache, labels: np.ndarray) -> list[Names]:
    """The classes' names: `given`, else the names of the class folders that the images are from."""
    source, names = experiment.eval.classes, given
    if names is None:
        folders = class_folders_of(cache)
        if folders is None:
            raise UserError(
                f"eval.classes is not set, and {cache.path} has no class names; set it to a list of names, label 0 "
                "first"
            )
        source, names = f"{cache.path}", [(folder.replace("_", " "),) for folder in folders]
    largest = int(labels.max())
    if largest >= len(names):
        raise UserError(
            f"{source} has {plural(len(names), 'name')}, but labels of {cache.path} go up to {largest}; give "
            f"{largest + 1} names, label 0 first"
        )
    if len(names) < 2:
        raise UserError(f"{source} has one class, but classification needs at least two")
    return names


def _unique_names(names: list[Names]) -> list[str]:
    """The first name of each class, in one line, followed by the label if another class has the same name."""
    first = [" ".join(synonyms[0].split()) for synonyms in names]
    counts = Counter(first)
    return [name if counts[name] == 1 else f"{name} ({label})" for label, name in enumerate(first)]


def _mistakes(confusion: np.ndarray, names: list[str]) -> dict[str, tuple[str, float]]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    images, most = confusion.sum(1), wrong.argmax(1)
    return {
        names[label]: (names[most[label]], float(wrong[label, most[label]] / images[label]))
        for label in np.flatnonzero(wrong.any(1)).tolist()
    }


def _save_confusion(experiment: Experiment, confusion: np.ndarray, names: list[str]) -> str:
    """Write the matrix as .npy, and as .png if matplotlib is installed; return a line that names the files."""
    path = result_path(experiment.folder, experiment.eval, "zeroshot", ".npy")
    with atomic_write(path) as file:
        np.save(file, confusion, allow_pickle=False)
    picture = Path(result_path(experiment.folder, experiment.eval, "zeroshot", ".png"))
    try:
        figure = draw_confusion(confusion, names)
    except UserError as error:
        return f"confusion matrix: {path}; not drawn: {error}"
    save_png(figure, picture)
    return "; ".join(filter(None, (f"confusion matrix: {path}, drawn in {picture}", class_lettering(names).note)))
