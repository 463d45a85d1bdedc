"""Zero-shot classification: an image belongs to the class whose prompts lie nearest to it.

Arrays in, numbers out; knows nothing of names or files. Shapes: N images, P prompts, C classes, D embedding width.
"""

from collections.abc import Sequence

import numpy as np

from siglit.evaluation.classification import Classification, tally

# The same product of unit rows differs by this much at most with its place in a float32 matrix product.
_TIE = 1e-6
_SCORES_AT_ONCE = 1 << 22


def class_embeddings(ztxt: np.ndarray, class_of_prompt: np.ndarray, classes: int) -> np.ndarray:
    """Mean of the normalised embeddings of a class's prompts, normalised again.

    Args:
        ztxt: (P, D) unit rows.
        class_of_prompt: (P,) integers in [0, C).
        classes: C.

    Returns:
        (C, D) float32 unit rows.

    Raises:
        ValueError: a class has no prompt, or the arrays do not fit each other.

    Source: CLIP_benchmark `zero_shot_classifier`, as open_clip and LiT (arXiv:2111.07991) do it too.
    """
    if len(ztxt) != len(class_of_prompt):
        raise ValueError(f"{len(ztxt)} prompts, but classes of {len(class_of_prompt)}")
    counts = np.bincount(class_of_prompt, minlength=classes)
    if len(counts) != classes or not counts.all():
        raise ValueError(f"every one of {classes} classes needs a prompt, got {np.flatnonzero(counts).tolist()}")
    sums = np.zeros((classes, ztxt.shape[1]))
    np.add.at(sums, class_of_prompt, ztxt)
    means = sums / counts[:, None]
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def classify(zimg: np.ndarray, zcls: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> Classification:
    """Put every image into the class with the nearest embedding.

    Equal scores (to 1e-6) count against the model; no (N, C) matrix is held.

    Args:
        zimg: (N, D) float32 unit rows.
        zcls: (C, D) float32 unit rows.
        labels: (N,) classes; images with a label below 0 are left out.
        ks: cut-offs.

    Raises:
        ValueError: no image has a label, one has a label that is no class, or there are fewer than two classes.

    Source: CLIP_benchmark `zeroshot_classification`, whose values these equal where no scores tie.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) and labels.max() >= len(zcls):
        raise ValueError(f"an image has label {labels.max()}, but there are {len(zcls)} classes, counted from 0")
    step = max(1, _SCORES_AT_ONCE // len(zcls))
    blocks = (known[start : start + step] for start in range(0, len(known), step))
    return tally(((zimg[rows] @ zcls.T, labels[rows]) for rows in blocks), len(zcls), ks, _TIE)
