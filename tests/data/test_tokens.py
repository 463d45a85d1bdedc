"""Token ids lie beside the cache, are those of the tokenizer, and are made once."""

import os
import warnings

import numpy as np
import pytest

from siglit.cache import EmbeddingCache, finish, write_shard
from siglit.data import tokens
from siglit.data.tokens import token_ids


class WordLengths:
    """A tokenizer that counts its calls; the ids are the lengths of the words."""

    pad_id = eos_id = 1

    def __init__(self, fingerprint="words", vocab_size=100, length=5):
        self.fingerprint, self.vocab_size, self.length, self.calls = fingerprint, vocab_size, length, 0

    def __call__(self, texts):
        self.calls += 1
        ids = np.ones((len(texts), self.length), dtype=np.int32)
        for row, text in zip(ids, texts, strict=True):
            numbers = [min(len(word), self.vocab_size - 1) for word in text.split()][: self.length - 1]
            row[: len(numbers)] = numbers
        return ids


def make_cache(folder, captions):
    half = len(captions) // 2
    for shard, rows in enumerate((captions[:half], captions[half:])):
        write_shard(
            folder,
            shard,
            embeddings=np.ones((len(rows), 3)),
            keys=[f"{shard}-{row}" for row in range(len(rows))],
            captions=rows,
            fingerprint={},
        )
    finish(folder, 2, {})
    return EmbeddingCache(folder)


CAPTIONS = [["one two", "three"], [], ["four five six seven eight nine"], ["", "ten"], ["eleven"]]


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", CAPTIONS)


def token_files(cache):
    return sorted(name for name in os.listdir(cache.path) if "tokens" in name)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_ids_are_those_of_the_tokenizer_in_the_caches_order(cache, vocab_size, dtype):
    tokenizer = WordLengths(vocab_size=vocab_size)
    ids = token_ids(cache, tokenizer)
    assert ids.dtype == dtype
    assert np.array_equal(ids, tokenizer([text for row in CAPTIONS for text in row]))


def test_the_largest_id_fits(tmp_path):
    cache = make_cache(tmp_path / "cache", [["x" * 70_000], ["y"]])
    for vocab_size in (2**16, 2**17):
        ids = token_ids(cache, WordLengths(f"of {vocab_size}", vocab_size=vocab_size))
        assert ids[0, 0] == min(70_000, vocab_size - 1)


def test_the_size_of_blocks_changes_nothing(cache, monkeypatch):
    monkeypatch.setattr(tokens, "_BLOCK", 2)
    tokenizer = WordLengths()
    ids = token_ids(cache, tokenizer)
    assert tokenizer.calls == 3
    assert np.array_equal(ids, WordLengths()([text for row in CAPTIONS for text in row]))


def test_the_file_is_used_again(cache):
    first = np.array(token_ids(cache, WordLengths()))
    tokenizer = WordLengths()
    again = token_ids(EmbeddingCache(cache.path), tokenizer)
    assert tokenizer.calls == 0
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    assert len(token_files(cache)) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: b[:-17], lambda b: b[:9], lambda _: b""]
)
def test_a_damaged_file_is_named_and_made_again(cache, damage, capsys):
    """One wrong bit would be trained on like any other id."""
    expected = np.array(token_ids(cache, WordLengths()))
    path = cache.path / token_files(cache)[0]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(token_ids(cache, WordLengths()), expected)
    assert f"{path} is damaged; what it holds is computed again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_file_of_an_earlier_siglit_has_no_checksum_and_is_used(cache, capsys):
    expected = np.array(token_ids(cache, WordLengths()))
    path = cache.path / token_files(cache)[0]
    path.write_bytes(path.read_bytes()[:-16])
    tokenizer = WordLengths()
    assert np.array_equal(token_ids(cache, tokenizer), expected)
    assert tokenizer.calls == 0
    assert "damaged" not in capsys.readouterr().err


def test_another_tokenizer_is_another_file(cache):
    token_ids(cache, WordLengths("one"))
    other = WordLengths("other", length=3)
    assert token_ids(cache, other).shape == (6, 3)
    assert other.calls == 1
    assert len(token_files(cache)) == 2


def test_another_cache_in_the_same_folder_is_another_file(tmp_path):
    """The file of the cache that was there before is not used."""
    folder = tmp_path / "cache"
    old = make_cache(folder, CAPTIONS)
    token_ids(old, WordLengths())
    for name in os.listdir(folder):
        if "tokens" not in name:
            (folder / name).unlink()
    new = make_cache(folder, [[text + " more" for text in row] for row in CAPTIONS])
    tokenizer = WordLengths()
    ids = token_ids(new, tokenizer)
    assert tokenizer.calls == 1
    assert ids[0].tolist() == [3, 3, 4, 1, 1]


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("step", ["open_memmap", "posix_fallocate"])
def test_a_folder_that_cannot_be_written_is_a_warning(cache, monkeypatch, step):
    """Read-only, or full: space is claimed before the map is written, where a full disk would kill the process."""
    monkeypatch.setattr(np.lib.format if step == "open_memmap" else os, step, refuse)
    with pytest.warns(UserWarning, match=r"cannot write token ids into .* \(Permission denied\)"):
        ids = token_ids(cache, WordLengths())
    assert np.array_equal(ids, WordLengths()([text for row in CAPTIONS for text in row]))
    assert token_files(cache) == []


def test_a_tokenizer_that_fails_leaves_nothing_behind(cache):
    class Failing(WordLengths):
        def __call__(self, texts):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        token_ids(cache, Failing())
    assert token_files(cache) == []
    assert token_ids(cache, WordLengths()).shape == (6, 5)


def test_a_cache_without_captions(tmp_path):
    cache = make_cache(tmp_path / "cache", [[], []])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_ids(cache, WordLengths()).shape == (0, 5)
