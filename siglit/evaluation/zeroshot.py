"""Zero-shot classification: the class of an image is the one whose prompts are nearest to it.

Arrays in, numbers out; knows nothing of names or files. Shapes: N images, P prompts, C classes, D embedding width.
"""

from collections.abc import Sequence

import numpy as np

from siglit.evaluation.classification import Classification, tally

# How much the same dot product of unit rows may differ between positions of a float32 matrix product.
_TIE = 1e-6
_SCORES_AT_ONCE = 1 << 22


def class_embeddings(ztxt: np.ndarray, class_of_prompt: np.ndarray, classes: int) -> np.ndarray:
    """Average the unit embeddings of each class's prompts and normalize the means.

    Args:
        ztxt: (P, D) unit rows.
        class_of_prompt: (P,) integers in [0, C).
        classes: C.

    Returns:
        (C, D) float32 unit rows.

    Raises:
        ValueError: a class has no prompt, or the lengths of the arrays differ.

    Source: CLIP_benchmark `zero_shot_classifier`; open_clip and LiT (arXiv:2111.07991) do the same.
    """
    if len(ztxt) != len(class_of_prompt):
        raise ValueError(f"ztxt has {len(ztxt)} prompts, but class_of_prompt has {len(class_of_prompt)} entries")
    counts = np.bincount(class_of_prompt, minlength=classes)
    if len(counts) != classes or not counts.all():
        raise ValueError(
            f"each of the {classes} classes needs a prompt, but only {np.flatnonzero(counts).tolist()} have one"
        )
    sums = np.zeros((classes, ztxt.shape[1]))
    np.add.at(sums, class_of_prompt, ztxt)
    means = sums / counts[:, None]
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def classify(zimg: np.ndarray, zcls: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> Classification:
    """Predict for every image the class with the nearest embedding, and compare with the labels.

    Ties (to 1e-6) count against the model. The (N, C) scores are computed in blocks.

    Args:
        zimg: (N, D) float32 unit rows.
        zcls: (C, D) float32 unit rows.
        labels: (N,) classes; images with a label below 0 are left out.
        ks: cut-offs.

    Raises:
        ValueError: no image has a label, a label is C or more, or there are fewer than two classes.

    Source: CLIP_benchmark `zeroshot_classification`, whose values these equal where no scores tie.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) > 0 and labels.max() >= len(zcls):
        raise ValueError(f"an image has label {labels.max()}, but there are {len(zcls)} classes, numbered from 0")
    step = max(1, _SCORES_AT_ONCE // len(zcls))
    blocks = (known[start : start + step] for start in range(0, len(known), step))
    return tally(((zimg[rows] @ zcls.T, labels[rows]) for rows in blocks), len(zcls), ks, _TIE)
