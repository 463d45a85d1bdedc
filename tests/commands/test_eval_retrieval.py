"""eval-retrieval: metrics are those of the trained rows, the index is built once, bad settings are refused early."""

import json
import shutil

import numpy as np
import pytest
import torch

import siglit
from siglit.commands import eval_retrieval
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.runs.trained import TrainedRun, open_trained
from tests.conftest import on, parse
from tests.evaluation.reference import full_ranking

KS = (1, 5, 10)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, prepared):
    return shutil.copytree(prepared, tmp_path_factory.mktemp("retrieval") / "copy")


@pytest.fixture
def run_of(trained_folder, monkeypatch):
    """`eval-retrieval` with more words, in the folder of a trained run; gives the result and the JSON."""
    monkeypatch.chdir(trained_folder)

    def run(*words):
        result = siglit.eval_retrieval(parse("eval-retrieval", *words))
        return result, json.loads((trained_folder / "runs/small/retrieval.json").read_text())

    return run


def trained_arrays(experiment):
    trained = open_trained(experiment)
    ids = token_ids(trained.cache, trained.tokenizer)
    ztxt = trained.encode_ids(ids, quiet=True)
    return trained, (trained.zimg, ztxt, np.asarray(trained.cache.caption_rows))


def test_all_options_together(run_of, device):
    """Metrics, folds and the approximate index, from the checkpoint and the cache that are named."""
    result, written = run_of("--eval.folds", "3", "--eval.index", "IVF2,Flat", *on(device))
    trained, (zimg, ztxt, image_of_text) = trained_arrays(parse("eval-retrieval"))
    expected = full_ranking(zimg, ztxt, image_of_text, KS)
    assert {name: written[name] for name in expected} == pytest.approx(expected)
    assert (written["images"], written["captions"]) == (12, 24)
    parts = [full_ranking(zimg[n : n + 4], ztxt[2 * n : 2 * n + 8], image_of_text[:8], KS) for n in (0, 4, 8)]
    assert written["folds"].pop("count") == 3
    assert written["folds"] == pytest.approx({name: np.mean([part[name] for part in parts]) for name in expected})
    assert written["provenance"] == trained.origin()
    assert [probe["nprobe"] for probe in written["index"]["sweep"]] == [1, 2]
    kept = trained.ensure_exact_index().with_name(f"{trained.ensure_exact_index().stem}-IVF2-Flat.faiss")
    assert written["index"]["file"] == str(kept)
    assert written["index"]["bytes_per_vector"] == kept.stat().st_size / 12
    table = str(result).splitlines()
    assert table[0].startswith("12 images, 24 captions")
    assert table[2].split() == ["R@1", "R@5", "R@10", "median", "mAP@10"] * 2
    cells = dict(zip(expected, table[3].split()[1:], strict=True))
    assert float(cells["text_to_image/R@5"]) == pytest.approx(100 * expected["text_to_image/R@5"], abs=0.051)
    assert float(cells["text_to_image/median_rank"]) == pytest.approx(expected["text_to_image/median_rank"], abs=0.051)
    assert table[4].startswith("mean of 3 folds ")
    assert table[-1].startswith("  nprobe 2: ")
    assert len({len(line) for line in table[1:5]}) == 1
    assert max(map(len, table[:5])) <= 100


def test_what_is_not_requested_is_left_out(run_of):
    _, written = run_of()
    assert not {"folds", "index", "by_language", "label_accuracy"} & set(written)


def test_the_index_is_written_once(run_of, trained_folder):
    """Opening a run writes none; a second evaluation and a search take the one that is there."""
    for file in (trained_folder / "runs/small").glob("*.faiss"):
        file.unlink()
    open_trained(parse("eval-retrieval"))
    assert not list((trained_folder / "runs/small").glob("*.faiss"))
    run_of()
    (index,) = (trained_folder / "runs/small").glob("*.faiss")
    before = index.stat()
    run_of()
    siglit.search(parse("eval-retrieval"), "a red square")
    assert list((trained_folder / "runs/small").glob("*.faiss")) == [index]
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    whole = index.read_bytes()
    index.write_bytes(whole[:-100])
    siglit.search(parse("eval-retrieval"), "a red square")
    assert index.read_bytes() == whole  # a damaged one is written again


def test_another_cache_or_head_has_another_index(run_of, trained_folder):
    """An index of other rows would find wrong images without a word."""
    files = {
        open_trained(parse("eval-retrieval")).ensure_exact_index(),
        open_trained(parse("eval-retrieval", "--eval.split", "train")).ensure_exact_index(),
    }
    words = ["--image_tower.head", "24", "--output_dir", "runs/head"]
    for more in ([], ["--train.resume", "true", "--train.steps", "9", "--train.resume_changed", "true"]):
        siglit.train(parse("train", *words, *more))
        trained = open_trained(parse("eval-retrieval", *words))
        assert trained.ensure_exact_index().exists()
        files.add(trained.ensure_exact_index())
    assert len(files) == 4
    assert len(list((trained_folder / "runs/head").glob("*.faiss"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval.folds", "5"], r"eval\.folds is 5, but 5 does not divide the 12 images of "),
        (["--eval.index", "bogus"], r"eval\.index: .*could not parse index string bogus.*; choose"),
        (["--eval.index", "IVF64,Flat"], r"eval\.index: .*12 images.*should be at least as large as number of clus"),
    ],
)
def test_bad_settings_are_refused_before_the_captions_are_encoded(run_of, monkeypatch, words, message):
    monkeypatch.setattr(TrainedRun, "encode_ids", None)
    with pytest.raises(UserError, match=message) as error:
        run_of(*words)
    assert "\n" not in str(error.value)


def test_a_fold_without_captions_is_refused():
    zimg = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match=r"eval\.folds is 2, but images 2 to 3 have no text"):
        eval_retrieval._folds(2, (zimg, zimg[:2], np.arange(2)), torch.device("cpu"))
