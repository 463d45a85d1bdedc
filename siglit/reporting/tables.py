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
OF_CLASSES = ("zeroshot", "fewshot", "probe")
"""Those of them that need labels."""

_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
_MOST_BARS = 40
_ENDS = (10, 20, 50, 100)
"""Per cent that a bar's track may end at; the longest bar decides."""

Row = dict[str, Any]
"""group and name, value (text), chance (a share, or None), and keys: what the paper's figure may be called."""


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
        [{"title", "about", "step", "rows": [{"group", "name", "value", "paper", "chance"}]}]; all but step are texts.
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
                    "group": row["group"],
                    "name": row["name"],
                    "value": row["value"],
                    "paper": _told(paper[key] / 100) if key else "",
                    "chance": "" if row["chance"] is None else _told(min(1.0, row["chance"])),
                }
            )
        step = (result.get("of") or {}).get("step")
        made.append({"title": title(stem), "about": _about(result), "step": step, "rows": rows})
    others = [
        {"group": "", "name": key, "value": "", "paper": _told(value / 100), "chance": ""}
        for key, value in paper.items()
        if key not in used
    ]
    if others:
        made.append({"title": "Further figures of the paper", "about": "", "step": None, "rows": others})
    return made


def verdict(results: Mapping[str, dict[str, Any]], trained: Mapping[str, float], paper: Mapping[str, float]) -> str:
    """The main figures in one line, of one result of each kind: one that the paper has a figure for, else the first.

    Args:
        results: as for `tables`.
        trained: last metrics of the training, which are told where nothing was evaluated.
        paper: as for `tables`.
    """
    parts = []
    for kind in KINDS:
        stems = [stem for stem in results if stem.partition("-")[0] == kind]
        stems.sort(key=lambda stem: not any(key.startswith(f"{stem}/") for key in paper))
        stem, told = next(((stem, told) for stem in stems if (told := _main_figure(kind, results[stem]))), ("", ""))
        if told:
            where = stem.partition("-")[2]
            parts.append(told + (f" on {where}" if where else ""))
    if not parts:
        told = _first_recalls({key.removeprefix("val/"): value for key, value in trained.items()})
        parts = [f"{told} on the held-out sample of training"] if told else []
    return "; ".join(parts) or "nothing was evaluated yet"


def _main_figure(kind: str, result: Mapping[str, Any]) -> str:
    if kind == "retrieval":
        average = (result.get("by_language") or {}).get("average")
        told = _first_recalls(average or result)
        return f"{told}, mean of the languages" if told and average else told
    if kind == "fewshot" and result.get("shots"):
        shots, found = list(result["shots"].items())[-1]
        return f"{shots} shots per class {_told(found['mean'])}"
    names = {"zeroshot": "zero-shot top-1", "probe": "linear probe top-1"}
    return f"{names[kind]} {_told(result['top1'])}" if kind in names and _is_number(result.get("top1")) else ""


def _first_recalls(metrics: Mapping[str, Any]) -> str:
    found = {words: metrics.get(f"{way}/R@1") for way, words in _DIRECTIONS.items()}
    told = ", ".join(f"{words} {_told(value)}" for words, value in found.items() if _is_number(value))
    return f"R@1 {told}" if told else ""


def languages(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of R@1 by language, one picture for each direction."""
    made = []
    for stem, result in results.items():
        table = dict(result.get("by_language") or {})
        average = table.pop("average", {})
        both = []
        for way, words in _DIRECTIONS.items():
            values = [(lang, metrics.get(f"{way}/R@1")) for lang, metrics in table.items()]
            both.append(bars(f"R@1 {words} by language{_of(stem)}", values, average.get(f"{way}/R@1")))
        end = max(picture["end"] for picture in both)  # they stand side by side
        made += [picture | {"end": end} for picture in both if picture["rows"]]
    return made


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
        {"title", "average" (per cent or None), "end" (per cent: the length of a bar's track), "rows": [{"name",
        "percent"} or {"left_out": number of bars}]}.
    """
    known = sorted(((name, v) for name, v in values if _is_number(v)), key=lambda item: -item[1])
    rows: list[dict[str, Any]] = [{"name": name, "percent": 100 * value} for name, value in known]
    if len(rows) > _MOST_BARS:
        half = _MOST_BARS // 2
        rows = [*rows[:half], {"left_out": len(rows) - 2 * half}, *rows[-half:]]
    mean = 100 * average if average is not None and _is_number(average) else None
    longest = max((100 * value for _, value in known), default=0.0)
    end = next((end for end in _ENDS if max(longest, mean or 0.0) <= end), 100)
    return {"title": about, "average": mean, "end": end, "rows": rows}


def _retrieval(result: dict[str, Any]) -> Iterator[Row]:
    folds, count = result.get("folds") or {}, (result.get("folds") or {}).get("count", 0)
    parts = [
        ("", "", result, result.get("images") or 0),
        (", mean of the languages", "by_language/average/", (result.get("by_language") or {}).get("average", {}), 0),
        (f", mean of {count} folds", "folds/", folds, (result.get("images") or 0) // max(1, count)),
        (", approximate index", "index/", result.get("index") or {}, 0),
    ]
    for note, prefix, metrics, images in parts:
        for way, words in _DIRECTIONS.items():
            for key, value in metrics.items():
                if key.startswith(f"{way}/") and _is_number(value):
                    yield _recall(words + note, prefix + key, value, images)
        if note == "" and _is_number(result.get("label_accuracy")):
            told = _told(result["label_accuracy"])
            yield _row("image → class", "class of the nearest caption is right", told, "label_accuracy")


def _recall(group: str, key: str, value: float, images: int) -> Row:
    """One metric of one direction; `images` is 0 where the chance level is not known."""
    way, metric = key.split("/")[-2:]
    depth = int(metric[2:]) if metric.startswith("R@") and metric[2:].isdigit() else 0
    # An image's own captions are its share of all: averaged over the images, one part of their number.
    easy = depth and images and (way == "text_to_image" or depth == 1)
    told = f"{value:,.4g}" if metric == "median_rank" else _told(value)
    return _row(group, metric.replace("_", " "), told, key, chance=depth / images if easy else None)


def _classification(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for key, name, right in (("top1", "top-1", 1), ("top5", "top-5", 5), ("mean_per_class", "mean over classes", 1)):
        if _is_number(result.get(key)):
            yield _row("", name, _told(result[key]), key, chance=right / count if count else None)
    if _is_number(result.get("l2")):
        yield _row("", "weight of the L2 penalty", f"{result['l2']:.3g}", "l2")


def _fewshot(result: dict[str, Any]) -> Iterator[Row]:
    count = _number_of_classes(result)
    for shots, found in (result.get("shots") or {}).items():
        spread = f" ± {100 * found['std']:.1f}" if _is_number(found.get("std")) else ""
        name = f"{shots} shot{'' if str(shots) == '1' else 's'} per class"
        keys = (f"shots/{shots}/mean", f"shots/{shots}", str(shots))
        yield _row("", name, _told(found["mean"]) + spread, *keys, chance=1 / count if count else None)


def _row(group: str, name: str, value: str, *keys: str, chance: float | None = None) -> Row:
    return {"group": group, "name": name, "value": value, "keys": keys, "chance": chance}


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
    number = f"{percent:.1f}" if percent >= 1 or percent == 0 else f"{percent:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"
