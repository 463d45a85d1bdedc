"""Names and templates are read as people write them; anything else is refused."""

import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from siglit.data.prompts import canonical, class_names, prompts, templates
from siglit.errors import UserError


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_names_of_a_text_file_and_of_json(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGLIT_TEST_DATA", str(tmp_path))
    write(tmp_path / "names.txt", "\ufeffcat \nguinea pig\n\n")
    assert class_names("${SIGLIT_TEST_DATA}/names.txt") == [("cat",), ("guinea pig",)]
    assert class_names(write(tmp_path / "names.json", ["cat", ["dog", "hound"]])) == [("cat",), ("dog", "hound")]


def test_prompts_are_every_name_in_every_template(tmp_path):
    wording = templates(write(tmp_path / "t.txt", "a {}.\nof {0} and {} and {}\n"))
    texts, classes = prompts([("cat",), ("dog", "{x} hound")], wording)
    assert texts[:2] == ["a cat.", "of {0} and cat and cat"]
    assert texts[4:] == ["a {x} hound.", "of {0} and {x} hound and {x} hound"]
    np.testing.assert_array_equal(classes, [0, 0, 1, 1, 1, 1])
    assert templates(None) == ["{}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.json", "{", "not valid JSON"),
        ("n.json", {"cat": 0}, "JSON other than a list"),
        ("n.json", ["cat", 3], "class 1 is 3"),
        ("n.json", ["cat", []], r"class 1 is \[\]"),
        ("n.json", ["cat", ["dog", " "]], "class 1 is"),
        ("n.json", [], "is empty"),
        ("n.txt", "\n", "is empty"),
        ("n.txt", "cat\n\ndog\n", "line 2 is blank"),
    ],
)
def test_a_file_that_is_no_list_of_names_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        class_names(write(tmp_path / name, content))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"eval.classes is .*nope.txt, which .* \(No such file .* siglit:cifar10, "):
        class_names(str(tmp_path / "nope.txt"))
    (tmp_path / "n.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        class_names(str(tmp_path / "n.txt"))


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prompt 2 is 'a photo of a \{c\}'.*\{\} in place of the name"):
        templates(write(tmp_path / "t.json", ["a {}", "a photo of a {c}"]))


def test_builtin_lists():
    assert class_names("siglit:cifar10")[:2] == [("airplane",), ("automobile",)]
    assert templates("siglit:photo") == ["a photo of a {}."]
    for name in ("imagenet", "../classes/cifar10"):
        with pytest.raises(
            UserError, match=f"is siglit:{name}, but siglit's lists are siglit:cifar10, siglit:cifar100, "
        ):
            class_names(f"siglit:{name}")


def test_lists_of_open_clip():
    pytest.importorskip("open_clip")
    names = class_names("open_clip:imagenet")
    assert len(names) == 1000
    assert names[1] == ("goldfish",)
    full, few = templates("open_clip:openai_imagenet"), templates("open_clip:simple_imagenet")
    assert (len(full), len(few)) == (80, 7)
    assert "a photo of a {}." in full
    assert all(text.count("{}") == 1 for text in full + few)


def test_lists_that_open_clip_does_not_have(monkeypatch):
    with pytest.raises(UserError, match="lists are open_clip:imagenet"):
        class_names("open_clip:cifar10")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        templates("open_clip:simple_imagenet")


# What big_vision's canonicalize_text (commit 0127fb6) makes of them: of a name with "," kept, up to the first one (its
# first_class_name_only); of a template with "{}" kept. Seen by running it.
CANONICAL_NAMES = {
    "T-shirt": "tshirt",
    "Maine_Coon": "maine coon",
    "maine__coon": "maine coon",
    " guinea\tpig\n": "guinea pig",
    "black-and-gold garden spider": "blackandgold garden spider",
    "American lobster (crustacean)": "american lobster crustacean",
    "Dr. Who's `dog`": "dr whos dog",
    "St. Bernard, Saint Bernard dog": "st bernard",
    "{x} hound": "x hound",
    "a_{}_b": "a b",
    "100%": "100",
    "ÀÉ Straße": "àé straße",
    "柴犬。\N{IDEOGRAPHIC SPACE}しば": "柴犬。 しば",
    "naïve—dash": "naïve—dash",
    "İstanbul": "i̇stanbul",
}
CANONICAL_TEMPLATES = {
    "a photo of a {}.": "a photo of a {}",
    "a close-up photo of the {}.": "a closeup photo of the {}",
    "{}": "{}",
    " test  {}...": "test {}",
    "a_photo_of_{} & {}": "a photo of {} {}",
    "{x} of {}!": "x of {}",
    "A {}, a type of pet.": "a {} a type of pet",
    "{{}}": "{}",
    "{ } {}": "{}",
    "{}'s toy": "{}s toy",
    "“{}” ¿": "“{}” ¿",
}


def test_canonical_prompts_are_those_of_big_vision():
    names, wording = canonical([tuple(CANONICAL_NAMES), ("cat",)], list(CANONICAL_TEMPLATES))
    assert dict(zip(CANONICAL_NAMES, names[0], strict=True)) == CANONICAL_NAMES
    assert names[1] == ("cat",)
    assert dict(zip(CANONICAL_TEMPLATES, wording, strict=True)) == CANONICAL_TEMPLATES
    assert prompts(names[1:], wording[:1])[0] == ["a photo of a cat"]


@pytest.mark.parametrize("names", [("?!",), ("cat", "_, cat")])
def test_a_name_of_which_nothing_is_left_is_named(names):
    with pytest.raises(UserError, match=r"my.txt: class 1 is .* leaves nothing; .* set eval.canonicalize to false"):
        canonical([("dog",), names], ["{}"], "my.txt")


def test_the_papers_templates_are_those_of_open_clip_and_the_name_alone(monkeypatch):
    """Compared with big_vision's CLIP_PAPER_PROMPT_TEMPLATES (commit 0127fb6): open_clip 3.3.0 has all but "{}"."""
    lists = {"OPENAI_IMAGENET_TEMPLATES": [lambda c: f"a bad photo of a {c}.", lambda c: f"a tattoo of the {c}."]}
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(**lists))
    assert templates("big_vision:clip_paper") == ["a bad photo of a {}.", "a tattoo of the {}.", "{}"]


