"""Every row group and every tar is read once, by one process, however many workers decode; counted, also in workers."""

import gc
import os
import threading
import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siglit.config import SourceSpec
from siglit.data.decode_workers import UnitPixels, pixel_batches
from siglit.data.sources import open_source, tar_source
from siglit.embedding import _units_of_rank
from tests.data.test_image_loader import COUNT, loader, png, small, to_pixels, write_parquet, write_webdataset

__all__ = ["small"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
GROUPS = list(range(-(-COUNT // 4)))
TARS = [f"{start:02d}.tar" for start in range(0, COUNT, 11)]


class Log:
    """Lines of any process that was forked from this one; each begins with the id of its process."""

    def __init__(self, path):
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR)

    def add(self, what):
        os.write(self._file, f"{os.getpid()} {what}\n".encode())

    def take(self):
        """The new lines, in order; all of them are of this process."""
        lines = [line.split() for line in os.pread(self._file, 1 << 20, 0).decode().splitlines()]
        os.ftruncate(self._file, 0)
        assert {line[0] for line in lines} <= {str(os.getpid())}
        return [line[1] for line in lines]


@pytest.fixture
def image_reads(tmp_path, monkeypatch):
    log, read = Log(tmp_path / "reads"), pq.ParquetFile.read_row_group

    def logged(self, number, columns):
        if columns == ["image"]:
            log.add(number)
        return read(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", logged)
    return log


@pytest.fixture
def index_passes(tmp_path, monkeypatch):
    log, index = Log(tmp_path / "passes"), tar_source.index_tar

    def logged(path):
        log.add(path.name)
        return index(path)

    monkeypatch.setattr(tar_source, "index_tar", logged)
    return log


def written(folder, write):
    folder.mkdir()
    return open_source(write(folder, [png(number) for number in range(COUNT)]))


def pixels_of(source, workers, size=10):
    units = UnitPixels(source, source.units(size), to_pixels, 3, 10_000)
    return [sample.key for batch in pixel_batches(units, workers, False) for sample in batch.samples]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_precompute_reads_every_row_group_once(tmp_path, image_reads, workers):
    """Batches of 3 and shards of 10 end within row groups of 4."""
    source = written(tmp_path / "set", write_parquet)
    assert pixels_of(source, workers) == [f"{number}.png" for number in range(COUNT)]
    assert image_reads.take() == [str(group) for group in GROUPS]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_precompute_indexes_every_tar_once(tmp_path, index_passes, workers):
    source = written(tmp_path / "set", write_webdataset)
    assert pixels_of(source, workers) == [f"{number}.png" for number in range(COUNT)]
    assert index_passes.take() == TARS


@pytest.mark.slow
def test_one_row_group_is_in_memory(tmp_path, monkeypatch):
    """Counted whenever the image column of another one begins to be read."""
    source, alive, counts = written(tmp_path / "set", write_parquet), [], []
    read = pq.ParquetFile.read_row_group

    def counted(self, number, columns):
        if columns != ["image"]:
            return read(self, number, columns=columns)
        gc.collect()
        counts.append(sum(table() is not None for table in alive))
        table = read(self, number, columns=columns)
        alive.append(weakref.ref(table))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert len(pixels_of(source, 0)) == COUNT
    assert counts == [0] * len(GROUPS)


def test_an_image_without_annotation_is_not_read(tmp_path, image_reads):
    """No caption and no label: no reason to read its row group."""
    rows = {"image": [png(1)] * 8, "caption": ["a"] * 4 + [""] * 4}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet", row_group_size=4)
    source = open_source(SourceSpec("parquet", str(tmp_path / "x.parquet")))
    assert len(pixels_of(source, 1)) == 4
    assert image_reads.take() == ["0"]


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_training_reads_as_often_with_workers_as_without(tmp_path, image_reads, shuffle):
    """Held rows: every row group with a caption once. Blocks: once for each window that has rows of it."""
    source = written(tmp_path / "set", write_parquet)
    result = []
    for workers in (0, 2):
        batches = loader(source, shuffle=shuffle, workers=workers)
        list(batches)
        batches.close()
        result.append(image_reads.take())
    assert result[0] == result[1]
    captioned = COUNT // 4
    assert len(result[0]) == captioned if shuffle == "rows" else captioned <= len(result[0]) <= 2 * captioned


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_training_indexes_a_tar_once_when_it_starts_and_once_a_pass(tmp_path, index_passes, shuffle):
    """Held rows: not again."""
    batches = loader(written(tmp_path / "set", write_webdataset), shuffle=shuffle, workers=2)
    assert index_passes.take() == TARS
    list(batches)
    batches.close()
    assert sorted(index_passes.take()) == ([] if shuffle == "rows" else TARS)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_take_neighboring_units_and_every_unit_once(ranks):
    units = list(range(5))
    parts = [_units_of_rank(units, rank, ranks) for rank in range(ranks)]
    assert [unit for mine in parts for unit in mine] == units
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_thread_that_reads_ends_with_its_consumer(tmp_path):
    source = written(tmp_path / "set", write_parquet)
    batches = pixel_batches(UnitPixels(source, source.units(10), to_pixels, 3, 10_000), 1, False)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "siglit-prefetch"]
