"""`siglit report` checks what it reads against a schema, and names each malformed file in one line.

The malformed files are real results in which each field in turn is missing, or of every other type.
"""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest

import siglit
from siglit.cli import main
from siglit.commands import report
from siglit.errors import UserError
from siglit.reporting import page
from siglit.reporting import tables as report_tables
from siglit.reporting.results import _SCHEMAS, _SUMMARY_SCHEMA, read_results, read_summary
from tests.conftest import parse

OTHERS = (None, True, 7, -1.5, math.nan, 10**400, "high", "", [], ["a"], [[]], {}, {"a": 1}, {"a": {}}, "\ud800")
"""Values of every type; some match the schema, and none may end in a traceback."""
FOLDER = Path("runs/small")


@pytest.fixture(scope="module")
def results(classed_run, tmp_path_factory):
    """{name of the file: its JSON} of one run, from each command; nobody changes it."""
    folder = tmp_path_factory.mktemp("results") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(classed_run)
        shutil.copytree("runs/small", folder, ignore=shutil.ignore_patterns("*.json"))
        shutil.copy("runs/small/summary.json", folder)
        shutil.copy("runs/small/tokenizer.json", folder)
        words = ("--output_dir", str(folder))
        siglit.eval_retrieval(parse("eval-retrieval", *words, "--eval.folds", "2", "--eval.index", "Flat"))
        siglit.eval_zeroshot(parse("eval-zeroshot", *words, "--eval.classes", "colors.json"))
        siglit.eval_fewshot(parse("eval-fewshot", *words, "--eval.shots", "[1]", "--eval.seeds", "2"))
        siglit.eval_probe(parse("eval-probe", *words))
        siglit.eval_logits(parse("eval-logits", *words))
    names = [*report_tables.KINDS, "summary"]
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    results["summary"] = {"train": results["summary"]["train"]}
    few = {"edges": 5, "positive": 4, "negative": 4, "nearest": 2, "calibration": 2}
    results["logits"] |= {field: results["logits"][field][:count] for field, count in few.items()}
    return results


@pytest.fixture
def experiment(classed_run, tmp_path, monkeypatch):
    """The run's, whose folder has nothing in it but what a test writes there; the test works above it."""
    monkeypatch.chdir(classed_run)
    parsed = parse("report")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        page, "environment", lambda: dict.fromkeys(("siglit", "packages", "python", "machine", "date"), "")
    )
    Path("runs/small").mkdir(parents=True)
    return parsed


def places(value, path=()):
    """Paths of all fields and of the first entry of every list."""
    fields = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for name, inner in fields:
        yield (*path, name)
        yield from places(inner, (*path, name))


def changed(value, path, *new):
    """A copy with `new` at the path, or nothing there."""
    value = copy.deepcopy(value)
    parent = value
    for name in path[:-1]:
        parent = parent[name]
    if new:
        parent[path[-1]] = new[0]
    else:
        del parent[path[-1]]
    return value


@pytest.mark.parametrize("name", [*report_tables.KINDS, "summary"])
def test_every_malformed_result_is_shown_or_named(results, experiment, name):
    """Each field missing, or of each type: either the page is written, or one line names the file."""
    valid, messages = {}, set()
    for path in places(results[name]):
        for new in [(), *((other,) for other in OTHERS)]:
            value = changed(results[name], path, *new)
            (FOLDER / f"{name}.json").write_text(json.dumps(value))
            try:
                read_results(FOLDER), read_summary(FOLDER)
            except UserError as error:
                messages.add(str(error))
            else:
                valid[f"{name}-{len(valid)}"] = value
    assert valid
    assert messages
    assert all(
        re.match(rf"runs/small/{name}\.json: .* (is expected|has no|are not|do not|ece is missing)", text)
        for text in messages
    )
    assert all("\n" not in text and len(text) < 300 for text in messages)
    if name == "summary":
        for value in valid.values():
            (FOLDER / "summary.json").write_text(json.dumps(value))
            context = report.collect(experiment, FOLDER, {}, None)
        valid = {}
    else:
        (FOLDER / f"{name}.json").unlink()
        context = report.collect(experiment, FOLDER, valid, None)
    report.render(context).encode()


