"""Reads and checks a study file; knows the names of an experiment's fields, but neither runs nor results."""

import itertools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from siglit.errors import UserError
from siglit.parsing.fields import FIELDS, did_you_mean, is_field
from siglit.parsing.yaml_checks import read_mapping
from siglit.studies.definition import Arm, Expectation, Paper, Study, matches, slug

EVALUATIONS = ("eval-retrieval", "eval-zeroshot", "eval-fewshot", "eval-logits")
_REQUIRED = ("name", "title", "claim", "source", "base", "axes", "measures", "expect")
_OPTIONAL = (
    "set",
    "test",
    "exclude",
    "seeds",
    "learning_rates",
    "evaluate",
    "kept",
    "curves",
    "paper",
    "notes",
    "full",
)
_MAX_ARMS, _MAX_SLUG = 1000, 180
"""A file system takes 255 bytes in a name, and a record's has its stage, learning rate and seed too."""
_SET_BY_STUDY = ("name", "output_dir", "seed", "train.resume", "eval.checkpoint")
"""Fields that differ from run to run; an axis cannot set them."""


def read_study(path: str | os.PathLike[str], *, full: bool = False) -> Study:
    """Read a study file.

    Args:
        path: the file.
        full: apply its `full`, a longer form for GPUs; the study is then called NAME-full. Without it, `full` is
            ignored.

    Raises:
        UserError: the file cannot be read, or a name or a value in it is wrong; the text names it.
    """
    path = Path(path)
    values = read_mapping(str(path), "study file")
    _check_names(path, "the study file", values, (*_REQUIRED, *_OPTIONAL))
    for name in _REQUIRED:
        if values.get(name) in (None, "", {}, []):
            raise _wrong(path, f"{name} is missing; a study has {', '.join(_REQUIRED)}")
    if full and not values.get("full"):
        raise _wrong(path, "it has no `full`, the fields of a longer form for GPUs; run it without --full")
    texts = {name: _text(path, name, values[name]) for name in ("name", "title", "claim", "source", "base")}
    if not texts["name"].replace("_", "").replace("-", "").isalnum():
        raise _wrong(
            path, f"name is {texts['name']!r}, but it must be letters, digits, _ and -: files are named after it"
        )
    study = Study(
        path=path,
        **{name: text for name, text in texts.items() if name not in ("base", "name")},
        name=texts["name"] + ("-full" if full else ""),
        base=path.parent / texts["base"],
        axes=_axes(path, values["axes"]),
        measures={
            name: tuple(_texts(path, f"measures.{name}", paths))
            for name, paths in _mapping(path, "measures", values["measures"]).items()
        },
        expect=tuple(_expectation(path, entry) for entry in _list(path, "expect", values["expect"])),
        set=_fields(path, "set", values.get("set") or {}),
        test=_fields(path, "test", values.get("test") or {}),
        exclude=_selectors(path, "exclude", values.get("exclude") or []),
        seeds=_seeds(path, values.get("seeds", 5)),
        learning_rates=_learning_rates(path, values.get("learning_rates") or []),
        evaluate=_evaluations(path, "evaluate", values.get("evaluate", ["eval-retrieval"])),
        kept=_evaluations(path, "kept", values.get("kept") or []),
        curves=tuple(_texts(path, "curves", values.get("curves") or [])),
        paper=_paper(path, values.get("paper") or {}),
        notes=_text(path, "notes", values.get("notes") or ""),
        full=_fields(path, "full", values["full"]) if full else {},
    )
    _check_selectors(study)
    return study


def _wrong(path: Path, text: str) -> UserError:
    return UserError(f"{path}: {text}")


def _check_names(path: Path, where: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known) or f"; {where} has {', '.join(known)}"
            raise _wrong(path, f"{name} is not a part of {where}{hint}")


def _mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, f"{name} is {value!r:.80}, but it must be a mapping of names to values")
    names = {str(key): inner for key, inner in value.items()}
    if len(names) < len(value):
        raise _wrong(path, f"{name} has two names that are the same text: {', '.join(map(repr, value))}; rename one")
    return names


def _list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(path, f"{name} is {value!r:.80}, but it must be a list")
    return value


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, f"{name} is {value!r:.80}, but it must be a text")
    return value.strip()


def _texts(path: Path, name: str, value: Any) -> list[str]:
    return [_text(path, name, entry) for entry in _list(path, name, value)]


def _fields(path: Path, where: str, value: Any) -> dict[str, Any]:
    """{dotted field: value}, with names that an experiment has."""
    fields = _mapping(path, where, value)
    for name in fields:
        if not is_field(name):
            raise _wrong(
                path, f"{where} sets {name}, which is not a field of an experiment{did_you_mean(name, FIELDS)}"
            )
        if name in _SET_BY_STUDY:
            raise _wrong(path, f"{where} sets {name}, which the study sets itself for each run; leave it out")
        try:
            json.dumps(fields[name], sort_keys=True, default=str)
        except TypeError:
            raise _wrong(path, f"{where}.{name} has names of several types; put quotes around them") from None
    return fields


