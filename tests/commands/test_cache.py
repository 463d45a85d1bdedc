"""`siglit cache …`: what is printed, deleted and handed on is what is in the cache."""

import csv
import io

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import siglit
from siglit.cache import CacheError, EmbeddingCache
from siglit.cli import main
from siglit.commands import cache_exchange
from siglit.errors import UserError
from tests.cache.test_merging import content, make
from tests.conftest import parse


def run(capsys, *words):
    """Exit code and the lines of standard output and error."""
    with pytest.raises(SystemExit) as stop:
        main(["cache", *map(str, words)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out.splitlines(), captured.err.splitlines()


def damage(cache, shard):
    path = cache.shard_paths[shard]
    data = bytearray(path.read_bytes())
    data[cache.located_shards()[shard].datasets["embedding"][0] + 1] ^= 64
    path.write_bytes(data)


def test_info_describes_the_cache(tmp_path, capsys):
    make(tmp_path / "a", 0, 10)
    code, out, _ = run(capsys, "info", tmp_path / "a")
    assert code == 0
    assert "rows         10 × 3 float16" in out
    assert any("in 3 shards" in line for line in out)
    assert any('"tower": "a"' in line for line in out)


def test_info_of_nothing_is_one_line(tmp_path, capsys):
    code, out, err = run(capsys, "info", tmp_path / "none")
    assert (code, out, len(err)) == (2, [], 1)
    code, out, err = run(capsys, "merge", tmp_path / "out")
    assert (code, out, len(err)) == (2, [], 1)
    assert "parts" in err[0]


def test_verify_lists_one_problem_per_line(tmp_path, capsys):
    cache = make(tmp_path / "a", 0, 10)
    assert run(capsys, "verify", tmp_path / "a")[:2] == (0, [f"{tmp_path / 'a'} is sound"])
    damage(cache, 0)
    cache.shard_paths[2].unlink()
    code, out, _ = run(capsys, "verify", tmp_path / "a")
    assert code == 2
    assert ["shard-000000" in out[0], "shard-000002" in out[1], len(out)] == [True, True, 2]
    assert cache.shard_paths[0].exists()


def test_repair_deletes_shards_that_precompute_rebuilds(cached, capsys):
    folder = "cache/small/train"
    cache = EmbeddingCache(folder)
    before = {path.name: path.read_bytes() for path in cache.path.iterdir()}
    damage(cache, 1)
    damage(cache, 3)
    code, out, _ = run(capsys, "verify", folder, "--repair")
    assert code == 2
    assert "shard-000001.h5, shard-000003.h5, index.json" in out[-1]
    assert {path.name for path in cache.path.iterdir()} == {
        n for n in before if n[6:12] not in ("000001", "000003")
    } - {"index.json"}
    assert siglit.precompute(cached).splits["train"].encoded_now == 16
    assert {path.name: path.read_bytes() for path in cache.path.iterdir()} == before
    assert run(capsys, "verify", folder, "--repair")[0] == 0


def test_repair_of_a_damaged_index_keeps_the_shards(tmp_path, capsys):
    make(tmp_path / "a", 0, 10)
    (tmp_path / "a" / "index.json").write_text("{")
    code, out, _ = run(capsys, "verify", tmp_path / "a", "--repair")
    assert code == 2
    assert "deleted index.json" in out[-1]
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_repair_deletes_no_shard_for_a_key_that_the_source_repeats(tmp_path, capsys):
    make(tmp_path / "a", 0, 4, source="x")
    make(tmp_path / "b", 3, 4, source="x")
    (tmp_path / "b" / "shard-000000.h5").rename(tmp_path / "a" / "shard-000001.h5")
    with h5py.File(tmp_path / "a" / "shard-000001.h5", "a") as file:
        file.attrs["number"] = 1
    (tmp_path / "a" / "index.json").unlink()
    code, out, _ = run(capsys, "verify", tmp_path / "a", "--repair")
    assert code == 2
    assert any("key 'k3'" in line for line in out)
    assert len(list((tmp_path / "a").glob("shard*"))) == 2


def test_skipped_is_csv(experiment, project, capsys):
    (project / "images/0003.png").write_bytes(b"")
    siglit.precompute(parse("precompute", "--data.max_skipped", "0.2"))
    code, out, _ = run(capsys, "skipped", "cache/small/train")
    rows = list(csv.reader(io.StringIO("\n".join(out))))
    assert code == 0
    assert rows == [["key", "reason"], *map(list, EmbeddingCache("cache/small/train").skipped)]
    assert rows[1][0] == "images/0003.png"


def test_merge_by_the_command(tmp_path, capsys):
    make(tmp_path / "a", 0, 4)
    make(tmp_path / "b", 4, 4)
    assert run(capsys, "merge", tmp_path / "out", tmp_path / "a", tmp_path / "b")[0] == 0
    assert list(EmbeddingCache(tmp_path / "out").keys) == [f"k{n}" for n in range(8)]


def test_export_is_clip_retrievals_layout(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_exchange, "_BLOCK", 3)
    monkeypatch.setattr(cache_exchange, "_ROWS_PER_PART", 7)
    cache = make(tmp_path / "a", 0, 10)
    assert run(capsys, "export", tmp_path / "a", tmp_path / "out")[0] == 0
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    files.remove("mean.npy")
    mean = np.load(tmp_path / "out" / "mean.npy")
    np.testing.assert_allclose(mean, cache.gather(np.arange(10)).astype(np.float64).mean(0), rtol=1e-6)
    assert files == [
        "img_emb/img_emb_0000.npy",
        "img_emb/img_emb_0001.npy",
        "metadata/metadata_0000.parquet",
        "metadata/metadata_0001.parquet",
    ]
    rows = np.concatenate([np.load(tmp_path / "out" / name) for name in files[:2]])
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, cache.gather(np.arange(10)))
    table = pa.concat_tables([pq.read_table(tmp_path / "out" / name) for name in files[2:]]).to_pydict()
    assert table["key"] == list(cache.keys)
    assert table["captions"] == [cache.captions(row) for row in range(10)]
    assert table["caption"][:3] == [None, "c1", "c2"]
    assert table["label"] == [None if n % 2 else n for n in range(10)]
    code, _, err = run(capsys, "export", tmp_path / "a", tmp_path / "out")
    assert (code, len(err)) == (2, 1)


def test_export_and_import_give_the_cache_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_exchange, "_BLOCK", 3)
    monkeypatch.setattr(cache_exchange, "_ROWS_PER_PART", 7)
    cache = make(tmp_path / "a", 0, 10)
    run(capsys, "export", tmp_path / "a", tmp_path / "out")
    folders = ["--embeddings", tmp_path / "out/img_emb", "--metadata", tmp_path / "out/metadata"]
    assert run(capsys, "import", tmp_path / "b", *folders, "--model", "clip")[0] == 0
    back = EmbeddingCache(tmp_path / "b")
    assert content(back) == content(cache)
    assert back.fingerprint["image_tower"] == {"model": "clip", "imported": True}


