"""The report of made-up studies: verdicts, tables, what is left out, hostile names, and the summary of all studies."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from siglit.errors import UserError
from siglit.studies import markdown, paper, plots, report, summary
from siglit.studies.definition import Expectation, Paper, Study
from siglit.studies.findings import find, is_fraction
from siglit.studies.grid import final_runs, selection_runs
from siglit.studies.records import Record, records_folder, write_record
from siglit.studies.study_file import read_study
from tests.conftest import ROOT

NOISE = [0.0, 0.01, -0.01, 0.005, -0.005]


def make_study(losses=("softmax", "sigmoid"), batches=("64", "512"), **fields):
    first, second = losses[0], losses[-1]
    settings = {
        "path": Path("configs/studies/batch_size.yaml"),
        "name": "batch_size",
        "title": "Losses over batch sizes",
        "claim": "The sigmoid loss is ahead while batches are small.",
        "source": "arXiv:2303.15343, Figure 2",
        "base": ROOT / "configs" / "quickstart.yaml",
        "axes": {"loss": {name: {} for name in losses}, "batch": {name: {} for name in batches}},
        "measures": {"R@10": ("retrieval/image_to_text/R@10", "retrieval/text_to_image/R@10"), "b": ("train/b",)},
        "expect": (Expectation("ahead", ({"loss": second},), ({"loss": first},), "R@10"),),
        "learning_rates": (0.0003, 0.001, 0.003),
        "test": {"eval.name": "test"},
    }
    return Study(**settings | fields)


def record(study, run, value):
    return Record(
        study=study.name,
        arm=run.arm,
        stage=run.stage,
        seed=run.seed,
        learning_rate=run.learning_rate,
        digest=run.digest,
        results={
            "retrieval/image_to_text/R@10": value + 0.1,
            "retrieval/text_to_image/R@10": value - 0.1,
            "train/b": -9.5,
        },
        curves={"step": [1, 2, 3], "train/grad_norm": [9.0 + run.seed, 5.0, None]},
        seconds=40.0,
        hardware="a processor, 1 thread",
        versions={"torch": "2.9"},
        commit="abc123",
    )


def make_records(study, gain=0.05, chosen=0.001):
    """A complete study, in which the last loss is `gain` ahead of the others; the chosen rate is 0.1 ahead on val."""
    last = list(study.axes["loss"])[-1]
    records = []
    for arm in study.arms():
        level = 0.3 + gain * (arm["loss"] == last)
        for run in selection_runs(study, arm):
            records.append(record(study, run, level - 0.1 * (run.learning_rate != chosen)))
        for run in final_runs(study, arm, chosen):
            own_noise = 0.004 * (run.seed - 2) * (arm["loss"] == last)
            records.append(record(study, run, level + NOISE[run.seed] + own_noise))
    return records


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a report."""
    monkeypatch.setattr(plots, "draw_png", lambda *args, **options: b"")


@pytest.mark.parametrize(
    ("gain", "word", "of_study"),
    [
        (0.05, "reproduced", "reproduced"),
        (0.001, "leans", "trend only"),
        (-0.001, "no effect", "not at this size"),
        (-0.05, "contradicted", "contradicted"),
    ],
)
def test_verdicts_follow_from_the_records(gain, word, of_study):
    study = make_study()
    findings = find(study, make_records(study, gain))
    assert [found.verdict for found in findings.contrasts] == [word]
    assert findings.verdict == of_study
    assert (len(findings.used), findings.total) == (32, 32)


