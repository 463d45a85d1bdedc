"""Batches of images: every captioned sample once per pass, whatever the source, ranks, workers and kills."""

import gc
import io
import itertools
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from siglit.config import ImageTowerConfig, SourceSpec
from siglit.data import image_loader
from siglit.data.corruption import Corruption
from siglit.data.decode_workers import Decoder, UnitPixels, pixel_batches
from siglit.data.image_loader import ImageLoader
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from tests.conftest import ROOT, TOWER
from tests.ranks import other_processes

COUNT, SIZE = 53, 6
CAPTIONS_OF = [number % 4 for number in range(COUNT)]  # none, one, two, three, none, …
CAPTIONED = {number for number in range(COUNT) if CAPTIONS_OF[number]}
FORMATS = ("csv", "parquet", "webdataset")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Units of 5, windows of 3 units, jobs of 3: batches, windows and jobs end anywhere in one another."""
    monkeypatch.setattr(image_loader, "UNIT_SAMPLES", 5)
    monkeypatch.setattr(image_loader, "WINDOW_UNITS", 3)
    monkeypatch.setattr(image_loader, "CHUNK", 3)


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    if other_processes():
        gc.collect()
    assert eventually(lambda: not other_processes())


def eventually(condition):
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def png(number):
    """Red is the number; green grows to the right, blue downwards."""
    pixels = np.empty((10, 12, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number, np.arange(12) * 20, np.arange(10)[:, None] * 25
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def texts(number):
    return [f"{number} {c}" for c in range(CAPTIONS_OF[number])]


PIXELS = """
dataset = decode_workers.UnitPixels(source, list(source.units(8)), shrink, 4, 1000)
stream = decode_workers.pixel_batches(dataset, 2, False)
next(stream)
print_pids()
"""


def write_csv(folder, images):
    lines = ["filepath,title,label"]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image)
        lines += [f"{number}.png,{text},{number % 7}" for text in texts(number) or [" "]]
    (folder / "x.csv").write_text("\n".join(lines) + "\n")
    return SourceSpec("csv", str(folder / "x.csv"), label_column="label")


def write_parquet(folder, images):
    columns = {
        "image": [{"bytes": image, "path": None} for image in images],
        "caption": [texts(number) for number in range(COUNT)],
        "label": [number % 7 for number in range(COUNT)],
        "id": [f"{number}.png" for number in range(COUNT)],
    }
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=4)
    return SourceSpec("parquet", str(folder / "x.parquet"), key_column="id")


def write_webdataset(folder, images):
    """Five tars of 11, one of them with no captions but for the last sample."""
    for start in range(0, COUNT, 11):
        with tarfile.open(folder / f"{start:02d}.tar", "w") as tar:
            for number in range(start, min(start + 11, COUNT)):
                json = f'{{"caption": {texts(number)}, "key": "{number}.png"}}'.replace("'", '"')
                for extension, data in (
                    ("png", images[number]),
                    ("json", json.encode()),
                    ("cls", b"%d" % (number % 7)),
                ):
                    info = tarfile.TarInfo(f"{number:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return SourceSpec("webdataset", str(folder), key_column="key")


WRITERS = {"csv": write_csv, "parquet": write_parquet, "webdataset": write_webdataset}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    images = [png(number) for number in range(COUNT)]
    return {fmt: open_source(write(tmp_path_factory.mktemp(fmt), images)) for fmt, write in WRITERS.items()}


@pytest.fixture
def source(sources):
    return sources["parquet"]


@pytest.fixture
def broken(tmp_path):
    """Every sixth image is cut off: 9 of the 39 captioned ones, of which few are in every window."""
    spec = write_csv(tmp_path, [png(number)[: 60 if number % 6 == 1 else None] for number in range(COUNT)])
    return open_source(spec)


class Tokens:
    """Number and caption as ids."""

    vocab_size, length, eos_id, pad_id, fingerprint = 100, 4, 1, 1, ""

    def __call__(self, texts):
        return np.array([[*map(int, text.split()), 0, 1] for text in texts], np.int32)


def to_pixels(image):
    return torch.from_numpy(np.asarray(image.resize((SIZE, SIZE))).copy()).permute(2, 0, 1)


def loader(
    source, batch_size=12, seed=0, workers=0, max_skipped=1.0, crop=None, flip=False, transform=to_pixels, **more
):
    decoder = Decoder(transform, SIZE, 1000, crop=crop, flip=flip)
    return ImageLoader(
        source, Tokens(), decoder, batch_size=batch_size, seed=seed, workers=workers, max_skipped=max_skipped, **more
    )


def endless(batches):
    while True:
        yield from batches


def everything(stream, count=None):
    """All tensors of `count` batches, end to end."""
    batches = list(itertools.islice(stream, count))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_one_pass_takes_every_captioned_sample_once(sources, fmt, shuffle):
    """Up to the incomplete last batch; pixels, caption, key and label are those of one sample."""
    batches = loader(sources[fmt], shuffle=shuffle, labels=True)
    result = list(batches)
    assert batches.count == len(CAPTIONED)
    assert len(result) == len(batches) == len(CAPTIONED) // 12
    numbers = []
    for batch in result:
        assert batch["image"].shape == (12, 3, SIZE, SIZE)
        assert batch["image"].dtype == torch.uint8
        assert {batch[name].dtype for name in ("ids", "rows", "text_ids", "image_ids")} == {torch.int64}
        numbers += (mine := batch["ids"][:, 0].tolist())
        assert all(caption < CAPTIONS_OF[number] for number, caption in batch["ids"][:, :2].tolist())
        assert (batch["image"][:, 0] == torch.tensor(mine)[:, None, None]).all()
        assert batches.keys(batch["rows"].tolist()) == [f"{number}.png" for number in mine]
        assert batch["image_ids"].tolist() == [number % 7 for number in mine]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= CAPTIONED


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_windows_without_captions_are_skipped(tmp_path, shuffle):
    """Ten of 16 units have no caption; with windows of 3 units, some windows have none in most passes."""
    lines = [
        "filepath,title",
        *(f"{number}.png,{number} 0" if number > 49 else f"{number}.png," for number in range(80)),
    ]
    for number in range(80):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "x.csv").write_text("\n".join(lines))
    batches = loader(open_source(SourceSpec("csv", str(tmp_path / "x.csv"))), batch_size=3, shuffle=shuffle)
    for _ in range(3):
        numbers = everything(batches)["ids"][:, 0].tolist()
        assert len(set(numbers)) == len(numbers) == 30
        assert set(numbers) <= set(range(50, 80))
    assert batches.keys([]) == []


def test_image_ids_are_rows_without_labels(source):
    batch = next(iter(loader(source)))
    assert torch.equal(batch["image_ids"], batch["rows"])


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_is_the_same_sample_in_every_source_and_shuffle(sources, fmt):
    """Captioned samples are numbered in the source's order, whatever the units."""
    expected = [f"{number}.png" for number in sorted(CAPTIONED)]
    for shuffle in ("rows", "blocks"):
        assert loader(sources[fmt], shuffle=shuffle).keys([38, 0, 38, 17]) == [expected[i] for i in (38, 0, 38, 17)]


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_another_pass_is_another_order_and_leaves_out_others(source, shuffle):
    """And begins elsewhere: the first batches of fixed windows would have the 11 samples of one in common."""
    stream = endless(loader(source, shuffle=shuffle))
    passes = [everything(stream, 3)["ids"][:, 0].tolist() for _ in range(8)]
    assert len({tuple(order) for order in passes}) == 8
    assert set().union(*passes) == CAPTIONED
    assert len(set().union(*(order[:11] for order in passes))) > 30