def test_import_of_one_pair_with_other_names(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.eye(3, dtype=np.float32))
    pq.write_table(pa.table({"url": ["u", "v", "w"], "TEXT": ["a", None, "c"]}), tmp_path / "x.parquet")
    words = ["--embeddings", tmp_path / "x.npy", "--metadata", tmp_path / "x.parquet", "--model", "clip"]
    code, _, err = run(capsys, "import", tmp_path / "out", *words)
    assert (code, len(err)) == (2, 1)
    assert "url, TEXT" in err[0]
    assert run(capsys, "import", tmp_path / "out", *words, "--key", "url", "--caption", "TEXT")[0] == 0
    cache = EmbeddingCache(tmp_path / "out")
    assert [cache.captions(row) for row in range(3)] == [["a"], [], ["c"]]
    assert list(cache.keys) == ["u", "v", "w"]


def test_import_of_plain_hdf5(tmp_path, capsys):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["embedding"] = np.eye(4, dtype=np.float32)
        file["key"] = ["a", "b", "ü", "d"]
        file["label"] = [0, -1, 2, 3]
    assert run(capsys, "import", tmp_path / "out", "--embeddings", tmp_path / "x.h5", "--model", "dinov2")[0] == 0
    cache = EmbeddingCache(tmp_path / "out")
    assert (list(cache.keys), cache.labels.tolist()) == (["a", "b", "ü", "d"], [0, -1, 2, 3])
    np.testing.assert_array_equal(cache.gather(np.arange(4)), np.eye(4))


def test_nothing_is_unpickled_and_rows_must_match(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}, 2], dtype=object), allow_pickle=True)
    pq.write_table(pa.table({"key": ["u", "v", "w"]}), tmp_path / "x.parquet")
    words = ["--embeddings", tmp_path / "x.npy", "--metadata", tmp_path / "x.parquet", "--model", "m"]
    code, _, err = run(capsys, "import", tmp_path / "out", *words)
    assert (code, len(err)) == (2, 1)
    assert "unpickled" in err[0]
    np.save(tmp_path / "x.npy", np.eye(2))
    code, _, err = run(capsys, "import", tmp_path / "out", *words)
    assert (code, len(err)) == (2, 1)
    assert "(2, 2)" in err[0]
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_to_import_is_named(tmp_path, capsys):
    words = ["--embeddings", tmp_path / "x.npy", "--metadata", tmp_path / "x.parquet", "--model", "m"]
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    pq.write_table(pa.table({"key": ["u", "v", "w"]}), tmp_path / "x.parquet")
    for name, text in (("x.npy", "is not a plain .npy file"), ("x.parquet", "is not a readable parquet file")):
        whole = (tmp_path / name).read_bytes()
        for damaged in (b"", whole[:90], whole[:-200] + bytes(192) + whole[-8:]):
            if name == "x.npy" and len(damaged) > 90:  # an array without values is not damaged
                continue
            (tmp_path / name).write_bytes(damaged)
            code, _, err = run(capsys, "import", tmp_path / "out", *words)
            assert (code, len(err)) == (2, 1)
            assert f"{tmp_path / name} {text}" in err[0]
        (tmp_path / name).write_bytes(whole)


