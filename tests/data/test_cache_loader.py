"""Training batches: every captioned row once per pass, the same for any number of ranks, continued exactly."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
import torch

from siglit.cache import EmbeddingCache, finish, write_shard
from siglit.data import shuffle
from siglit.data.cache_loader import CacheLoader
from siglit.errors import UserError

ROWS, DIM, LENGTH = 53, 6, 4
CAPTIONS_OF_ROW = [row % 4 for row in range(ROWS)]  # none, one, two, three, none, …
CAPTIONED = {row for row in range(ROWS) if CAPTIONS_OF_ROW[row]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Row r holds the number r; caption c of row r is "r c"."""
    folder = tmp_path_factory.mktemp("cache")
    for shard, rows in enumerate((range(20), range(20, 20), range(20, ROWS))):
        write_shard(
            folder,
            shard,
            embeddings=np.full((len(rows), DIM), 1.0) * np.array(rows, dtype=float)[:, None],
            keys=[f"k{row}" for row in rows],
            captions=[[f"{row} {c}" for c in range(CAPTIONS_OF_ROW[row])] for row in rows],
            fingerprint={"tower": "none"},
        )
    finish(folder, 3, {"tower": "none"})
    return EmbeddingCache(folder)


@pytest.fixture(scope="module")
def ids(cache):
    """Token ids from which row and caption can be read."""
    return np.array([[*map(int, text.split()), 0, 1] for text in cache.iter_captions()], dtype=np.uint16)


def loader(cache, ids, batch_size=8, seed=0, **ranks):
    return CacheLoader(cache, ids, batch_size=batch_size, seed=seed, **ranks)


def taken(batches):
    """(row, caption) pairs in order."""
    return [tuple(pair) for batch in batches for pair in batch["ids"][:, :2].tolist()]


@pytest.mark.parametrize("batch_size", [1, 8, 13, len(CAPTIONED)])
def test_one_pass_takes_every_captioned_row_once(cache, ids, batch_size):
    """Up to the incomplete last batch; a row without captions never appears."""
    batches = list(loader(cache, ids, batch_size))
    rows = torch.cat([batch["rows"] for batch in batches]).tolist()
    assert len(batches) == len(loader(cache, ids, batch_size)) == len(CAPTIONED) // batch_size
    assert {len(batch["rows"]) for batch in batches} == {batch_size}
    assert len(set(rows)) == len(rows)
    assert set(rows) <= CAPTIONED
    assert len(CAPTIONED) - len(rows) < batch_size


@pytest.mark.parametrize("length", [1, 4])
def test_text_ids_are_equal_where_captions_are(cache, ids, length):
    """Also when equal captions belong to different rows; the ids of images are their rows."""
    ids = (ids % 3)[:, :length]
    (batch,) = loader(cache, ids, len(CAPTIONED))
    same_ids = batch["text_ids"][:, None] == batch["text_ids"]
    same_captions = (batch["ids"][:, None] == batch["ids"]).all(2)
    assert torch.equal(same_ids, same_captions)
    assert same_captions.sum() > len(CAPTIONED)
    assert torch.equal(batch["image_ids"], batch["rows"])


def test_image_ids_are_labels_where_there_are_some(cache, ids):
    """A row without a label is a class of its own."""
    labels = np.arange(ROWS) % 5 - 1
    (batch,) = loader(cache, ids, len(CAPTIONED), labels=labels)
    expected = [labels[row] if labels[row] >= 0 else -1 - row for row in batch["rows"].tolist()]
    assert batch["image_ids"].tolist() == expected


def test_rows_left_out_of_one_pass_come_in_another(cache, ids):
    batches = loader(cache, ids, 16)
    seen = {row for _ in range(8) for row, _ in taken(batches)}
    assert seen == CAPTIONED


def test_image_caption_and_row_belong_together(cache, ids):
    for batch in loader(cache, ids):
        rows = batch["rows"].tolist()
        assert batch["image"].dtype == torch.float16
        assert batch["ids"].dtype == batch["rows"].dtype == torch.int64
        assert batch["ids"].shape == (8, LENGTH)
        assert batch["image"].tolist() == [[row] * DIM for row in rows]
        assert batch["ids"][:, 0].tolist() == rows
        assert all(caption < CAPTIONS_OF_ROW[row] for row, caption in batch["ids"][:, :2].tolist())


