"""Precompute: every row is its image's, whatever is killed, skipped or shared out."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import siglit
from siglit.cache import CacheError, EmbeddingCache
from siglit.commands import precompute
from siglit.embedding import _Encoder
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from tests.conftest import ROOT, TOWER, on, parse, run_siglit


def rows_by_key(folder):
    """{key: (embedding, captions)} of a cache."""
    cache = EmbeddingCache(folder)
    rows = cache.gather(np.arange(len(cache)))
    return {key: (rows[i].tobytes(), tuple(cache.captions(i))) for i, key in enumerate(cache.keys)}


# The rows are stored in float16, 2^-11 of a value of up to 3. Each product of the tower rounds its inputs to 2^-12 in
# float16 and to 2^-9 in bfloat16, and there are some ten one after the other.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("fp16", 1e-2), ("bf16", 6e-2)])
def test_rows_are_the_towers_own_output_for_each_key(
    experiment, tower_weights, precision, tolerance, device, monkeypatch
):
    """An independent forward pass with timm and PIL alone gives the same rows."""
    tf32, real = set(), ImageTower.forward

    def forward(tower, pixels):
        if len(pixels) > 1:  # not the one that tells the width
            tf32.add(torch.backends.cudnn.allow_tf32)
        return real(tower, pixels)

    monkeypatch.setattr(ImageTower, "forward", forward)
    result = siglit.precompute(parse("precompute", *on(device), "--image_tower.precision", precision))
    cache = EmbeddingCache("cache/small/train")
    model = timm.create_model(TOWER["model"], num_classes=0, **TOWER["model_args"]).eval()
    state = load_file(tower_weights)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    pixels = [
        np.asarray(Image.open(key).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) for key in cache.keys
    ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        expected = model(x).numpy()
    np.testing.assert_allclose(cache.gather(np.arange(40)), expected, atol=tolerance, rtol=2e-3)
    assert cache.fingerprint["image_tower"]["precision"] == precision
    assert tf32 == {False}, "fp32 is not TF32"
    assert cache.captions(7) == ["a grey square", "picture 7 is grey"]
    assert result.splits["train"].rows == 40
    assert EmbeddingCache("cache/small/train").verify() == []


def test_summary_has_the_rate_beside_the_towers_own(experiment):
    siglit.precompute(experiment)
    summary = json.loads((experiment.folder / "summary.json").read_text())
    train = summary["precompute"]["train"]
    assert train["images_per_second"] > 0
    assert train["tower_images_per_second"] > 0


def test_a_rank_that_had_nothing_to_do_has_a_result_too():
    """It knows the rate of all, but not of a tower that it never ran; its failure used to end a run of 4 ranks."""
    split = precompute.SplitResult("p", 8, 0, {}, 8, 1.0, images_per_second=8.0)
    assert str(precompute.PrecomputeResult({"val": split})) == "val: 8 rows in p, 8 encoded now, 8 images/s"


def test_a_second_run_encodes_nothing(cached):
    before = {p: p.stat().st_mtime_ns for p in EmbeddingCache("cache/small/train").path.iterdir()}
    assert siglit.precompute(cached).splits["train"].encoded_now == 0
    assert {p: p.stat().st_mtime_ns for p in EmbeddingCache("cache/small/train").path.iterdir()} == before


@pytest.mark.slow
def test_killed_and_restarted_equals_undisturbed(project):
    """SIGKILL at random moments, then a restart: the same rows by key, byte for byte."""
    run_siglit("precompute", "-c", "experiment.yaml", "--cache.path", "whole", cwd=project, check=0)
    chance = random.Random(0)
    command = [sys.executable, "-m", "siglit", "precompute", "-c", "experiment.yaml", "--cache.path", "killed"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        seen = time.monotonic()
        while process.poll() is None and time.monotonic() - seen < 60:
            if any((project / "killed").glob("*/shard-*.h5")):
                time.sleep(chance.uniform(0, 0.05))
                break
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (project / "killed" / "train").mkdir(parents=True, exist_ok=True)
    (project / "killed" / "train" / "shard-000001.h5.tmp.99-abc").write_bytes(b"half a shard")
    run_siglit("precompute", "-c", "experiment.yaml", "--cache.path", "killed", cwd=project, check=0)
    for split in ("train", "val"):
        assert rows_by_key(project / "killed" / split) == rows_by_key(project / "whole" / split)
    assert not list((project / "killed").rglob("*.tmp*"))


def test_two_devices_give_the_same_cache(project):
    run_siglit("precompute", "-c", "experiment.yaml", "--cache.path", "one", cwd=project, check=0)
    run_siglit(
        "precompute", "-c", "experiment.yaml", "--cache.path", "two", "--cache.devices", "2", cwd=project, check=0
    )
    assert rows_by_key(project / "two" / "train") == rows_by_key(project / "one" / "train")
    assert (project / "two/train/index.json").read_bytes() == (project / "one/train/index.json").read_bytes()


def test_bad_images_are_skipped_listed_and_shift_no_other(experiment, project):
    siglit.precompute(experiment)
    good = rows_by_key("cache/small/train")
    (project / "images/0003.png").write_bytes(b"")
    (project / "images/0010.png").write_bytes(b"no image at all")
    (project / "images/0011.png").unlink()
    whole = (project / "images/0012.png").read_bytes()
    (project / "images/0012.png").write_bytes(whole[: len(whole) // 2])
    result = siglit.precompute(parse("precompute", "--cache.path", "bad", "--data.max_skipped", "0.2"))
    bad = {f"images/{n:04d}.png" for n in (3, 10, 11, 12)}
    assert rows_by_key("bad/train") == {k: v for k, v in good.items() if k not in bad}
    assert {key for key, _ in EmbeddingCache("bad/train").skipped} == bad
    assert result.splits["train"].skipped == 4
    with pytest.raises(UserError, match=r"4 of 40 images \(10.0%\).*data.max_skipped"):
        siglit.precompute(parse("precompute", "--cache.path", "bad2"))


def test_retry_rebuilds_only_the_shards_with_skipped_images(experiment, project):
    siglit.precompute(parse("precompute", "--cache.path", "whole"))
    mended = {n: (project / f"images/{n:04d}.png").read_bytes() for n in (3, 4, 20)}
    for number in mended:
        (project / f"images/{number:04d}.png").write_bytes(b"")
    words = ["--cache.path", "bad", "--data.max_skipped", "0.2"]
    siglit.precompute(parse("precompute", *words))
    for number in (3, 4):
        (project / f"images/{number:04d}.png").write_bytes(mended[number])
    before = {p.name: p.stat().st_mtime_ns for p in (project / "bad/train").iterdir()}
    assert siglit.precompute(parse("precompute", *words)).splits["train"].encoded_now == 0
    result = siglit.precompute(parse("precompute", *words, "--cache.retry_skipped", "true")).splits["train"]
    assert (result.encoded_now, result.skipped) == (8 + 7, 1)
    after = {p.name: p.stat().st_mtime_ns for p in (project / "bad/train").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {
        "index.json",
        "shard-000000.h5",
        "shard-000002.h5",
    }
    good = rows_by_key("whole/train")
    assert rows_by_key("bad/train") == {k: v for k, v in good.items() if k != "images/0020.png"}


def test_retry_deletes_nothing_of_other_settings(experiment, project):
    (project / "images/0003.png").write_bytes(b"")
    siglit.precompute(parse("precompute", "--data.max_skipped", "0.2"))
    before = rows_by_key("cache/small/train")
    with pytest.raises(ValueError, match=r"image_tower.pooling"):
        siglit.precompute(parse("precompute", "--image_tower.pooling", "avg", "--cache.retry_skipped", "true"))
    assert rows_by_key("cache/small/train") == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
def test_rows_do_not_depend_on_workers_batches_or_processes(project, monkeypatch):
    """Equal by key to within float16 rounding: 1 or 4 workers, 1 or 2 processes, batches of 1 or 64."""
    monkeypatch.chdir(project)
    kinds = [("1", "1", "1"), ("4", "1", "64"), ("1", "2", "64"), ("4", "2", "1")]
    caches = []
    for number, (workers, devices, batch) in enumerate(kinds):
        words = ["--cache.path", str(number), "--cache.shard_size", "16", "--cache.batch_size", batch]
        words += ["--data.workers", workers, "--cache.devices", devices]
        if devices == "1":
            siglit.precompute(parse("precompute", *words))
        else:
            run_siglit("precompute", "-c", "experiment.yaml", *words, cwd=project, check=0)
        caches.append(rows_by_key(f"{number}/train"))
    for rows in caches[1:]:
        assert rows.keys() == caches[0].keys()
        for key, (row, captions) in rows.items():
            expected, expected_captions = caches[0][key]
            assert captions == expected_captions
            got, expected = np.frombuffer(row, np.float16), np.frombuffer(expected, np.float16)
            assert (np.abs(got - expected) <= np.spacing(np.maximum(np.abs(got), np.abs(expected)))).all()


def test_a_forward_pass_has_32_images_on_a_cpu_unless_set(experiment, project, monkeypatch):
    sizes = []
    forward = _Encoder._forward
    monkeypatch.setattr(_Encoder, "_forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    monkeypatch.setattr(_Encoder, "tower_rate", lambda self: None)
    words = ["--cache.splits", "[train]", "--cache.shard_size", "64", "--cache.batch_size", "null"]
    siglit.precompute(parse("precompute", *words))
    assert sizes == [32, 8]


def test_samples_without_a_caption_are_skipped(experiment, project):
    (project / "train.csv").write_text("filepath,title\nimages/0000.png,a red square\nimages/0001.png,  \n")
    result = siglit.precompute(parse("precompute", "--data.max_skipped", "1"))
    assert result.splits["train"].skipped_by_reason == {"no caption": 1}


def test_no_captions_at_all_fails(experiment, project):
    (project / "train.csv").write_text("filepath,title\nimages/0000.png,\nimages/0001.png,\n")
    with pytest.raises(UserError, match="no caption"):
        siglit.precompute(experiment)


def test_an_empty_fold_fails(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "val.csv").write_text("filepath,title\nimages/0000.png,a red square\n")
    with pytest.raises(UserError, match="empty"):
        siglit.precompute(parse("precompute", "--data.val.fold", "0/1000"))


def test_only_the_requested_splits_are_embedded(experiment, project):
    """The listing of the other one is not even looked for; later figures of one split leave those of the other."""
    (project / "train.csv").rename(project / "later.csv")
    result = siglit.precompute(parse("precompute", "--cache.splits", "[val]"))
    assert list(result.splits) == ["val"]
    assert not (project / "cache/small/train").exists()
    (project / "later.csv").rename(project / "train.csv")
    siglit.precompute(parse("precompute", "--cache.splits", "[train]"))
    figures = json.loads((project / "runs/small/summary.json").read_text())["precompute"]
    assert {split: saved["rows"] for split, saved in figures.items()} == {"val": 12, "train": 40}
    with pytest.raises(UserError, match=r"cache.splits is \[val\], but data.val is not set"):
        siglit.precompute(parse("precompute", "--cache.splits", "[val]", "--data.val", "null"))


def test_a_cache_of_another_tower_is_never_mixed(cached):
    before = rows_by_key("cache/small/train")
    with pytest.raises(ValueError, match=r"image_tower.pooling is 'tower', expected 'avg'"):
        siglit.precompute(parse("precompute", "--image_tower.pooling", "avg"))
    assert rows_by_key("cache/small/train") == before


def test_a_draft_reads_large_jpegs_at_a_reduced_scale(project, monkeypatch):
    monkeypatch.chdir(project)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 260)).save("large.jpg")
    (project / "train.csv").write_text("filepath,title\nlarge.jpg,noise\n")
    siglit.precompute(parse("precompute", "--cache.path", "full"))
    siglit.precompute(parse("precompute", "--cache.path", "draft", "--image_tower.jpeg_draft", "true"))
    full, draft = (
        EmbeddingCache(f"{name}/train").gather(np.arange(1)).astype(np.float32) for name in ("full", "draft")
    )
    assert 0 < np.linalg.norm(full - draft) / np.linalg.norm(full) < 0.2
    with pytest.raises(ValueError, match=r"jpeg_draft is False, expected True"):
        siglit.precompute(parse("precompute", "--cache.path", "full", "--image_tower.jpeg_draft", "true"))


def test_a_changed_listing_is_noticed(cached, project):
    with (project / "train.csv").open("a") as file:
        file.write("images/0040.png,one more\n")
    with pytest.raises(ValueError, match="source"):
        siglit.precompute(cached)


@pytest.mark.parametrize("problem", ["full", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_line(project, problem):
    """Full disk (a file-size limit stands in for it) and a folder that cannot be made."""
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    (project / "in-the-way").write_text("a file")
    # No workers: the limit would hit the shared memory that they hand their pixels over in.
    words = ["--cache.path", "in-the-way/cache"] if problem == "read-only" else ["--data.workers", "0"]
    options = {"preexec_fn": limit} if problem == "full" else {}
    done = run_siglit("precompute", "-c", "experiment.yaml", *words, cwd=project, check=2, **options)
    assert len([line for line in done.stderr.splitlines() if line.startswith("siglit:")]) == 1
    assert "Traceback" not in done.stderr
    assert not list(project.rglob("*.tmp*"))


def test_a_tower_the_hub_cannot_give_names_the_local_way(project):
    done = run_siglit("precompute", "-c", "experiment.yaml", "--image_tower.weights", "null", cwd=project, check=2)
    assert "image_tower.weights" in done.stderr
    assert "local-dir:" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_row_that_float16_cannot_hold_is_a_skipped_image(experiment, project, monkeypatch):
    """Images whose outputs are too large or not finite are listed with the reason; all others keep row and captions."""
    words = ["--data.workers", "0", "--cache.splits", "[train]"]
    siglit.precompute(parse("precompute", "--cache.path", "good", *words))
    good = rows_by_key("good/train")
    (project / "images/0012.png").write_bytes(b"")
    forward, seen = _Encoder._forward, []

    def corrupted(encoder, pixels):
        rows = forward(encoder, pixels).clone()
        start = len(seen)
        seen.extend(range(len(rows)))
        for number, value in ((2, 7e4), (5, float("nan")), (11, float("-inf"))):
            if start <= number < start + len(rows):
                rows[number - start, 3] = value
        return rows

    monkeypatch.setattr(_Encoder, "_forward", corrupted)
    result = siglit.precompute(parse("precompute", *words, "--data.max_skipped", "0.1")).splits["train"]
    cache = EmbeddingCache("cache/small/train")
    bad = [f"images/{n:04d}.png" for n in (2, 5, 11, 12)]
    assert rows_by_key("cache/small/train") == {key: row for key, row in good.items() if key not in bad}
    assert sorted(key for key, _ in cache.skipped) == bad
    assert [reason for _, reason in sorted(cache.skipped)] == [
        "the tower's output is larger than 65504, which float16 cannot hold",
        *["the tower's output is not finite"] * 2,
        "zero bytes",
    ]
    assert (result.rows, result.encoded_now, result.skipped) == (36, 36, 4)
    assert cache.verify() == []
    with pytest.raises(UserError, match=r"4 of 40 images \(10.0%\).*data.max_skipped.*'images/0002.png': the tower's"):
        siglit.precompute(parse("precompute", *words, "--data.max_skipped", "0.05"))


def test_a_key_in_two_tars_ends_the_run_at_the_second(experiment, project):
    """Also where an earlier run committed the first; once the tar is fixed, the run completes."""

    def write_tar(number, *keys):
        with tarfile.open(project / f"{number}.tar", "w") as tar:
            for key in keys:
                (project / "text").write_text("a red square")
                tar.add(project / "images/0000.png", f"{key}.png")
                tar.add(project / "text", f"{key}.txt")

    for number, keys in enumerate(["ab", "c", "da"]):
        write_tar(number, *keys)
    words = ["--data.train.format", "webdataset", "--data.train.path", "[012].tar", "--cache.splits", "[train]"]
    experiment = parse("precompute", *words, "--data.workers", "0")
    for _ in range(2):
        with pytest.raises(CacheError, match=r"'a' is in row 0 of shard-000000\.h5 and in row 1 of shard-000002\.h5"):
            siglit.precompute(experiment)
        assert sorted(path.name for path in Path("cache/small/train").glob("*")) == [
            "shard-000000.h5",
            "shard-000001.h5",
        ]
    write_tar(2, *"de")
    assert siglit.precompute(experiment).splits["train"].encoded_now == 2
    assert list(EmbeddingCache("cache/small/train").keys) == list("abcde")


def test_where_all_images_are_missing_the_folder_is_named(experiment, project):
    words = ["--data.train.images", "nowhere", "--cache.splits", "[train]", "--data.workers", "0"]
    with pytest.raises(UserError) as refused:
        siglit.precompute(parse("precompute", *words))
    assert str(refused.value) == (
        f"there are no images in {project / 'nowhere'}: data.train lists 40 files, the first is 'images/0000.png', but "
        "none exists; check data.train.images, then run with --cache.retry_skipped true"
    )
    siglit.precompute(parse("precompute", *words[2:], "--cache.retry_skipped", "true"))
    assert len(EmbeddingCache("cache/small/train")) == 40
    # The reason is another one where some are there and broken.
    (project / "bad").mkdir()
    (project / "bad/images").mkdir()
    (project / "bad/images/0001.png").write_bytes(b"")
    words[1] = "bad"
    with pytest.raises(UserError, match=r"40 of 40 images.*data\.max_skipped"):
        siglit.precompute(parse("precompute", *words, "--cache.path", "bad"))
