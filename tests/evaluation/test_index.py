"""Exact indices return what the full score matrix gives; reported metrics of approximate ones are correct."""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from siglit.evaluation import index
from siglit.evaluation.index import build, compare, is_index_of, load_or_build, nearest_images, save_index
from tests.evaluation.reference import random_set


def test_a_saved_index_returns_what_the_full_matrix_gives(tmp_path):
    zimg, ztxt, _ = random_set(80, 20, 12)
    save_index(zimg, tmp_path / "images.index")
    scores, rows = nearest_images(tmp_path / "images.index", ztxt, 6)
    matrix = ztxt @ zimg.T
    assert np.array_equal(rows, np.argsort(-matrix, axis=1)[:, :6])
    assert scores == pytest.approx(-np.sort(-matrix, axis=1)[:, :6], abs=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["images.index"]


def test_more_answers_than_images_are_cut_to_the_images(tmp_path):
    zimg, ztxt, _ = random_set(4, 2, 12)
    save_index(zimg, tmp_path / "images.index")
    scores, rows = nearest_images(tmp_path / "images.index", ztxt, 10)
    assert scores.shape == rows.shape == (2, 4)
    assert sorted(rows[0]) == [0, 1, 2, 3]


def test_a_failed_save_leaves_the_old_index(tmp_path, monkeypatch):
    """A write that fails halfway does not touch the existing file."""
    path = tmp_path / "images.index"
    zimg, ztxt, _ = random_set(10, 3, 4)
    save_index(zimg, path)
    before = path.read_bytes()

    def full_disk(_, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(faiss, "write_index", full_disk)
    with pytest.raises(RuntimeError, match="no space"):
        save_index(-zimg, path)
    assert path.read_bytes() == before
    assert nearest_images(path, ztxt, 1)[1].shape == (3, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the process's mappings")
@pytest.mark.skipif(not hasattr(faiss, "IO_FLAG_MMAP_IFC"), reason="faiss before 1.11 reads flat indices whole")
def test_a_saved_index_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "images.index"
    save_index(random_set(1000, 1, 64)[0], path)
    opened = index._read(path)
    assert opened.ntotal == 1000
    assert str(path) in Path("/proc/self/maps").read_text()
    del opened
    assert str(path) not in Path("/proc/self/maps").read_text()


def approximate(factory, arrays, folder, ks=(1, 5, 10)):
    zimg, ztxt, image_of_text = arrays
    return compare(build(zimg, factory, folder / "some.index"), zimg, ztxt, image_of_text, ks)


def test_an_exact_index_has_no_gap(tmp_path):
    arrays = random_set(120, 300, 16)
    actual = approximate("Flat", arrays, tmp_path)
    assert set(actual.gap.values()) == {0.0}
    assert actual.neighbours == 1.0
    assert actual.nprobe is None
    assert actual.sweep == []
    zimg, ztxt, image_of_text = arrays
    order = np.argsort(-(ztxt @ zimg.T), axis=1)
    for k in (1, 5, 10):
        recall = np.mean([image in row[:k] for image, row in zip(image_of_text, order, strict=True)])
        assert actual.exact[f"text_to_image/R@{k}"] == pytest.approx(recall)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "PCA8,IVF4,Flat"])
def test_an_inverted_file_is_swept_over_its_lists(tmp_path, factory):
    """The default searches one list of four; also where a transform comes before the inverted file."""
    actual = approximate(factory, random_set(200, 400, 16), tmp_path)
    assert all(0 <= gap < 1 for gap in actual.gap.values())
    assert actual.gap["text_to_image/R@10"] > 0
    assert actual.neighbours < 1
    assert actual.nprobe == 1
    assert [probe.nprobe for probe in actual.sweep] == [1, 4]
    assert actual.sweep[0].recall == actual.metrics["text_to_image/R@1"]
    if factory == "IVF4,Flat":
        assert actual.sweep[-1].recall == actual.exact["text_to_image/R@1"]


def test_the_sweep_agrees_with_the_metrics(tmp_path):
    """With codes of four bits, many images have the same score."""
    zimg, ztxt, image_of_text = random_set(300, 600, 16)
    actual = approximate("IVF2,PQ2x2", (zimg, ztxt, image_of_text), tmp_path)
    assert actual.nprobe == actual.sweep[0].nprobe == 1
    assert actual.sweep[0].recall == actual.metrics["text_to_image/R@1"]


def test_lists_are_swept_up_to_64(tmp_path):
    actual = approximate("IVF100,Flat", random_set(200, 50, 8), tmp_path)
    assert [probe.nprobe for probe in actual.sweep] == [1, 4, 16, 64]
    actual = approximate("IVF10,Flat", random_set(200, 50, 8), tmp_path)
    assert [probe.nprobe for probe in actual.sweep] == [1, 4, 10]


def test_the_saved_file_gives_the_reported_metrics(tmp_path):
    """Recall and shared neighbours, computed query by query from the answers of the saved file."""
    zimg, ztxt, image_of_text = arrays = random_set(300, 500, 16)
    actual = approximate("IVF8,PQ4x4", arrays, tmp_path)
    rows = nearest_images(tmp_path / "some.index", ztxt, 10)[1]
    for k in (1, 5, 10):
        recall = np.mean([image in row[:k] for image, row in zip(image_of_text, rows, strict=True)])
        assert actual.metrics[f"text_to_image/R@{k}"] == pytest.approx(recall)
    exact = np.argsort(-(ztxt @ zimg.T), axis=1)[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
    assert actual.neighbours == pytest.approx(shared)
    assert 0 < shared < 1
    assert actual.bytes_per_vector == (tmp_path / "some.index").stat().st_size / 300
    assert actual.ms_per_query == pytest.approx(1e3 * actual.query_seconds / 500)
    assert actual.build_seconds > 0


def test_a_saved_index_is_loaded_again(tmp_path, monkeypatch):
    """With the same metrics and build time; another factory, other images or a damaged file are built again."""
    zimg, ztxt, image_of_text = random_set(300, 50, 16)
    path = tmp_path / "some.faiss"
    first = load_or_build(zimg, "IVF8,PQ4x4", path)
    built = []
    monkeypatch.setattr(index, "build", lambda *of: built.append(of[1]) or build(*of))
    again = load_or_build(zimg, "IVF8,PQ4x4", path)
    assert not built
    assert again.seconds == first.seconds
    results = [compare(one, zimg, ztxt, image_of_text) for one in (first, again)]
    assert results[0].metrics == results[1].metrics
    load_or_build(zimg, "IVF8,PQ4x4fs", path)
    load_or_build(zimg[:200], "IVF8,PQ4x4fs", path)
    path.write_bytes(path.read_bytes()[:-40])
    load_or_build(zimg[:200], "IVF8,PQ4x4fs", path)
    path.with_suffix(".json").unlink()
    load_or_build(zimg[:200], "IVF8,PQ4x4fs", path)
    assert built == ["IVF8,PQ4x4fs"] * 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: bytes(5000),
        lambda whole: whole[:-1],
        lambda whole: whole[:2000] + bytes(64) + whole[2064:],
    ],
)
def test_a_damaged_index_is_built_again(tmp_path, damage):
    """Its metrics would be those of other vectors."""
    zimg, *_ = random_set(300, 50, 16)
    path = tmp_path / "images.faiss"
    load_or_build(zimg, "IVF8,Flat", path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    load_or_build(zimg, "IVF8,Flat", path)
    assert path.read_bytes() == whole


def test_a_damaged_exact_index_is_recognized(tmp_path):
    """So is one over other images."""
    zimg, *_ = random_set(30, 5, 16)
    path = tmp_path / "images.faiss"
    assert not is_index_of(path, zimg)
    save_index(zimg, path)
    assert is_index_of(path, zimg)
    assert not is_index_of(path, zimg[:20])
    assert not is_index_of(path, zimg[:, :4])
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for left in (flipped, whole[:-1], whole[:20], b"", b"garbage"):
        path.write_bytes(left)
        assert not is_index_of(path, zimg)


def test_fewer_images_than_neighbours(tmp_path):
    actual = approximate("Flat", random_set(6, 20, 8), tmp_path)
    assert actual.neighbours == actual.metrics["text_to_image/R@10"] == 1.0


def test_queries_are_searched_in_parts(tmp_path, monkeypatch):
    arrays = random_set(100, 90, 8)
    whole = approximate("IVF4,Flat", arrays, tmp_path)
    monkeypatch.setattr(index, "_QUERIES_AT_ONCE", 7)
    parts = approximate("IVF4,Flat", arrays, tmp_path)
    assert (parts.metrics, parts.exact, parts.neighbours) == (whole.metrics, whole.exact, whole.neighbours)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("bogus", "could not parse index string bogus"),
        ("IVF4,Flat", r"training points \(3\) should be at least as large as number of clusters \(4\)"),
        ("PQ5", "dimension of the vector"),
        ("IDMap,Flat", "add does not make sense"),
        ("IVF0,Flat", "0 is too small"),
        ("HNSW0", "0 is too small"),
        ("IVF2_HNSW1,Flat", "HNSW1 is too small"),
    ],
)
def test_an_index_that_cannot_be_built_raises_one_line(tmp_path, factory, message):
    zimg = random_set(3, 1, 16)[0]
    with pytest.raises(ValueError, match=message) as error:
        build(zimg, factory, tmp_path / "some.index")
    assert str(error.value).startswith(f"faiss cannot build '{factory}' over 3 images of width 16: ")
    assert "\n" not in str(error.value)
    assert "cpp" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_json_and_a_few_lines(tmp_path):
    actual = approximate("IVF4,Flat", random_set(100, 90, 8), tmp_path)
    value = json.loads(json.dumps(actual.to_json()))
    assert value["gap"]["text_to_image/R@5"] == pytest.approx(
        value["exact"]["text_to_image/R@5"] - value["text_to_image/R@5"]
    )
    assert {"factory", "neighbours", "bytes_per_vector", "build_seconds", "ms_per_query", "nprobe"} <= set(value)
    assert [set(probe) for probe in value["sweep"]] == [{"nprobe", "recall", "ms_per_query"}] * 2
    lines = str(actual).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("IVF4,Flat: text → image R@1 ")
    assert lines[3].startswith("  nprobe 4: R@1 ")


