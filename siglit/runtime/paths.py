"""Paths as people write them: `~`, ${VARIABLES}, globs, brace ranges and comma lists."""

import glob
import os
import re
from pathlib import Path

import braceexpand

from siglit.errors import UserError
from siglit.runtime.files import check_regular


def expand(text: str, option: str) -> str:
    """Expand ~, $NAME and ${NAME}; unlike os.path.expandvars, an unset variable is an error."""

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{option} is {text}, but the environment variable {name} is not set. Set it, or write it out."
            )
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", variable, text))


def files_of(pattern: str, suffix: str) -> list[Path]:
    """Files a path, folder, glob, brace range or comma list means, each once, in natural order (2 before 10)."""
    found: dict[str, None] = {}
    expanded = expand(pattern, "path")
    # A comma within braces separates alternatives, not patterns.
    parts = [expanded] if os.path.exists(expanded) else re.split(r",(?![^{]*\})", expanded)
    for part in (part.strip() for part in parts):
        try:
            names = [part] if os.path.exists(part) else list(braceexpand.braceexpand(part))
        except ValueError as error:
            raise UserError(f"path {pattern} has braces that do not match: {error}") from error
        for name in names:
            wanted = os.path.join(glob.escape(name), f"*{suffix}") if os.path.isdir(name) else name
            there = [wanted] if os.path.exists(wanted) else glob.glob(wanted, recursive=True)
            matches = [match for match in there if os.path.isfile(match)]
            if not matches:
                for match in there:
                    _check_regular(match, pattern)
                raise UserError(f"no file matches {wanted} (path {pattern}). Correct path.")
            found.update(dict.fromkeys(matches))
    return [Path(name) for name in sorted(found, key=lambda name: (_natural(name), name))]


def _check_regular(path: str, pattern: str) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise UserError(f"{path} (path {pattern}) cannot be read: {error.strerror}. Correct path.") from error


def _natural(name: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
