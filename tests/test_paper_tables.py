"""The tables in configs/studies/paper are complete, without repeated rows, in range, and equal to what configs cite."""

import csv
import re
from collections import Counter

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "studies" / "paper"
ROWS = {"table1": 5, "table2": 35, "table3": 15, "table4": 32, "table5": 88, "table6": 37 * 9}


def rows(name):
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ROWS)
def test_a_table_has_each_figure_once_and_in_percent(name):
    table = rows(name)
    assert len(table) == ROWS[name]
    assert max(Counter(tuple(list(row.values())[:-1]) for row in table).values()) == 1
    assert all(row["value"] == "" or 0 < float(row["value"]) < 100 for row in table)


def test_the_averages_over_languages_are_those_of_their_rows():
    table = rows("table6")
    for average in (row for row in table if row["language"] == "avg"):
        same = [float(r["value"]) for r in table if (r["batch"], r["metric"]) == (average["batch"], average["metric"])]
        languages = sum(same) - float(average["value"])
        assert languages / 36 == pytest.approx(float(average["value"]), abs=0.0051)


def test_the_siglit_sweep_cites_the_table():
    header = (ROOT / "configs" / "reproductions" / "siglit_batch_sweep.yaml").read_text()
    for examples in ("450M", "900M", "3B", "18B"):
        cited = re.search(rf"^#   {examples} +(.*)$", header, re.MULTILINE)[1].split()
        table = [r["value"] for r in rows("table5") if (r["examples"], r["loss"]) == (examples, "sigmoid")]
        assert [value.strip("-") for value in cited] == table
