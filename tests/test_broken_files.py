"""Every file that siglit reads, broken in five ways or more: exit code 2, one line that names it, nothing written.

The line is checked by `refused`: no traceback, no class names, no second line. Where a file could reach out of itself
(pickles, links, paths, sizes that it claims), nothing of it may happen.
"""

import io
import json
import os
import pickle
import struct
import tarfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import TOWER, copy
from tests.test_bad_input import one_parser, refused  # noqa: F401

DEEP = "[" * 100_000
LONG_NUMBER = f'{{"a": {"9" * 5000}}}'
TOKENIZE = ("tokenizer", "train", "-c", "experiment.yaml")
pytestmark = pytest.mark.usefixtures("one_parser")


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an experiment of a csv and an image; the test works there."""
    monkeypatch.chdir(tmp_path)
    experiment = {
        "name": "small",
        "data": {"train": {"format": "csv", "path": "train.csv"}},
        "image_tower": TOWER | {"pretrained": False},
        "train": {"batch_size": 16, "steps": 2, "accelerator": "cpu"},
        "tokenizer": {"vocab_size": 320, "length": 8},
        "text_tower": {"width": 32, "depth": 1, "heads": 2},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    (tmp_path / "train.csv").write_text("filepath,title\na.png,a\n")
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


BASE = "data: {train: {format: csv, path: train.csv}}\n"
BOMB = "image_tower:\n  model_args:\n    a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    {new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
EXPERIMENTS = {
    "utf-16": (BASE.encode("utf-16"), "is not UTF-8 at byte 0, so it is no experiment file in YAML; convert it"),
    "latin-1": (b"name: caf\xe9\n", "is not UTF-8 at byte 9"),
    "pickle": (pickle.dumps(Evil()), "is not UTF-8 at byte 0"),
    "null": (BASE + "name: \0\n", "line 2 is not YAML: special characters are not allowed"),
    "tab": (BASE + "train:\n\tsteps: 1\n", "line 3, column 1 is not YAML: found character"),
    "deep list": (BASE + f"name: {DEEP[:500]}", "is nested too deeply; write sections, fields, and lists of values"),
    "deep mapping": ("{a: " * 500, "is nested too deeply"),
    "aliases": (BASE + BOMB, "holds more than 100,000 values, with its aliases written out; use fewer"),
    "alias of itself": (BASE + "optim: &a {betas: [*a]}", "line 2: a value contains itself; write it out"),
    "object": (BASE + "name: !!python/object/apply:os.mkdir [made]", "line 2: !!python/object/apply:os.mkdir is not"),
    "class": (BASE + "class_path: os.mkdir", "line 2: class_path is not a field"),
    "half a pair": (BASE + r'name: "\uD83D"', "is half of a surrogate pair; write the character out"),
    "nothing as a name": (BASE + "? \n: 3\n", "line 2: '' is not a field"),
    "list": ("[1, 2]", "line 1: the experiment is a list, but it must be a mapping of fields to values"),
    "digits": (BASE + f"seed: {'9' * 5000}", "line 2: a number has 5,000 digits; shorten it"),
}


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_an_experiment(kind, place, capsys):
    content, line = EXPERIMENTS[kind]
    write(place / "bad.yaml", content)
    given = refused(capsys, place, "train", "-c", "bad.yaml")
    assert given.startswith("bad.yaml")
    assert line in given


CSV = "filepath,title\na.png,a\n"
LISTINGS = {
    "csv": {
        "empty": ("", "bad has no samples"),
        "header alone": ("filepath,title\n", "bad has no samples"),
        "other columns": ("a,b\n1,2\n", "has no column filepath; its columns: a, b. Set image_column."),
        "cells": (CSV + "x,y,z\n", "bad, line 3 has 3 cells, but the header has 2"),
        "quote": (CSV + '"x,y\n', "bad, line 3 is not valid csv: unexpected end of data. Close every quote"),
        "latin-1": (CSV.encode() + b"caf\xe9.png,x\n", "bad, line 3 is not UTF-8 at byte 26 (0xe9). Convert the file"),
        "utf-16": (CSV.encode("utf-16"), "bad, line 1 is not UTF-8 at byte 0"),
        "old line ends": (CSV.replace("\n", "\r"), "holds a carriage return without a line feed"),
        "no image": (CSV + " ,b\n", "bad, line 3: filepath is ' ', expected the path of an image"),
        "many columns": (f"{','.join(map(str, range(999)))}\n", " 76, 77 …. Set image_column."),
    },
    "jsonl": {
        "cut": ('{"image": "a", "caption": "b"}\n{"image":', "line 2 is not valid JSON: expecting value at column 10."),
        "list": ("[1]\n", "bad, line 1 is a list in JSON, expected an object {…}. Check the format."),
        "null": ("null\n", "bad, line 1 is null in JSON, expected an object"),
        "deep": (DEEP, "bad, line 1 is not valid JSON: nested too deeply. Fix it, or write it again."),
        "digits": (LONG_NUMBER, "bad, line 1 is not valid JSON: a number has too many digits"),
        "number for a caption": ('{"image": "a", "caption": 3}', "caption is 3, expected a text or a list of texts"),
        "no image": ('{"image": null, "caption": "a"}', "line 1: image is missing, expected the path of an image"),
        "half a pair": ('{"image": "\\ud800", "caption": "a"}', "is not valid Unicode (half of a surrogate pair)"),
    },
    "coco": {
        "empty": ("", "bad is not valid JSON: it is empty. Fix it, or write it again."),
        "cut": ('{\n"images":', "bad is not valid JSON: expecting value at line 2, column 10."),
        "list": ("[]", "bad is a list in JSON, expected an object"),
        "no images": ("{}", "is not a COCO captions file, {"),
        "number for a name": (
            '{"images": [{"id": 1, "file_name": 3}], "annotations": []}',
            "bad, image 0: file_name is 3, expected the path of an image",
        ),
        "no name": (
            '{"images": [{"id": 1, "file_name": null}], "annotations": []}',
            "bad, image 0: file_name is missing, expected the path of an image",
        ),
        "other image": (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]}',
            "bad: annotation 0 is for image id 2, not in images",
        ),
        "deep": (DEEP, "bad is not valid JSON: nested too deeply"),
    },
    "karpathy": {
        "strings": ('{"images": ["a"]}', "is not a Karpathy split file, {"),
        "no split": ('{"images": [{"filename": "a", "sentences": []}]}', "is not a Karpathy split file"),
        "other split": (
            '{"images": [{"filename": "a", "split": "test", "sentences": []}]}',
            "bad has no split val; its splits: test. Set split.",
        ),
        "number for a name": (
            '{"images": [{"filename": 3, "split": "val", "sentences": []}]}',
            "bad, image 0: filename is 3, expected the path of an image",
        ),
        "sentences": ('{"images": [{"filename": "a", "split": "val", "sentences": [3]}]}', "is not a Karpathy split"),
    },
    "xm3600": {
        "empty": ("", "bad has no samples"),
        "no key": ("{}", "line 1: the key (image/key) is missing, expected a non-empty text or an integer"),
        "list for a key": ('{"image/key": [1]}', "line 1: the key is [1], expected a non-empty text"),
        "caption": ('{"image/key": "a", "en": {"caption": 3}}', "line 1: en is 3, expected a text or a list of texts"),
        "latin-1": (b'{"image/key": "caf\xe9"}', "bad, line 1 is not UTF-8"),
    },
}


@pytest.mark.parametrize(("fmt", "kind"), [(fmt, kind) for fmt, kinds in LISTINGS.items() for kind in kinds])
def test_a_listing(fmt, kind, place, capsys):
    content, line = LISTINGS[fmt][kind]
    write(place / "bad", content)
    split = {"split": "val"} if fmt == "karpathy" else {"separator": ","} if fmt == "csv" else {}
    given = refused(capsys, place, *TOKENIZE, "--data.train", json.dumps({"format": fmt, "path": "bad", **split}))
    assert line in given
    assert given.startswith("bad")


def parquet(**columns):
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


GOOD = parquet(image=[b"x", b"y"], caption=["a", "b"])
DOWNLOAD = ". Download it again."
TABLES = {
    "empty": (b"", "is not a readable parquet file: Parquet file size is 0 bytes" + DOWNLOAD),
    "cut": (GOOD[: len(GOOD) // 2], "is not a readable parquet file: Parquet magic bytes not found in footer"),
    "pickle": (pickle.dumps(Evil()), "is not a readable parquet file"),
    "footer": (GOOD[:-20] + b"\xff" * 12 + GOOD[-8:], DOWNLOAD),
    "pages": (GOOD[:10] + bytes(255 - byte for byte in GOOD[10:200]) + GOOD[200:], DOWNLOAD),
    "number for a caption": (parquet(image=[b"x"], caption=[3]), "row 0 of bad.parquet: caption is 3, expected a text"),
    "number for an image": (parquet(image=[3], caption=["a"]), "column image is int64, expected binary, a path, or"),
    "no rows": (parquet(image=pa.array([], pa.binary()), caption=pa.array([], pa.string())), "has no samples"),
    "list for a key": (
        parquet(image=[b"x"], caption=["a"], key=[[1]]),
        "row 0 of bad.parquet: the key is [1], expected a non-empty text or an integer. Choose another key_column.",
    ),
    "a key twice": (parquet(image=[b"x"] * 2, caption=["a"] * 2, key=["a"] * 2), "the key 'a' occurs twice"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_parquet_file(kind, place, capsys):
    content, line = TABLES[kind]
    write(place / "bad.parquet", content)
    spec = {"format": "parquet", "path": "bad.parquet"} | ({"key_column": "key"} if "key" in kind else {})
    assert line in refused(capsys, place, *TOKENIZE, "--data.train", json.dumps(spec))


def tar(*members, fmt=tarfile.PAX_FORMAT):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=fmt) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


def with_size(content, size):
    """A tar whose first header claims another size, with a correct checksum."""
    header = bytearray(content)
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


TAR = tar(("a.png", b"x" * 2000), ("a.txt", b"a"))
TARS = {
    "empty": (b"", "bad.tar is truncated, or not a tar: empty file. Download it again"),
    "cut": (TAR[:700], "bad.tar is truncated, or not a tar: unexpected end of data"),
    "cut header": (TAR[:200], "bad.tar is truncated, or not a tar: truncated header"),
    "flipped": (b"zz" + TAR[2:], "bad.tar is truncated, or not a tar: bad checksum"),
    "zip": (b"PK\3\4" + bytes(2000), "bad.tar is truncated, or not a tar: bad checksum"),
    "negative size": (with_size(TAR, b"\x80" + b"\xff" * 11), "bad.tar is truncated, or not a tar"),
    "size of 2^95": (with_size(TAR, b"\x80\x7f" + b"\xff" * 10), "bad.tar is truncated, or not a tar"),
    "size of 8 GiB": (with_size(TAR, b"77777777777\0"), "bad.tar is truncated, or not a tar"),
    "latin-1": (tar(("a.png", b"x"), ("a.txt", b"caf\xe9")), "bad.tar, a.txt is not UTF-8 at byte"),
    "json": (tar(("a.json", b"{")), "bad.tar, sample a: .json is not valid JSON: expecting property name"),
    "label": (tar(("a.cls", b"x")), "bad.tar, sample a: .cls is 'x', but a label is an integer"),
    "a key twice": (tar(("a.png", b"x"), ("a.jpg", b"x")), "bad.tar: the key a occurs twice"),
}


@pytest.mark.parametrize("kind", TARS)
def test_a_tar(kind, place, capsys):
    content, line = TARS[kind]
    write(place / "bad.tar", content)
    spec = json.dumps({"format": "webdataset", "path": "bad.tar"})
    assert line in refused(capsys, place, *TOKENIZE, "--data.train", spec)


@pytest.mark.parametrize(("kind", "name"), [("SYMTYPE", "../secret"), ("LNKTYPE", "/etc/passwd"), ("REGTYPE", "../x")])
def test_a_member_of_a_tar_names_no_file_outside_it(kind, name, place):
    """A link holds no caption, whatever it points at; a member with such a name is read from the tar itself."""
    from siglit.config import SourceSpec
    from siglit.data.sources import open_source

    (place.parent / "secret").write_text("secret")
    with tarfile.open(place / "bad.tar", "w") as file:
        info = tarfile.TarInfo(f"{name}/a.txt" if kind == "REGTYPE" else "a.txt")
        info.type, info.linkname = getattr(tarfile, kind), name
        info.size = 4 if kind == "REGTYPE" else 0
        file.addfile(info, io.BytesIO(b"mine"))
    source = open_source(SourceSpec("webdataset", str(place / "bad.tar")))
    texts = [text for captions in source.captions() for text in captions]
    assert texts == (["mine"] if kind == "REGTYPE" else [])


def saved(value):
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def npz(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


HEADER = b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,8]}}'
PICKLED, OTHER = "it holds pickled objects, and siglit unpickles nothing", "it does not hold tensors by their names"
WEIGHTS = {
    "empty.safetensors": (b"", "header too small"),
    "pickle.safetensors": (pickle.dumps(Evil()), "header"),
    "header.safetensors": (struct.pack("<Q", 1 << 60) + b"{}", "header too large"),
    "json.safetensors": (struct.pack("<Q", 4) + b"[[[[", "invalid JSON in header"),
    "size.safetensors": (struct.pack("<Q", len(HEADER)) + HEADER + bytes(8), "invalid shape, data type, or offset"),
    "pickle.pt": (pickle.dumps(Evil()), PICKLED),
    "object.pt": (saved(Evil()), PICKLED),
    "list.pt": (saved([1, 2]), OTHER),
    "number.pt": (saved({"state_dict": 3}), OTHER),
    "empty.pt": (b"", "it is empty or cut off"),
    "cut.pt": (saved({"a": torch.ones(9)})[:500], "it is damaged or cut off"),
    "object.npz": (npz(a=np.array([Evil()], dtype=object)), OTHER),
    "pickle.npz": (pickle.dumps(Evil()), PICKLED),
    "empty.npz": (b"", "it is empty or cut off"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, place, capsys):
    content, reason = WEIGHTS[name]
    write(place / name, content)
    line = refused(capsys, place, "precompute", "-c", "experiment.yaml", "--image_tower.weights", name)
    assert line.startswith(f"cannot read the weights {name} into the image tower: ")
    assert reason in line
    assert line.endswith("Download or convert it again")


def test_weights_of_another_model(place, capsys):
    save_file({"x": torch.ones(1)}, place / "other.safetensors")
    words = ("precompute", "-c", "experiment.yaml", "--image_tower.weights", "other.safetensors")
    assert "do not fit the image tower; 30 missing: cls_token" in refused(capsys, place, *words)


TOWERS = {
    "nothing": ({}, "Config file not found"),
    "empty": ({"config.json": ""}, "Expecting value"),
    "list": ({"config.json": "[]"}, "its files are missing or of another kind"),
    "no architecture": ({"config.json": "{}"}, "its files are missing or of another kind"),
    "other architecture": ({"config.json": '{"architecture": "nope"}'}, "Unknown model (nope)"),
    "deep": ({"config.json": DEEP}, "one of its JSON files is nested too deeply"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_a_folder_of_an_image_tower(kind, place, capsys):
    files, reason = TOWERS[kind]
    (place / "tower").mkdir()
    for name, content in files.items():
        write(place / "tower" / name, content)
    words = ("--image_tower", '{model: "local-dir:tower", model_args: {}, pretrained: true}')
    line = refused(capsys, place, "precompute", "-c", "experiment.yaml", *words)
    assert line.startswith("cannot load local-dir:tower (")
    assert reason in line
    assert line.endswith("config.json, with the name of the architecture, and the weights")


NAMES = {
    "empty.json": ("", "is not valid JSON: it is empty"),
    "cut.json": ('["a",', "is not valid JSON: expecting value at column 6"),
    "deep.json": (DEEP, "is not valid JSON: nested too deeply"),
    "mapping.json": ("{}", "holds JSON other than a list, but eval.classes needs a list of strings"),
    "numbers.json": ("[1, 2]", "class 0 is 1, expected a name or a list of names"),
    "latin-1.txt": (b"caf\xe9\n", "is not UTF-8 at byte 3. Convert the file (iconv -t utf-8)."),
    "blank.txt": ("a\n\nb\n", "line 2 is blank, but each line is one entry. Remove it."),
    "empty.txt": ("", "is empty, but eval.classes needs at least one entry"),
}


@pytest.mark.parametrize("name", NAMES)
def test_class_names(name, place, capsys):
    from siglit.data import prompts
    from siglit.errors import UserError

    content, line = NAMES[name]
    write(place / name, content)
    with pytest.raises(UserError, match=f"^{name}") as error:
        prompts.class_names(name)
    assert line in str(error.value)


ROWS = np.random.default_rng(0).random((3, 4)).astype(np.float32)
KEYS = {"key": ["a", "b", "c"]}


def npy(array):
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


ARRAYS = {
    "empty": (b"", "is not a plain .npy file (No data left in file), and nothing is unpickled"),
    "text": (b"hello", "is not a plain .npy file (it holds pickled objects, or something else)"),
    "pickle": (pickle.dumps(Evil()), "is not a plain .npy file (it holds pickled objects, or something else)"),
    "objects": (npy(np.array([[Evil()]] * 3, dtype=object)), "is not a plain .npy file (it holds pickled objects"),
    "cut": (npy(ROWS)[:140], "is not a plain .npy file (mmap length is greater than file size)"),
    "size that it claims": (npy(ROWS).replace(b"(3, 4)", b"(3, 9999999999)"), "mmap length is greater"),
    "archive": (npz(a=ROWS), "is an .npz archive, but one array is expected; write it with numpy.save"),
    "one dimension": (npy(ROWS[0]), "has shape (4,), but m.parquet has 3 rows"),
    "integers": (npy(ROWS.astype(int)), "embeddings are int64 (3, 4); expected floats (3, D), one row per key"),
    "nan": (npy(ROWS * np.nan), "the embedding of 'a' (row 0) holds nan; expected finite values"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_embeddings_to_import(kind, place, capsys):
    content, line = ARRAYS[kind]
    write(place / "e.npy", content)
    write(place / "m.parquet", parquet(**KEYS))
    words = ("cache", "import", "out", "--embeddings", "e.npy", "--metadata", "m.parquet", "--model", "m")
    assert line in refused(capsys, place, *words)


METADATA = {
    "empty": (b"", "m.parquet is not a readable parquet file: Parquet file size is 0 bytes. Write it again."),
    "no key": (parquet(x=["a", "b", "c"]), "m.parquet has no 'key', it has x; set --key"),
    "null for a key": (
        parquet(key=["a", None, "c"]),
        "row 1 of m.parquet: the key (key) is missing, expected a non-empty",
    ),
    "bytes for a key": (parquet(key=[b"a", b"b", b"c"]), "row 0 of m.parquet: the key is b'a', expected a non-empty"),
    "list for a key": (parquet(key=[[1], [2], [3]]), "row 0 of m.parquet: the key is [1], expected a"),
    "key twice": (parquet(key=["a", "a", "c"]), "key 'a' is in row 0 and in row 1, but keys must be unique"),
    "caption": (parquet(**KEYS, caption=[1, 2, 3]), "row 0 of m.parquet: the caption is 1, expected a text or a list"),
    "captions": (parquet(**KEYS, captions=[[1], [], []]), "row 0 of m.parquet: the caption is [1], expected a text"),
    "mapping": (parquet(**KEYS, captions=[{"a": "b"}] * 3), "the caption is {'a': 'b'}, expected a text or a list"),
    "text for a label": (
        parquet(**KEYS, label=["x", "y", "z"]),
        "row 0 of m.parquet: the label is 'x', but a label is",
    ),
    "half a label": (
        parquet(**KEYS, label=[0.5] * 3),
        "row 0 of m.parquet: the label is 0.5, but a label is an integer",
    ),
    "label of 65 bits": (
        parquet(**KEYS, label=pa.array([2**63] * 3, pa.uint64())),
        "the label is 9223372036854775808,",
    ),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_to_import(kind, place, capsys):
    content, line = METADATA[kind]
    write(place / "e.npy", npy(ROWS))
    write(place / "m.parquet", content)
    words = ("cache", "import", "out", "--embeddings", "e.npy", "--metadata", "m.parquet", "--model", "m")
    assert line in refused(capsys, place, *words)


def virtual(file):
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (3, 4))
    file.create_virtual_dataset("embedding", layout)


HDF5 = {
    "link": (
        lambda file: file.update({"embedding": h5py.ExternalLink("other.h5", "secret")}),
        "a link to another file",
    ),
    "link to a link": (
        lambda file: file.update({"x": h5py.ExternalLink("other.h5", "secret"), "embedding": h5py.SoftLink("/x")}),
        "a view of another file; copy the values into this file",
    ),
    "virtual": (virtual, "'embedding' is a view of another file; copy the values into this file"),
    "raw bytes of a file": (
        lambda file: file.create_dataset("embedding", (3, 4), "f4", external=[("secret.bin", 0, 48)]),
        "'embedding' is a view of another file; copy the values into this file",
    ),
    "group": (lambda file: file.create_group("embedding"), "'embedding' is not a dataset"),
    "nothing": (lambda file: None, "has no dataset 'embedding'; it has key"),
    "scalar": (lambda file: file.update({"embedding": 3.0}), "the datasets have different numbers of rows (embedding"),
    "two rows": (
        lambda file: file.update({"embedding": ROWS[:2]}),
        "(embedding 2x4, key 3); expected one row per image",
    ),
    "width that it claims": (
        lambda file: file.create_dataset("embedding", (3, 10**14), "f4", chunks=(1, 4)),
        "dataset 'embedding' cannot be read (Unable to allocate",
    ),
}


@pytest.mark.parametrize("kind", HDF5)
def test_an_hdf5_file_to_import(kind, place, capsys):
    """Nothing of another file is read, whatever the file points at."""
    make, line = HDF5[kind]
    (place / "secret.bin").write_bytes(bytes(48))
    with h5py.File(place / "other.h5", "w") as file:
        file["secret"] = ROWS
    with h5py.File(place / "bad.h5", "w") as file:
        file["key"] = KEYS["key"]
        make(file)
    assert line in refused(capsys, place, "cache", "import", "out", "--embeddings", "bad.h5", "--model", "m")


@pytest.mark.parametrize("content", [b"", b"text" * 99, b"\x89HDF\r\n\x1a\n" + bytes(100), pickle.dumps(Evil())])
def test_what_is_no_hdf5_file(content, place, capsys):
    write(place / "bad.h5", content)
    line = refused(capsys, place, "cache", "import", "out", "--embeddings", "bad.h5", "--model", "m")
    assert line.startswith("bad.h5 cannot be read as HDF5 (")


def changed(**fields):
    def change(index):
        index.update(fields)

    return change


def in_shard(**fields):
    def change(index):
        index["shards"][0].update(fields)

    return change


def far_away(index):
    index["shards"][0]["datasets"]["key_bytes"][0] = 4096 * 10**12


INDICES = {
    "empty": (b"", "is damaged, not JSON (it is empty)"),
    "cut": (b'{"format":', "is damaged, not JSON (expecting value at column 11)"),
    "deep": (DEEP.encode(), "is damaged, not JSON (nested too deeply)"),
    "digits": (LONG_NUMBER.encode(), "is damaged, not JSON (a number has too many digits)"),
    "list": (b"[]", "is not the index of a cache; check the path"),
    "newer": (changed(version=99), "has format version 99, this siglit reads up to 1; update siglit"),
    "no shards": (lambda index: index.pop("shards"), "is damaged (no 'shards')"),
    "no settings": (changed(fingerprint=[]), "is damaged (its fingerprint is not an object)"),
    "rows": (in_shard(rows=10**12), "is damaged (its totals are not the sums over its shards)"),
    "a file elsewhere": (in_shard(file="../../../../etc/passwd"), "it names a shard outside its folder"),
    "an absolute file": (in_shard(file="/etc/passwd"), "it names a shard outside its folder, /etc/passwd"),
    "an offset": (far_away, "it places key_bytes of shard-000000.h5 outside the file"),
}


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """A cache of three rows; no test changes it."""
    from siglit.cache import CacheWriter

    folder = tmp_path_factory.mktemp("cache") / "small"
    with CacheWriter(str(folder), {"image_tower": {"model": "m", "imported": True}}) as writer:
        writer.add(ROWS, KEYS["key"], [["x"], ["y"], ["z"]], [0, 1, 2], None)
    return folder


@pytest.mark.parametrize("kind", INDICES)
def test_the_index_of_a_cache(kind, place, small_cache, capsys):
    copy(small_cache, place)
    change, line = INDICES[kind]
    index = json.loads((place / "small/index.json").read_text())
    content = change if isinstance(change, bytes) else (change(index), json.dumps(index))[1]
    write(place / "small/index.json", content)
    given = refused(capsys, place, "cache", "export", "small", "out")
    assert given.startswith("small")
    assert line in given


SHARDS = {
    "empty": (lambda data: b"", "cannot be mapped (cannot mmap an empty file)"),
    "cut": (lambda data: data[:-1], "bytes when the cache was completed"),
    "longer": (lambda data: data + b"x", "when the cache was completed"),
    "text": (lambda data: b"text", "has 4 bytes, but had"),
    "of another cache": (lambda data: bytes(len(data)), "is not the shard that index.json names"),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard(kind, place, small_cache, capsys):
    copy(small_cache, place)
    change, line = SHARDS[kind]
    path = place / "small/shard-000000.h5"
    write(path, change(path.read_bytes()))
    given = refused(capsys, place, "cache", "export", "small", "out")
    assert given.startswith("small/shard-000000.h5")
    assert line.removeprefix("bytes ") in given


@pytest.mark.parametrize("kind", ["link", "virtual", "deep settings", "other format"])
def test_a_shard_of_a_cache_that_is_not_complete(kind, place, small_cache, capsys):
    """Its embeddings lie in another file, or its attributes are of another kind."""
    copy(small_cache, place)
    (place / "small/index.json").unlink()
    with h5py.File(place / "other.h5", "w") as other:
        other["secret"] = ROWS.astype(np.float16)
    with h5py.File(place / "small/shard-000000.h5", "r+") as file:
        if kind in ("link", "virtual"):
            del file["embedding"]
            HDF5[kind][0](file)
        elif kind == "deep settings":
            del file.attrs["fingerprint"]
            file.attrs["fingerprint"] = DEEP[:50_000]
        else:
            file.attrs["format"] = [1.0, 2.0]
    expected = {"link": "a link to another file", "virtual": "a view of another file"}
    expected |= {"deep settings": "has no fingerprint (maximum recursion", "other format": "has format '[1. 2.]'"}
    assert expected[kind] in refused(capsys, place, "cache", "skipped", "small")


RESULTS = {
    "empty": ("", "is not JSON (it is empty)"),
    "cut": ("{", "is not JSON (expecting property name"),
    "deep": (DEEP, "is not JSON (nested too deeply)"),
    "latin-1": (b'"caf\xe9"', "is not JSON (not UTF-8 at byte 4)"),
    "digits": (LONG_NUMBER, "is not JSON (a number has too many digits)"),
    "list": ("[]", "holds JSON other than an object {…}"),
}


@pytest.mark.parametrize("name", ["retrieval.json", "zeroshot.json", "probe.json", "summary.json"])
def test_results(name, tmp_path):
    from siglit.errors import UserError
    from siglit.reporting.results import read_results, read_summary

    read = read_summary if name == "summary.json" else read_results
    for content, line in RESULTS.values():
        write(tmp_path / name, content)
        with pytest.raises(UserError, match=name) as error:
            read(tmp_path)
        assert line.partition("is ")[2] in str(error.value)
        assert "\n" not in str(error.value)


METRICS = {
    "no step": ("a,b\n1,2\n", "it has no column step"),
    "step": ("step,train/loss\n1,2\nx,1\n", "after line 2, 'x' is not a number of it"),
    "value": ("step,train/loss\n1,x\n", "after line 1, 'x' is not a number of it"),
    "negative": ("step,train/loss\n-5,1\n", "after line 1, step -5 is not a number of it"),
    "binary": (bytes(range(256)), "it is not UTF-8 at byte 128"),
}


@pytest.mark.parametrize("kind", METRICS)
def test_the_curves_of_a_run(kind, place, capsys):
    content, line = METRICS[kind]
    write(place / "run/metrics.csv", content)
    given = refused(capsys, place, "plot", "run", "out.png")
    assert given == f"run/metrics.csv is not the metrics.csv of a run: {line}; restore it, or remove it"


@pytest.mark.parametrize("content", [b"", b"text" * 9, b"\xff" * 99, b"\x0a\x00" * 3, pickle.dumps(Evil())])
def test_a_sentencepiece_model(content, place):
    from siglit.config import TokenizerConfig
    from siglit.errors import UserError
    from siglit.models.tokenizer import load_tokenizer

    write(place / "bad.model", content)
    with pytest.raises(UserError, match=r"^tokenizer.path bad.model: this is not a SentencePiece model; name another"):
        load_tokenizer("bad.model", TokenizerConfig())


NOTES = {"empty": ("", "it is empty"), "list": ("[]", "it holds JSON other"), "deep": (DEEP, "nested too deeply")}


@pytest.mark.parametrize("kind", NOTES)
def test_the_note_of_a_runs_tokenizer(kind, place, capsys):
    content, line = NOTES[kind]
    write(place / "runs/small/tokenizer.model", b"")
    write(place / "runs/small/tokenizer.json", content)
    given = refused(capsys, place, *TOKENIZE)
    assert given.startswith("runs/small/tokenizer.json is damaged")
    assert line in given
    assert given.endswith("remove it and tokenizer.model, or restore both")
