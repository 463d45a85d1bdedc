"""The reader: everything comes back as it was written, in any process, and a wrong cache is refused."""

import gc
import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest

from siglit.cache import CacheError, EmbeddingCache, finish, write_shard
from tests.conftest import ROOT

FINGERPRINT = {"image_tower": {"model": "vit_b", "hash": "ab"}, "transform": {"size": 224}, "source": "coco"}
SIZES = (5, 0, 3, 1, 0)
CAPTIONS = [
    ["a cat", "un chat noir"],
    [],
    ["猫 🐈"],
    [""],
    ["x", "y", "z"],
    [],
    ["a\nb"],
    ["last of two", "é"],
    ["end"],
]
LANGS = [["en", "fr"], [], ["ja"], [""], ["en", "en", "pt-BR"], [], [""], ["en", "fr"], ["en"]]
LABELS = [3, None, 0, None, 7, 1, None, 2, 9]
KEYS = [f"dir/ñ {row}.jpg" for row in range(9)]
EMBEDDINGS = np.random.default_rng(0).standard_normal((9, 13), np.float32)
SKIPPED = [("broken.jpg", "cannot identify image"), ("größe.png", "0 × 0 pixels"), ("z", "")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine rows in five shards, of which two are empty, one of them at the end."""
    start = 0
    for number, size in enumerate(SIZES):
        rows = slice(start, start + size)
        write_shard(
            tmp_path / "cache",
            number,
            embeddings=EMBEDDINGS[rows],
            keys=KEYS[rows],
            captions=CAPTIONS[rows],
            langs=LANGS[rows],
            labels=LABELS[rows],
            skipped={1: SKIPPED[:2], 4: SKIPPED[2:]}.get(number, ()),
            fingerprint=FINGERPRINT,
        )
        start += size
    finish(tmp_path / "cache", len(SIZES), FINGERPRINT)
    return tmp_path / "cache"


def test_everything_comes_back(folder):
    cache = EmbeddingCache(folder)
    assert (len(cache), cache.dim, cache.num_captions, cache.num_skipped) == (9, 13, 11, 3)
    assert (cache.path, cache.fingerprint) == (folder, FINGERPRINT)
    np.testing.assert_array_equal(cache.gather(np.arange(9)), EMBEDDINGS.astype(np.float16))
    assert list(cache.keys) == KEYS == [cache.key(row) for row in range(9)]
    assert (len(cache.keys), cache.keys[-1], cache.keys[3:6]) == (9, KEYS[-1], KEYS[3:6])
    assert [cache.captions(row) for row in range(9)] == CAPTIONS
    flat = [caption for group in CAPTIONS for caption in group]
    assert list(cache.iter_captions()) == flat == [cache.caption(number) for number in range(11)]
    assert cache.caption_offsets.tolist() == [0, 2, 2, 3, 4, 7, 7, 8, 10, 11]
    assert cache.caption_rows.tolist() == [0, 0, 2, 3, 4, 4, 4, 6, 7, 7, 8]
    assert cache.labels is not None
    assert cache.labels.tolist() == [-1 if label is None else label for label in LABELS]
    assert cache.langs is not None
    assert cache.langs.tolist() == [code for group in LANGS for code in group]
    assert cache.skipped == SKIPPED
    assert cache.verify() == []
    assert [array.dtype for array in (cache.caption_offsets, cache.caption_rows, cache.labels)] == [np.int64] * 3


def test_what_was_not_written_is_none(tmp_path):
    write_shard(tmp_path, 0, embeddings=np.ones((2, 4)), keys=["a", "b"], captions=[[], []], fingerprint={})
    finish(tmp_path, 1, {})
    cache = EmbeddingCache(tmp_path)
    assert (cache.labels, cache.langs, cache.skipped, list(cache.iter_captions())) == (None, None, [], [])
    assert cache.caption_offsets.tolist() == [0, 0, 0]
    assert cache.caption_rows.shape == (0,)
    assert cache.captions(1) == []
    assert cache.verify() == []


def test_a_cache_of_skipped_images_alone_opens(tmp_path):
    for number in range(2):
        none = np.zeros((0, 4))
        write_shard(tmp_path, number, embeddings=none, keys=[], captions=[], skipped=SKIPPED[:1], fingerprint={})
    finish(tmp_path, 2, {})
    cache = EmbeddingCache(tmp_path)
    assert (len(cache), cache.dim, list(cache.keys), cache.skipped) == (0, 4, [], SKIPPED[:1] * 2)
    assert cache.gather(np.zeros(0, np.int64)).shape == (0, 4)
    assert cache.verify() == []
    with pytest.raises(IndexError):
        cache.gather(np.zeros(1, np.int64))


@pytest.mark.parametrize("dim", [1, 13, 64, 2048])
def test_gather_equals_indexing_one_array(tmp_path, dim):
    """Any order, repeats, many shards of odd sizes, any integer type, widths that divide 4096 bytes and not."""
    rng = np.random.default_rng(dim)
    sizes = rng.integers(0, 40, 30)
    embeddings = rng.standard_normal((sizes.sum(), dim)).astype(np.float16)
    for number, end in enumerate(np.cumsum(sizes)):
        rows = range(end - sizes[number], end)
        keys = [str(row) for row in rows]
        write_shard(tmp_path, number, embeddings=embeddings[rows], keys=keys, captions=[[]] * len(keys), fingerprint={})
    finish(tmp_path, len(sizes), {})
    cache = EmbeddingCache(tmp_path)
    for dtype in (np.int64, np.int32, np.uint64):
        rows = rng.integers(0, len(embeddings), 3000).astype(dtype)
        gathered = cache.gather(rows)
        np.testing.assert_array_equal(gathered, embeddings[rows])
        assert (gathered.dtype, gathered.flags.c_contiguous, gathered.flags.writeable) == (np.float16, True, True)


@pytest.mark.parametrize("sizes", [(64,) * 5, (60, 64, 58, 64, 3), (1, 0, 500, 0), (1,) * 40 + (1000,), (0, 7)])
def test_every_row_is_found_whatever_the_sizes_of_the_shards(tmp_path, sizes):
    """Equal shards, some with skipped images, and sizes so different that buckets are not used."""
    data = np.arange(sum(sizes), dtype=np.float16)[:, None]
    starts = np.cumsum((0, *sizes))
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        keys = [str(row) for row in range(start, stop)]
        write_shard(
            tmp_path, number, embeddings=data[start:stop], keys=keys, captions=[["a"]] * len(keys), fingerprint={}
        )
    finish(tmp_path, len(sizes), {})
    cache = EmbeddingCache(tmp_path)
    order = np.random.default_rng(0).permutation(len(data))
    assert np.array_equal(cache.gather(order), data[order])
    assert np.array_equal(cache.gather(order.astype(np.uint16)), data[order])


@pytest.mark.parametrize("rows", [[-1], [0, 9], [2**40], [0.5], [[1]], [True]])
def test_a_row_out_of_range_is_an_index_error(folder, rows):
    with pytest.raises(IndexError):
        EmbeddingCache(folder).gather(np.array(rows))


@pytest.mark.parametrize("method", ["key", "captions", "caption"])
@pytest.mark.parametrize("number", [-1, 11])
def test_a_number_out_of_range_is_an_index_error(folder, method, number):
    with pytest.raises(IndexError, match=str(number)):
        getattr(EmbeddingCache(folder), method)(number)


def test_opening_reads_the_index_alone(folder):
    for path in folder.glob("*.h5"):
        path.rename(path.with_suffix(".away"))
    cache = EmbeddingCache(folder)
    assert (len(cache), cache.dim) == (9, 13)
    with pytest.raises(CacheError, match=r"shard-000000\.h5 cannot be mapped"):
        cache.gather(np.arange(3))


def test_reading_does_not_use_hdf5(folder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("h5py was used")

    monkeypatch.setattr(h5py, "File", fail)
    cache = EmbeddingCache(folder)
    cache.gather(np.arange(9))
    assert (list(cache.keys), cache.captions(0), cache.skipped) == (KEYS, CAPTIONS[0], SKIPPED)


def test_pickling_carries_no_maps_and_survives_another_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    cache = EmbeddingCache("cache")
    fresh = len(pickle.dumps(cache))
    cache.gather(np.arange(9))
    assert cache.labels is not None
    assert cache.caption_rows.size
    data = pickle.dumps(cache)
    assert len(data) == fresh
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.gather(np.arange(9)), cache.gather(np.arange(9)))
    assert (list(again.keys), again.digest) == (KEYS, cache.digest)


def test_use_after_fork(folder):
    """A child uses the maps of its parent, and maps the other shards itself."""
    cache = EmbeddingCache(folder)
    cache.gather(np.array([0]))
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads, and BLAS has threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        same = np.array_equal(cache.gather(np.array([8, 0, 6])), EMBEDDINGS[[8, 0, 6]].astype(np.float16))
        os._exit(0 if same and cache.captions(8) == CAPTIONS[8] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(cache.gather(np.array([8])), EMBEDDINGS[[8]].astype(np.float16))


def test_use_in_a_spawned_process(folder):
    cache = EmbeddingCache(folder)
    cache.gather(np.array([0]))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = pool.submit(cache.gather, np.array([8, 0])).result()
    np.testing.assert_array_equal(rows, EMBEDDINGS[[8, 0]].astype(np.float16))


READ_ONLY = """
import ctypes, os, pickle, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from siglit.cache import EmbeddingCache

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def watch(event, words):
    changes = event == "open" and words[2] & WRITING or event in CHANGES
    if changes and any(sys.argv[1] in os.fsdecode(w) for w in words if isinstance(w, str | bytes | os.PathLike)):
        print("tried:", event, words, flush=True)

def rows():
    return EmbeddingCache(sys.argv[1]).gather(np.array([8, 0]))

sys.addaudithook(watch)
if __name__ == "__main__":
    # Root may write anywhere; without this capability the folder's permissions bind it as they bind its owner.
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if "again" not in sys.argv:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
        os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
    cache = EmbeddingCache(sys.argv[1])
    cache.gather(np.arange(9))
    list(cache.iter_captions()), list(cache.keys), cache.labels, cache.langs, cache.skipped
    assert cache.verify() == []
    again = pickle.loads(pickle.dumps(cache))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        sent, opened = pool.submit(again.gather, np.array([8, 0])).result(), pool.submit(rows).result()
    assert (sent == cache.gather(np.array([8, 0]))).all() and (sent == opened).all()
    try:
        open(os.path.join(sys.argv[1], "new"), "w")
    except PermissionError:
        print("refused")
"""


def test_a_finished_cache_may_lie_on_a_read_only_disk(folder, tmp_path):
    """Opened, gathered, verified, pickled and read in a spawned process: nothing in the folder is opened to write.

    The kernel refuses it where permissions bind, HDF5's own calls included; an audit hook reports every attempt.
    """
    (tmp_path / "read.py").write_text(READ_ONLY)

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder, *folder.iterdir())}

    before = state()
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        command = [sys.executable, str(tmp_path / "read.py"), str(folder)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
        if "refused" in done.stdout:
            assert state() == before
    finally:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    # The one attempt at the end, which shows that the hook sees and, where it can be had, that the kernel refuses.
    tried = [line for line in done.stdout.splitlines() if line.startswith("tried:")]
    assert len(tried) == 1, tried
    assert "/new'" in tried[0]


def test_more_shards_than_files_may_be_open(tmp_path):
    for number in range(40):
        write_shard(tmp_path, number, embeddings=np.ones((1, 2)), keys=[str(number)], captions=[[]], fingerprint={})
    finish(tmp_path, 40, {})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    tenth_free = sorted(set(range(1000)) - taken)[10]
    resource.setrlimit(resource.RLIMIT_NOFILE, (tenth_free, before[1]))
    try:
        assert EmbeddingCache(tmp_path).gather(np.arange(40)).shape == (40, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_missing_or_incomplete_cache_is_refused(tmp_path, folder):
    with pytest.raises(CacheError, match=r"there is no cache at .*absent"):
        EmbeddingCache(tmp_path / "absent")
    (folder / "index.json").unlink()
    with pytest.raises(CacheError, match=r"not complete: it has 5 shards, but no index.*run `siglit precompute` again"):
        EmbeddingCache(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index.update(version=2), "format version 2, this siglit reads up to 1; update siglit"),
        (lambda index: index.update(format="other"), "not the index of a cache"),
        (lambda index: index.pop("shards"), "damaged.*delete it"),
        (lambda index: index["shards"].pop(0), "its totals are not the sums"),
        (lambda index: index["shards"][0].update(more=1), "damaged"),
        (lambda index: index["shards"][0]["datasets"].pop("label"), "damaged"),
        (lambda index: index["shards"][0]["datasets"]["label"].__setitem__(0, 5000), "multiple of 4096 bytes"),
    ],
)
def test_a_wrong_index_is_refused(folder, change, text):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CacheError, match=text):
        EmbeddingCache(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_an_index_that_is_not_json_is_refused(folder, text):
    (folder / "index.json").write_text(text, "latin-1")
    with pytest.raises(CacheError, match=r"index\.json"):
        EmbeddingCache(folder)


def test_software_versions_that_are_not_the_shards_are_a_problem(folder):
    """One flipped bit of the index is one too many, also where nothing is computed from it."""
    file = folder / "index.json"
    file.write_bytes(file.read_bytes().replace(b"HDF5", b"HDF4", 1))
    (problem,) = EmbeddingCache(folder).verify()
    assert problem.startswith(f"{file}: created_by is not what the shards say")


def test_a_cut_shard_is_refused_before_its_map_kills_the_process(folder):
    path = folder / "shard-000002.h5"
    os.truncate(path, path.stat().st_size // 2)
    cache = EmbeddingCache(folder)
    with pytest.raises(CacheError, match=r"shard-000002\.h5 has \d+ bytes, but had \d+ when the cache was completed"):
        cache.gather(np.arange(9))
    assert any("shard-000002.h5" in problem for problem in cache.verify())


def test_another_fingerprint_is_named_by_field(folder):
    cache = EmbeddingCache(folder)
    cache.check_fingerprint(json.loads(json.dumps(FINGERPRINT)))
    other = {"image_tower": {"model": "vit_l", "hash": "ab"}, "transform": {"size": 256}, "source": "coco"}
    with pytest.raises(CacheError, match=r"image_tower\.model is 'vit_b', expected 'vit_l'; transform\.size is 224"):
        cache.check_fingerprint(other)
    cache.check_fingerprint(other, ["source", "image_tower.hash"])
    with pytest.raises(CacheError, match=r"transform\.size is 224, expected 256") as caught:
        cache.check_fingerprint(other, ["source", "transform"])
    assert "vit_l" not in str(caught.value)
    with pytest.raises(CacheError, match=r"image_tower\.model is 'vit_b', expected nothing"):
        cache.check_fingerprint({}, ["image_tower.model"])


def test_verify_finds_what_the_index_gets_wrong(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["labelled"] = 0
    index["fingerprint"]["source"] = "other"
    index["skipped"] = 4
    (folder / "index.json").write_text(json.dumps(index))
    problems = "\n".join(EmbeddingCache(folder).verify())
    assert "shard-000000.h5: labelled is 3, the index says 0" in problems
    assert "source is 'coco', expected 'other'" in problems
    assert "counts of skipped images differ" in problems


def test_verify_finds_swapped_missing_and_stray_shards(folder):
    (folder / "shard-000000.h5").rename(folder / "swap")
    (folder / "shard-000002.h5").rename(folder / "shard-000000.h5")
    (folder / "swap").rename(folder / "shard-000002.h5")
    (folder / "shard-000003.h5").rename(folder / "shard-000009.h5")
    problems = "\n".join(EmbeddingCache(folder).verify())
    for number, other in ((0, 2), (2, 0)):
        assert f"shard-00000{number}.h5: it was written as shard {other}" in problems
    assert "shard-000003.h5 is missing" in problems
    assert "shard-000009.h5 is not in index.json" in problems


def test_verify_finds_contradictions_under_a_correct_checksum(tmp_path, monkeypatch):
    """A writer with an error stores wrong data with its checksum: verify checks the data too."""
    monkeypatch.setattr("siglit.cache.shard_writer._label_array", lambda labels, rows: np.full(rows, -5, np.int64))
    monkeypatch.setattr("siglit.cache.shard_writer._float16", lambda array, keys: np.full((2, 3), np.inf, np.float16))
    write_shard(tmp_path, 0, embeddings=np.ones((2, 3)), keys=["a", "b"], captions=[[], []], fingerprint={})
    finish(tmp_path, 1, {})
    problems = "\n".join(EmbeddingCache(tmp_path).verify())
    assert "not finite" in problems
    assert "label" in problems


def test_digest_follows_the_content(tmp_path):
    digests = []
    for name, value, fingerprint in (("a", 1.0, {}), ("b", 1.0, {}), ("c", 2.0, {})):
        write_shard(
            tmp_path / name,
            0,
            embeddings=np.full((1, 3), value),
            keys=["k"],
            captions=[["c"]],
            fingerprint=fingerprint,
        )
        finish(tmp_path / name, 1, fingerprint)
        digests.append(EmbeddingCache(tmp_path / name).digest)
    assert digests[0] == digests[1] != digests[2]
