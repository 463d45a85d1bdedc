"""metrics.csv: a row for what is logged of a step at once, kept through kills and resumes.

Knows nothing of what is logged. Lightning's own CSV logger deletes the file of an earlier run when it opens it, and
writes it anew in place when a column is added: a kill then loses all rows.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from siglit.runtime.files import atomic_write


class MetricsTable(Logger):
    """Appends rows on the first rank, also where another brings new columns."""

    def __init__(self, path: Path):
        """Take the file; nothing is written yet."""
        super().__init__()
        self._path, self._pending = path, list[dict[str, Any]]()
        self._columns = ["step"]

    def go_on_after(self, steps: int) -> None:
        """Keep the rows of the first `steps` steps; a run that goes on from there makes the later ones again.

        For the first process alone.
        """
        if self._path.exists():
            rows = [row for row in _read(self._path) if int(row["step"]) < steps]
            self._columns = list(rows[0]) if rows else self._columns
            self._replace(rows)

    @property
    def name(self) -> str:
        """The folder has the name."""
        return ""

    @property
    def version(self) -> str:
        """There is one table per run."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in experiment.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, torch.Tensor | float], step: int | None = None) -> None:
        """Keep a row until it is saved, which Lightning does at once."""
        assert step is not None
        figures = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self._pending.append({"step": step, **figures})

    @rank_zero_only
    def save(self) -> None:
        """Write what has come since the last time.

        Raises:
            OSError: the disk is full, or refuses for another reason; names the file.
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
            earlier = _read(self._path) if self._path.exists() else []
            self._columns = ["step", *sorted({*self._columns, *new} - {"step"})]
            self._replace([*earlier, *rows])
        elif rows:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                file.write(self._lines(rows))

    def finalize(self, status: str) -> None:
        """Write the last rows, however the run ended."""
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
    """All whole rows: a kill may have torn the last one."""
    text = path.read_bytes().rpartition(b"\n")[0].decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))