class OnGpu:
    """The part of a GPU index's interface that is used; counts the queries."""

    def __init__(self, on_cpu):
        self.on_cpu, self.searched = on_cpu, 0

    def train(self, rows):
        self.on_cpu.train(rows)

    def add(self, rows):
        self.on_cpu.add(rows)

    def search(self, rows, depth):
        self.searched += len(rows)
        return self.on_cpu.search(rows, depth)


def test_gpus_are_used_where_faiss_has_them(tmp_path, monkeypatch):
    """The CPU functions of faiss stand in for those of GPUs: this checks the calls, not the GPUs."""
    arrays = random_set(100, 90, 8)
    expected = approximate("IVF4,Flat", arrays, tmp_path)

    class Space:
        def set_index_parameter(self, opened, name, value):
            faiss.ParameterSpace().set_index_parameter(opened.on_cpu, name, value)

    on_gpu = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(
        faiss, "index_cpu_to_all_gpus", lambda on_cpu: on_gpu.append(OnGpu(on_cpu)) or on_gpu[-1], raising=False
    )
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda opened: opened.on_cpu, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", Space, raising=False)
    actual = approximate("IVF4,Flat", arrays, tmp_path)
    assert on_gpu[0].searched == 3 * 90 + 1  # and one query that checks that it can be searched
    assert actual.metrics == expected.metrics
    assert [p.recall for p in actual.sweep] == [p.recall for p in expected.sweep]


def test_an_index_that_gpus_do_not_have_stays_on_the_cpu(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("This index type is not implemented on GPU.")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuse, raising=False)
    assert approximate("HNSW8", random_set(50, 60, 8), tmp_path).metrics["text_to_image/R@10"] > 0
