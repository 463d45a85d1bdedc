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

_MOST_NUMBERS, _MOST_NAMES = 15, 40
"""Classes up to which a confusion matrix has its shares written in, and its rows and columns named."""


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """Where the images of each class went: a row per class, its shares over the columns; named as far as there is room.

    Args:
        counts: (C, C) images of class [row] that were put into class [column]; a row without images stays blank.
        names: C names.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise UserError(f"it takes matplotlib ({error}); pip install 'siglit[plots]'") from error
    images, classes = counts.sum(1, keepdims=True), len(counts)
    shares = np.divide(counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    side = min(12.0, 5.0 + 0.3 * classes)
    drawn = Figure(figsize=(side + 1.0, side), layout="compressed")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    image = axes.imshow(100 * shares, cmap=colormaps["Blues"], vmin=0, vmax=100, interpolation="nearest")
    drawn.colorbar(image, ax=axes, label="per cent of the class's images", shrink=0.8)
    axes.set_xlabel("put into class")
    axes.set_ylabel("class")
    if classes <= _MOST_NAMES:
        letters = class_lettering(names)
        written: dict[str, Any] = {"fontfamily": letters.families, "parse_math": False}
        axes.set_xticks(range(classes), letters.texts, rotation=90, **written)
        axes.set_yticks(range(classes), letters.texts, **written)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= _MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.5 else "0.2"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return drawn


def class_lettering(names: Sequence[str]) -> Lettering:
    """How `confusion` writes the names of classes: as labels where no font has the letters, or the classes are many."""
    if len(names) > _MOST_NAMES:
        return Lettering([str(label) for label in range(len(names))], [], "")
    return lettering(names, [str(label) for label in range(len(names))])
