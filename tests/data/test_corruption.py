"""The noise study: its shares, its independence, and that it depends on seed, pass and row alone."""

import numpy as np
import pytest
import torch

from siglit.cache import EmbeddingCache, finish, write_shard
from siglit.config import DataConfig, SourceSpec
from siglit.data import shuffle
from siglit.data.cache_loader import CacheLoader
from siglit.data.corruption import Corruption, corruption_of, noise_pixels, noise_pool
from siglit.errors import UserError

KINDS = ("image", "text", "alignment")
ROWS, DIM, LENGTH, BATCH, EOS, PAD, VOCAB = 160, 6, 5, 24, 7, 3, 100
POOL = np.full((8, DIM), -1, np.float16) - np.arange(8, dtype=np.float16)[:, None]
MANY = np.arange(40_000) * 37


def make_corruption(*kinds, share=0.4, seed=0, eos_id=EOS, pad_id=PAD):
    return Corruption(frozenset(kinds), share, seed, VOCAB, eos_id, pad_id)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Row r holds the number r and has one caption, or two, or three."""
    folder = tmp_path_factory.mktemp("cache")
    write_shard(
        folder,
        0,
        embeddings=np.repeat(np.arange(ROWS, dtype=float)[:, None], DIM, 1),
        keys=[str(row) for row in range(ROWS)],
        captions=[["a"] * (1 + row % 3) for row in range(ROWS)],
        fingerprint={"tower": "none"},
    )
    finish(folder, 1, {"tower": "none"})
    return EmbeddingCache(folder)


@pytest.fixture(scope="module")
def ids(cache):
    """Token ids of the row (from 1000 on, above all random tokens) and of the caption."""
    starts = cache.caption_offsets[cache.caption_rows]
    caption = np.arange(cache.num_captions) - starts
    blank = np.full(cache.num_captions, PAD)
    return np.stack([1000 + cache.caption_rows, 2000 + caption, blank + EOS - PAD, blank, blank], 1).astype(np.uint16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Windows of 40 rows: batches begin and end anywhere in them."""
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 8)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 5)


def loader(cache, ids, corruption, **arguments):
    return CacheLoader(cache, ids, batch_size=BATCH, seed=0, corruption=corruption, noise=POOL, **arguments)


