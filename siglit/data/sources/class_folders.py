"""ImageNet's layout: one folder per class, the images of the class anywhere in it.

Lists files and opens none. The label of an image is the position of its class among the folders sorted by name, from 0,
as in torchvision's `ImageFolder`. Names that begin with a dot are ignored: desktops and notebooks leave such files.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siglit.data.decode_image import IMAGE_EXTENSIONS
from siglit.data.sources.columns import Columns
from siglit.data.sources.listings import Row
from siglit.errors import UserError
from siglit.runtime.text import plural


def read(root: Path) -> tuple[list[str], list[Row]]:
    """List the classes and their images.

    Args:
        root: the folder of class folders.

    Returns:
        Names of the class folders in the order of their labels, and a row for each image, class by class. A folder
        without images is a class too, and keeps its label. The key of an image is its path from `root`, with slashes;
        it has no caption.

    Raises:
        UserError: there is no class folder or no image, or images lie outside the class folders.
    """
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir())
    expected = "class_folders expects one folder of images for each class"
    if len(loose) > 0:
        raise UserError(
            f"{root} has {plural(len(loose), 'image')} outside its class folders ({loose[0]}), but {expected}. "
            "Move them into a class folder, or set another format."
        )
    rows = [
        Row(0, Columns().key_of({}, key, str(root)), key, (), (), label)
        for label, name in enumerate(classes)
        for key in sorted(_images(root, name))
    ]
    if len(rows) == 0:
        state = f"{plural(len(classes), 'folder')}, but no image in any" if len(classes) > 0 else "no folder in it"
        raise UserError(f"{root} has {state}; {expected} ({', '.join(IMAGE_EXTENSIONS)}). Check the path.")
    return classes, rows


def identity(root: Path) -> dict[str, Any]:
    """What decides the samples: the names of the classes, and a hash of theirs and of all keys."""
    classes, rows = read(root)
    names = "\n".join([*classes, "", *(row.key for row in rows)])
    return {"classes": classes, "sha256": hashlib.sha256(names.encode()).hexdigest()}


def _images(root: Path, name: str) -> Iterator[str]:
    """Paths of a class's images from `root`; links to folders are followed, as data sets made of links are common."""
    for folder, below, files in os.walk(root / name, followlinks=True):
        below[:] = [inner for inner in below if not inner.startswith(".")]
        start = Path(folder).relative_to(root).as_posix()
        yield from (f"{start}/{file}" for file in files if _is_image(file) and not file.startswith("."))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
