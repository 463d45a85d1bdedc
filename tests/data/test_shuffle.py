"""The order of a pass: its memory, its reads, its mixing, and when which order is chosen."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from siglit.data import random_hash, shuffle
from siglit.data.order import RankShare
from siglit.data.random_hash import choose_captions
from siglit.data.shuffle import BlockShuffle, RowShuffle, choose_image_shuffle, choose_shuffle


def offsets(rows, every=3):
    """One caption per row, but none for every third."""
    return np.concatenate([[0], np.cumsum(np.arange(rows) % every > 0)]).astype(np.int64)


def fetch(rows):
    return {"rows": rows}


def batches_of(order, total, epoch=0, first=0, ranks=1):
    """(batches, total) rows, the ranks' parts put together."""
    shares = [order.batches(epoch, first, RankShare(total, rank, ranks), fetch) for rank in range(ranks)]
    return np.array([np.concatenate([part["rows"] for part in parts]) for parts in zip(*shares, strict=True)])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 16)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 80, 81, 1000])
@pytest.mark.parametrize("total", [1, 12, 64, 500])
def test_blocks_hold_every_captioned_row_once(small_blocks, rows, total):
    """For caches of less than a block, less than a window and many; for batches of less and more than a window."""
    order = BlockShuffle(offsets(rows), 0)
    captioned = {row for row in range(rows) if row % 3}
    assert order.count == len(captioned)
    seen = batches_of(order, total).reshape(-1).tolist()
    assert len(seen) == len(set(seen)) == len(captioned) // total * total
    assert set(seen) <= captioned


@pytest.mark.parametrize("kind", [RowShuffle, BlockShuffle])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_and_any_start_give_the_same_batches(small_blocks, kind, ranks):
    order = kind(offsets(1000), 7)
    whole = batches_of(order, 12, epoch=2)
    assert len(whole) == 666 // 12
    for first in (0, 1, 4, 5, 30, 54):
        assert np.array_equal(batches_of(order, 12, epoch=2, first=first, ranks=ranks), whole[first:])


@pytest.mark.parametrize("kind", [RowShuffle, BlockShuffle])
def test_seed_and_pass_decide(small_blocks, kind):
    order = kind(offsets(1000), 7)
    assert np.array_equal(batches_of(order, 12), batches_of(kind(offsets(1000), 7), 12))
    assert not np.array_equal(batches_of(order, 12), batches_of(order, 12, epoch=1))
    assert not np.array_equal(batches_of(order, 12), batches_of(kind(offsets(1000), 8), 12))


def test_rows_are_numpys_permutation():
    """The order is frozen, as checkpoints count positions in it."""
    expected = np.random.default_rng((3, 1, 0)).permutation(np.flatnonzero(np.arange(300) % 3))
    assert batches_of(RowShuffle(offsets(300), 3), 1, epoch=1)[:, 0].tolist() == expected.tolist()


def test_blocks_read_forwards_within_a_window(small_blocks):
    """The rows of a window are read in ascending order, though batches have another; two windows at a time."""
    requested = []

    def watch(rows):
        requested.append(rows)
        return {"rows": rows}

    order = BlockShuffle(offsets(800, every=10**9), 0)
    given = [batch["rows"] for batch in order.batches(0, 0, RankShare(9), watch)]
    flat = np.concatenate(requested)
    assert (np.diff(flat) < 0).sum() == 799 // (16 * 5), "as many ways back as there are further windows"
    assert (np.diff(np.concatenate(given)) < 0).mean() > 0.4, "an increase as often as a decrease"


def test_blocks_mix_a_window(small_blocks):
    """A batch of 16 of a window of 5 blocks has rows of at least 3 of them: one block alone never fills it."""
    batches = batches_of(BlockShuffle(offsets(800, every=10**9), 0), 16)
    assert min(len(set(batch // 16)) for batch in batches) >= 3


def test_rows_take_eight_bytes_a_row():
    """Beside the cache's own 8 bytes of caption offsets: 16 in all."""
    rows = 2_000_000
    starts = np.arange(rows + 1)
    tracemalloc.start()
    try:
        order = RowShuffle(starts, 0)
        next(order.batches(0, 0, RankShare(256), fetch))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 * rows < peak < 8.05 * rows + (16 << 20)


def test_blocks_take_two_windows_and_nothing_per_row(monkeypatch):
    """Ten times as many rows need no more memory; each of two ranks holds its half of the windows."""
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 512)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 8)

    def peak(rows, ranks):
        starts = np.arange(rows + 1)
        tracemalloc.start()
        try:
            order = BlockShuffle(starts, 0)
            batches = order.batches(
                0, 0, RankShare(256, 0, ranks), lambda r: {"image": np.ones((len(r), 64), np.float16)}
            )
            for _ in range(24):
                next(batches)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    windows = 2 * 512 * 8 * 64 * 2
    assert windows < peak(20_000, 1) < 1.7 * windows
    assert peak(200_000, 1) < 1.7 * windows
    assert peak(200_000, 2) < windows


def test_a_caption_is_drawn_evenly_from_seed_pass_and_row():
    """100,000 draws of 1–7 captions: even (chi-square, 1e-6); another seed or pass is another draw."""
    rows = np.arange(100_000)
    for count in range(1, 8):
        drawn = choose_captions(0, 0, rows, np.full(len(rows), count))
        seen = np.bincount(drawn, minlength=count)
        assert len(seen) == count
        assert ((seen - len(rows) / count) ** 2 / (len(rows) / count)).sum() < 39
    three = np.full(len(rows), 3)
    draws = [choose_captions(*key, rows, three) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (-5, 2**40))]
    for first in range(len(draws)):
        for second in range(first):
            assert (draws[first] == draws[second]).mean() == pytest.approx(1 / 3, abs=0.01)
    part = rows[500:600]
    assert np.array_equal(choose_captions(1, 1, part, three[:100]), draws[3][500:600])


def test_splitmix64_is_splitmix64():
    """First outputs of the published generator, seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = np.array([(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(3)], np.uint64)
    assert random_hash._splitmix64(states).tolist() == expected


@pytest.mark.parametrize(("free", "chosen"), [(2_000_000, "rows"), (1_999_999, "blocks")])
def test_blocks_are_chosen_above_half_of_the_free_memory(monkeypatch, free, chosen):
    class Cache(SimpleNamespace):
        def __len__(self):
            return 5000

    monkeypatch.setattr(shuffle, "free_memory", lambda: free)
    assert choose_shuffle(Cache(dim=100))[0] == chosen


@pytest.mark.parametrize(("processes", "chosen"), [(2, "rows"), (3, "blocks")])
def test_every_process_of_a_machine_holds_the_images(monkeypatch, processes, chosen):
    class Source:
        def memory(self):
            return 1000

    monkeypatch.setattr(shuffle, "free_memory", lambda: 5000)
    assert choose_image_shuffle(Source(), processes)[0] == chosen


def test_the_free_memory_is_the_machines():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 1 << 20 < shuffle.free_memory() < total