def test_every_caption_gets_its_turn(source):
    """One per sample and pass; 40 passes leave none of the 78 out."""
    pairs = everything(endless(loader(source)), 120)["ids"][:, :2]
    assert {tuple(pair) for pair in pairs.tolist()} == {(n, c) for n in CAPTIONED for c in range(CAPTIONS_OF[n])}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_take_the_same_global_batches(sources, fmt, shuffle, ranks):
    alone = endless(loader(sources[fmt], shuffle=shuffle, crop=0.3, flip=True))
    parts = [
        endless(loader(sources[fmt], shuffle=shuffle, crop=0.3, flip=True, rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    for whole, *shares in itertools.islice(zip(alone, *parts, strict=True), 5):
        assert {len(share["rows"]) for share in shares} == {12 // ranks}
        assert equal(everything(shares), whole)


def test_a_rank_decodes_its_share_only(source):
    seen = []
    list(loader(source, transform=lambda image: seen.append(1) or to_pixels(image), rank=1, world_size=3))
    assert len(seen) == 12


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_workers_change_no_byte(broken, shuffle):
    """Over two passes, with augmentation and images that are replaced."""
    runs = [
        everything(endless(loader(broken, shuffle=shuffle, workers=workers, crop=0.3, flip=True)), 5)
        for workers in (0, 1, 2)
    ]
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("after", range(7))
def test_a_restored_loader_continues_exactly(broken, after, shuffle):
    """From every position of two passes, on one rank or two, augmentation and replaced images included."""
    options = {"shuffle": shuffle, "crop": 0.3, "flip": True}
    first = loader(broken, **options)
    stream = endless(first)
    list(itertools.islice(stream, after))
    state = dict(first.state_dict())
    expected = everything(stream, 5)
    second = loader(broken, **options)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert equal(everything(endless(second), 5), expected)
    halves = [loader(broken, **options, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    both = zip(*(itertools.islice(endless(half), 5) for half in halves), strict=True)
    assert equal(everything(itertools.chain(*both)), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_was_consumed_is_not_decoded_again(sources, fmt):
    seen = []
    batches = loader(sources[fmt], shuffle="blocks", transform=lambda image: seen.append(1) or to_pixels(image))
    batches.load_state_dict(batches.state_dict() | {"examples": 24})
    assert len(list(batches)) == 1
    assert len(seen) == 12


def test_the_position_counts_consumed_batches(source):
    batches = loader(source)
    stream = iter(batches)
    next(stream)
    assert batches.state_dict()["examples"] == 12
    stream.close()
    assert batches.state_dict()["examples"] == 12
    list(batches)
    assert (batches.epoch, batches.examples) == (1, 0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 20}, "train.batch_size 12, but it is 20"),
        ({"seed": 3}, "seed 0, but it is 3"),
        ({"shuffle": "blocks"}, "train.shuffle rows, but it is blocks"),
    ],
)
def test_a_position_counted_in_other_batches_is_refused(source, change, name):
    state = loader(source).state_dict()
    with pytest.raises(UserError, match=name):
        loader(source, **change).load_state_dict(state)


@pytest.mark.parametrize(("before", "now"), [("rows", "blocks"), ("blocks", "rows")])
def test_the_checkpoint_overrides_an_automatic_shuffle(source, before, now):
    first = loader(source, shuffle=before)
    stream = endless(first)
    next(stream)
    state, expected = first.state_dict(), everything(stream, 4)
    second = loader(source, shuffle=now, auto_shuffle=True)
    second.load_state_dict(state)
    assert second.shuffle == before
    assert equal(everything(endless(second), 4), expected)


def test_augmentation_varies_from_pass_to_pass_and_not_from_run_to_run(source):
    def images_of_rows(batches):
        return {
            row: image for batch in batches for row, image in zip(batch["rows"].tolist(), batch["image"], strict=True)
        }

    batches = loader(source, batch_size=len(CAPTIONED), crop=0.3, flip=True)
    first, second = images_of_rows(batches), images_of_rows(batches)
    again = images_of_rows(loader(source, batch_size=len(CAPTIONED), crop=0.3, flip=True))
    assert all(torch.equal(first[row], again[row]) for row in range(39))
    assert sum(torch.equal(first[row], second[row]) for row in range(39)) < 5
    assert len({image[1:].numpy().tobytes() for image in first.values()}) > 35, "one crop for all"


def test_an_unusable_image_is_replaced_by_a_pair_that_belongs_together(broken):
    """Whole batches; the pair in its place is another of the pass's samples, with one of its own captions."""
    batches = loader(broken, batch_size=len(CAPTIONED))
    (batch,) = batches
    numbers = batch["ids"][:, 0].tolist()
    assert (batch["image"][:, 0] == torch.tensor(numbers)[:, None, None]).all()
    assert all(caption < CAPTIONS_OF[number] for number, caption in batch["ids"][:, :2].tolist())
    assert batches.keys(batch["rows"].tolist()) == [f"{number}.png" for number in numbers]
    bad = {number for number in CAPTIONED if number % 6 == 1}
    assert not bad & set(numbers)
    assert set(numbers) == CAPTIONED - bad
    assert batches.seen == 39
    assert sum(batches.skipped.values()) == len(bad)
    assert all("truncated or broken" in reason for reason in batches.skipped)


def test_replacements_come_from_the_window(broken, monkeypatch):
    """And from the first samples of it, so that no more than those outlive it."""
    monkeypatch.setattr(image_loader, "MAX_REPLACEMENTS", 4)
    (batch,) = loader(broken, batch_size=len(CAPTIONED))
    numbers, counts = np.unique(batch["ids"][:, 0].numpy(), return_counts=True)
    assert 1 <= (counts > 1).sum() <= 4
    assert len(numbers) == 30


def test_too_many_unusable_images_end_the_pass(tmp_path):
    """Not before ten of them; the message names the share, the first key and the reason."""
    spec = write_csv(tmp_path, [b"x" if number % 3 else png(number) for number in range(COUNT)])
    stream = iter(loader(open_source(spec), max_skipped=0.5))
    next(stream)
    message = (
        r"^10 of 1[58] images \(\d\d\.\d%\) could not be used, more than data.max_skipped \(50.0%\); "
        r"the first is '\d+.png': not an image \(1 bytes\). Fix the images, or raise data.max_skipped$"
    )
    with pytest.raises(UserError, match=message):
        list(stream)


def test_as_many_unusable_images_as_allowed_do_not_end_the_pass(broken):
    assert len(list(itertools.islice(endless(loader(broken, max_skipped=0.4)), 9))) == 9


def test_fewer_than_ten_unusable_images_do_not_end_the_pass(broken):
    """Nine, a share of 23 %."""
    assert len(list(loader(broken, batch_size=len(CAPTIONED), max_skipped=0.0))) == 1


def test_images_that_are_all_unusable_end_the_pass(tmp_path):
    spec = write_csv(tmp_path, [b"x"] * COUNT)
    with pytest.raises(UserError, match="no usable image was found in 100 tries.*the first unusable one is '"):
        list(loader(open_source(spec)))


def test_a_missing_file_is_an_unusable_image(sources, tmp_path):
    source = open_source(write_csv(tmp_path, [png(number) for number in range(COUNT)]))
    (tmp_path / "5.png").unlink()
    batches = loader(source, batch_size=len(CAPTIONED))
    list(batches)
    assert batches.skipped == {"cannot be read: No such file or directory": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_no_window_stays_when_a_pass_is_over(source, monkeypatch, workers):
    """Nor the thread that reads them, while the loader waits for its next pass."""
    alive = weakref.WeakSet()

    class Window(image_loader.SampleWindow):
        def __init__(self, *args):
            alive.add(self)
            super().__init__(*args)

    monkeypatch.setattr(image_loader, "SampleWindow", Window)
    batches = loader(source, shuffle="blocks", workers=workers)
    list(batches)
    assert not alive
    assert not [thread for thread in threading.enumerate() if thread.name == "siglit-prefetch"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_two_windows_at_most_are_in_memory(sources, fmt, monkeypatch):
    """Counted whenever one begins to be read; each is bounded by its units, and holds this rank's share of them."""
    alive, counts = weakref.WeakSet(), []

    class Window(image_loader.SampleWindow):
        def __init__(self, *args):
            alive.add(self)
            counts.append(len(alive))
            super().__init__(*args)
            sizes.append(len(self._samples))

    class Slow(image_loader.Prefetched):
        """The thread begins the next window before the consumer has the last one."""

        def __next__(self):
            window = super().__next__()
            time.sleep(0.02)
            return window

    sizes = []
    monkeypatch.setattr(image_loader, "Prefetched", Slow)
    monkeypatch.setattr(image_loader, "SampleWindow", Window)
    monkeypatch.setattr(image_loader, "MAX_REPLACEMENTS", 2)
    for batch in itertools.islice(endless(loader(sources[fmt], shuffle="blocks", rank=1, world_size=2)), 9):
        time.sleep(0.02)
        assert len(batch["rows"]) == 6
    assert max(counts) == 2
    assert len(counts) >= 6
    assert max(sizes) <= (33 if fmt == "webdataset" else 15) * 0.75


def test_images_of_a_table_are_read_unit_by_unit(source, monkeypatch):
    """Each row group once or, where two units share it, twice; in blocks without holding them."""
    reads = []
    original = pq.ParquetFile.read_row_group

    def spied(self, number, columns):
        if columns == ["image"]:
            reads.append(number)
        return original(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spied)
    batches = loader(source, shuffle="blocks")
    assert reads == []
    list(batches)
    assert len(reads) <= 2 * 13
    reads.clear()
    batches = loader(source, shuffle="rows")
    assert reads == list(range(13))
    list(batches)
    assert reads == list(range(13))


def test_at_most_three_batches_are_in_memory(source, monkeypatch):
    """The consumer's, one ready, and one that is made as soon as that is taken."""
    alive, counts = weakref.WeakSet(), []
    original = image_loader.ImageLoader._batch

    def counted(self, *args):
        counts.append(len(alive) + 1)
        batch = original(self, *args)
        alive.add(batch["image"])
        return batch

    monkeypatch.setattr(image_loader.ImageLoader, "_batch", counted)
    for taken, batch in enumerate(itertools.islice(iter(loader(source, batch_size=4)), 8), start=1):
        assert eventually(lambda taken=taken: len(counts) == taken + 1)
        time.sleep(0.03)
        assert len(counts) == taken + 1
        assert len(batch["rows"]) == 4
    assert 2 <= max(counts) <= 3


def test_pixels_are_those_of_precompute(tmp_path, tower_weights):
    """Without augmentation, JPEGs decoded at a reduced scale included."""
    spec, rng = write_csv(tmp_path, [png(0)] * COUNT), np.random.default_rng(0)
    for number in range(COUNT):
        noise = Image.fromarray(rng.integers(0, 255, (90, 70, 3), np.uint8))
        noise.save(tmp_path / f"{number}.png", "JPEG")
    source = open_source(spec)
    tower = ImageTower(ImageTowerConfig(**TOWER, weights=str(tower_weights), jpeg_draft=True))
    transform, draft = tower.transform(), tower.draft()
    decoded = pixel_batches(UnitPixels(source, source.units(20), transform, 7, 10_000, draft), 0, False)
    expected = {
        sample.key: pixels for batch in decoded for sample, pixels in zip(batch.samples, batch.pixels, strict=True)
    }
    decoder = Decoder(transform, tower.image_size, 10_000, draft)
    batches = ImageLoader(source, Tokens(), decoder, batch_size=len(CAPTIONED), seed=0, workers=0, max_skipped=0)
    (batch,) = batches
    for key, pixels in zip(batches.keys(batch["rows"].tolist()), batch["image"], strict=True):
        assert torch.equal(pixels, expected[key])


def test_workers_stay_from_pass_to_pass(source):
    """Also where the consumer stops after the last batch; they end with `close`, and with the loader."""
    batches = loader(source, workers=2)
    list(batches)
    workers = other_processes()
    assert len(workers) == 2
    stream = iter(batches)
    list(itertools.islice(stream, 3))
    stream.close()
    list(batches)
    assert other_processes() == workers
    batches.close()
    assert not other_processes()
    list(batches)
    del batches, stream
    gc.collect()
    assert eventually(lambda: not other_processes())


def test_no_worker_outlives_a_pass_that_is_stopped_early(source):
    """Whether all of it is decoded already or another pass has begun meanwhile."""
    batches = loader(source, workers=2)
    stream, other = iter(batches), iter(batches)
    next(stream)
    next(other)
    assert len(other_processes()) == 4
    stream.close()
    assert len(other_processes()) == 2
    other.close()
    assert not other_processes()
    assert len(list(batches)) == 1


class Refusing:
    def __call__(self, image):
        raise UserError("this image is refused")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_of_a_worker_arrives_unchanged(source, workers):
    with pytest.raises(UserError, match=r"^this image is refused$"):
        next(iter(loader(source, workers=workers, transform=Refusing())))
    assert not other_processes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("good", [0, 2])
def test_an_error_of_the_source_arrives_unchanged(tmp_path, monkeypatch, workers, good):
    """After all batches before it. No worker lives on while the traceback is kept."""
    monkeypatch.setattr(image_loader, "WINDOW_UNITS", 1)
    source = open_source(write_webdataset(tmp_path, [png(number) for number in range(COUNT)]))
    batches = loader(source, batch_size=4, shuffle="blocks", workers=workers)
    order = np.random.default_rng((0, 0, 0)).permutation(5)
    for number in order[good:]:
        path = tmp_path / f"{number * 11:02d}.tar"
        path.write_bytes(path.read_bytes()[:2000])
    taken = []
    with pytest.raises(UserError, match=r"\.tar is truncated") as caught:
        taken.extend(batches)
    assert len(taken) == sum(len(CAPTIONED & set(range(n * 11, n * 11 + 11))) for n in order[:good]) // 4
    assert not other_processes(), caught


def test_a_source_that_changes_is_noticed(tmp_path):
    batches = loader(
        open_source(write_webdataset(tmp_path, [png(number) for number in range(COUNT)])), shuffle="blocks"
    )
    with tarfile.open(tmp_path / "00.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"00.tar had 8 captioned samples when training started, but has 0 now"):
        batches.keys([0])


def test_other_errors_are_not_hidden(source):
    with pytest.raises(TypeError):
        next(iter(loader(source, transform=None)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "last_words",
    [
        "stream = iter(batches); next(stream); print_pids()",
        "list(batches); print_pids()",
        "for _ in batches: print_pids(); exit()",
        PIXELS,
    ],
    ids=["iterator", "between passes", "exit", "pixels"],
)
def test_a_program_that_ends_while_workers_run_ends(tmp_path, last_words):
    """At once, printing nothing, and its workers with it."""
    spec = write_csv(tmp_path, [png(number) for number in range(COUNT)])
    program = f"""
import multiprocessing
import numpy as np
import torch
from siglit.config import SourceSpec
from siglit.data import decode_workers, worker_pool
from siglit.data.decode_workers import Decoder
from siglit.data.image_loader import ImageLoader
from siglit.data.sources import open_source

worker_pool._WORKER_GRACE = 1000.0
source = open_source(SourceSpec("csv", {spec.path!r}, label_column="label"))
shrink = lambda image: torch.zeros(3, 4, 4, dtype=torch.uint8)
tokens = lambda texts: np.zeros((len(texts), 2), np.int32)
batches = ImageLoader(source, tokens, Decoder(shrink, 4, 1000), batch_size=4, seed=0, workers=2, max_skipped=0)
print_pids = lambda: print(*(child.pid for child in multiprocessing.active_children()))
{last_words}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert [line for line in done.stderr.splitlines() if not line.startswith("reading csv")] == []
    pids = done.stdout.split()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_trainings_random_state_is_left_alone(source):
    state = torch.get_rng_state()
    list(loader(source, workers=1, crop=0.3, flip=True))
    list(loader(source, workers=0, crop=0.3, flip=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_are_pinned_with_pin_memory(source, monkeypatch):
    pinned, empty = [], torch.empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    monkeypatch.setattr(
        torch, "empty", lambda *a, pin_memory=False, **k: (pinned.append(a[0]) if pin_memory else 0, empty(*a, **k))[1]
    )
    list(loader(source, batch_size=len(CAPTIONED)))
    assert pinned == []
    list(loader(source, batch_size=len(CAPTIONED), pin_memory=True))
    assert pinned == [(39, 3, SIZE, SIZE), (39, 4), (39,), (39,), (39,)]


def test_a_batch_that_cannot_be_filled_or_shared(source):
    with pytest.raises(UserError, match=r"train.batch_size 12 cannot be shared evenly by 5 devices"):
        loader(source, world_size=5)
    with pytest.raises(UserError, match=r"x.parquet has 39 images with captions.*lower train.batch_size from 40 to 39"):
        loader(source, batch_size=40)


def corrupted(source, kinds, share=0.5, **options):
    """A loader with corruption, each text of which is a number of its own."""
    corruption = Corruption(frozenset(kinds), share, 0, Tokens.vocab_size, Tokens.eos_id, Tokens.pad_id)
    return loader(source, corruption=corruption, **options)


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("kinds", [["image"], ["text"], ["alignment"], ["image", "text", "alignment"]])
def test_corruption_is_the_same_on_any_number_of_ranks_and_after_resuming(source, kinds, shuffle):
    whole = everything(endless(corrupted(source, kinds, shuffle=shuffle)), 5)
    parts = [corrupted(source, kinds, shuffle=shuffle, rank=rank, world_size=3) for rank in range(3)]
    streams = [endless(part) for part in parts]
    batches = [[next(stream) for stream in streams] for _ in range(5)]
    together = everything(iter([{k: torch.cat([b[k] for b in batch]) for k in batch[0]} for batch in batches]))
    assert equal(together, whole)
    resumed = corrupted(source, kinds, shuffle=shuffle)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": 0, "examples": 24})
    assert equal(everything(endless(resumed), 3), {k: v[24:] for k, v in whole.items()})
    for stream in streams:
        stream.close()


def test_corruption_hits_about_its_share_and_nothing_else(source):
    plain, result = everything(endless(loader(source)), 15), everything(endless(corrupted(source, ["image"])), 15)
    noise = (plain["image"] != result["image"]).flatten(1).any(1)
    assert 60 < noise.sum() < 120
    assert equal(
        {k: plain[k] for k in ("ids", "rows", "text_ids")}, {k: result[k] for k in ("ids", "rows", "text_ids")}
    )
    assert torch.equal(result["image_ids"] == result["rows"], ~noise)
    result = everything(endless(corrupted(source, ["alignment"])), 15)
    moved = (plain["ids"] != result["ids"]).any(1)
    assert 40 < moved.sum() < 120
    for start in range(0, 180, 12):  # nothing is lost: the texts of a batch are those of its own pairs
        batches = plain["ids"][start : start + 12], result["ids"][start : start + 12]
        assert sorted(batches[0].tolist()) == sorted(batches[1].tolist())
    assert torch.equal(plain["image"], result["image"])


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_a_key_in_two_tars_is_refused_at_the_start(tmp_path, shuffle):
    """The message names the key and both tars; a sample without a caption is not trained on, and may share its key."""
    spec = write_webdataset(tmp_path, [png(number) for number in range(COUNT)])
    last = tmp_path / "44.tar"
    last.write_bytes(last.read_bytes().replace(b'"key": "44.png"', b'"key": "00.png"'))
    loader(open_source(spec), shuffle=shuffle)
    last.write_bytes(last.read_bytes().replace(b'"key": "45.png"', b'"key": "10.png"'))
    with pytest.raises(UserError, match=r"the key '10\.png' occurs twice: in 00\.tar and in 44\.tar\. .*key_column"):
        loader(open_source(spec), shuffle=shuffle)
