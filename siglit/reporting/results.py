"""Reads the JSON results in a run's folder for `siglit report`, and checks that the fields it shows are well-formed.

Other fields are ignored. Knows nothing of how results are shown.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from siglit.errors import UserError
from siglit.reporting import tables
from siglit.runtime.text import json_problem

Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """Any float, also nan and inf, which the page leaves out; an int that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_NUMBER, _COUNT, _STRING = "a number", "a whole number", "a string"
_LEAVES: dict[str, Check] = {_NUMBER: _is_number, _COUNT: _is_count, _STRING: lambda value: isinstance(value, str)}

# A schema is a leaf, [schema] for a list, a tuple of alternative schemas, or a dict of fields: "name" is required,
# "name?" may be missing or null, "prefix*" is every field with this prefix.
_METRICS = {"text_to_image/*": (_NUMBER, None), "image_to_text/*": (_NUMBER, None)}
_PROVENANCE = {"step?": _COUNT}
_CLASSES: tuple[Any, ...] = ([(_STRING, [_STRING])], _COUNT, {})
_SCHEMAS: dict[str, Any] = {
    "retrieval": {
        "text_to_image/R@1": _NUMBER,
        "image_to_text/R@1": _NUMBER,
        **_METRICS,
        "images?": _COUNT,
        "captions?": _COUNT,
        "label_accuracy?": _NUMBER,
        "by_language?": {"*": _METRICS},
        "folds?": {"count": _COUNT, **_METRICS},
        "index?": {"factory": _STRING, **_METRICS},
        "provenance?": _PROVENANCE,
    },
    "zeroshot": {
        "top1": _NUMBER,
        "top5?": _NUMBER,
        "mean_per_class?": _NUMBER,
        "images?": _COUNT,
        "classes?": _CLASSES,
        "per_class?": ({"*": (_NUMBER, None)}, [(_NUMBER, None)]),
        "provenance?": _PROVENANCE,
    },
    "fewshot": {
        "shots": {"*": {"mean": _NUMBER, "std?": _NUMBER}},
        "images?": _COUNT,
        "classes?": _CLASSES,
        "provenance?": _PROVENANCE,
    },
    "probe": {
        "top1": _NUMBER,
        "top5?": _NUMBER,
        "mean_per_class?": _NUMBER,
        "l2?": _NUMBER,
        "images?": _COUNT,
        "classes?": _CLASSES,
        "provenance?": _PROVENANCE,
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
        "nearest": [{"caption": _STRING, "nearest": [{"caption": _STRING, "cosine": _NUMBER}]}],
        "provenance?": _PROVENANCE,
    },
}
_SUMMARY_SCHEMA = {
    "train?": {"steps": _COUNT, "seconds": _NUMBER, "examples_per_second": _NUMBER, "metrics?": {"*": _NUMBER}},
}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{stem: JSON} of the evaluations' result files, in the order of the page.

    Raises:
        UserError: a file is not JSON, or does not have the fields that its command writes.
    """
    results = {}
    for kind, (_, command) in tables.KINDS.items():
        for path in sorted(folder.glob(f"{kind}.json")) + sorted(folder.glob(f"{kind}-*.json")):
            advice = f"rerun `siglit {command}`"
            value = _read(path, _SCHEMAS[kind], advice)
            problem = _logits_problem(value) if kind == "logits" else None
            if problem is not None:
                raise UserError(f"{path}: {problem}; {advice}")
            results[path.stem] = value
    return results


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's summary.json, empty if there is none.

    Raises:
        UserError: it is not JSON, or does not have the fields that the commands write.
    """
    path = folder / "summary.json"
    return _read(path, _SUMMARY_SCHEMA, "remove it") if path.exists() else {}


def _read(path: Path, schema: Any, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({json_problem(error)}); {advice}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds JSON other than an object {{…}}; {advice}")
    problem = _find_problem(value, schema, "")
    if problem is not None:
        raise UserError(f"{path}: {problem}; {advice}")
    return value


def _find_problem(value: Any, schema: Any, path: str) -> str | None:
    """The first mismatch between the value at `path` and the schema, as a message; None if there is none."""
    if isinstance(schema, tuple):
        problems = [_find_problem(value, alternative, path) for alternative in schema]
        return None if None in problems else problems[0]
    if schema is None or isinstance(schema, str):
        matches = value is None if schema is None else _LEAVES[schema](value)
        return None if matches else f"{path} is {_short(value)}, but {schema} is expected"
    if not isinstance(value, type(schema)):
        expected = "a list" if isinstance(schema, list) else "an object"
        return f"{path} is {_short(value)}, but {expected} is expected"
    if isinstance(schema, list):
        problems = [_find_problem(entry, schema[0], f"{path}[{number}]") for number, entry in enumerate(value)]
    else:
        problems = [_field_problem(value, name, field_schema, path) for name, field_schema in schema.items()]
    return next(filter(None, problems), None)


def _field_problem(value: dict[str, Any], name: str, schema: Any, path: str) -> str | None:
    """`_find_problem` for the fields of an object that one entry of its schema is about."""
    prefix = f"{path}: " if path else ""
    if name.endswith("*"):
        fields = [field for field in value if field.startswith(name[:-1])]
        problems = (_find_problem(value[field], schema, f"{prefix}{_short(field)[1:-1]}") for field in fields)
        return next(filter(None, problems), None)
    plain = name.removesuffix("?")
    if value.get(plain) is None and name != plain:
        return None
    if plain not in value:
        return f"{path or 'it'} has no {plain}"
    return _find_problem(value[plain], schema, prefix + plain)


def _logits_problem(value: dict[str, Any]) -> str | None:
    """What the histogram and the calibration need beyond the schema, as a message if it is missing."""
    edges = value["edges"]
    if not all(map(math.isfinite, edges)) or any(low >= high for low, high in itertools.pairwise(edges)):
        return "edges are not finite and ascending"
    if not len(edges) - 1 == len(value["positive"]) == len(value["negative"]) > 0:
        return "positive and negative do not have one entry fewer than edges"
    if len(value["calibration"]) > 0 and value.get("ece") is None:
        return "calibration is given, but ece is missing"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