def one_pass(batches):
    """All arrays of a pass, by name."""
    result = list(batches)
    return {name: torch.cat([batch[name] for batch in result]).numpy() for name in result[0]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_is_hit(kind, share):
    """Within five standard deviations; all at 1, none at 0."""
    rate = make_corruption(kind, share=share).hits(kind, 3, MANY).mean()
    assert abs(rate - share) <= 5 * np.sqrt(share * (1 - share) / len(MANY))


def test_kinds_are_hit_independently_of_each_other_and_of_the_pass():
    """Two kinds, or two passes, meet in the product of their shares."""
    corruption = make_corruption(*KINDS)
    hits = [corruption.hits(kind, epoch, MANY) for kind in KINDS for epoch in (0, 1)]
    sigma = np.sqrt(0.16 * 0.84 / len(MANY))
    for first in range(6):
        for second in range(first):
            assert abs((hits[first] & hits[second]).mean() - 0.16) < 5 * sigma
    assert not make_corruption("text").hits("image", 0, MANY).any()


def test_seeds_differ():
    assert not np.array_equal(
        make_corruption("text").hits("text", 0, MANY), make_corruption("text", seed=1).hits("text", 0, MANY)
    )


@pytest.mark.parametrize(("eos", "pad"), [(7, 3), (3, 7), (1, 1), (0, 99), (99, 98)])
def test_random_texts_are_texts(eos, pad):
    """Pieces of the whole vocabulary but the special ones, 1 to L - 1 of them, then the end, then padding."""
    ids = np.full((len(MANY), LENGTH), 500, np.int32)
    corruption = make_corruption("text", eos_id=eos, pad_id=pad)
    result = corruption.corrupt_texts(0, MANY, ids)
    hit = corruption.hits("text", 0, MANY)
    assert result.dtype == ids.dtype
    assert (result[~hit] == 500).all()
    assert (ids == 500).all(), "the caller's array is not written to"
    texts = result[hit]
    pieces = (texts != eos) & (texts != pad)
    lengths = pieces.sum(1)
    place = np.arange(LENGTH)
    assert np.array_equal(pieces, place < lengths[:, None])
    assert (texts[np.arange(len(texts)), lengths] == eos).all()
    assert (texts[place > lengths[:, None]] == pad).all()
    assert set(texts[pieces].tolist()) == set(range(VOCAB)) - {eos, pad}
    counts = np.bincount(lengths, minlength=LENGTH)
    assert counts[0] == 0
    assert np.abs(counts[1:] / len(texts) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / len(texts))
    assert np.abs(np.bincount(texts[:, 0], minlength=VOCAB).max() * (VOCAB - 2) / len(texts) - 1) < 0.4


def test_exchanged_texts_are_a_permutation_of_the_hit_rows():
    """As the paper's shuffle: no pair outside takes part, no text is lost, and a few stay where they are."""
    rows = MANY[:1000]
    corruption = make_corruption("alignment")
    sources, hit = corruption.caption_sources(0, rows), corruption.hits("alignment", 0, rows)
    assert np.array_equal(sources[~hit], rows[~hit])
    assert sorted(sources[hit]) == sorted(rows[hit])
    assert (sources[hit] == rows[hit]).sum() < 10
    assert not np.array_equal(sources, corruption.caption_sources(1, rows))


@pytest.mark.parametrize("order", ["rows", "blocks"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_hand_out_what_one_does(cache, ids, order, ranks):
    """Every array, over two passes, all kinds at once."""
    corruption = make_corruption(*KINDS)
    alone = loader(cache, ids, corruption, shuffle=order)
    parts = [loader(cache, ids, corruption, shuffle=order, rank=r, world_size=ranks) for r in range(ranks)]
    for _ in range(2):
        for whole, *shares in zip(alone, *parts, strict=True):
            for name, value in whole.items():
                assert torch.equal(torch.cat([share[name] for share in shares]), value), name


def test_the_corruption_of_a_row_does_not_depend_on_the_shuffle(cache, ids):
    """Noise and random texts are of (pass, row); only the partners of an exchange follow from the batch."""
    corruption = make_corruption("image", "text")
    by_row = []
    for order in ("rows", "blocks"):
        result = one_pass(loader(cache, ids, corruption, shuffle=order))
        by_row.append({int(row): number for number, row in enumerate(result["rows"])} | {"result": result})
    both = [row for row in range(ROWS) if row in by_row[0] and row in by_row[1]]
    assert len(both) > 100
    for name in ("image", "ids", "text_ids", "image_ids"):
        one, other = (side["result"][name][[side[row] for row in both]] for side in by_row)
        assert np.array_equal(one, other), name


@pytest.mark.parametrize("kinds", [("image",), ("text",), ("alignment",), KINDS])
def test_a_resumed_pass_is_corrupted_as_it_would_have_been(cache, ids, kinds):
    first = loader(cache, ids, make_corruption(*kinds), shuffle="blocks")
    stream = iter(first)
    for _ in range(2):
        next(stream)
    state = dict(first.state_dict())
    second = loader(cache, ids, make_corruption(*kinds), shuffle="blocks", rank=0, world_size=1)
    second.load_state_dict(state)
    for expected, result in zip(stream, second, strict=True):
        for name in expected:
            assert torch.equal(expected[name], result[name]), name


@pytest.mark.parametrize("other", [None, make_corruption("text", share=0.3), make_corruption("text", "image")])
def test_a_run_with_another_corruption_is_not_resumed(cache, ids, other):
    state = loader(cache, ids, make_corruption("text")).state_dict()
    with pytest.raises(UserError, match=r"data.corrupt text \(data.corrupt_share 0.4\), but it is"):
        loader(cache, ids, other).load_state_dict(state)
    with pytest.raises(UserError, match=r"now: the batches"):
        loader(cache, ids, make_corruption("text")).load_state_dict(loader(cache, ids, other).state_dict())


def test_passes_are_corrupted_differently(cache, ids):
    batches = loader(cache, ids, make_corruption("image"))
    corrupted = [
        set(result["rows"][result["image"][:, 0] < 0].tolist()) for result in map(one_pass, (batches, batches))
    ]
    assert corrupted[0]
    assert corrupted[1]
    assert corrupted[0] != corrupted[1]


@pytest.mark.parametrize("order", ["rows", "blocks"])
def test_no_corruption_and_a_share_of_nothing_change_no_byte(cache, ids, order):
    plain = one_pass(CacheLoader(cache, ids, batch_size=BATCH, seed=0, shuffle=order))
    for corruption in (None, make_corruption(*KINDS, share=0.0)):
        result = one_pass(loader(cache, ids, corruption, shuffle=order))
        assert {n: (a.dtype, a.tobytes()) for n, a in result.items()} == {
            n: (a.dtype, a.tobytes()) for n, a in plain.items()
        }


def test_corrupted_images_come_from_the_pool_and_have_ids_of_their_own(cache, ids):
    """Equal where the noise is the same, and never a row, a label or the id of a missing label."""
    for labels in (None, np.arange(ROWS) % 5 - 1):
        plain = one_pass(loader(cache, ids, None, labels=labels))
        result = one_pass(loader(cache, ids, make_corruption("image", share=0.7), labels=labels))
        number = -1 - result["image"][:, 0]
        hit = number >= 0
        assert set(number[hit]) == set(range(len(POOL)))
        assert np.array_equal(result["image"][hit], POOL[number[hit].astype(int)])
        assert np.array_equal(result["image"][~hit], plain["image"][~hit])
        assert np.array_equal(result["image_ids"][~hit], plain["image_ids"][~hit])
        same = result["image_ids"][hit][:, None] == result["image_ids"][hit]
        assert np.array_equal(same, number[hit][:, None] == number[hit])
        assert not set(result["image_ids"][hit]) & set(range(-1 - ROWS, ROWS))
        assert np.array_equal(result["ids"], plain["ids"])


def test_corrupted_texts_are_random_and_the_others_are_captions(cache, ids):
    corruption = make_corruption("text")
    plain, result = one_pass(loader(cache, ids, None)), one_pass(loader(cache, ids, corruption))
    hit = corruption.hits("text", 0, plain["rows"])
    assert (result["ids"][hit] < VOCAB).all()
    assert np.array_equal(result["ids"], corruption.corrupt_texts(0, plain["rows"], plain["ids"]))
    assert np.array_equal(result["image"], plain["image"])
    assert np.array_equal(result["image_ids"], plain["image_ids"])


@pytest.mark.parametrize("order", ["rows", "blocks"])
def test_pairs_exchange_the_very_texts_of_their_batch(cache, ids, order):
    """The captions chosen in this pass, each once; rows represent the images."""
    corruption = make_corruption("alignment")
    pairs = zip(loader(cache, ids, None, shuffle=order), loader(cache, ids, corruption, shuffle=order), strict=True)
    for plain, result in pairs:
        assert torch.equal(result["rows"], plain["rows"])
        assert torch.equal(result["image"], plain["image"])
        rows = result["rows"].numpy()
        texts = result["ids"][:, 0].numpy() - 1000
        assert np.array_equal(texts, corruption.caption_sources(0, rows))
        assert (texts != rows).any()
        assert sorted(result["ids"].tolist()) == sorted(plain["ids"].tolist())
        assert sorted(result["text_ids"].tolist()) == sorted(plain["text_ids"].tolist())


@pytest.mark.parametrize("kinds", [("text",), ("alignment",), ("text", "alignment")])
def test_text_ids_are_those_of_the_corrupted_texts(cache, ids, kinds):
    result = one_pass(loader(cache, ids % 1500 % 20, make_corruption(*kinds)))
    same = (result["ids"][:, None] == result["ids"]).all(2)
    assert same.sum() > len(same)
    assert np.array_equal(result["text_ids"][:, None] == result["text_ids"], same)


def test_a_random_text_moves_with_its_row(cache, ids):
    both = make_corruption("text", "alignment")
    texts = one_pass(loader(cache, ids, make_corruption("text")))
    text_of = dict(zip(texts["rows"].tolist(), texts["ids"].tolist(), strict=True))
    moved = 0
    for batch in loader(cache, ids, both):
        sources = both.caption_sources(0, batch["rows"].numpy())
        moved += int((sources != batch["rows"].numpy()).sum())
        assert batch["ids"].tolist() == [text_of[row] for row in sources.tolist()]
    assert moved > 10


def test_noise_pixels_are_uniform_and_of_seed_pass_and_row():
    pixels = noise_pixels(0, 1, 2, 65)
    assert pixels.shape == (3, 65, 65)
    assert pixels.dtype == np.uint8
    assert np.bincount(pixels.ravel(), minlength=256).min() > 10
    assert abs(pixels.mean() - 127.5) < 5 * 74 / np.sqrt(pixels.size)
    assert np.array_equal(pixels, noise_pixels(0, 1, np.int64(2), 65))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert (pixels == noise_pixels(*other, 65)).mean() < 0.02


class Tower:
    """Embeds an image as its first pixels, and counts its calls."""

    def __init__(self):
        self.calls, self.seen = 0, 0

    def __call__(self, pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (3, 9, 9)
        self.calls, self.seen = self.calls + 1, self.seen + len(pixels)
        return pixels.reshape(len(pixels), -1)[:, :DIM].astype(np.float32)


def pool(folder, tower, model="a", seed=0, count=40):
    return noise_pool(folder, {"model": model}, tower, image_size=9, dim=DIM, seed=seed, count=count)


def test_the_pool_is_made_once(tmp_path):
    """The second call reads the same bytes and embeds nothing; nothing else is left in the folder."""
    tower = Tower()
    first = pool(tmp_path / "run", tower)
    assert tower.seen == 40
    assert first.shape == (40, DIM)
    assert first.dtype == np.float16
    assert len(np.unique(first, axis=0)) == 40
    calls = tower.calls
    again = pool(tmp_path / "run", tower)
    assert tower.calls == calls
    assert again.tobytes() == first.tobytes()
    assert len(list((tmp_path / "run").iterdir())) == 1
    assert pool(tmp_path / "other", tower).tobytes() == first.tobytes()


@pytest.mark.parametrize("change", [{"model": "b"}, {"seed": 1}, {"count": 41}])
def test_another_tower_seed_or_count_has_another_pool(tmp_path, change):
    tower = Tower()
    pool(tmp_path, tower)
    pool(tmp_path, tower, **change)
    assert tower.seen == 40 + change.get("count", 40)
    assert len(list(tmp_path.iterdir())) == 2


def explode():
    raise AssertionError("unpickled")


class Bomb:
    def __reduce__(self):
        return explode, ()


def foreign(array):
    def write(path):
        np.save(path, array, allow_pickle=True)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(
            path.read_bytes()[:200] + bytes([path.read_bytes()[200] ^ 1]) + path.read_bytes()[201:]
        ),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 something else"),
        foreign(np.zeros((40, DIM), np.float32)),
        foreign(np.zeros((40, DIM + 1), np.float16)),
        foreign(np.array([Bomb()], dtype=object)),
    ],
    ids=["flipped", "cut", "header cut", "empty", "not numpy's", "another type", "another width", "pickled"],
)
def test_a_truncated_or_foreign_pool_is_computed_again(tmp_path, damage):
    tower = Tower()
    first = pool(tmp_path, tower)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert pool(tmp_path, tower).tobytes() == first.tobytes()
    assert tower.seen == 80
    assert path.read_bytes() == whole


class Words:
    vocab_size, length, eos_id, pad_id, fingerprint = VOCAB, LENGTH, EOS, PAD, ""

    def __call__(self, texts):
        raise NotImplementedError


def test_the_experiment_decides():
    train = SourceSpec(format="csv", path="x.csv")
    assert corruption_of(DataConfig(train), 3, Words()) is None
    data = DataConfig(train, corrupt=["text", "image"], corrupt_share=0.2)
    assert corruption_of(data, 3, Words()) == make_corruption("image", "text", share=0.2, seed=3)
