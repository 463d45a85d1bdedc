"""A confusion matrix as a matplotlib figure.

Shapes: C classes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from siglit.errors import UserError
from siglit.reporting.fonts import Lettering, lettering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_CLASSES_WITH_NUMBERS, _MAX_CLASSES_WITH_NAMES = 15, 40
"""Classes up to which the cells show their numbers, and rows and columns show class names."""


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """A row per class with the shares of its images by predicted class, in percent.

    Args:
        counts: (C, C) images of class [row] that were classified as [column]; a row without images stays blank.
        names: C class names.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise UserError(f"drawing needs matplotlib ({error}); pip install 'siglit[plots]'") from error
    images, classes = counts.sum(1, keepdims=True), len(counts)
    shares = np.divide(counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    side = min(12.0, 5.0 + 0.3 * classes)
    figure = Figure(figsize=(side + 1.0, side), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap=colormaps["Blues"], vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="percent of the class's images", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    if classes <= _MAX_CLASSES_WITH_NAMES:
        letters = class_lettering(names)
        style: dict[str, Any] = {"fontfamily": letters.families, "parse_math": False}
        axes.set_xticks(range(classes), letters.texts, rotation=90, **style)
        axes.set_yticks(range(classes), letters.texts, **style)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= _MAX_CLASSES_WITH_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                color = "white" if share > 0.5 else "0.2"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=9)
    return figure


def class_lettering(names: Sequence[str]) -> Lettering:
    """Class names as `draw_confusion` shows them: integer labels if there are many, or if no font has their letters."""
    if len(names) > _MAX_CLASSES_WITH_NAMES:
        return Lettering([str(label) for label in range(len(names))], [], "")
    return lettering(names, [str(label) for label in range(len(names))])