@pytest.mark.parametrize("name", [*report_tables.KINDS, "summary"])
def test_other_json_and_no_json_are_named_in_one_line(experiment, capsys, name):
    """Whatever the file contains."""
    wrong = ["[]", "3", "null", "", "{", '"a"', "[" * 100_000, "\udcff"]
    wrong += ['{"train": []}', '{"train": {"steps": "7"}}'] if name == "summary" else ["{}", '{"a": 1}']
    (FOLDER / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    advice = "remove it" if name == "summary" else f"rerun `siglit {report_tables.KINDS[name][1]}`"
    for text in wrong:
        (FOLDER / f"{name}.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=rf"^runs/small/{name}\.json.*; {advice}$"):
            siglit.report(experiment)
    line = printed_error(capsys)
    assert f"runs/small/{name}.json" in line


@pytest.mark.parametrize(
    "text",
    ["when,what\n1,2\n", "step,train/loss\n0,nine\n", "step,train/loss\n-3,1\n", f"step,train/loss\n{10**30},1\n"],
)
def test_a_table_of_other_metrics_is_named(experiment, text):
    (FOLDER / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=r"runs/small/metrics.csv is not the metrics.csv of a run"):
        siglit.report(experiment)


def test_a_picture_of_another_kind_is_named(experiment):
    (FOLDER / "metrics.csv").write_text("step,train/loss\n0,1\n")
    (FOLDER / "zeroshot-x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"zeroshot-x.png is not a PNG file; rerun `siglit eval-zeroshot`"):
        siglit.report(experiment)


def printed_error(capsys):
    """The one line that the command prints about the run."""
    Path("e.yaml").write_text("data: {train: {format: csv, path: t.csv}}\n")
    with pytest.raises(SystemExit) as stop:
        main(["report", "-c", "e.yaml", "--output_dir", str(FOLDER)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_the_commands_write_matches_the_schema(results):
    """No field of a schema is misspelt: each of them is in a real result."""
    for kind, schema in {**_SCHEMAS, "summary": _SUMMARY_SCHEMA}.items():
        for name in schema:
            begins = name.rstrip("?*")
            assert any(field.startswith(begins) for field in results[kind]) or name in ("top5?", "by_language?"), name


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        (
            "zeroshot",
            ("top1",),
            "high",
            r"zeroshot\.json: top1 is 'high', but a number is expected; rerun `siglit eval-z",
        ),
        ("zeroshot", ("top1",), True, "top1 is True, but a number"),
        ("zeroshot", ("images",), -1, "images is -1, but a whole number"),
        ("zeroshot", ("classes", 0), 7, r"classes\[0\] is 7, but a string"),
        ("fewshot", ("shots", "1", "mean"), None, "shots: 1: mean is None, but a number"),
        ("retrieval", ("folds", "text_to_image/R@1"), "x", "folds: text_to_image/R@1 is 'x'"),
        ("logits", ("edges", 0), math.nan, "edges are not finite"),
        ("logits", ("edges", 0), 1000, "edges are not finite and ascending"),
        ("logits", ("edges",), [0.0, 1.0], "do not have one entry fewer than edges"),
        ("logits", ("ece",), None, "calibration is given, but ece is missing"),
        ("logits", ("nearest", 0, "caption"), 7, r"nearest\[0\]: caption is 7, but a string"),
        ("summary", ("train", "metrics"), [], r"train: metrics is \[\], but an object is expected; remove it"),
    ],
)
def test_the_message_says_what_is_where(results, experiment, name, path, new, message):
    (FOLDER / f"{name}.json").write_text(json.dumps(changed(results[name], path, new)))
    with pytest.raises(UserError, match=message):
        read_results(FOLDER), read_summary(FOLDER)


def test_a_run_without_a_summary_has_an_empty_one(tmp_path):
    assert read_summary(tmp_path) == {}


def test_a_metric_with_a_digit_that_is_no_number_has_no_chance_level():
    """`"²".isdigit()` is true, but int("²") fails."""
    retrieval = {"text_to_image/R@1": 0.5, "image_to_text/R@1": 0.5, "text_to_image/R@²": 0.25, "images": 4}
    fewshot = {"shots": {"²": {"mean": 0.5}}}
    (recalls, shots) = report_tables.metric_tables({"retrieval": retrieval, "fewshot": fewshot}, {})
    assert {row["name"]: row["chance"] for row in recalls["rows"]} == {"R@1": "25.0\N{NO-BREAK SPACE}%", "R@²": ""}
    assert [row["name"] for row in shots["rows"]] == ["² shots per class"]
    assert "² shots per class 50.0" in report_tables.summary_line({"fewshot": fewshot}, {}, {})
