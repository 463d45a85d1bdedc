"""ImageNet's layout: one folder per class, the images of the class anywhere in it.

Lists files and opens none. The label of an image is the place of its class among the folders sorted by name, counted
from 0, as in torchvision's `ImageFolder`. Names that begin with a dot are nobody's: desktops and notebooks leave them.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siglit.data.columns import Columns
from siglit.data.images import IMAGE_EXTENSIONS
from siglit.data.listings import Row
from siglit.errors import UserError


def read(root: Path) -> tuple[list[str], list[Row]]:
    """Names of the class folders in the order of their labels, and a row for each image, class by class.

    Args:
        root: the folder of class folders.

    Returns:
        A folder without images is a class too, and keeps its number. The key of an image is its path from `root`, with
        slashes; it has no caption.

    Raises:
        UserError: there is no class folder or no image, or images lie outside the class folders.
    """
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir())
    wanted = "class_folders wants one folder of images for each class"
    if loose:
        raise UserError(
            f"{root} has {len(loose)} images outside its class folders, the first is {loose[0]}, but {wanted}. "
            "Move them, or take another format."
        )
    rows = [
        Row(0, Columns().key_of({}, key, str(root)), key, (), (), label)
        for label, name in enumerate(classes)
        for key in sorted(_images(root, name))
    ]
    if not rows:
        state = f"{len(classes)} folders, but no image in them" if classes else "no folder in it"
        raise UserError(f"{root} has {state}; {wanted} ({', '.join(IMAGE_EXTENSIONS)}). Correct path.")
    return classes, rows


def identity(root: Path) -> dict[str, Any]:
    """What decides the samples: the names of the classes, and a hash of theirs and of all keys."""
    classes, rows = read(root)
    listed = "\n".join([*classes, "", *(row.key for row in rows)])
    return {"classes": classes, "sha256": hashlib.sha256(listed.encode()).hexdigest()}


def _images(root: Path, name: str) -> Iterator[str]:
    """Paths of a class's images from `root`; links to folders are followed, as sets of links are common."""
    for folder, below, files in os.walk(root / name, followlinks=True):
        below[:] = [inner for inner in below if not inner.startswith(".")]
        start = Path(folder).relative_to(root).as_posix()
        yield from (f"{start}/{file}" for file in files if _is_image(file) and not file.startswith("."))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
