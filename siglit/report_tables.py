"""Results of the evaluations to what the page of `siglit report` shows of them: tables, bars and one line of figures.

Knows the JSON of each evaluation and nothing of files or HTML. What a result does not have is left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

KINDS = {
    "retrieval": ("Retrieval", "eval-retrieval"),
    "zeroshot": ("Zero-shot classification", "eval-zeroshot"),
    "fewshot": ("Few-shot classification", "eval-fewshot"),
    "probe": ("Linear probe", "eval-probe"),
    "logits": ("Logits", "eval-logits"),
}
"""{first word of a result's file: (title, command)}."""

_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
_MOST_BARS = 60

Row = dict[str, Any]
"""name, value (text), chance (a share, or None), and keys: what the paper's figure may be called."""


def title(stem: str) -> str:
    """Title of a result file, by its name without the suffix: zeroshot-imagenet."""
    kind, _, name = stem.partition("-")
    return KINDS[kind][0] + (f" · {name}" if name else "")


def tables(results: Mapping[str, dict[str, Any]], paper: Mapping[str, float]) -> list[dict[str, Any]]:
    """A table for each result, and one for those figures of the paper that none of them has.

    Args:
        results: {name of the file without its suffix: its JSON}.
        paper: {"zeroshot-imagenet/top1": per cent}.

    Returns:
        [{"title", "about", "step", "rows": [{"name", "value", "paper", "chance"}]}]; all but step are texts.
    """
    rows_of: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
        "retrieval": _retrieval,
        "zeroshot": _classification,
        "fewshot": _fewshot,
        "probe": _classification,
    }
    made, used = [], set()
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
                    "name": row["name"],
                    "value": row["value"],
                    "paper": _told(paper[key] / 100) if key else "",
                    "chance": "" if row["chance"] is None else _told(min(1.0, row["chance"])),
                }
            )
        step = (result.get("of") or {}).get("step")
        made.append({"title": title(stem), "about": _about(result), "step": step, "rows": rows})
    others = [
        {"name": key, "value": "", "paper": _told(value / 100), "chance": ""}
        for key, value in paper.items()
        if key not in used
    ]
    if others:
        made.append({"title": "Further figures of the paper", "about": "", "step": None, "rows": others})
    return made


def verdict(results: Mapping[str, dict[str, Any]], trained: Mapping[str, float]) -> str:
    """The best figures in one line; those seen in training, of `trained`, where nothing was evaluated."""
    parts = []
    for stem, result in results.items():
        where = stem.partition("-")[2]
        on = f" on {where}" if where else ""
        if stem.startswith("zeroshot") and _is_number(result.get("top1")):
            parts.append(f"zero-shot top-1 {_told(result['top1'])}{on}")
        elif stem.startswith("retrieval"):
            found = {w: result.get(f"{way}/R@1") for way, w in _DIRECTIONS.items()}
            told = ", ".join(f"{way} {_told(value)}" for way, value in found.items() if _is_number(value))
            parts.append(f"R@1 {told} of {result['images']:,} images{on}" if told and "images" in result else "")
        elif stem.startswith("fewshot") and result.get("shots"):
            shots, best = list(result["shots"].items())[-1]
            parts.append(f"{shots} shots per class {_told(best['mean'])}{on}")
        elif stem.startswith("probe") and _is_number(result.get("top1")):
            parts.append(f"linear probe top-1 {_told(result['top1'])}{on}")
    parts = [part for part in parts if part]
    if not parts:
        found = {w: trained.get(f"val/{way}/R@1") for way, w in _DIRECTIONS.items()}
        told = ", ".join(f"{way} {_told(value)}" for way, value in found.items() if _is_number(value))
        parts = [f"R@1 {told} on the held-out sample of training"] if told else []
    return "; ".join(parts) or "nothing was evaluated yet"


