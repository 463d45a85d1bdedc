"""The fields of an experiment by name: their types in plain words, and suggestions for a mistyped name.

Read off the types of the dataclasses, so that a field that is added to `siglit.config` is known here. Knows nothing of
files or command lines.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from siglit.config import Experiment


def field_types(section: type = Experiment, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": float, …}: the type of every field that holds a value."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        inner = section_of(kind)
        kinds |= {prefix + name: kind} if inner is None else field_types(inner, f"{prefix}{name}.")
    return kinds


def section_types(section: type = Experiment, prefix: str = "") -> dict[str, Any]:
    """{"optim": OptimConfig, "data.val": SourceSpec | None, …}: the type of every section."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        if (inner := section_of(kind)) is not None:
            kinds |= {prefix + name: kind} | section_types(inner, f"{prefix}{name}.")
    return kinds


def section_of(kind: Any) -> type | None:
    """The dataclass of a section's type, which may be optional; None if the type is not a section's."""
    return next((m for m in _members(kind) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def is_optional(kind: Any) -> bool:
    """Whether the field may be null."""
    return type(None) in _members(kind)


def is_list(kind: Any) -> bool:
    """Whether the field takes a list."""
    return any(get_origin(member) in (list, tuple) for member in _members(kind))


def is_free_form(kind: Any) -> bool:
    """Whether the field takes a dict, so that dotted names may continue below its own: image_tower.model_args.depth."""
    return any(get_origin(member) is dict for member in _members(kind))


def describe_type(kind: Any) -> str:
    """What a field of this type takes, in words that follow "must be"."""
    members = [_describe_member(member) for member in _members(kind) if member is not type(None)]
    return " or ".join(members) + (", or null" if is_optional(kind) else "")


def is_field(name: str) -> bool:
    """Whether the name is a field's, or a name below a free-form field."""
    return name in FIELDS or any(name.startswith(f"{field}.") for field, kind in FIELDS.items() if is_free_form(kind))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What follows a mistyped name in an error: similar names, else the names in the same section."""
    names = sorted(known)
    section, _, last = name.rpartition(".")
    siblings = [other for other in names if other.rpartition(".")[0] == section]
    namesakes = [other for other in names if other.rpartition(".")[2] == last]
    similar = (
        difflib.get_close_matches(name, siblings, n=1, cutoff=0.8)
        or (difflib.get_close_matches(name, namesakes, n=1, cutoff=0.8) if section else [])
        or namesakes
        or difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    )
    if len(similar) > 0:
        return f"; did you mean {join_or(prefix + other for other in similar)}?"
    if section and len(siblings) > 0:
        return f"; the fields of {section} are {', '.join(other.rpartition('.')[2] for other in siblings)}"
    return ""


def join_or(names: Iterable[object]) -> str:
    """A, b or c."""
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}" if first else last


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Any: "a value"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", Any: "values"}
_EXAMPLES = {int: "[1, 5]", float: "[0.5, 0.9]", str: "[a, b]"}


def _describe_member(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return join_or(inner)
    if get_origin(kind) is dict:
        return f"a mapping of names to {_PLURALS[inner[1]]}, such as {{name: 1}}"
    assert get_origin(kind) in (list, tuple), f"{kind} has no description yet"
    if get_origin(inner[0]) is Literal:
        choices = get_args(inner[0])
        return f"a list of {join_or(choices)}, such as [{choices[0]}]"
    length = f"{len(inner)} " if get_origin(kind) is tuple else ""
    return f"a list of {length}{_PLURALS[inner[0]]}, such as {_EXAMPLES[inner[0]]}"


FIELDS, SECTIONS = field_types(), section_types()
"""Types of all fields and of all sections of an experiment, by dotted name."""