def test_the_report_has_the_same_figures_in_all_files(tmp_path):
    """R@10 is the mean of both directions in percent, b a plain number; seeds are paired."""
    study = make_study()
    done = report.report(study, [replace(made, curves={}) for made in make_records(study)], tmp_path)
    page, data = (tmp_path / "batch_size.md").read_text(), json.loads((tmp_path / "data/batch_size.json").read_text())
    assert "**Verdict: reproduced.**" in page
    assert "| softmax | 64 | 0.001 | 30.0 ± 0.8 | -9.500 ± 0.000 | 5 |" in page
    assert "| ahead | **reproduced** | +5.00 | +4.21 … +5.79 | 5 | R@10, % |" in page
    assert "| sigmoid, 512 | 25.0 | **35.0** | 25.0 |" in page
    assert data["expectations"][0]["by_seed"] == {"0": 0.042, "1": 0.046, "2": 0.05, "3": 0.054, "4": 0.058}
    assert (data["verdict"], data["runs"], data["seconds"], data["commit"]) == ("reproduced", 32, 1280, ["abc123"])
    assert done.verdict == "reproduced"
    assert "reproduced: ahead: R@10 +5.00 points (+4.21 … +5.79), 5 seeds" in str(done)
    assert all(Path(path).is_file() for path in done.files)
    html = (tmp_path / "batch_size.html").read_text()
    for row in ("30.0 ± 0.8", "+4.21 … +5.79", "configs/studies/batch_size.yaml", "a processor, 1 thread"):
        assert row in page
        assert row in html
    assert html.count("data:image/png") == 4  # two measures, each for a light and a dark page
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html) == ["README.md"]


@pytest.mark.usefixtures("no_pictures")
def test_a_report_is_repeatable(tmp_path):
    study = make_study()
    made = make_records(study)
    report.report(study, made, tmp_path / "a")
    report.report(study, made[::-1], tmp_path / "b")
    for name in ("batch_size.md", "batch_size.html", "data/batch_size.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_picture_is_repeatable():
    study = make_study()
    panels = [plots.panels(find(study, records))[0] for records in [make_records(study)] * 2]
    first, second = (plots.draw_png([panel], plots.LIGHT) for panel in panels)
    assert first == second


@pytest.mark.usefixtures("no_pictures")
def test_missing_runs_make_a_study_incomplete(tmp_path):
    study = make_study()
    records = [r for r in make_records(study) if r.arm["batch"] == "64" and (r.stage, r.seed) != ("final", 4)]
    done = report.report(study, records, tmp_path)
    page = (tmp_path / "batch_size.md").read_text()
    assert (done.verdict, done.runs, done.total) == ("incomplete", 14, 32)
    assert "14 of 32 runs" in str(done)
    assert "14 of 32 runs are there." in page
    assert "- softmax, 64: seed 4" in page
    assert (
        "- sigmoid, 512: learning rate 0.0003 on val, learning rate 0.001 on val, learning rate 0.003 on val, all"
        in page
    )
    assert "14 of 32" in (tmp_path / "README.md").read_text()


def test_a_study_without_records_has_a_report(tmp_path):
    assert report.report(make_study(), [], tmp_path).verdict == "incomplete"
    assert not (tmp_path / "batch_size.png").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "earlier"},
        {"seed": 7},
        {"learning_rate": 0.1},
        {"arm": {"loss": "sigmoid", "batch": "128"}},
        {"arm": {"loss": "sigmoid"}},
    ],
)
def test_runs_of_an_earlier_form_of_the_study_are_named_and_left_out(change):
    study = make_study()
    *records, last = make_records(study)
    findings = find(study, [*records, replace(last, **change)])
    assert findings.verdict == "incomplete"
    assert len(findings.stale) == 1
    assert findings.stale[0].startswith("sigmoid")
    assert findings.missing == ["sigmoid, 512: seed 4"]
    assert len(findings.used) == 31


def test_a_left_over_record_is_named_and_decides_nothing():
    """Such as that of a seed or a learning rate that the study has no more."""
    study = make_study()
    records = make_records(study)
    findings = find(study, [*records, replace(records[-1], seed=9)])
    assert findings.missing == []
    assert len(findings.stale) == 1
    assert findings.verdict == find(study, records).verdict == "reproduced"