def languages(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of R@1 by language, one picture for each direction."""
    made = []
    for stem, result in results.items():
        table = dict(result.get("by_language") or {})
        average = table.pop("average", {})
        for way, words in _DIRECTIONS.items():
            values = [(lang, metrics.get(f"{way}/R@1")) for lang, metrics in table.items()]
            made.append(bars(f"R@1 {words} by language{_of(stem)}", values, average.get(f"{way}/R@1")))
    return [picture for picture in made if picture["rows"]]


def classes(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of the accuracy of each class of the zero-shot results."""
    made = [
        bars(f"Zero-shot accuracy by class{_of(stem)}", _per_class(result), result.get("mean_per_class"))
        for stem, result in results.items()
        if stem.startswith("zeroshot")
    ]
    return [picture for picture in made if picture["rows"]]


def bars(about: str, values: list[tuple[str, Any]], average: float | None) -> dict[str, Any]:
    """Shares as bars, best first; of very many only the best and the worst.

    Returns:
        {"title", "average" (per cent or None), "rows": [{"name", "percent"} or {"left_out": number of bars}]}.
    """
    known = sorted(((name, v) for name, v in values if _is_number(v)), key=lambda item: -item[1])
    rows: list[dict[str, Any]] = [{"name": name, "percent": 100 * value} for name, value in known]
    if len(rows) > _MOST_BARS:
        half = _MOST_BARS // 2
        rows = [*rows[:half], {"left_out": len(rows) - 2 * half}, *rows[-half:]]
    return {"title": about, "average": 100 * average if _is_number(average) else None, "rows": rows}


def _retrieval(result: dict[str, Any]) -> Iterator[Row]:
    images = result.get("images") or 0
    for way in _DIRECTIONS:
        yield from _metrics(result, way, "", images)
    if _is_number(result.get("label_accuracy")):
        yield _row("class of the nearest caption is right", _told(result["label_accuracy"]), "label_accuracy")
    average = (result.get("by_language") or {}).get("average", {})
    for way in _DIRECTIONS:
        yield from _metrics(average, way, "by_language/average/", 0, note=", mean of the languages")
    folds = result.get("folds") or {}
    count = folds.get("count", 0)
    for way in _DIRECTIONS:
        yield from _metrics(folds, way, "folds/", images // count if count else 0, note=f", mean of {count} folds")
    for way in _DIRECTIONS:
        yield from _metrics(result.get("index") or {}, way, "index/", 0, note=", approximate index")


def _metrics(found: Mapping[str, Any], way: str, prefix: str, images: int, note: str = "") -> Iterator[Row]:
    for key, value in found.items():
        if not key.startswith(f"{way}/") or not _is_number(value):
            continue
        metric = key.removeprefix(f"{way}/")
        recall = int(metric[2:]) if metric.startswith("R@") and metric[2:].isdigit() else 0
        # An image's own captions are its share of all, on average over the images one of their number.
        easy = recall and images and (way == "text_to_image" or recall == 1)
        shown = f"{value:,.4g}" if metric == "median_rank" else _told(value)
        name = f"{_DIRECTIONS[way]} {metric.replace('_', ' ')}{note}"
        yield _row(name, shown, prefix + key, chance=recall / images if easy else None)


def _classification(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for key, name, right in (("top1", "top-1", 1), ("top5", "top-5", 5), ("mean_per_class", "mean over classes", 1)):
        if _is_number(result.get(key)):
            yield _row(name, _told(result[key]), key, chance=right / count if count else None)
    if _is_number(result.get("l2")):
        yield _row("weight of the L2 penalty", f"{result['l2']:.3g}", "l2")


def _fewshot(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for shots, found in (result.get("shots") or {}).items():
        spread = f" ± {100 * found['std']:.1f}" if _is_number(found.get("std")) else ""
        name = f"{shots} shot{'' if str(shots) == '1' else 's'} per class"
        keys = (f"shots/{shots}/mean", f"shots/{shots}", str(shots))
        yield _row(name, _told(found["mean"]) + spread, *keys, chance=1 / count if count else None)


def _row(name: str, value: str, *keys: str, chance: float | None = None) -> Row:
    return {"name": name, "value": value, "keys": keys, "chance": chance}


def _about(result: dict[str, Any]) -> str:
    counts = {name: result.get(name) for name in ("images", "captions")}
    counts["classes"] = _number_of_classes(result)
    told = [f"{number:,} {name}" for name, number in counts.items() if number]
    index = (result.get("index") or {}).get("factory")
    return ", ".join([*told, f"approximate index {index}"] if index else told)


def _number_of_classes(result: dict[str, Any]) -> int:
    given = result.get("classes")
    return len(given) if isinstance(given, list | dict) else given or 0


def _per_class(result: dict[str, Any]) -> list[tuple[str, Any]]:
    found = result.get("per_class") or {}
    if isinstance(found, dict):
        return [(str(name), value) for name, value in found.items()]
    names = result["classes"] if isinstance(result.get("classes"), list) else range(len(found))
    return [(str(name), value) for name, value in zip(names, found, strict=False)]


def _of(stem: str) -> str:
    name = stem.partition("-")[2]
    return f" · {name}" if name else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _told(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f} %" if percent >= 1 or percent == 0 else f"{percent:.2g} %"
