"""From the results of the evaluations to what the page of `siglit report` shows: tables, bars and a summary line.

Knows the JSON of each evaluation and nothing of files or HTML. Metrics that a result lacks are left out.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from siglit.runtime.text import plural

KINDS = {
    "retrieval": ("Retrieval", "eval-retrieval"),
    "zeroshot": ("Zero-shot classification", "eval-zeroshot"),
    "fewshot": ("Few-shot classification", "eval-fewshot"),
    "probe": ("Linear probe", "eval-probe"),
    "logits": ("Logits", "eval-logits"),
}
"""{first word of a result file's name: (title, command)}."""
NEED_LABELS = ("zeroshot", "fewshot", "probe")
"""Kinds that need labelled images."""

_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
_MAX_BARS = 40
_SCALES = (10, 20, 50, 100)
"""Percent at the end of a bar chart's scale; the smallest that holds the longest bar is used."""

Row = dict[str, Any]
"""group, name, value (formatted), chance (a fraction, or None), and keys that eval.paper may use for the metric."""


def title(stem: str) -> str:
    """Title of a result file, by its stem: zeroshot-imagenet."""
    kind, _, name = stem.partition("-")
    return KINDS[kind][0] + (f" · {name}" if name else "")


def metric_tables(results: Mapping[str, dict[str, Any]], paper: Mapping[str, float]) -> list[dict[str, Any]]:
    """A table for each result, and one for numbers of the paper that no result has.

    Args:
        results: {stem of the file: its JSON}.
        paper: {"zeroshot-imagenet/top1": percent}.

    Returns:
        [{"title", "about", "step", "rows": [{"group", "name", "value", "paper", "chance"}]}]; strings, except for step.
    """
    rows_of: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
        "retrieval": _retrieval,
        "zeroshot": _classification,
        "fewshot": _fewshot,
        "probe": _classification,
    }
    tables, used = [], set()
    for stem, result in results.items():
        kind = stem.partition("-")[0]
        if kind not in rows_of:
            continue
        rows = []
        for row in rows_of[kind](result):
            key = next((k for k in (f"{stem}/{key}" for key in row["keys"]) if k in paper), None)
            used.add(key)
            rows.append(
                {
                    "group": row["group"],
                    "name": row["name"],
                    "value": row["value"],
                    "paper": format_percent(paper[key] / 100) if key else "",
                    "chance": "" if row["chance"] is None else format_percent(min(1.0, row["chance"])),
                }
            )
        tables.append({"title": title(stem), "about": _about(result), "step": step_of(result), "rows": rows})
    others = [
        {"group": "", "name": key, "value": "", "paper": format_percent(value / 100), "chance": ""}
        for key, value in paper.items()
        if key not in used
    ]
    if len(others) > 0:
        tables.append({"title": "Further numbers of the paper", "about": "", "step": None, "rows": others})
    return tables


def step_of(result: Mapping[str, Any]) -> int | None:
    """Training step of the checkpoint that a result is of; None if it has no checkpoint."""
    return (result.get("provenance") or {}).get("step")


def summary_line(
    results: Mapping[str, dict[str, Any]], trained: Mapping[str, float], paper: Mapping[str, float]
) -> str:
    """The main metrics in one line, from one result of each kind: one that the paper has too, else the first.

    Args:
        results: as for `metric_tables`.
        trained: last logged metrics of the training, used if nothing was evaluated.
        paper: as for `metric_tables`.
    """
    parts = []
    for kind in KINDS:
        stems = [stem for stem in results if stem.partition("-")[0] == kind]
        stems.sort(key=lambda stem: not any(key.startswith(f"{stem}/") for key in paper))
        for stem in stems:
            metric = _main_metric(kind, results[stem])
            if metric:
                name = stem.partition("-")[2]
                parts.append(metric + (f" on {name}" if name else ""))
                break
    if len(parts) == 0:
        recall = _format_recall_at_1({key.removeprefix("val/"): value for key, value in trained.items()})
        parts = [f"{recall} in the last validation of the training"] if recall else []
    return "; ".join(parts) or "no evaluation yet"


def _main_metric(kind: str, result: Mapping[str, Any]) -> str:
    """The main metric of a result with its name; empty if the result has none."""
    if kind == "retrieval":
        average = (result.get("by_language") or {}).get("average")
        recall = _format_recall_at_1(average or result)
        return f"{recall}, mean over languages" if recall and average else recall
    if kind == "fewshot" and result.get("shots"):
        shots, accuracy = list(result["shots"].items())[-1]
        return f"{_shots(shots)} {format_percent(accuracy['mean'])}"
    names = {"zeroshot": "zero-shot top-1", "probe": "linear probe top-1"}
    if kind in names and _is_number(result.get("top1")):
        return f"{names[kind]} {format_percent(result['top1'])}"
    return ""


def _format_recall_at_1(metrics: Mapping[str, Any]) -> str:
    recalls = {arrow: metrics.get(f"{direction}/R@1") for direction, arrow in _DIRECTIONS.items()}
    text = ", ".join(f"{arrow} {format_percent(value)}" for arrow, value in recalls.items() if _is_number(value))
    return f"R@1 {text}" if text else ""


