"""What is no regular file is refused in one line and at once, instead of being read forever or waited for."""

import io
import os
import signal
import tarfile

import pytest
from PIL import Image

from siglit.config import SourceSpec, TokenizerConfig
from siglit.data import prompts
from siglit.data.decode_workers import UnitPixels, pixel_batches
from siglit.data.sources import open_source, source_identity
from siglit.data.sources.samples import FilePart, read_part
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from siglit.models.pretrained_text import load_text_model
from siglit.models.tokenizer import load_tokenizer
from siglit.runtime import files
from siglit.runtime.files import read_regular
from tests.conftest import parse
from tests.data.test_decode_workers import to_pixels
from tests.models.test_image_tower import VIT, replace

LINE = r"(a device|a named pipe|a folder), not a regular file"


@pytest.fixture(autouse=True)
def at_once():
    """A test that waits at a pipe or reads zeros forever fails after five seconds."""

    def too_long(*_):
        raise AssertionError("it was waited for, or read on and on")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "zero", "folder"])
def odd(request, tmp_path):
    """Create a file of some kind at a path, or a link to it."""

    def make(name):
        path = tmp_path / name
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "zero":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    make.kind = request.param
    return make


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("fmt", ["csv", "jsonl", "coco", "karpathy", "xm3600"])
def test_a_listing(odd, fmt):
    spec = SourceSpec(fmt, str(odd("listing")), split="train" if fmt == "karpathy" else None)
    expected = "there is no" if fmt == "xm3600" and odd.kind == "folder" else LINE
    for ask in (open_source, source_identity):
        with pytest.raises(UserError, match=expected) as error:
            ask(spec)
        one_line(error)


@pytest.mark.parametrize(("fmt", "name"), [("parquet", "x.parquet"), ("webdataset", "x.tar")])
def test_a_table_or_tar(odd, fmt, name):
    with pytest.raises(UserError, match="no file matches" if odd.kind == "folder" else LINE) as error:
        open_source(SourceSpec(fmt, str(odd(name))))
    one_line(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_is_skipped_with_its_reason(odd, tmp_path, workers):
    odd("odd.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "x.csv").write_text("filepath,title\nodd.png,a\ngood.png,b\n")
    source = open_source(SourceSpec("csv", str(tmp_path / "x.csv")))
    (batch,) = pixel_batches(UnitPixels(source, source.units(9), to_pixels, 9, 100), workers, False)
    ((key, reason),) = batch.skipped
    assert (key, [sample.key for sample in batch.samples]) == ("odd.png", ["good.png"])
    kind = {"pipe": "a named pipe", "zero": "a device", "folder": "a folder"}[odd.kind]
    assert reason == f"cannot be read: it is {kind}, not a regular file"


def test_an_image_above_the_limit_is_not_read(tmp_path):
    """Also a member of a tar, whose size is in its header."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="100 bytes, more than 99"):
        read_regular(path, 99)
    assert read_regular(path, 100) == b"x" * 100
    os.truncate(path, files.MAX_LISTING_BYTES)  # a hole: nothing is on the disk
    with pytest.raises(OSError, match="more than 1,073,741,824"):
        FilePart(str(path)).read()
    with pytest.raises(OSError, match="more than 1,073,741,824"):
        FilePart(str(path), 0, 2 << 30).read()
    assert FilePart(str(path), 5, 3).read() == b"xxx"


def test_a_listing_above_the_limit(tmp_path):
    path = tmp_path / "x.csv"
    path.touch()
    os.truncate(path, files.MAX_LISTING_BYTES + 1)
    with pytest.raises(UserError, match=r"x\.csv cannot be read: it has 68,719,476,737 bytes, more than") as error:
        open_source(SourceSpec("csv", str(path)))
    one_line(error)


def test_a_text_in_a_tar_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("siglit.data.sources.tar_source.MAX_BYTES", 10)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 11
        tar.addfile(info, io.BytesIO(b"x" * 11))
    source = open_source(SourceSpec("webdataset", str(tmp_path / "x.tar")))
    with pytest.raises(UserError, match=r"x\.tar cannot be read: it has 11 bytes, more than 10"):
        source.load(source.units(1)[0])


def test_a_part_of_a_tar_that_has_become_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(OSError, match="named pipe"):
        read_part(tmp_path / "x.tar", 0, 10)


def test_weights_of_the_image_tower(odd):
    with pytest.raises(UserError, match=f"image_tower.weights .* cannot be read: .*{LINE}") as error:
        ImageTower(replace(VIT, weights=str(odd("w.safetensors"))))
    one_line(error)


def test_a_weights_file_in_a_folder(odd, tmp_path):
    odd("model.safetensors")
    if odd.kind == "folder":
        pytest.skip("folders in it are left aside")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(UserError, match=f"model.safetensors in it is {LINE}") as error:
        ImageTower(replace(VIT, model=f"local-dir:{tmp_path}", model_args={}))
    one_line(error)


@pytest.mark.parametrize("name", ["words.model", "words"])
def test_a_tokenizer(odd, name):
    expected = "cannot load the tokenizer" if odd.kind == "folder" and name == "words" else LINE
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(str(odd(name)), TokenizerConfig())
    one_line(error)


def test_a_file_of_a_text_towers_folder(odd, tmp_path):
    if odd.kind == "folder":
        pytest.skip("folders in it are left aside")
    odd("tokenizer.json")

    for load in (load_text_model, lambda path: load_tokenizer(path, TokenizerConfig())):
        with pytest.raises(UserError, match=f"tokenizer.json in it is {LINE}") as error:
            load(str(tmp_path))
        one_line(error)


def test_a_list_of_class_names(odd):
    with pytest.raises(UserError, match=LINE) as error:
        prompts._read_list(str(odd("names.txt")), "eval.classes")
    one_line(error)


def test_an_experiment_file(odd):
    with pytest.raises(UserError, match=f"cannot read the experiment file .*{LINE}") as error:
        parse("train", config=str(odd("experiment.yaml")))
    one_line(error)