def test_final_runs_at_another_learning_rate_than_the_chosen_one_do_not_count():
    study = make_study()
    *records, last = make_records(study)
    findings = find(study, [*records, replace(last, learning_rate=0.003)])
    reason = "val has chosen the learning rate 0.001"
    assert findings.stale == [f"sigmoid, 512, final, learning rate 0.003, seed 4: {reason}"]
    assert findings.verdict == "incomplete"


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_run_is_named_and_its_pair_left_out(tmp_path):
    study = make_study()
    *records, last = make_records(study)
    records.append(replace(last, failed="loss is nan at step 12"))
    findings = find(study, records)
    assert findings.contrasts[0].by_seed.keys() == {0, 1, 2, 3}
    assert findings.verdict == "reproduced"
    report.report(study, records, tmp_path)
    page = (tmp_path / "batch_size.md").read_text()
    assert "sigmoid, 512, final, learning rate 0.001, seed 4: loss is nan at step 12" in page
    assert "5 (1 failed)" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_run_of_the_grid_is_shown_and_named(tmp_path):
    study = make_study()
    first, *records = make_records(study)
    report.report(study, [replace(first, failed="loss is nan"), *records], tmp_path)
    page = (tmp_path / "batch_size.md").read_text()
    assert "| softmax, 64 | failed | **30.0** | 20.0 |" in page
    assert "softmax, 64, select, learning rate 0.0003, seed 1000: loss is nan" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_learning_rate_at_the_edge_of_the_grid_is_said(tmp_path):
    study = make_study()
    report.report(study, make_records(study, chosen=0.003), tmp_path)
    page = (tmp_path / "batch_size.md").read_text()
    assert "For softmax, 64; softmax, 512; sigmoid, 64; sigmoid, 512 it is the lowest or the highest" in page
    report.report(study, make_records(study), tmp_path)
    assert "the lowest or the highest" not in (tmp_path / "batch_size.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_one_learning_rate_needs_no_grid_and_no_test_split_is_said(tmp_path):
    study = make_study(learning_rates=(0.001,), test={})
    assert report.report(study, make_records(study), tmp_path).total == 20
    page = (tmp_path / "batch_size.md").read_text()
    assert "All arms use the learning rate 0.001." in page
    assert "names no test split" in page
    assert "How the learning rates were chosen" not in page


@pytest.mark.usefixtures("no_pictures")
def test_names_are_data(tmp_path):
    hostile = "<script>alert(1)</script> a|b `c` *d* [e](javascript:f) $x$ ![g](h)"
    study = make_study(
        losses=("softmax", hostile),
        title=hostile,
        claim=hostile,
        source=hostile,
        notes=f"{hostile}\n\n<img src=x onerror=alert(1)>",
        measures={"R@10": ("retrieval/image_to_text/R@10",), hostile: ("train/b",)},
        expect=(Expectation(hostile, ({"loss": hostile},), ({"loss": "softmax"},), "R@10"),),
    )
    records = [replace(r, hardware=hostile, versions={hostile: "1"}, commit=hostile) for r in make_records(study)]
    report.report(study, [*records, replace(records[-1], digest="earlier", seed=7)], tmp_path)
    html = (tmp_path / "batch_size.html").read_text()
    assert re.findall(r"<(?:script|img src=x|a href=\"(?!README))[^>]*>", html) == []
    assert html.count("<script") == 0
    for name in ("batch_size.md", "README.md"):
        lines = (tmp_path / name).read_text().splitlines()
        assert not any("<script" in line or "<img" in line for line in lines)
        for row in (line for line in lines if line.startswith("|")):
            following = lines[lines.index(row) + 1]
            if set(following) <= set("|:- "):
                cells = len(re.findall(r"(?<!\\)\|", row))
            assert len(re.findall(r"(?<!\\)\|", row)) == cells, row


def test_a_line_is_the_mean_over_seeds_and_its_bars_their_standard_deviation():
    from matplotlib.figure import Figure

    study = make_study()
    figure = Figure(layout="constrained")
    plots.panels(find(study, make_records(study)))[0].draw(figure, "#000000")
    [axes] = figure.axes
    softmax, sigmoid = axes.containers
    assert [bars.get_label() for bars in axes.containers] == ["softmax", "sigmoid"]
    assert list(softmax.lines[0].get_ydata()) == pytest.approx([30.0, 30.0])
    assert list(sigmoid.lines[0].get_ydata()) == pytest.approx([35.0, 35.0])
    low, high = softmax.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((30 - 0.790569, 30 + 0.790569), abs=1e-5)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "512"]