def languages(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of R@1 by language, one chart for each direction."""
    charts = []
    for stem, result in results.items():
        table = dict(result.get("by_language") or {})
        average = table.pop("average", {})
        both = []
        for direction, arrow in _DIRECTIONS.items():
            values = [(lang, metrics.get(f"{direction}/R@1")) for lang, metrics in table.items()]
            both.append(bars(f"R@1 {arrow} by language{_suffix(stem)}", values, average.get(f"{direction}/R@1")))
        end = max(chart["end"] for chart in both)  # one scale for the two charts side by side
        charts += [chart | {"end": end} for chart in both if len(chart["rows"]) > 0]
    return charts


def classes(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of the accuracy by class, one chart for each zero-shot result."""
    charts = [
        bars(f"Zero-shot accuracy by class{_suffix(stem)}", _per_class(result), result.get("mean_per_class"))
        for stem, result in results.items()
        if stem.startswith("zeroshot")
    ]
    return [chart for chart in charts if len(chart["rows"]) > 0]


def bars(title: str, values: list[tuple[str, Any]], average: float | None) -> dict[str, Any]:
    """Fractions as bars, best first; of more than 40 only the 20 best and the 20 worst.

    Returns:
        {"title", "average" (percent or None), "end" (percent of a full bar), "rows": [{"name", "percent"}
        or {"left_out": number of bars}]}.
    """
    known = sorted(((name, v) for name, v in values if _is_number(v)), key=lambda item: -item[1])
    rows: list[dict[str, Any]] = [{"name": name, "percent": 100 * value} for name, value in known]
    if len(rows) > _MAX_BARS:
        half = _MAX_BARS // 2
        rows = [*rows[:half], {"left_out": len(rows) - 2 * half}, *rows[-half:]]
    mean = 100 * average if average is not None and _is_number(average) else None
    longest = max((100 * value for _, value in known), default=0.0)
    end = next((end for end in _SCALES if max(longest, mean or 0.0) <= end), 100)
    return {"title": title, "average": mean, "end": end, "rows": rows}


def _retrieval(result: dict[str, Any]) -> Iterator[Row]:
    folds, count = result.get("folds") or {}, (result.get("folds") or {}).get("count", 0)
    parts = [
        ("", "", result, result.get("images") or 0),
        (", mean over languages", "by_language/average/", (result.get("by_language") or {}).get("average", {}), 0),
        (f", mean over {count} folds", "folds/", folds, (result.get("images") or 0) // max(1, count)),
        (", approximate index", "index/", result.get("index") or {}, 0),
    ]
    for note, prefix, metrics, images in parts:
        for direction, arrow in _DIRECTIONS.items():
            for key, value in metrics.items():
                if key.startswith(f"{direction}/") and _is_number(value):
                    yield _retrieval_metric(arrow + note, prefix + key, value, images)
        if note == "" and _is_number(result.get("label_accuracy")):
            accuracy = format_percent(result["label_accuracy"])
            yield _row("image → class", "nearest caption is of the image's class", accuracy, "label_accuracy")


def _retrieval_metric(group: str, key: str, value: float, images: int) -> Row:
    """One metric of one direction; `images` is 0 if the chance level is unknown."""
    direction, metric = key.split("/")[-2:]
    depth = re.fullmatch(r"R@([0-9]{1,9})", metric)
    k = int(depth[1]) if depth is not None else 0
    # Chance is k / images. For image → text that holds for k = 1 only: an image's share of all captions, averaged over
    # the images, is 1 / images.
    has_chance = k > 0 and images > 0 and (direction == "text_to_image" or k == 1)
    text = f"{value:,.4g}" if metric == "median_rank" else format_percent(value)
    return _row(group, metric.replace("_", " "), text, key, chance=k / images if has_chance else None)


def _classification(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for key, name, k in (("top1", "top-1", 1), ("top5", "top-5", 5), ("mean_per_class", "mean over classes", 1)):
        if _is_number(result.get(key)):
            yield _row("", name, format_percent(result[key]), key, chance=k / count if count else None)
    if _is_number(result.get("l2")):
        yield _row("", "L2 penalty", f"{result['l2']:.3g}", "l2")


def _fewshot(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for shots, accuracy in (result.get("shots") or {}).items():
        spread = f" ± {100 * accuracy['std']:.1f}" if _is_number(accuracy.get("std")) else ""
        keys = (f"shots/{shots}/mean", f"shots/{shots}", shots)
        yield _row(
            "", _shots(shots), format_percent(accuracy["mean"]) + spread, *keys, chance=1 / count if count else None
        )


def _shots(count: str) -> str:
    return f"{count} shot{'' if count == '1' else 's'} per class"


def _row(group: str, name: str, value: str, *keys: str, chance: float | None = None) -> Row:
    return {"group": group, "name": name, "value": value, "keys": keys, "chance": chance}


def _about(result: dict[str, Any]) -> str:
    """The sizes of the evaluated set, and the approximate index."""
    counts = {"image": result.get("images"), "caption": result.get("captions"), "class": _number_of_classes(result)}
    parts = [plural(count, noun) for noun, count in counts.items() if count]
    index = (result.get("index") or {}).get("factory")
    return ", ".join([*parts, f"approximate index {index}"] if index else parts)


def _number_of_classes(result: dict[str, Any]) -> int:
    classes = result.get("classes")
    return len(classes) if isinstance(classes, list | dict) else classes or 0


def _per_class(result: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and accuracies of the classes."""
    accuracies = result.get("per_class") or {}
    if isinstance(accuracies, dict):
        return [(str(name), value) for name, value in accuracies.items()]
    names = result["classes"] if isinstance(result.get("classes"), list) else range(len(accuracies))
    return [(str(name), value) for name, value in zip(names, accuracies, strict=False)]


def _suffix(stem: str) -> str:
    name = stem.partition("-")[2]
    return f" · {name}" if name else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def format_percent(fraction: float) -> str:
    """41.3 %; below 1 %, two significant digits."""
    percent = 100 * fraction
    number = f"{percent:.1f}" if percent >= 1 or percent == 0 else f"{percent:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"
