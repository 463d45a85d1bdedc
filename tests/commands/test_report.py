"""The page of a run: what is on it, with any of its sources missing; that it is safe, and works in a browser."""

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import siglit
from siglit.commands import eval_logits
from siglit.errors import UserError
from siglit.reporting import gallery, svg
from siglit.reporting.tables import bars, metric_tables, summary_line
from tests.conftest import make_project, parse

EVIL = '<script>alert("x")</script> & <b>bold</b>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
BY_LANGUAGE = {
    lang: {"image_to_text/R@1": share, "text_to_image/R@1": share / 2}
    for lang, share in (("de", 0.5), ("average", 0.4), ("quz", 0.1), ("en", 0.6))
}
ZEROSHOT = {
    "top1": 0.4,
    "top5": 0.9,
    "mean_per_class": 0.35,
    "images": 200,
    "classes": 10,
    "per_class": {EVIL: 0.1, "cat": 0.7, "dog": math.nan},
    "provenance": {"step": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tower_weights):
    """A folder with a trained and evaluated run, whose captions hold markup; the tests copy what they change."""
    folder = make_project(tmp_path_factory.mktemp("report"), tower_weights)
    listing = folder / "val.csv"
    listing.write_text(listing.read_text().replace("a red square", '"' + EVIL.replace('"', '""') + '"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        experiment = parse("train")
        siglit.precompute(experiment)
        siglit.train(experiment)
        shutil.copy("experiment.yaml", "runs/small/experiment.yaml")
        siglit.eval_retrieval(experiment)
        siglit.eval_logits(experiment)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run to work in: its folder of results."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy/runs/small"


def page(*words):
    """The page, made now."""
    return Path(siglit.report(parse("report", *words)).path).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Headings, ids of sections, and all attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.attributes, self.tags, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag == "section":
            self.sections.append(dict(attrs).get("id") or dict(attrs)["class"])

    def handle_data(self, data):
        self.texts.append(data)


def write(run, stem, value):
    (run / f"{stem}.json").write_text(json.dumps(value))


def fill(run):
    """Results of the evaluations that were not run on the tiny run."""
    retrieval = json.loads((run / "retrieval.json").read_text())
    write(run, "retrieval-xm", retrieval | {"by_language": BY_LANGUAGE})
    write(run, "zeroshot-tiny", ZEROSHOT)
    write(run, "fewshot", {"shots": {"1": {"mean": 0.3, "std": 0.02, "seeds": [0.3]}}, "classes": 10})
    write(run, "probe", {"top1": 0.8, "top5": 0.99, "l2": 0.01})
    Image.new("RGB", (8, 8)).save(run / "zeroshot-tiny.png")


def test_the_page_of_a_whole_run_has_every_section(run):
    fill(run)
    text = page("--eval.paper", '{"zeroshot-tiny/top1": 79.7, "retrieval-coco/text_to_image/R@1": 12.5}')
    outline = Outline(text)
    assert outline.sections == [
        "metrics",
        "gallery",
        "training",
        "languages",
        "classes",
        "logits",
        "provenance",
    ]
    text = " ".join(" ".join(outline.texts).split())
    for words in ("79.7 %", "retrieval-coco/text_to_image/R@1 12.5 %", "30.0 % ± 2.0", "probe top-1 80.0 %", "step 2"):
        assert words in text, words
    assert outline.tags.count("svg") == 7 + 2, "seven curves, the histogram and the calibration"
    assert (
        "Zero-shot classification · tiny was computed at step 2, but the run is at step 6: rerun siglit eval-zeroshot."
        in text
    )
    assert "vit_tiny_patch16_224" in text
    assert "vocab_size: 320" in text, "the experiment as it ran"
    assert ("img", "alt", "Confusion matrix of Zero-shot classification · tiny") in outline.attributes


def test_nothing_is_loaded_from_elsewhere(run):
    fill(run)
    for tag, name, value in Outline(page()).attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith("data:"), f"<{tag} {name}={value[:60]}>"
    text = page()
    assert not re.search(r"@import|url\((?!data:)", text)
    assert '<link rel="stylesheet"' not in text
    assert "default-src 'none'" in text


def test_captions_names_and_keys_are_text_and_never_markup(run):
    fill(run)
    text = page("--name", EVIL, "--output_dir", str(run), "--cache.path", "cache/small")
    outline = Outline(text)
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert outline.tags.count("script") == 1
    assert any(name == "data-text" and value == EVIL for _, name, value in outline.attributes), "a query of the gallery"
    assert any(EVIL in data for data in outline.texts)


def test_gallery_shows_queries_with_five_pictures_each(run):
    outline = Outline(page())
    shown = [value for tag, name, value in outline.attributes if (tag, name) == ("article", "data-result")]
    pictures = [value for tag, name, value in outline.attributes if (tag, name) == ("img", "src")]
    assert len(shown) == 16
    assert len(pictures) == 16 * 5
    assert all(value.startswith("data:image/jpeg;base64,") for value in pictures)
    assert max(map(len, pictures)) < 6000, "thumbnails, not images"


def test_without_the_images_the_page_says_so(run):
    shutil.rmtree(run.parent.parent / "images")
    outline = Outline(page())
    assert "gallery" in outline.sections
    assert "img" not in outline.tags
    assert any("images could not be read from data.val" in data for data in outline.texts)
    (run.parent.parent / "val.csv").unlink()
    assert any("not on the machine that wrote this page" in data for data in Outline(page()).texts)


def test_a_checkpoint_alone_gives_curves_gallery_and_what_to_run_next(run):
    for path in [*run.glob("*.json"), run / "experiment.yaml"]:
        if path.name != "tokenizer.json":
            path.unlink()
    outline = Outline(page())
    assert outline.sections == ["gallery", "training", "missing", "provenance"]
    text = " ".join(outline.texts)
    for command in ("eval-retrieval", "eval-logits"):
        assert f"siglit {command} -c EXPERIMENT.yaml" in text
    for command in ("eval-zeroshot", "eval-fewshot", "eval-probe"):
        assert command not in text, "its images have no labels"
    assert "no evaluation yet" in text
    shutil.rmtree(run / "checkpoints")
    for command in ("eval-zeroshot", "eval-fewshot", "eval-probe"):
        assert f"siglit {command} -c EXPERIMENT.yaml" in " ".join(Outline(page()).texts), "nobody knows of labels"


def test_results_alone_give_a_page_too(run):
    """As where only the small files of a run were copied from another machine."""
    shutil.rmtree(run / "checkpoints")
    outline = Outline(page())
    assert outline.sections == ["metrics", "training", "logits", "missing", "provenance"]
    assert any("Retrieved images are left out: there is no checkpoint" in data for data in outline.texts)


def test_a_run_that_has_just_begun_has_no_curves(run):
    (run / "metrics.csv").write_text("step,train/loss\r\n")
    outline = Outline(page())
    assert "training" not in outline.sections
    assert any("no rows yet" in data for data in outline.texts)


def test_a_folder_without_a_run_is_refused(run):
    with pytest.raises(UserError, match="there is no run in runs/none; run `siglit train`"):
        page("--output_dir", "runs/none")
    assert not (run.parent / "none").exists()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_result_is_named(run, text):
    (run / "zeroshot-x.json").write_text(text)
    with pytest.raises(UserError, match=r"zeroshot-x\.json .*rerun `siglit eval-zeroshot`"):
        page()


def test_the_logits_of_a_run_are_those_of_its_towers(run):
    """Positives and their mean in logits.json equal a plain computation; the nearest captions are others."""
    value = json.loads((run / "logits.json").read_text())
    assert value["positives"] == sum(value["positive"]) == 24
    assert value["batch_size"] == 12, "there are no more images than these"
    assert value["prior"] == pytest.approx(24 / (24 + value["negatives"]))
    assert value["provenance"]["step"] == 6
    assert len(value["edges"]) == len(value["positive"]) + 1 == len(value["negative"]) + 1
    assert value["edges"][-1] <= value["logit_bias"] + value["logit_scale"] * 1.01
    for entry in value["nearest"]:
        others = [other["caption"] for other in entry["nearest"]]
        assert entry["caption"] not in others
        assert len(set(others)) == 5
        cosines = [other["cosine"] for other in entry["nearest"]]
        assert cosines == sorted(cosines, reverse=True)


def test_the_softmax_loss_has_no_calibration(run):
    value = siglit.eval_logits(parse("eval-logits", "--loss.name", "softmax")).to_json()
    assert (value["logit_bias"], value["calibration"], value["ece"]) == (0.0, [], None)
    assert "calibration error" not in str(eval_logits.LogitsResult(value))
    assert "softmax loss does not model the probability" in page()


CURVES = {
    "empty": {},
    "no points": {"a": []},
    "one point": {"a": [(5, 2.0)]},
    "constant": {"a": [(1, 3.0), (2, 3.0)]},
    "zero": {"a": [(1, 0.0), (2, 0.0)]},
    "not a number": {"a": [(1, math.nan), (2, math.inf)]},
    "partly not a number": {"a": [(1, math.nan), (2, 1.0), (3, 2.0)], "<&\"'>": [(1, -1.0)]},
    "many": {"a": [(n, math.sin(n)) for n in range(50_000)]},
    "huge and tiny": {"a": [(1, 1e-12), (10**9, 1e12)]},
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("series", CURVES.values(), ids=CURVES)
def test_curves_are_well_formed_and_inside_their_frame(series, log):
    root = ET.fromstring(svg.curves('loss <"&', series, log=log))
    assert root.get("role") == "img"
    assert root.get("aria-label").startswith('loss <"&')
    width, height = map(float, root.get("viewBox").split()[2:])
    finite = {name for name, points in series.items() if any(map(svg._finite, points))}
    lines = root.findall("polyline")
    assert len(lines) == len(finite)
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert 1 <= len(points) <= 400
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    if finite:
        assert {line["name"] for line in json.loads(root.get("data-curve"))["series"]} == finite
        ticks = [text.text for text in root.findall("text") if text.text != "step"]
        assert len(ticks) >= 3
        assert len(ticks) <= 18


def test_thinning_keeps_spikes_and_ends():
    points = [(n, 0.0) for n in range(20_000)]
    points[7_777] = (7_777, 9.0)
    points[12_345] = (12_345, -3.0)
    kept = svg._thinned(points)
    assert {points[0], points[7_777], points[12_345], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= 400


def test_a_curve_goes_up_where_its_values_do():
    root = ET.fromstring(svg.curves("a", {"a": [(1, 1.0), (2, 100.0), (3, 10.0)]}, log=True))
    (x1, y1), (x2, y2), (x3, y3) = (
        tuple(map(float, point.split(","))) for point in root.find("polyline").get("points").split()
    )
    assert x1 < x2 < x3
    assert y1 > y3 > y2, "SVG counts from the top"
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2), "a factor of ten is as far as the next"


@pytest.mark.parametrize(
    ("positive", "negative"), [([0, 3, 1], [5, 2, 0]), ([0, 0, 0], [0, 0, 0]), ([1, 0, 0], [0, 0, 0])]
)
def test_the_histogram_is_well_formed(positive, negative):
    root = ET.fromstring(svg.histogram("logits", [-20.0, -10.0, -5.0, -1.0], positive, negative))
    marks = [line for line in root.findall("line") if line.get("class") == "mark"]
    assert len(marks) == (1 if sum(positive) else 0), "logit 0 is marked, also where no logit is as high"


@pytest.mark.parametrize(
    "bins",
    [
        [],
        [{"predicted": math.nan, "observed": 0.5}],
        [{"predicted": 0.5, "observed": 0.5}],
        [{"predicted": 1e-12, "observed": 0.0}, {"predicted": 1.0, "observed": 1.0}],
        [{"predicted": 10.0**-n, "observed": 10.0**-n / 2} for n in range(7, 0, -1)],
    ],
)
def test_the_reliability_diagram_is_well_formed(bins):
    root = ET.fromstring(svg.reliability("calibration", bins))
    dots = root.findall("circle")
    assert len(dots) == sum(math.isfinite(b["predicted"]) for b in bins)
    assert all(0 <= float(dot.get(axis)) <= 380 for dot in dots for axis in ("cx", "cy"))


def test_what_is_calibrated_lies_on_the_diagonal():
    root = ET.fromstring(svg.reliability("c", [{"predicted": p, "observed": p} for p in (0.001, 0.3, 0.9)]))
    mark = next(line for line in root.findall("line") if line.get("class") == "mark")
    x1, y1, x2, y2 = (float(mark.get(name)) for name in ("x1", "y1", "x2", "y2"))
    for dot in root.findall("circle"):
        share = (float(dot.get("cx")) - x1) / (x2 - x1)
        assert (float(dot.get("cy")) - y1) / (y2 - y1) == pytest.approx(share, abs=0.005)


def test_rows_of_the_tables_have_their_chance_level_and_the_papers_number():
    results = {
        "retrieval": {
            "text_to_image/R@5": 0.5,
            "image_to_text/R@1": 0.25,
            "text_to_image/median_rank": 4.0,
            "images": 50,
            "folds": {"count": 5, "text_to_image/R@1": 0.7},
            "index": {"factory": "HNSW32", "text_to_image/R@5": 0.4, "seconds": 1.5},
        },
        "zeroshot-cifar": {"top1": 0.95, "classes": ["cat", "dog"]},
        "zeroshot-imagenet": {"top1": 0.797, "top5": 0.9, "classes": 1000},
        "fewshot": {"shots": {"10": {"mean": 0.5, "std": 0.01}}},
    }
    tables = metric_tables(results, {"zeroshot-imagenet/top1": 79.7, "fewshot/10": 60, "probe/top1": 1.0})
    rows = {
        (table["title"], f"{row['group']} {row['name']}".strip()): {k: v.replace("\xa0", " ") for k, v in row.items()}
        for table in tables
        for row in table["rows"]
    }
    of_retrieval = {name: row for (title, name), row in rows.items() if title == "Retrieval"}
    assert {name: (row["value"], row["chance"]) for name, row in of_retrieval.items()} == {
        "text → image R@5": ("50.0 %", "10.0 %"),
        "text → image median rank": ("4", ""),
        "image → text R@1": ("25.0 %", "2.0 %"),
        "text → image, mean over 5 folds R@1": ("70.0 %", "10.0 %"),
        "text → image, approximate index R@5": ("40.0 %", ""),
    }
    assert rows["Zero-shot classification · imagenet", "top-1"]["paper"] == "79.7 %"
    assert rows["Zero-shot classification · imagenet", "top-1"]["chance"] == "0.1 %"
    assert rows["Few-shot classification", "10 shots per class"]["paper"] == "60.0 %"
    assert rows["Further numbers of the paper", "probe/top1"]["paper"] == "1.0 %"
    assert rows["Zero-shot classification · cifar", "top-1"]["chance"] == "50.0 %"


def test_the_summary_line_has_one_metric_of_each_kind():
    """Preferably one that the paper has too; the mean over languages; of training if nothing was evaluated."""
    results = {
        "retrieval": {"text_to_image/R@1": 0.9, "by_language": BY_LANGUAGE},
        "zeroshot-cifar": {"top1": 0.95},
        "zeroshot-imagenet": {"top1": 0.797},
        "fewshot": {"shots": {"1": {"mean": 0.1}, "10": {"mean": 0.5}}},
        "logits": {"ece": 0.1},
    }
    line = summary_line(results, {}, {"zeroshot-imagenet/top1": 79.7}).replace("\xa0", " ")
    assert line == (
        "R@1 text → image 20.0 %, image → text 40.0 %, mean over languages; zero-shot top-1 79.7 % on imagenet; "
        "10 shots per class 50.0 %"
    )
    assert "95.0" in summary_line(results, {}, {})
    assert summary_line({"zeroshot": {}, "zeroshot-cifar": {"top1": 0.95}}, {}, {}).endswith(" on cifar")
    assert summary_line({}, {"val/text_to_image/R@1": 0.5, "train/loss": 3.0}, {}).startswith("R@1 text → image 50.0")


def test_bars_are_sorted_and_only_the_ends_of_very_many_are_shown():
    chart = bars("accuracy", [(str(n), n / 200) for n in range(200)], 0.5)
    rows = chart["rows"]
    assert (chart["average"], chart["end"]) == (50, 100)
    assert [row["name"] for row in rows[:2]] == ["199", "198"]
    assert rows[-1]["name"] == "0"
    assert rows[20] == {"left_out": 160}
    assert len(rows) == 41


@pytest.mark.parametrize(
    ("values", "mean", "end"), [([0.05, 0.1], 0.07, 10), ([0.05], 0.101, 20), ([0.501], None, 100), ([], None, 10)]
)
def test_bars_end_at_a_round_number_beyond_the_longest(values, mean, end):
    assert bars("R@1", [(str(value), value) for value in values], mean)["end"] == end


def test_the_nearest_images_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(gallery, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    zimg, ztxt = rng.standard_normal((30, 6)).astype(np.float32), rng.standard_normal((4, 6)).astype(np.float32)
    scores, rows = gallery.nearest(zimg, ztxt, 5)
    whole = ztxt @ zimg.T
    assert rows.tolist() == np.argsort(-whole, axis=1)[:, :5].tolist()
    assert scores == pytest.approx(np.take_along_axis(whole, rows, 1))
    assert gallery.nearest(zimg[:3], ztxt, 5)[1].shape == (4, 3)


@pytest.mark.parametrize(("hits", "misses", "of_hits"), [(100, 100, 8), (100, 3, 13), (2, 50, 2), (5, 0, 5), (0, 0, 0)])
def test_queries_are_drawn_from_hits_and_misses(hits, misses, of_hits):
    hit = np.random.default_rng(0).permutation(np.arange(hits + misses) < hits)
    chosen = gallery.choose(hit, 16)
    assert len(chosen) == len(set(chosen)) == min(16, hits + misses)
    assert hit[chosen].sum() == of_hits


def in_browser(text, folder, script=""):
    """Load a page in headless Chromium: its text once `script` has run, and the messages of the console."""
    file = folder / "page.html"
    file.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_page_has_no_errors_and_its_gallery_can_be_filtered(run, tmp_path):
    fill(run)
    text = page()
    dom, messages = in_browser(text, tmp_path)
    assert messages == []
    assert "16 of 16 queries" in dom, "the page's own script ran under its policy"
    click = """<script>
      const seen = () => [...document.querySelectorAll(".query")].filter((q) => q.offsetHeight > 0);
      const results = [seen().length];
      for (const kind of ["hit", "miss"]) {
        document.querySelector(`[data-show=${kind}]`).click();
        results.push(seen().length, seen().every((q) => q.dataset.result === kind));
      }
      document.querySelector("[data-show=all]").click();
      const words = document.querySelector("#gallery input");
      words.value = "GREEN";
      words.dispatchEvent(new Event("input"));
      results.push(seen().length, seen().every((q) => q.textContent.includes("green")));
      const svg = document.querySelector("svg[data-curve]"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 9 }));
      results.push(svg.parentElement.querySelector(".readout").textContent.includes("step 6"));
      results.push(document.documentElement.scrollWidth <= window.innerWidth);
      document.body.append("RESULTS" + JSON.stringify(results) + "RESULTS");
    </script>"""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert free != text
    dom, messages = in_browser(free, tmp_path, click)
    assert messages == []
    every, hits, all_hits, misses, all_misses, green, all_green, read, fits = json.loads(dom.split("RESULTS")[-2])
    assert (every, hits + misses) == (16, 16)
    assert 0 < hits < 16
    assert 0 < green < 16
    assert all_hits
    assert all_misses
    assert all_green
    assert read
    assert fits


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_policy_stops_a_script_that_is_not_the_pages_own(run, tmp_path):
    """Should markup ever get through: it does not run."""
    dom, messages = in_browser(page(), tmp_path, '<script>document.body.append("RAN" + "IT")</script>')
    assert "RANIT" not in dom
    assert any("Content Security Policy" in line for line in messages)