def test_names_that_no_font_has_and_formulas_are_drawn_without_warnings():
    odd, formula = "\U00013000 x", "$\\frac{1}{$"
    study = make_study(losses=("softmax", odd), measures={odd: ("train/b",), formula: ("train/b",)}, expect=())
    axes = {odd: {"1": {}, "2": {}}, "loss": {odd: {}, formula: {}}}
    study = replace(study, axes=axes, learning_rates=(0.001,))
    findings = find(study, [record(study, run, 0.3) for arm in study.arms() for run in final_runs(study, arm, 0.001)])
    assert plots.draw_png(plots.panels(findings), plots.DARK, columns=2).startswith(b"\x89PNG")


def test_curves_of_many_arms_are_split_by_the_longest_axis():
    study = make_study(batches=("1", "2", "3", "4"), learning_rates=(0.001,))
    titles = [panel.title for panel in plots.panels(find(study, make_records(study)))]
    assert titles == ["R@10, %", "b", *(f"train/grad_norm · batch {n}" for n in range(1, 5))]
    few = make_study(learning_rates=(0.001,))
    titles = [panel.title for panel in plots.panels(find(few, make_records(few)))]
    assert titles == ["R@10, %", "b", "train/grad_norm"]


def test_a_curve_has_the_steps_that_all_seeds_have():
    study = make_study(learning_rates=(0.001,))
    records = make_records(study)
    records[0] = replace(records[0], curves={"step": [1], "train/grad_norm": [1.0]})
    records[1] = replace(records[1], failed="nan")
    arm = find(study, records).arms[0]
    assert plots._curve(arm, "train/grad_norm") == {1: [1.0, 11.0, 12.0, 13.0]}
    records[0] = replace(records[0], curves={"kept/step": [10], "kept/zeroshot/top1": [0.5]})
    assert plots._curve(find(study, records).arms[0], "kept/zeroshot/top1") == {10: [0.5]}


def test_figures_are_in_percent_where_they_are_fractions():
    fractions = ["retrieval/image_to_text/R@10", "retrieval/by_language/de/mAP@10", "zeroshot/top1", "fewshot/10/mean"]
    assert all(is_fraction(path) for path in fractions)
    assert not any(is_fraction(path) for path in ["train/logit_bias", "retrieval/images", "logits/ece", "train/loss"])


@pytest.mark.parametrize(
    ("name", "value"), [("64", 64), ("4,096", 4096), ("30 %", 30), ("24K", 24000), ("1e-3", 1e-3), ("-10", -10)]
)
def test_points_that_are_numbers(name, value):
    assert plots.number(name) == value


@pytest.mark.parametrize("name", ["auto", "sigmoid -10", "", "1.2.3", "none", "64 x"])
def test_points_that_are_names(name):
    assert plots.number(name) is None


def test_an_axis_of_numbers_is_the_horizontal_one_and_others_are_rows():
    study = make_study(batches=("64", "512", "4,096"))
    findings = find(study, make_records(study))
    layout = plots._arrange(study.axes, findings.arms)
    assert layout.axis == "batch"
    assert [(line.label, line.places) for line in layout.lines] == [
        ("softmax", [64, 512, 4096]),
        ("sigmoid", [64, 512, 4096]),
    ]
    named = make_study(batches=("small", "large"))
    layout = plots._arrange(named.axes, find(named, make_records(named)).arms)
    assert layout.axis == ""
    assert layout.ticks == {0.0: "softmax", -1.0: "sigmoid"}
    assert [line.label for line in layout.lines] == ["small", "large"]


