"""Names and templates are read as people write them; what is no list of them is told."""

import json
import sys

import numpy as np
import pytest

from siglit.data.prompts import class_names, prompts, templates
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
    ("name", "content", "told"),
    [
        ("n.json", "{", "not valid JSON"),
        ("n.json", {"cat": 0}, "JSON dict"),
        ("n.json", ["cat", 3], "class 1 is 3"),
        ("n.json", ["cat", []], r"class 1 is \[\]"),
        ("n.json", ["cat", ["dog", " "]], "class 1 is"),
        ("n.json", [], "is empty"),
        ("n.txt", "\n", "is empty"),
        ("n.txt", "cat\n\ndog\n", "line 2 is blank"),
    ],
)
def test_what_is_no_list_of_names_is_told(tmp_path, name, content, told):
    with pytest.raises(UserError, match=told):
        class_names(write(tmp_path / name, content))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"eval.classes is .*nope.txt, but .* \(No such file .* siglit:cifar10, "):
        class_names(str(tmp_path / "nope.txt"))
    (tmp_path / "n.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        class_names(str(tmp_path / "n.txt"))


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prompt 2 is 'a photo of a \{c\}'.*\{\} for the name"):
        templates(write(tmp_path / "t.json", ["a {}", "a photo of a {c}"]))


def test_lists_of_ours():
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