def test_an_imported_cache_is_known_by_its_model_alone(experiment, tmp_path, capsys):
    from siglit.errors import UserError
    from siglit.runs.caches import open_cache

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["embedding"], file["key"] = np.eye(2, dtype=np.float32), ["a", "b"]
    run(capsys, "import", "cache/small/val", "--embeddings", tmp_path / "x.h5", "--model", "vit_tiny_patch16_224")
    run(capsys, "import", "cache/small/train", "--embeddings", tmp_path / "x.h5", "--model", "other")
    assert len(open_cache(experiment, "val")) == 2
    with pytest.raises(UserError, match=r"image_tower\.model is 'other'"):
        open_cache(experiment, "train")


def test_info_verify_and_skipped_take_the_folder_of_both_splits(experiment, project, capsys):
    (project / "images/0003.png").write_bytes(b"")
    (project / "images/0042.png").unlink()
    siglit.precompute(parse("precompute", "--data.max_skipped", "0.2"))
    (project / "cache/small/notes").mkdir()
    code, out, _ = run(capsys, "info", "cache/small")
    assert (code, [line for line in out if line.startswith(("cache/", "rows"))]) == (
        0,
        ["cache/small/train", "rows         39 × 48 float16", "cache/small/val", "rows         11 × 48 float16"],
    )
    assert run(capsys, "verify", "cache/small")[:2] == (
        0,
        ["cache/small/train is sound", "cache/small/val is sound"],
    )
    code, out, _ = run(capsys, "skipped", "cache/small")
    assert (code, out) == (
        0,
        [
            "cache,key,reason",
            "cache/small/train,images/0003.png,zero bytes",
            "cache/small/val,images/0042.png,cannot be read: No such file or directory",
        ],
    )
    damage(EmbeddingCache("cache/small/val"), 0)
    code, out, _ = run(capsys, "verify", "cache/small", "--repair")
    assert (code, out[0]) == (2, "cache/small/train is sound")
    assert "deleted shard-000000.h5, index.json" in out[-1]
    assert (project / "cache/small/train/index.json").exists()


def test_a_cache_that_is_not_complete_says_so_and_lists_its_skipped_images(experiment, project, capsys):
    for number in (3, 4, 20):
        (project / f"images/{number:04d}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"`siglit cache skipped cache/small/train` lists the images"):
        siglit.precompute(parse("precompute", "--cache.splits", "[train]"))
    code, out, _ = run(capsys, "skipped", "cache/small/train")
    assert (code, out) == (
        0,
        ["key,reason", *(f"images/{number:04d}.png,zero bytes" for number in (3, 4, 20))],
    )
    (project / "cache/small/train/shard-000000.h5").unlink()
    code, out, _ = run(capsys, "info", "cache/small")
    assert code == 0
    assert out[1] == "not complete: 4 shards committed; run `siglit precompute` to complete it"
    assert "rows         31 × 48 float16" in out
    assert "  1 zero bytes" in out
    assert any('"pooling": "tower"' in line for line in out)
    code, out, _ = run(capsys, "verify", "cache/small")
    assert (code, len(out)) == (2, 1)
    assert "not complete: it has 4 shards" in out[0]


def test_info_shows_the_versions_that_wrote_the_cache(experiment, capsys):
    import PIL
    import timm
    import torch

    siglit.precompute(parse("precompute", "--cache.splits", "[train]"))
    line = next(line for line in run(capsys, "info", "cache/small/train")[1] if line.startswith("created by"))
    assert f"Pillow {PIL.__version__}, timm {timm.__version__}, torch {torch.__version__}" in line


@pytest.mark.parametrize("command", ["info", "verify", "skipped"])
def test_no_cache_at_a_relative_path_names_the_working_directory(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, command, "cache/my/train")
    assert (code, out, len(err)) == (2, [], 1)
    assert f"there is no cache at cache/my/train (the working directory is {tmp_path}); create it" in err[0]
    with pytest.raises(CacheError, match=f"the working directory is {tmp_path}"):
        EmbeddingCache("cache/my/train")
    (tmp_path / "empty/train").mkdir(parents=True)
    code, out, err = run(capsys, command, tmp_path / "empty")
    assert (code, out, len(err)) == (2, [], 1)
    assert "holds no cache" in err[0]
