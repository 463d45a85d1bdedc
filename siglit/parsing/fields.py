"""The fields of an experiment by name: which there are, which one a mistyped name means, and what each of them takes.

Read off the types of the dataclasses, so that a field that is added to `siglit.config` is known here.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from siglit.config import Experiment


def field_types(section: type = Experiment, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": float, …}: the type of every field that holds a value."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        inner = section_of(kind)
        found |= {prefix + name: kind} if inner is None else field_types(inner, f"{prefix}{name}.")
    return found


def section_types(section: type = Experiment, prefix: str = "") -> dict[str, Any]:
    """{"optim": OptimConfig, "data.val": SourceSpec | None, …}: the type of every section."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        if (inner := section_of(kind)) is not None:
            found |= {prefix + name: kind} | section_types(inner, f"{prefix}{name}.")
    return found


def section_of(kind: Any) -> type | None:
    """The dataclass that a type stands for, also where the section may be left out; None if it is no section."""
    return next((m for m in _members(kind) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def is_optional(kind: Any) -> bool:
    """Whether the field may be null."""
    return type(None) in _members(kind)


def is_list(kind: Any) -> bool:
    """Whether the field takes a list."""
    return any(get_origin(member) in (list, tuple) for member in _members(kind))


def is_free_form(kind: Any) -> bool:
    """Whether the field takes names with values, so that names may go on below its own."""
    return any(get_origin(member) is dict for member in _members(kind))


def expected(kind: Any) -> str:
    """What a field of this type takes, in words that follow "must be"."""
    kinds = [member for member in _members(kind) if member is not type(None)]
    return " or ".join(_expected(member) for member in kinds) + ", or null" * is_optional(kind)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What follows a mistyped name in an error: the names it may mean, else those that stand beside it."""
    names = sorted(known)
    section, _, last = name.rpartition(".")
    beside = [other for other in names if other.rpartition(".")[0] == section]
    elsewhere = [other for other in names if other.rpartition(".")[2] == last]
    near = (
        difflib.get_close_matches(name, beside, n=1, cutoff=0.8)
        or (difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8) if section else [])
        or elsewhere
        or difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    )
    if near:
        return f"; did you mean {enumeration(prefix + other for other in near)}?"
    fields = ", ".join(other.rpartition(".")[2] for other in beside)
    return f"; the fields of {section} are {fields}" if section and beside else ""


def enumeration(names: Iterable[object]) -> str:
    """A, b or c."""
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}" if first else last


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Any: "a value"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_EXAMPLES = {int: "[1, 5]", float: "[0.5, 0.9]", str: "[a, b]"}


def _expected(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return enumeration(inner)
    if get_origin(kind) is dict:
        return f"names with {_WORDS[inner[1]]} each, such as {{name: 1}}"
    assert get_origin(kind) in (list, tuple), f"{kind} has no words yet"
    if get_origin(inner[0]) is Literal:
        return f"a list of {enumeration(get_args(inner[0]))}, such as [{get_args(inner[0])[0]}]"
    number = f"{len(inner)} " if get_origin(kind) is tuple else ""
    return f"a list of {number}{_PLURALS[inner[0]]}, such as {_EXAMPLES[inner[0]]}"
