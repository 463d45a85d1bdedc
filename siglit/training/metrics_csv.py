"""metrics.csv: one row for each set of metrics logged at a step, kept through kills and resumes.

Knows nothing of what is logged. Lightning's own CSV logger deletes the file of an earlier run when it opens it, and
rewrites it in place when a column is added: a kill then loses all rows.
"""

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from typing_extensions import override

from siglit.errors import UserError
from siglit.runtime.files import atomic_write

_logger = logging.getLogger(__name__)


class MetricsTable(Logger):
    """Appends rows on the first rank; a row may bring new columns."""

    def __init__(self, path: Path):
        """Take the path of the file; nothing is written yet."""
        super().__init__()
        self._path, self._pending = path, list[dict[str, Any]]()
        self._columns = ["step"]

    def keep_first(self, steps: int) -> None:
        """Keep the rows of the first `steps` steps; a run resumed from there logs the later ones again.

        For the first process alone.

        Raises:
            UserError: the file is damaged; of a run that starts anew, it is replaced without being read.
        """
        if self._path.exists():
            rows = [row for row in _read(self._path) if int(row["step"]) < steps] if steps > 0 else []
            self._columns = list(rows[0]) if rows else self._columns
            self._replace(rows)

    @property
    @override
    def name(self) -> str:
        """Empty: the run's folder has the name."""
        return ""

    @property
    @override
    def version(self) -> str:
        """Empty: a run has one table."""
        return ""

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: hyperparameters are in experiment.yaml."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, torch.Tensor | float], step: int | None = None) -> None:
        """Keep a row until `save`, which Lightning calls next."""
        assert step is not None
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self._pending.append({"step": step, **values})

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write the rows logged since the last call.

        Raises:
            OSError: the file cannot be written, as on a full disk; names it.
        """
        try:
            self._save()
        except OSError as error:
            error.filename = str(self._path)
            raise

    def _save(self) -> None:
        rows, self._pending = self._pending, []
        new = [name for row in rows for name in row if name not in self._columns]
        if new or (rows and not self._path.exists()):
            earlier = self._earlier_rows()
            self._columns = ["step", *sorted({*self._columns, *new} - {"step"})]
            self._replace([*earlier, *rows])
        elif rows:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                file.write(self._lines(rows))

    def _earlier_rows(self) -> list[dict[str, str]]:
        """The file's rows; a file that was damaged meanwhile is set aside, because the run itself is sound."""
        if not self._path.exists():
            return []
        try:
            return _read(self._path)
        except UserError as error:
            aside = self._path.with_suffix(".damaged.csv")
            self._path.replace(aside)
            _logger.warning(f"{error}; it is now {aside.name}, and a new table begins")
            return []

    @override
    def finalize(self, status: str) -> None:
        """Write the last rows, whatever the status."""
        self.save()

    def _replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as file:
            file.write(f"{','.join(self._columns)}\r\n{self._lines(rows)}".encode())

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, restval="").writerows(rows)
        return text.getvalue()


def _read(path: Path) -> list[dict[str, str]]:
    """All complete rows; a kill may have cut the last one short.

    Raises:
        UserError: another row is not one that this class writes.
    """
    content = path.read_bytes().rpartition(b"\n")[0]
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        head, *rows = [line for line in lines if line] or [["step"]]
        if head[0] != "step" or len(set(head)) < len(head):
            raise ValueError(f"its columns are {','.join(head)[:60]}")
        for row in rows:
            [float(value) for value in row if value]
            if len(row) != len(head) or not row[0].isdecimal():
                raise ValueError(f"{','.join(row)[:60]!r} is not a row of {len(head)} numbers")
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({error}); repair it, or remove it to continue with the curves from here on"
        ) from error
    return [dict(zip(head, row, strict=True)) for row in rows]
