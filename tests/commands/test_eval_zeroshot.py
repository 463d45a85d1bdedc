"""eval-zeroshot: metrics equal a plain computation, files are complete, and what is missing is named."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import siglit
from siglit.cache import EmbeddingCache
from siglit.commands import eval_zeroshot
from siglit.errors import UserError
from siglit.models.tokenizer import SentencePieceTokenizer
from siglit.reporting import fonts
from siglit.runs.trained import open_trained
from tests.conftest import COLORS, on, parse

NAMED = ("--eval.classes", "colors.json", "--eval.templates", "templates.txt")


@pytest.fixture
def worded(classed):
    (classed / "templates.txt").write_text("a {} square\npicture 3 is {}\n")
    return classed


def result(folder, name="zeroshot.json"):
    return json.loads((folder / "runs/small" / name).read_text())


def test_metrics_equal_a_plain_computation(worded, device):
    """Also the confusion matrix, in numbers and in a picture."""
    experiment = parse("eval-zeroshot", *NAMED, *on(device))
    evaluated = siglit.eval_zeroshot(experiment)
    trained = open_trained(experiment)
    prompts = [text.format(name) for name in COLORS for text in ("a {} square", "picture 3 is {}")]
    with torch.inference_mode():
        texts = F.normalize(trained.tower(torch.from_numpy(trained.tokenizer(prompts)).long()), dim=1)
    classes = F.normalize(texts.reshape(4, 2, -1).mean(1), dim=1)
    cache = EmbeddingCache("cache/small/val")
    images = F.normalize(torch.from_numpy(cache.gather(np.arange(12))).float(), dim=1)
    predicted, labels = (images @ classes.T).argmax(1).numpy(), np.arange(40, 52) % 4
    written = result(worded)
    assert written["top1"] == evaluated.top1 == pytest.approx((predicted == labels).mean())
    assert written["top1"] > 0.5, "the run has learned its colors"
    assert "top5" not in written
    assert written["per_class"] == {n: (predicted[labels == c] == c).mean() for c, n in enumerate(COLORS)}
    assert written["mean_per_class"] == pytest.approx(written["top1"]), "each class has three images"
    assert (written["images"], written["classes"]) == (12, list(COLORS))
    assert written["templates"] == ["a {} square", "picture 3 is {}"]
    assert written["provenance"] == trained.origin()
    expected = np.zeros((4, 4), np.int64)
    np.add.at(expected, (labels, predicted), 1)
    counts = np.load(worded / "runs/small/zeroshot.npy", allow_pickle=False)
    np.testing.assert_array_equal(counts, expected)
    with Image.open(worded / "runs/small/zeroshot.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    text = str(evaluated)
    assert f"{100 * evaluated.top1:.1f}" in text
    assert "runs/small/zeroshot.png" in text
    assert not list((worded / "runs/small").glob("*.tmp"))


def test_names_in_turn_and_split_and_name_of_the_set(worded):
    """Several names of a class, more names than classes, and results beside the others."""
    (worded / "more.json").write_text(json.dumps(["red", ["green", "lime"], "blue", "grey", "grey", "pink"]))
    words = ["--eval.classes", "more.json", "--eval.split", "train", "--eval.name", "colors"]
    evaluated = siglit.eval_zeroshot(parse("eval-zeroshot", *words))
    written = result(worded, "zeroshot-colors-train.json")
    assert written["classes"][1] == ["green", "lime"]
    assert list(written["per_class"]) == ["red", "green", "blue", "grey (3)", "grey (4)", "pink"]
    assert written["per_class"]["pink"] is None
    assert "2 of 6 classes have no image; check eval.classes" in str(evaluated)
    assert written["images"] == 40
    assert 0 <= written["top1"] <= written["top5"] <= 1
    assert written["per_class"]["grey (3)"] == 0, "two classes of one name tie, and neither is correct"
    assert "grey (3)" in str(evaluated)


def test_without_matplotlib_only_the_picture_is_missing(worded, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = str(siglit.eval_zeroshot(parse("eval-zeroshot", *NAMED, "--eval.name", "blind")))
    assert "pip install 'siglit[plots]'" in text
    assert (worded / "runs/small/zeroshot-blind.npy").exists()
    assert not (worded / "runs/small/zeroshot-blind.png").exists()
    assert result(worded, "zeroshot-blind.json")["images"] == 12


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (None, (), "eval.classes is not set, and cache/small/val has no class names"),
        (["red", "green", "blue"], (), r"has 3 names, but labels of cache/small/val go up to 3; give 4 names"),
        (["red"], (), "has 1 name, but"),
        (["red", 2], (), "class 1 is 2"),
        (list(COLORS), ("--eval.templates", "nope.txt"), "eval.templates is nope.txt"),
    ],
)
def test_what_is_missing_is_named(classed, tmp_path, names, words, message):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(names))
    given = () if names is None else ("--eval.classes", str(path))
    with pytest.raises(UserError, match=message):
        siglit.eval_zeroshot(parse("eval-zeroshot", *given, *words))


def test_a_cache_without_labels_is_refused(classed, tmp_path):
    (tmp_path / "plain.csv").write_text("filepath,title\nimages/0040.png,a red square\n")
    (tmp_path / "plain.yaml").write_text(
        f"data: {{val: {{format: csv, path: {tmp_path}/plain.csv, images: {classed}}}}}\n"
        f"cache: {{path: {tmp_path}/cache, splits: [val]}}\n"
    )
    words = ("-c", str(tmp_path / "plain.yaml"), "--eval.classes", "colors.json", "--eval.name", "plain")
    siglit.precompute(parse("precompute", *words))
    with pytest.raises(UserError, match=r"has no labels to evaluate with; set data.val.label_column"):
        siglit.eval_zeroshot(parse("eval-zeroshot", *words))


def test_a_set_of_class_folders_is_laid_over_a_run(classed, tmp_path):
    """Its names come from the folders, also when these are gone; only its images are embedded, beside the run's."""
    (classed / "templates.txt").write_text("a {} square\n")
    for number in range(40, 52):
        folder = tmp_path / "set" / ["plain_red", "a_green", "the_blue", "grey"][number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(classed / f"images/{number:04d}.png", folder)
    (tmp_path / "set.yaml").write_text(
        f"data: {{val: {{format: class_folders, path: {tmp_path}/set}}}}\n"
        f"cache: {{path: {tmp_path}/cache, splits: [val]}}\n"
        "eval: {name: folders, templates: templates.txt}\n"
    )
    before = json.loads((classed / "runs/small/summary.json").read_text())
    done = siglit.precompute(parse("precompute", "-c", str(tmp_path / "set.yaml")))
    assert list(done.splits) == ["val"]
    assert not (tmp_path / "cache/train").exists()
    after = json.loads((classed / "runs/small/summary.json").read_text())
    assert after["precompute-folders"]["val"]["rows"] == 12
    assert after["precompute"] == before["precompute"]
    shutil.rmtree(tmp_path / "set")
    siglit.eval_zeroshot(parse("eval-zeroshot", "-c", str(tmp_path / "set.yaml")))
    written = result(classed, "zeroshot-folders.json")
    assert written["classes"] == ["a green", "grey", "plain red", "the blue"]
    assert written["top1"] > 0.5
    assert written["provenance"]["cache"] == str(tmp_path / "cache/val")


def test_prompts_that_are_cut_off_before_the_name_are_reported(worded, capsys):
    (worded / "long.txt").write_text("a very long sentence that comes before the name {}\n")
    words = ["--eval.classes", "colors.json", "--eval.templates", "long.txt", "--eval.name", "long"]
    siglit.eval_zeroshot(parse("eval-zeroshot", *words))
    message = "4 of 4 classes have a prompt with the same tokens as one of another class"
    assert f"{message}; prompts are cut off at tokenizer.length 8" in capsys.readouterr().err


def test_equal_prompts_of_one_class_are_not_reported():
    """Synonyms that differ in case alone are the same tokens, and harm nobody."""
    count = eval_zeroshot._classes_with_equal_tokens
    ids = np.array([[1, 2], [1, 2], [3, 4], [5, 6]])
    assert count(ids, np.array([0, 0, 1, 2])) == 0
    assert count(ids, np.array([0, 1, 1, 2])) == 2


def test_canonical_prompts_are_what_is_encoded(worded, monkeypatch):
    """Names stand in the result as they were given, and the result says what was done to them."""
    (worded / "loud.json").write_text(json.dumps(["RED, crimson", "Green.", "b_l_u_e", "grey"]))
    (worded / "loud.txt").write_text("A {}-square!\n")
    encoded = []

    def tokenize(self, texts):
        encoded.append(texts)
        return real(self, texts)

    real = SentencePieceTokenizer.__call__
    monkeypatch.setattr(SentencePieceTokenizer, "__call__", tokenize)
    words = ["--eval.classes", "loud.json", "--eval.templates", "loud.txt", "--eval.name", "loud"]
    experiment = parse("eval-zeroshot", *words, "--eval.canonicalize", "true")
    siglit.eval_zeroshot(experiment)
    assert encoded[0] == ["a redsquare", "a greensquare", "a b l u esquare", "a greysquare"]
    written = result(worded, "zeroshot-loud.json")
    assert written["canonicalize"] is True
    assert written["classes"] == ["RED, crimson", "Green.", "b_l_u_e", "grey"]
    assert written["templates"] == ["A {}-square!"]
    siglit.eval_zeroshot(parse("eval-zeroshot", *words))
    assert result(worded, "zeroshot-loud.json")["canonicalize"] is False
    assert not np.array_equal(encoded[1], encoded[0])


def test_names_that_cannot_be_drawn_are_reported_and_are_in_the_result(worded, recwarn, monkeypatch):
    """Letters that no font has, formulas and line breaks; warnings are no way to say so."""
    monkeypatch.setattr(fonts, "_missing_letters", lambda font, letters: letters & set("柴犬"))
    names = ["柴犬", "$a_$b", "blue\n sky", "grey"]
    (worded / "odd.json").write_text(json.dumps(names))
    evaluated = siglit.eval_zeroshot(parse("eval-zeroshot", "--eval.classes", "odd.json", "--eval.name", "odd"))
    written = result(worded, "zeroshot-odd.json")
    assert written["classes"] == names
    assert list(written["per_class"]) == ["柴犬", "$a_$b", "blue sky", "grey"]
    *_, last = str(evaluated).splitlines()
    assert last.endswith("zeroshot-odd.png; no installed font has 柴犬: names with these letters are shown as numbers")
    assert not recwarn.list