def test_the_papers_table_is_laid_out_by_its_last_key(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(
        "batch,loss,metric,value\n512,a,top1,5.0\n512,b,top1,4.0\n1k,a,top1,6.0\n1k,b,top1,\n2k,a,top1,\n2k,b,top1,\n"
    )
    assert paper.read_table(file) == (
        "top1",
        ["batch", "a", "b"],
        [["512", "5.0", "4.0"], ["1k", "6.0", "–"]],
    )
    file.write_text("bias,scale,metric,value\nnone,10,top1,62.0\n-10,10,top1,63.0\n-10,1,top1,61.0\n")
    assert paper.read_table(file).rows == [["none", "10", "62.0"], ["-10", "10", "63.0"], ["-10", "1", "61.0"]]
    file.write_text("bias,metric,value\nnone,top1,62.0\nnone,pets,81.8\n-10,top1,63.0\n-10,pets,82.4\n")
    assert paper.read_table(file) == ("", ["bias", "top1", "pets"], [["none", "62.0", "81.8"], ["-10", "63.0", "82.4"]])


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "a,metric,value\n1,2\n"])
def test_a_table_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=r"t\.csv \(paper\.table\)"):
        paper.read_table(tmp_path / "t.csv")


@pytest.mark.usefixtures("no_pictures")
def test_the_paper_stands_beside_the_results(tmp_path):
    (tmp_path / "t.csv").write_text("batch,metric,value\n512,top1,51.5\n")
    study = make_study(paper=Paper(tmp_path / "t.csv", "Figure 2"), path=tmp_path / "batch_size.yaml")
    report.report(study, make_records(study), tmp_path / "out")
    page = (tmp_path / "out" / "batch_size.md").read_text()
    assert "| 512 | 51.5 |" in page
    assert "Figure 2" in page
    assert str(tmp_path) not in page


@pytest.mark.usefixtures("no_pictures")
def test_the_summary_has_a_row_for_each_study(tmp_path):
    study = make_study()
    report.report(study, make_records(study), tmp_path)
    full = make_study(name="batch_size-full", full={"train.examples": 1000})
    report.report(full, make_records(full, -0.05), tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| [")]
    assert [re.match(r"\| \[.*?\]\((.*?)\)", row)[1] for row in rows] == ["batch_size-full.md", "batch_size.md"]
    assert "(full length)" in rows[0]
    assert "batch_size.yaml --full" in (tmp_path / "batch_size-full.md").read_text()
    assert "**contradicted**" in rows[0]
    assert "**reproduced** | ahead: R@10 +5.00 points (+4.21 … +5.79), 5 seeds | 32 |" in rows[1]
    for word in ("reproduced", "trend only", "not at this size", "contradicted", "incomplete"):
        assert any(line.startswith(f"- **{word}**") for line in lines)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"title": 1}', "\xff"])
def test_a_damaged_json_is_named(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.json is not"):
        summary.write_summary(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_a_study_file_is_reported_from_the_records_beside_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("name: small\n")
    (tmp_path / "study.yaml").write_text(
        "{name: tiny, title: Tiny, claim: more is better, source: none, base: base.yaml, seeds: 5,"
        " axes: {loss: {softmax: {loss.name: softmax}, sigmoid: {loss.name: sigmoid}}},"
        " measures: {R@10: [retrieval/image_to_text/R@10]},"
        " expect: [{say: ahead, plus: [{loss: sigmoid}], minus: [{loss: softmax}], measure: R@10}]}"
    )
    study = read_study("study.yaml")
    for made in make_records(study, chosen=None):
        write_record(records_folder(Path("out"), "tiny"), made)
    done = report.report_study("study.yaml", "out")
    assert (done.name, done.verdict, done.runs, done.total) == ("tiny", "reproduced", 10, 10)
    assert "siglit study run -c study.yaml\n" in (tmp_path / "out" / "tiny.md").read_text()


def test_a_page_shows_raw_html_as_text():
    page = markdown.page("<b>", "<i>x</i>\n\n<script>alert(1)</script>", "x.png", [])
    assert "<i>" not in page
    assert "<script" not in page
    assert "<title>&lt;b&gt; · siglit</title>" in page
