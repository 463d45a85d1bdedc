"""The paper's numbers beside a study: a table in long form (key columns, then metric and value), laid out in rows.

Knows nothing of what was measured here. Values stay as they are printed.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from siglit.errors import UserError

_MAX_COLUMNS = 9


class PaperTable(NamedTuple):
    """A table as a page shows it."""

    metric: str
    """The metric of all values; empty if the columns name several."""
    header: list[str]
    rows: list[list[str]]


def read_table(path: Path) -> PaperTable:
    """Lay out a CSV file whose last columns are metric and value; a value that is empty is a dash.

    The metric, and those last keys that every row has in full, become columns, so that what is compared stands side
    by side: the losses, then the lengths. Rows without any value are left out.

    Raises:
        UserError: the file is missing or has no such columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = [row for row in csv.reader(file, strict=True) if len(row) > 0]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{path} (paper.table) is not a CSV file that can be read: {error}") from error
    if header[-2:] != ["metric", "value"] or len(header) < 3 or any(len(line) != len(header) for line in lines):
        raise UserError(
            f"{path} (paper.table) must have the columns metric,value after others; see its folder's README"
        )
    keys = _row_keys(lines, len(header) - 2)
    metrics = {line[-2] for line in lines}
    end = -2 if len(metrics) == 1 and keys < len(header) - 2 else -1
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        table.setdefault(tuple(line[:keys]), {})[", ".join(line[keys:end])] = line[-1]
    columns = list(dict.fromkeys(", ".join(line[keys:end]) for line in lines))
    rows = [
        [*key, *(values.get(name) or "–" for name in columns)] for key, values in table.items() if any(values.values())
    ]
    return PaperTable(metrics.pop() if end == -2 else "", [*header[:keys], *columns], rows)


def _row_keys(lines: Sequence[Sequence[str]], keys: int) -> int:
    """The fewest first keys that name the rows, such that rows and columns make a full table."""
    for k in range(1, keys):
        rows, columns = {tuple(line[:k]) for line in lines}, {tuple(line[k:-1]) for line in lines}
        if len(columns) <= _MAX_COLUMNS and len(rows) * len(columns) == len(lines):
            return k
    return keys
