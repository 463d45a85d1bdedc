"""Paths as people write them: `~`, ${VARIABLES}, globs, brace ranges and comma lists.

Knows nothing of what the files hold.
"""

import glob
import os
import re
from pathlib import Path

import braceexpand

from siglit.errors import UserError
from siglit.runtime.files import check_regular


def expand(text: str, option: str) -> str:
    """Expand ~, $NAME and ${NAME} in the value of an option.

    Raises:
        UserError: a variable is not set (os.path.expandvars would leave it as it is).
    """

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{option} is {text}, but the environment variable {name} is not set. Set it, or write the path out."
            )
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", variable, text))


def files_of(pattern: str, suffix: str) -> list[Path]:
    """Files that a path, folder, glob, brace range or comma list names, each once, in natural order (2 before 10).

    Args:
        pattern: as in the configuration.
        suffix: ending of the files that a folder stands for, such as ".tar".

    Raises:
        UserError: a part of the pattern matches no regular file, a variable is not set, or braces do not match.
    """
    files: dict[str, None] = {}
    expanded = expand(pattern, "path")
    # A comma within braces separates alternatives, not patterns.
    parts = [expanded] if os.path.exists(expanded) else re.split(r",(?![^{]*\})", expanded)
    for part in (part.strip() for part in parts):
        try:
            names = [part] if os.path.exists(part) else list(braceexpand.braceexpand(part))
        except ValueError as error:
            raise UserError(f"path {pattern} has braces that do not match: {error}") from error
        for name in names:
            query = os.path.join(glob.escape(name), f"*{suffix}") if os.path.isdir(name) else name
            candidates = [query] if os.path.exists(query) else glob.glob(query, recursive=True)
            matches = [match for match in candidates if os.path.isfile(match)]
            if len(matches) == 0:
                for candidate in candidates:
                    _check_regular(candidate, pattern)
                raise UserError(f"no file matches {query} (path {pattern}). Check the path.")
            files.update(dict.fromkeys(matches))
    return [Path(name) for name in sorted(files, key=lambda name: (_natural(name), name))]


def _check_regular(path: str, pattern: str) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise UserError(f"{path} (path {pattern}) cannot be read: {error.strerror}. Check the path.") from error


def _natural(name: str) -> list[str | int]:
    """Sort key in which numbers compare as numbers."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
