"""eval-probe: the figure is the probe's on the caches alone; of a trained tower, on images that it embeds."""

import json

import numpy as np
import pytest
import torch

import siglit
from siglit.cache import EmbeddingCache
from siglit.evaluation.linear_probe import probe
from tests.conftest import on, parse


def test_the_probe_of_a_locked_tower_needs_its_caches_alone(classed, tmp_path, device):
    result = siglit.eval_probe(parse("eval-probe", "--output_dir", str(tmp_path / "new"), *on(device)))
    written = json.loads((tmp_path / "new/probe.json").read_text())
    train, val = EmbeddingCache("cache/small/train"), EmbeddingCache("cache/small/val")
    rows, test = train.gather(np.arange(40)), val.gather(np.arange(12))
    expected = probe(rows, train.labels, test, val.labels, 4, device=torch.device("cpu"))
    assert written["top1"] == expected.test.top[1]
    assert written["top1"] > 0.9, "pictures of one color each"
    if device == "cpu":  # elsewhere, rounding may choose another of equally good penalties
        assert written["l2"] == expected.l2
        assert written["held_out"] == {f"{l2:g}": share for l2, share in expected.held_out.items()}
    assert (written["train_images"], written["images"], written["classes"]) == (40, 12, 4)
    assert "top5" not in written
    assert set(written["provenance"]) == {"cache", "cache_digest", "train_cache", "train_cache_digest"}
    assert f"{100 * result.top1:.1f}" in str(result)


def test_a_trained_tower_embeds_both_splits_for_all_three(classed, tmp_path, device):
    """Each evaluation belongs to the checkpoint, and the second finds the images of the first."""
    words = ("--mode", "unlocked", "--output_dir", str(tmp_path / "run"), "--eval.shots", "[1,5]", *on(device))
    siglit.train(parse("train", *words))
    for name in ("fewshot", "probe", "zeroshot"):
        evaluate = getattr(siglit, f"eval_{name}")
        evaluate(parse(f"eval-{name}", *words, "--eval.classes", "colors.json"))
    embedded = sorted(path.name.split("-")[0] for path in (tmp_path / "run/embeddings").glob("*/*"))
    assert embedded == ["train", "val"]
    provenance = {
        kind: json.loads((tmp_path / f"run/{kind}.json").read_text())["provenance"]
        for kind in ("zeroshot", "fewshot", "probe")
    }
    assert {origin["step"] for origin in provenance.values()} == {6}
    assert len({origin["cache_digest"] for origin in provenance.values()}) == 1
    assert "train_cache_digest" in provenance["probe"]
    locked = EmbeddingCache("cache/small/val").gather(np.arange(12))
    trained = EmbeddingCache(provenance["probe"]["cache"]).gather(np.arange(12))
    assert not np.allclose(trained, locked, atol=1e-2), "the tower has moved"
    assert trained.shape == locked.shape
    assert provenance["probe"]["checkpoint"].endswith("last.ckpt")


@pytest.mark.parametrize("stage", ["eval_probe", "eval_zeroshot"])
def test_cuda_on_a_machine_without_is_refused(classed, stage):
    from siglit.errors import UserError

    with pytest.raises(UserError, match="eval.accelerator is cuda"):
        getattr(siglit, stage)(parse("eval-probe", "--eval.accelerator", "cuda"))
