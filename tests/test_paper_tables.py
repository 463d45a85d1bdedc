"""The files of configs/studies/paper are complete, without repeated rows, in range, and equal to what configs cite."""

import csv
import re
from collections import Counter

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "studies" / "paper"
ROWS = {"table1": 5, "table2": 35, "table3": 15, "table4": 32, "table5": 88, "table6": 37 * 9}


NUMBERS = {"one million": "1M", "half": "0.5", " billion": "B"}
"""Numbers that the paper writes as words, as `text_claims.csv` has them."""


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


def test_a_claim_states_its_number_once():
    table = rows("text_claims")
    assert len(table) == 60
    assert all(all(row.values()) for row in table)
    assert max(Counter((row["section"], row["metric"]) for row in table).values()) == 1
    for row in table:
        claim = row["claim"]
        for word, number in NUMBERS.items():
            claim = claim.replace(word, number)
        claim = re.sub(r"(?<=\d) (?=[kMB]\b)", "", claim)
        assert re.search(rf"(?<![\w.]){re.escape(row['value'])}(?![\w.]*\d|\w)", claim), row


@pytest.mark.parametrize(("name", "table"), [("msiglip", "table2"), ("siglip_bias", "table3")])
def test_a_recipe_cites_its_table(name, table):
    """Every number of the table, without the languages, is in the header, in the table's order."""
    header = (ROOT / "configs" / "reproductions" / f"{name}.yaml").read_text().partition("\nname:")[0]
    cited = iter(re.findall(r"(?<![\d.])\d\d\.\d(?!\d)", header))
    named = {"imagenet_top1", "pets_top1", "cifar100_top1", "xm_t2i_r1_avg"}
    assert all(row["value"] in cited for row in rows(table) if row["metric"] in named)
