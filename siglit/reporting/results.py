"""What the commands left in a run's folder as JSON, read for `siglit report` and held against the shape it must have.

Knows the fields that the page shows; others may come and go. Knows nothing of how they are shown.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from siglit.errors import UserError
from siglit.reporting import tables

Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """An int beyond all floats cannot be drawn; what is no finite number is left out where it is shown."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_NUMBER, _COUNT, _TEXT = "a number", "a whole number", "a text"
_LEAVES: dict[str, Check] = {_NUMBER: _is_number, _COUNT: _is_count, _TEXT: lambda value: isinstance(value, str)}

# A shape is a leaf, [shape] for a list, a tuple of shapes of which one fits, or a dict: "name" has to be there, "name?"
# may be missing or null, "name*" is every field that begins so.
_METRICS = {"text_to_image/*": (_NUMBER, None), "image_to_text/*": (_NUMBER, None)}
_OF = {"step?": _COUNT}
_CLASSES: tuple[Any, ...] = ([(_TEXT, [_TEXT])], _COUNT, {})
_SHAPES: dict[str, Any] = {
    "retrieval": {
        "text_to_image/R@1": _NUMBER,
        "image_to_text/R@1": _NUMBER,
        **_METRICS,
        "images?": _COUNT,
        "captions?": _COUNT,
        "label_accuracy?": _NUMBER,
        "by_language?": {"*": _METRICS},
        "folds?": {"count": _COUNT, **_METRICS},
        "index?": {"factory": _TEXT, **_METRICS},
        "of?": _OF,
    },
    "zeroshot": {
        "top1": _NUMBER,
        "top5?": _NUMBER,
        "mean_per_class?": _NUMBER,
        "images?": _COUNT,
        "classes?": _CLASSES,
        "per_class?": ({"*": (_NUMBER, None)}, [(_NUMBER, None)]),
        "of?": _OF,
    },
    "fewshot": {
        "shots": {"*": {"mean": _NUMBER, "std?": _NUMBER}},
        "images?": _COUNT,
        "classes?": _CLASSES,
        "of?": _OF,
    },
    "probe": {
        "top1": _NUMBER,
        "top5?": _NUMBER,
        "mean_per_class?": _NUMBER,
        "l2?": _NUMBER,
        "images?": _COUNT,
        "classes?": _CLASSES,
        "of?": _OF,
    },
    "logits": {
        "edges": [_NUMBER],
        "positive": [_COUNT],
        "negative": [_COUNT],
        "positives": _COUNT,
        "negatives": _COUNT,
        "logit_scale": _NUMBER,
        "logit_bias": _NUMBER,
        "calibration": [{"predicted": _NUMBER, "observed": _NUMBER}],
        "ece?": _NUMBER,
        "prior": _NUMBER,
        "batch_size": _COUNT,
        "nearest": [{"caption": _TEXT, "nearest": [{"caption": _TEXT, "cosine": _NUMBER}]}],
        "of?": _OF,
    },
}
_SUMMARY = {
    "train?": {"steps": _COUNT, "seconds": _NUMBER, "examples_per_second": _NUMBER, "metrics?": {"*": _NUMBER}},
}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{name without the suffix: JSON} of the evaluations' files, in the order of the page.

    Raises:
        UserError: one is not JSON, or not what its command writes.
    """
    found = {}
    for kind, (_, command) in tables.KINDS.items():
        for path in sorted(folder.glob(f"{kind}.json")) + sorted(folder.glob(f"{kind}-*.json")):
            advice = f"run `siglit {command}` again"
            value = _read(path, _SHAPES[kind], advice)
            complaint = _unlike_logits(value) if kind == "logits" else None
            if complaint:
                raise UserError(f"{path}: {complaint}; {advice}")
            found[path.stem] = value
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's summary.json, empty if there is none.

    Raises:
        UserError: it is not JSON, or not what the commands write.
    """
    path = folder / "summary.json"
    return _read(path, _SUMMARY, "remove it") if path.exists() else {}


def _read(path: Path, shape: Any, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, an object was wanted; {advice}")
    complaint = _unlike(value, shape, "")
    if complaint:
        raise UserError(f"{path}: {complaint}; {advice}")
    return value


def _unlike(value: Any, shape: Any, where: str) -> str | None:
    """What is wrong with `value`, which stands at `where`, in the words of a message; None if it has the shape."""
    if isinstance(shape, tuple):
        complaints = [_unlike(value, one, where) for one in shape]
        return None if None in complaints else complaints[0]
    if shape is None or isinstance(shape, str):
        fits = value is None if shape is None else _LEAVES[shape](value)
        return None if fits else f"{where} is {_short(value)}, but {shape} is expected"
    if not isinstance(value, type(shape)):
        expected = "a list" if isinstance(shape, list) else "an object"
        return f"{where} is {_short(value)}, but {expected} is expected"
    if isinstance(shape, list):
        found = (_unlike(entry, shape[0], f"{where}[{number}]") for number, entry in enumerate(value))
        return next(filter(None, found), None)
    return next(filter(None, (_unlike_field(value, name, one, where) for name, one in shape.items())), None)


def _unlike_field(value: dict[str, Any], name: str, shape: Any, where: str) -> str | None:
    path = f"{where}: " if where else ""
    if name.endswith("*"):
        fields = [field for field in value if field.startswith(name[:-1])]
        found = (_unlike(value[field], shape, f"{path}{_short(field)[1:-1]}") for field in fields)
        return next(filter(None, found), None)
    plain = name.removesuffix("?")
    if value.get(plain) is None and name != plain:
        return None
    if plain not in value:
        return f"{where or 'it'} has no {plain}"
    return _unlike(value[plain], shape, path + plain)


def _unlike_logits(value: dict[str, Any]) -> str | None:
    """What the histogram and the words beside the calibration need besides the types."""
    edges = value["edges"]
    if not all(map(math.isfinite, edges)) or any(low >= high for low, high in itertools.pairwise(edges)):
        return "edges are not finite and ascending"
    if not len(edges) - 1 == len(value["positive"]) == len(value["negative"]) > 0:
        return "positive and negative are not one shorter than edges"
    return "calibration is given, but no ece" if value["calibration"] and value.get("ece") is None else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