def test_keys_name_the_rows(cache, ids):
    batches = loader(cache, ids)
    batch = next(iter(batches))
    assert batches.keys(batch["rows"].tolist()) == [f"k{number}" for number in batch["ids"][:, 0].tolist()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_take_the_same_global_batches(cache, ids, world_size):
    """In the same order, captions included, over several passes."""
    alone = loader(cache, ids)
    ranks = [loader(cache, ids, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(3):
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert {len(part["rows"]) for part in parts} == {8 // world_size}
            for name in ("image", "ids", "rows"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_another_pass_is_another_order_with_other_captions(cache, ids):
    batches = loader(cache, ids, 1)
    first, second = taken(batches), taken(batches)
    assert [row for row, _ in first] != [row for row, _ in second]
    assert set(first) != set(second)
    assert {row for row, _ in first} == {row for row, _ in second}


def test_every_caption_gets_its_turn_equally(cache, ids):
    """Over 300 passes each of three captions is taken 100 ± 40 times (5 standard deviations)."""
    batches = loader(cache, ids, len(CAPTIONED))
    counts = np.zeros((ROWS, 3), dtype=int)
    for _ in range(300):
        for row, caption in taken(batches):
            counts[row, caption] += 1
    three = counts[[row for row in range(ROWS) if CAPTIONS_OF_ROW[row] == 3]]
    assert (three.sum(1) == 300).all()
    assert np.abs(three - 100).max() <= 40


def test_the_seed_decides(cache, ids):
    assert taken(loader(cache, ids)) == taken(loader(cache, ids))
    assert taken(loader(cache, ids, seed=1)) != taken(loader(cache, ids))


def endless(batches):
    while True:
        yield from batches


@pytest.fixture
def small_blocks(monkeypatch):
    """Windows of 9 captioned rows: a batch of 8 begins and ends anywhere in them."""
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 4)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 3)


@pytest.mark.parametrize("order", ["rows", "blocks"])
@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 11])
def test_a_restored_loader_continues_exactly(cache, ids, small_blocks, after, order):
    """Within a pass and at its end (there are 4 batches to a pass), also on another number of ranks."""
    first = loader(cache, ids, shuffle=order)
    stream = endless(first)
    taken(itertools.islice(stream, after))
    state = dict(first.state_dict())
    expected = taken(itertools.islice(stream, 6))
    second = loader(cache, ids, shuffle=order)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert taken(itertools.islice(endless(second), 6)) == expected
    halves = [loader(cache, ids, rank=r, world_size=2, shuffle=order) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    parts = zip(*(itertools.islice(endless(half), 6) for half in halves), strict=True)
    assert [pair for both in parts for pair in taken(both)] == expected


def test_len_pass_state(cache, ids):
    batches = loader(cache, ids)
    assert len(batches) == len(CAPTIONED) // 8 == 4
    list(batches)
    assert (batches.epoch, batches.examples) == (1, 0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 20}, "train.batch_size 8, but it is 20"),
        ({"seed": 3}, "seed 0, but it is 3"),
        ({"shuffle": "blocks"}, "train.shuffle rows, but it is blocks"),
    ],
)
def test_a_position_counted_in_other_batches_is_refused(cache, ids, change, name):
    """The same number of other batches would be another position, or one beyond the end of the pass."""
    first = loader(cache, ids)
    next(iter(first))
    with pytest.raises(UserError, match=name):
        loader(cache, ids, **change).load_state_dict(first.state_dict())


def test_the_checkpoint_overrides_an_automatic_shuffle(cache, ids):
    """There may be less free memory when a run is resumed; its batches must stay the same."""
    first = loader(cache, ids)
    stream = endless(first)
    next(stream)
    state, expected = first.state_dict(), taken(itertools.islice(stream, 5))
    second = loader(cache, ids, shuffle="blocks", auto_shuffle=True)
    second.load_state_dict(state)
    assert second.shuffle == "rows"
    assert taken(itertools.islice(endless(second), 5)) == expected


def test_batches_made_ahead_do_not_count(cache, ids):
    """After one batch the position is 8 examples, though the thread has made three batches."""
    batches, gathered = loader(cache, ids), []
    gather = cache.gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "gather", lambda rows: gathered.append(len(rows)) or gather(rows), raising=True)
        stream = iter(batches)
        next(stream)
        for _ in range(500):
            if len(gathered) == 3:
                break
            time.sleep(0.01)
        assert gathered == [8, 8, 8]
        assert batches.state_dict()["examples"] == 8
        stream.close()


def test_an_error_of_the_cache_reaches_the_training(cache, ids, monkeypatch):
    def broken(rows):
        raise OSError("the disk went")

    batches = loader(cache, ids)
    monkeypatch.setattr(cache, "gather", broken)
    with pytest.raises(OSError, match="the disk went"):
        next(iter(batches))
    assert batches.state_dict()["examples"] == 0


def test_at_most_three_batches_are_added(tmp_path):
    """The consumer's and three more, temporaries included, at any moment of a pass of slow steps."""
    rows, dim, size = 16_384, 128, 2048
    write_shard(
        tmp_path,
        0,
        embeddings=np.ones((rows, dim)),
        keys=[str(row) for row in range(rows)],
        captions=[["a"]] * rows,
        fingerprint={"tower": "none"},
    )
    finish(tmp_path, 1, {"tower": "none"})
    batches = loader(EmbeddingCache(tmp_path), np.zeros((rows, 16), np.uint16), size)
    whole = size * (dim * 2 + 16 * 8 + 2 * 8)
    list(batches)
    tracemalloc.start()
    try:
        peak = 0
        for batch in batches:
            time.sleep(0.02)
            peak = max(peak, tracemalloc.get_traced_memory()[1])
            assert len(batch["rows"]) == size
    finally:
        tracemalloc.stop()
    assert 2 * whole < peak < 4 * whole + 4 * rows + 100_000


def test_a_batch_that_ranks_cannot_share_evenly(cache, ids):
    with pytest.raises(UserError, match=r"train.batch_size 8 cannot be shared evenly by 3 devices"):
        loader(cache, ids, world_size=3)


def test_fewer_rows_than_a_batch(cache, ids):
    """Only rows with captions count."""
    loader(cache, ids, len(CAPTIONED))
    with pytest.raises(UserError, match=rf"has {len(CAPTIONED)} images with captions.*lower train.batch_size from"):
        loader(cache, ids, len(CAPTIONED) + 1)
