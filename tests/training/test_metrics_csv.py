"""metrics.csv: each row once, and none lost to a kill."""

import csv
import os

import pytest
import torch

from siglit.errors import UserError
from siglit.training.metrics_csv import MetricsTable


def rows(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def log(table, *steps, **more):
    for step in steps:
        table.log_metrics({"loss": torch.tensor(step / 2), **more}, step)
    table.save()


def test_columns_may_come_later(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    log(table, 0, 1)
    table.log_metrics({"loss": 1.0}, 2)
    table.log_metrics({"val": 0.25}, 2)
    table.finalize("success")
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "0", "loss": "0.0"},
        {"step": "1", "loss": "0.5"},
        {"step": "2", "loss": "1.0"},
        {"step": "2", "val": "0.25"},
    ]


def test_rows_after_the_step_to_resume_from_are_dropped(tmp_path):
    """They are logged again; a row that a kill cut short is dropped too, whatever its step looks like now."""
    path = tmp_path / "metrics.csv"
    log(MetricsTable(path), *range(13))
    path.write_bytes(path.read_bytes().rstrip() + b"\r\n1")
    table = MetricsTable(path)
    table.keep_first(3)
    log(table, 3, 4, val=1)
    assert [row["step"] for row in rows(path)] == ["0", "1", "2", "3", "4"]
    assert rows(path)[4] == {"step": "4", "loss": "2.0", "val": "1"}


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\r\n1,", b"\r\n1-"), (b"step", b"stdp"), (b"0.5", b"0/5"), (b"0.5", b"0.\xb5"), (b",", b"")],
)
def test_a_damaged_table_is_named_before_training_goes_on(tmp_path, before, after):
    """A run that starts anew needs no row of it."""
    path = tmp_path / "metrics.csv"
    log(MetricsTable(path), 0, 1, 2)
    path.write_bytes(path.read_bytes().replace(before, after, 1))
    with pytest.raises(UserError, match=r"metrics\.csv is damaged .*; repair it, or remove it"):
        MetricsTable(path).keep_first(2)
    MetricsTable(path).keep_first(0)
    assert rows(path) == []


@pytest.mark.parametrize("saved_by", [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\r\n", b"\r\n\r\n")])
def test_a_table_that_a_spreadsheet_has_saved_is_read(tmp_path, saved_by):
    path = tmp_path / "metrics.csv"
    log(MetricsTable(path), 0, 1, 2)
    path.write_bytes(saved_by(path.read_bytes()))
    MetricsTable(path).keep_first(2)
    assert [row["step"] for row in rows(path)] == ["0", "1"]


def test_an_empty_table_holds_no_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"")
    table = MetricsTable(path)
    table.keep_first(2)
    log(table, 2)
    assert [row["step"] for row in rows(path)] == ["2"]


def test_a_table_that_is_damaged_while_a_sound_run_goes_on_is_set_aside(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    log(table, 0, 1)
    path.write_bytes(b"stdp,loss\r\n0,1\r\n")
    log(table, 2, val=1)
    assert [row["step"] for row in rows(path)] == ["2"]
    assert (tmp_path / "metrics.damaged.csv").exists()
    assert "it is now metrics.damaged.csv" in caplog.text


@pytest.mark.parametrize("write", [lambda t: t.keep_first(2), lambda t: log(t, 2, val=1)])
def test_a_kill_while_the_table_is_rewritten_loses_no_row(tmp_path, monkeypatch, write):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    log(table, 0, 1)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
        write(table)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert [row["step"] for row in rows(path)] == ["0", "1"]
