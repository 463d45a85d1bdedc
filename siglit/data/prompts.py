"""Texts of zero-shot classes: names of classes in templates of prompts, from files, our lists or open_clip's.

Knows nothing of towers or tokens. Shapes: C classes, P prompts.
"""

import importlib
import importlib.resources
import json
import string
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from siglit.data.sources.texts import is_unicode
from siglit.errors import UserError
from siglit.runtime.files import read_regular
from siglit.runtime.paths import expand
from siglit.runtime.text import json_problem

Names = tuple[str, ...]
"""All names of one class; results use the first."""
_BUILTIN = "siglit:"
_OPEN_CLIP = "open_clip:"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LISTS = {
    "eval.classes": {"imagenet": "IMAGENET_CLASSNAMES"},
    "eval.templates": {
        "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",
        "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES",
    },
}
_CLIP_PAPER = "big_vision:clip_paper"
"""The templates of the paper's zero-shot results: openai_imagenet, and the name alone."""


def class_names(where: str) -> list[Names]:
    """Names of the classes, label 0 first.

    Args:
        where: a JSON list of names or lists of names, a text file with a name a line, `siglit:` and one of our lists
            (siglit/assets/classes), or `open_clip:imagenet`.

    Raises:
        UserError: there is no such list, or an entry is not a name or a list of names.
    """
    option = "eval.classes"
    if where.startswith(_OPEN_CLIP):
        return [(name,) for name in _open_clip_list(where, option)]
    classes: list[Names] = []
    for label, entry in enumerate(_read_list(where, option)):
        names = entry if isinstance(entry, list) else [entry]
        if len(names) == 0 or not all(_is_text(name) and name.strip() for name in names):
            raise UserError(f"{where}: class {label} is {entry!r:.80}, expected a name or a list of names")
        classes.append(tuple(names))
    return classes


def templates(where: str | None) -> list[str]:
    """Prompts with {} in place of the name; None is the name alone.

    Args:
        where: a JSON list, a text file with a prompt a line, `siglit:` and one of our lists (siglit/assets/templates),
            `open_clip:openai_imagenet`, `open_clip:simple_imagenet`, or `big_vision:clip_paper`, which needs open_clip
            too.

    Raises:
        UserError: there is no such list, or a prompt has no {}.
    """
    option = "eval.templates"
    if where is None:
        return ["{}"]
    if where == _CLIP_PAPER:
        return [*templates(_OPEN_CLIP + "openai_imagenet"), "{}"]
    if where.startswith(_OPEN_CLIP):
        return [prompt("{}") for prompt in _open_clip_list(where, option)]
    prompts_read = _read_list(where, option)
    for number, entry in enumerate(prompts_read, start=1):
        if not _is_text(entry) or "{}" not in entry:
            raise UserError(
                f"{where}: prompt {number} is {entry!r:.80}, expected a text with {{}} in place of the name"
            )
    return prompts_read


def prompts(names: Sequence[Names], wording: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Every name of every class in every template.

    Args:
        names: C classes.
        wording: templates.

    Returns:
        P texts, and (P,) int64 labels.
    """
    texts = [
        (label, text.replace("{}", name)) for label, several in enumerate(names) for name in several for text in wording
    ]
    return [text for _, text in texts], np.array([label for label, _ in texts], np.int64)


def canonical(
    names: Sequence[Names], wording: Sequence[str], where: str = "eval.classes"
) -> tuple[list[Names], list[str]]:
    """Names and templates as big_vision's zero-shot evaluator canonicalizes them, before the names are put in.

    Lower case, no ASCII punctuation (but the {} of a template), _ to a space, runs of white space to one. A name ends
    at its first comma: there, further names of the class come after it.

    Args:
        names: C classes.
        wording: templates.
        where: where the names come from, for the message.

    Raises:
        UserError: a name has no letters or digits.

    Source: big_vision `prompt_engineering.canonicalize_text` and `discriminative_classifier` (`canonicalize`,
    `first_class_name_only`), commit 0127fb6.
    """
    plain = [tuple(_canonicalize(name.partition(",")[0]) for name in several) for several in names]
    for label, (before, after) in enumerate(zip(names, plain, strict=True)):
        if not all(after):
            empty = before[after.index("")]
            raise UserError(
                f"{where}: class {label} is {empty!r:.80}, of which eval.canonicalize leaves nothing; "
                "use a name with letters, or set eval.canonicalize to false"
            )
    return plain, [_canonicalize(text, "{}") for text in wording]


def _canonicalize(text: str, kept: str | None = None) -> str:
    """Every whole `kept` stays in the text; elsewhere its characters are removed like all punctuation."""
    text = text.replace("_", " ")
    parts = text.split(kept) if kept else [text]
    text = (kept or "").join(part.translate(_NO_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())


def _is_text(entry: Any) -> bool:
    return isinstance(entry, str) and is_unicode(entry)


def _open_clip_list(where: str, option: str) -> Sequence[Any]:
    lists = _LISTS[option]
    name = lists.get(where.removeprefix(_OPEN_CLIP))
    if name is None:
        raise UserError(f"{option} is {where}, but open_clip's lists are {', '.join(_OPEN_CLIP + n for n in lists)}")
    try:
        return getattr(importlib.import_module("open_clip"), name)
    except ImportError as error:
        raise UserError(
            f"{option} is {where}, but open_clip is not installed ({error}): pip install open_clip_torch, or name a "
            "file"
        ) from error


def _builtin_list(where: str, option: str) -> list[Any]:
    lists = _builtin_lists(option)
    if where not in lists:
        raise UserError(f"{option} is {where}, but siglit's lists are {', '.join(lists)}")
    return json.loads(lists[where].read_text(encoding="utf-8"))


def _builtin_lists(option: str) -> dict[str, Traversable]:
    """{name: file} of the lists that come with the package."""
    folder = importlib.resources.files("siglit") / "assets" / option.removeprefix("eval.")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {_BUILTIN + file.name.removesuffix(".json"): file for file in files}


def _read_list(where: str, option: str) -> list[Any]:
    if where.startswith(_BUILTIN):
        return _builtin_list(where, option)
    path = Path(expand(where, option))
    try:
        text = read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}. Convert the file (iconv -t utf-8).") from error
    except OSError as error:
        raise UserError(
            f"{option} is {where or 'empty'}, which cannot be read ({error.strerror}); name a JSON list, a text "
            f"file with one entry per line, or one of {', '.join(_builtin_lists(option))}"
        ) from error
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {json_problem(error)}. Fix it, or write it again.") from error
        if not isinstance(entries, list):
            raise UserError(f"{path} holds JSON other than a list, but {option} needs a list of strings")
    else:
        entries = text.rstrip().splitlines()
        blank = next((number for number, line in enumerate(entries, start=1) if line.strip() == ""), None)
        if blank is not None:
            raise UserError(f"{path}, line {blank} is blank, but each line is one entry. Remove it.")
        entries = [line.strip() for line in entries]
    if len(entries) == 0:
        raise UserError(f"{path} is empty, but {option} needs at least one entry")
    return entries
