"""One folder per class: labels are torchvision's, and any other layout is refused."""

import json

import pytest

from siglit.config import SourceSpec
from siglit.data.sources import open_source, source_identity
from siglit.data.sources.samples import FilePart
from siglit.errors import UserError


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def samples(root, **options):
    opened = open_source(SourceSpec("class_folders", str(root), **options))
    return [sample for unit in opened.units(2) for sample in opened.load(unit)]


def refused(root, *words, **options):
    with pytest.raises(UserError) as caught:
        samples(root, **options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_by_name_are_classes_and_paths_are_keys(tmp_path):
    fill(tmp_path, "n02/b.JPEG", "n02/a.png", "n01/x.webp", "n10/deep/y.jpg", "n02/notes.txt", "README.md")
    result = samples(tmp_path)
    expected = [("n01/x.webp", 0), ("n02/a.png", 1), ("n02/b.JPEG", 1), ("n10/deep/y.jpg", 2)]
    assert [(s.key, s.label) for s in result] == expected
    assert {s.captions for s in result} == {()}
    assert result[0].image == FilePart(str(tmp_path / "n01/x.webp"))
    assert [s.image_bytes().decode() for s in result] == [key for key, _ in expected]


def test_labels_are_those_of_torchvision(tmp_path):
    """An independent reader of the layout gives the same labels and order, upper case and digits included."""
    folder = pytest.importorskip("torchvision.datasets").ImageFolder
    fill(tmp_path, "b/1.jpg", "B/2.jpg", "a_b/10.jpg", "a_b/9.jpg", "10/3.png", "9/4.png", "a/z/5.png", "a/6.png")
    theirs = folder(str(tmp_path))
    result = samples(tmp_path)
    assert {s.image.path: s.label for s in result} == dict(theirs.samples)
    assert open_source(SourceSpec("class_folders", str(tmp_path))).identity()["classes"] == theirs.classes


def test_an_empty_folder_keeps_its_number_and_dotted_names_are_ignored(tmp_path):
    fill(tmp_path, "b/1.jpg", ".ipynb_checkpoints/2.jpg", "b/._1.jpg", "b/.cache/3.jpg", ".DS_Store")
    (tmp_path / "a").mkdir()
    assert [(s.key, s.label) for s in samples(tmp_path)] == [("b/1.jpg", 1)]


def test_links_to_folders_are_followed(tmp_path):
    """In the place of a class's folder, and within one."""
    fill(tmp_path / "all", "cat/1.jpg", "dog/2.jpg", "emu/3.jpg")
    (tmp_path / "some/other").mkdir(parents=True)
    (tmp_path / "some/cat").symlink_to(tmp_path / "all/cat")
    (tmp_path / "some/other/birds").symlink_to(tmp_path / "all/emu")
    assert [(s.key, s.label) for s in samples(tmp_path / "some")] == [("cat/1.jpg", 0), ("other/birds/3.jpg", 1)]


def test_a_fold_divides_the_images_and_not_the_classes(tmp_path):
    fill(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(50)))
    parts = [samples(tmp_path, fold=fold) for fold in ("0-3/5", "4/5")]
    assert sorted(s.key for part in parts for s in part) == sorted(s.key for s in samples(tmp_path))
    assert {s.label for s in parts[1]} == {0, 1}


def test_identity_follows_names_and_not_the_place(tmp_path):
    names = ["a/1.jpg", "b/2.jpg"]
    for folder in ("here", "there"):
        fill(tmp_path / folder, *names)
    fill(tmp_path / "more", *names, "b/3.jpg")
    fill(tmp_path / "renamed", "a/1.jpg", "c/2.jpg")
    here, there, more, renamed = (
        source_identity(SourceSpec("class_folders", str(tmp_path / f))) for f in ("here", "there", "more", "renamed")
    )
    assert here == there == open_source(SourceSpec("class_folders", str(tmp_path / "here"))).identity()
    assert here["classes"] == ["a", "b"]
    assert len({json.dumps(identity) for identity in (here, more, renamed)}) == 3
    assert str(tmp_path) not in json.dumps(here)


def test_mistakes(tmp_path):
    refused(tmp_path / "nope", "there is no", "class_folders")
    refused(tmp_path, "no folder in it", "one folder of images for each class")
    (tmp_path / "a").mkdir()
    refused(tmp_path, "1 folder, but no image")
    fill(tmp_path, "a/1.jpg", "loose.png", "other.jpg")
    refused(tmp_path, "2 images outside", "loose.png", "Move them")
    refused(tmp_path / "loose.png", "is a file")
    refused(tmp_path, "label_column is not an option", label_column="label")
