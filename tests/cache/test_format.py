"""The format: the files are as cache/README.md specifies, and a single changed byte of data is detected."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from siglit.cache import CacheError, EmbeddingCache, differing_fields, finish, write_shard
from siglit.cache.format import DATASETS, pack_strings, shard_files, unpack_strings
from siglit.cache.keys import find_duplicate_key

FINGERPRINT = {"image_tower": {"model": "vit", "args": [1, 2]}, "dtype": "float32", "source": "/déjà"}
DIM = 24


def write_two(folder: Path) -> list[np.ndarray]:
    """A small cache that has something in every dataset; returns the embeddings of its shards."""
    rng = np.random.default_rng(0)
    stored = []
    for number, rows in enumerate((7, 5)):
        stored.append(rng.standard_normal((rows, DIM)).astype(np.float16))
        write_shard(
            folder,
            number,
            embeddings=stored[-1],
            keys=[f"ключ/{number}/{row}.jpg" for row in range(rows)],
            captions=[["a cat", "eine Katze 🐈"][: row % 3] for row in range(rows)],
            langs=[["en", "de"][: row % 3] for row in range(rows)],
            labels=[None if row == 1 else row for row in range(rows)],
            skipped=[(f"bad-{number}", "truncated: ü")],
            fingerprint=FINGERPRINT,
        )
    finish(folder, 2, FINGERPRINT)
    return stored


def readme_text_list(file: h5py.File, name: str) -> list[str]:
    offsets = file[f"{name}_offsets"][:]
    return [file[f"{name}_bytes"][a:b].tobytes().decode() for a, b in pairwise(offsets)]


def test_plain_h5py_reads_what_the_readme_says(tmp_path):
    stored = write_two(tmp_path)
    with h5py.File(tmp_path / "shard-000000.h5") as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["number"]) == ("siglit-cache", 1, 0)
        assert json.loads(file.attrs["fingerprint"]) == FINGERPRINT
        assert file.attrs["fingerprint"].isascii()
        np.testing.assert_array_equal(file["embedding"][:], stored[0])
        assert readme_text_list(file, "key")[3] == "ключ/0/3.jpg"
        captions, langs, pointer = (
            readme_text_list(file, "caption"),
            readme_text_list(file, "lang"),
            file["caption_ptr"][:],
        )
        assert captions[pointer[5] : pointer[6]] == ["a cat", "eine Katze 🐈"]
        assert [langs[code] for code in file["lang_code"][pointer[5] : pointer[6]]] == ["en", "de"]
        assert langs[0] == ""
        assert file["label"][:].tolist() == [0, -1, 2, 3, 4, 5, 6]
        assert (readme_text_list(file, "skipped_key"), readme_text_list(file, "skipped_reason")) == (
            ["bad-0"],
            ["truncated: ü"],
        )
        assert set(file) == set(DATASETS)


def test_checksum_is_the_one_of_the_readme(tmp_path):
    """Computed here from the README alone: names, types and order are written out."""
    write_two(tmp_path)
    layout = (
        "embedding <f2|key_bytes |u1|key_offsets <i8|caption_bytes |u1|caption_offsets <i8|caption_ptr <i8|label <i8"
    )
    layout += "|lang_code <u2|lang_bytes |u1|lang_offsets <i8|skipped_key_bytes |u1|skipped_key_offsets <i8"
    layout += "|skipped_reason_bytes |u1|skipped_reason_offsets <i8"
    names = [part.split(" ")[0] for part in layout.replace("|u1", "u1").split("|")]
    types = {"embedding": "<f2", "lang_code": "<u2"}
    digest = hashlib.sha256()
    with h5py.File(tmp_path / "shard-000001.h5") as file:
        for name in names:
            kind = types.get(name, "|u1" if name.endswith("_bytes") else "<i8")
            assert f"{name} {kind}" in layout
            digest.update(f"{name} {kind} {'x'.join(map(str, file[name].shape))}\n".encode() + file[name][()].tobytes())
        assert file.attrs["checksum"] == digest.hexdigest()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shards"][1]["checksum"] == digest.hexdigest()
    joined = "\n".join(shard["checksum"] for shard in index["shards"])
    assert EmbeddingCache(tmp_path).digest == hashlib.sha256(joined.encode()).hexdigest()[:32]


def test_every_dataset_is_contiguous_aligned_and_where_the_index_says(tmp_path):
    stored = write_two(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for shard, embeddings in zip(index["shards"], stored, strict=True):
        path = tmp_path / shard["file"]
        assert path.stat().st_size == shard["size"]
        assert path.stat().st_blocks * 512 >= shard["size"], "the file has holes"
        with h5py.File(path) as file:
            for name, dataset in file.items():
                offset, *shape = shard["datasets"][name]
                assert dataset.id.get_offset() == offset
                assert offset % 4096 == 0
                assert (tuple(shape), dataset.chunks, dataset.compression) == (dataset.shape, None, None)
        offset, *shape = shard["datasets"]["embedding"]
        np.testing.assert_array_equal(np.memmap(path, "<f2", "r", offset, tuple(shape)), embeddings)


def test_any_changed_byte_of_any_dataset_is_detected(tmp_path):
    write_two(tmp_path)
    cache = EmbeddingCache(tmp_path)
    assert cache.verify() == []
    path = tmp_path / "shard-000000.h5"
    whole = path.read_bytes()
    with h5py.File(path) as file:
        places = {name: (dataset.id.get_offset(), dataset.nbytes) for name, dataset in file.items()}
    rng = np.random.default_rng(0)
    for name, (offset, size) in places.items():
        for position in {0, size - 1, *rng.integers(0, size, 4).tolist()}:
            changed = bytearray(whole)
            changed[offset + position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            assert any("shard-000000.h5" in problem for problem in cache.verify()), (name, position)
    path.write_bytes(whole)
    assert cache.verify() == []


def test_no_changed_byte_anywhere_passes_for_other_content(tmp_path):
    """Outside the datasets too: the change is detected, or it is in padding, which nothing reads."""
    write_two(tmp_path)
    cache = EmbeddingCache(tmp_path)
    path = tmp_path / "shard-000000.h5"
    whole = path.read_bytes()
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    for position in np.random.default_rng(1).choice(used, 60, replace=False).tolist():
        changed = bytearray(whole)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        if cache.verify() == []:
            with h5py.File(path) as file:
                assert json.loads(file.attrs["fingerprint"]) == FINGERPRINT
                assert file["key_bytes"][()].tobytes().startswith("ключ".encode())


@pytest.mark.parametrize(
    ("actual", "expected", "text"),
    [
        ({"a": {"model": "x"}}, {"a": {"model": "y"}}, ["a.model is 'x', expected 'y'"]),
        ({"a": 1}, {"a": 1, "b": None}, ["b is nothing, expected None"]),
        ({"a": {"b": 1}}, {"a": 3}, ["a is {'b': 1}, expected 3"]),
        ({"a": (0.5, 0.5)}, {"a": [0.5, 0.5]}, []),
        ({"a": 1}, {"a": True}, ["a is 1, expected True"]),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, ["a is 1, expected 2", "z is 1, expected 2"]),
    ],
)
def test_differing_fields_names_path_and_both_values(actual, expected, text):
    assert differing_fields(actual, expected) == text


def test_a_fingerprint_that_json_cannot_hold_is_refused():
    with pytest.raises(CacheError, match="cannot be written as JSON"):
        differing_fields({"path": Path("x")}, {})


def test_strings_survive_packing():
    strings = ["", "a", "日本語 🐈", "", "with\nnewline\0"]
    assert list(unpack_strings(*pack_strings(strings, "key"))) == strings
    assert list(unpack_strings(*pack_strings([], "key"))) == []


@pytest.mark.parametrize("bad", ["\udcff.jpg", None, b"bytes"])
def test_a_string_that_utf8_cannot_hold_is_named(bad):
    with pytest.raises(CacheError, match="caption 1 is "):
        pack_strings(["ok", bad], "caption")


def test_keys_with_equal_hashes_are_compared_as_text(tmp_path, monkeypatch):
    """With one hash for all keys, different keys stay different and equal ones are detected."""
    write_two(tmp_path)
    monkeypatch.setattr("siglit.cache.keys.hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    paths = list(shard_files(tmp_path).values())
    assert find_duplicate_key(paths) is None
    assert "'ключ/0/0.jpg'" in (find_duplicate_key([paths[0], paths[0]]) or "")


def test_only_committed_shards_are_listed(tmp_path):
    for name in ("shard-000001.h5", "shard-1000000.h5", "shard-000000.h5.tmp.1-ab", "shard-2.h5", "shard-0000003.h5"):
        (tmp_path / name).touch()
    assert list(shard_files(tmp_path)) == [1, 1_000_000]