# Order and spelling of CIFAR-10 and -100: mmpretrain 1.2.0 (datasets/categories.py) and the prompts.md of openai/CLIP
# (d05afc4) agree. Pets: these two and tensorflow-datasets 4.9.10 (its label classes) agree but for capitals, which are
# those of clip_benchmark 1.6.2 (en_classnames.json); torchvision 0.29.2 makes the same of the names of the images.
LABELLED = {"cifar10": "bb3914949cecedee", "cifar100": "60ae3a3ac1355fcf", "pets": "50be1443390f8a02"}


@pytest.mark.parametrize("name", LABELLED)
def test_names_are_those_that_packages_carry(name):
    """By the hash of the list that was compared with theirs."""
    names = "\n".join(first for (first,) in class_names(f"siglit:{name}"))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == LABELLED[name]


def test_half_a_surrogate_pair_is_refused(tmp_path):
    """It could be neither encoded nor written into the result."""
    with pytest.raises(UserError, match=r"class 1 is '\\ud83d', expected a name"):
        class_names(write(tmp_path / "n.json", ["cat", "\ud83d"]))
    with pytest.raises(UserError, match="prompt 1 is"):
        templates(write(tmp_path / "t.json", ["{} \ud83d"]))


def test_a_path_with_a_null_byte_is_named():
    with pytest.raises(UserError, match=r"eval.classes is a\x00b, which cannot be read"):
        class_names("a\x00b")