def _axes(path: Path, value: Any) -> dict[str, dict[str, dict[str, Any]]]:
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for axis, points in _mapping(path, "axes", value).items():
        axes[axis] = {}
        for point, fields in _mapping(path, f"axes.{axis}", points).items():
            where = f"axes.{axis}.{point}"
            values = _mapping(path, where, fields)
            reserved: dict[str, Any] = {}
            if "base" in values:
                reserved["base"] = _text(path, f"{where}.base", values.pop("base"))
            if "test" in values:
                reserved["test"] = _fields(path, f"{where}.test", values.pop("test"))
            axes[axis][point] = {**_fields(path, where, values), **reserved}
        if len(axes[axis]) == 0:
            raise _wrong(path, f"axes.{axis} has no points")
    return axes


def _selectors(path: Path, where: str, value: Any) -> tuple[Arm, ...]:
    selectors = [_mapping(path, where, entry) for entry in _list(path, where, value)]
    return tuple({axis: str(point) for axis, point in selector.items()} for selector in selectors)


def _expectation(path: Path, value: Any) -> Expectation:
    values = _mapping(path, "expect", value)
    _check_names(path, "an expectation", values, ("say", "plus", "minus", "measure", "margin"))
    for name in ("say", "plus", "minus", "measure"):
        if name not in values:
            raise _wrong(path, f"an expectation has no {name}: {values!r:.200}")
    plus, minus = (_selectors(path, name, values[name]) for name in ("plus", "minus"))
    say, measure = (_text(path, name, values[name]) for name in ("say", "measure"))
    return Expectation(say, plus, minus, measure, _number(path, "margin", values.get("margin", 0.0)))


def _number(path: Path, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(path, f"{name} is {value!r:.80}, but it must be a number")
    return number


def _seeds(path: Path, value: Any) -> int:
    if not isinstance(value, int) or not 5 <= value <= 1000:
        raise _wrong(path, f"seeds is {value!r:.80}, but it must be a whole number from 5 to 1,000")
    return value


def _learning_rates(path: Path, value: Any) -> tuple[float, ...]:
    rates = [_number(path, "learning_rates", entry) for entry in _list(path, "learning_rates", value)]
    if len({f"{rate:g}" for rate in rates}) < len(rates):  # as in the names of the records
        raise _wrong(path, f"learning_rates has a value twice, in six digits: {rates}")
    return tuple(rates)


def _evaluations(path: Path, name: str, value: Any) -> tuple[str, ...]:
    commands = _texts(path, name, value)
    for command in commands:
        if command not in EVALUATIONS:
            raise _wrong(path, f"{name} has {command!r:.80}, but it must be {', '.join(EVALUATIONS)}")
    return tuple(commands)


def _paper(path: Path, value: Any) -> Paper:
    values = _mapping(path, "paper", value)
    _check_names(path, "paper", values, ("table", "note", "recipe"))
    files: dict[str, Path | None] = {"table": None, "recipe": None}
    for name in files.keys() & values.keys():
        file = path.parent / _text(path, f"paper.{name}", values[name])
        if not file.is_file():
            raise _wrong(path, f"paper.{name} is {file}, which is no file")
        files[name] = file
    return Paper(note=_text(path, "paper.note", values.get("note", "")), **files)


def _check_selectors(study: Study) -> None:
    if (count := math.prod(map(len, study.axes.values()))) > _MAX_ARMS:
        raise _wrong(study.path, f"the axes cross to {count:,} arms, more than {_MAX_ARMS:,}; use fewer points")
    arms = study.arms()
    if len(arms) == 0:
        raise _wrong(study.path, "exclude leaves out all arms")
    names = [slug(arm) for arm in arms]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise _wrong(study.path, f"two arms would have records of the same name, {twice[0]}; rename a point")
    if (longest := max(names, key=len)) and len(longest) > _MAX_SLUG:
        raise _wrong(study.path, f"{longest:.40}… is too long for the name of a file; shorten axes or points")
    for name, paths in study.measures.items():
        if len(paths) == 0:
            raise _wrong(study.path, f"measures.{name} has no paths of results")
    for selector in study.exclude:
        _check_selector(study, "exclude", selector, _all_arms(study))
    for expectation in study.expect:
        where = f"expect {expectation.say!r}"
        if len(expectation.plus + expectation.minus) == 0:
            raise _wrong(study.path, f"{where} has neither arms in plus nor in minus")
        for selector in expectation.plus + expectation.minus:
            _check_selector(study, where, selector, arms)
        if expectation.measure not in study.measures:
            hint = did_you_mean(expectation.measure, study.measures) or f"; they are {', '.join(study.measures)}"
            raise _wrong(study.path, f"{where}: {expectation.measure} is not one of the measures{hint}")
    if len(study.learning_rates) > 0 and any("optim.lr" in study.fields_of(arm) for arm in arms):
        raise _wrong(study.path, "optim.lr is set, but learning_rates choose it; leave one of them out")


def _check_selector(study: Study, where: str, selector: Arm, arms: Sequence[Arm]) -> None:
    if not any(matches(arm, selector) for arm in arms):
        raise _wrong(study.path, f"{where}: no arm has {selector}; the axes are {_names(study.axes)}")


def _all_arms(study: Study) -> list[Arm]:
    return [dict(zip(study.axes, points, strict=True)) for points in itertools.product(*study.axes.values())]


def _names(axes: Mapping[str, Collection[str]]) -> str:
    return "; ".join(f"{axis}: {', '.join(points)}" for axis, points in axes.items())
