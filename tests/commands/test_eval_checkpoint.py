"""eval.checkpoint: every evaluation takes the weights that train.keep_every has kept of a step."""

import json

import pytest

import siglit
from siglit.runs.trained import open_trained
from tests.conftest import parse

KINDS = ("retrieval", "zeroshot", "logits", "fewshot", "probe")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_every_evaluation_takes_the_weights_of_a_step(classed, tmp_path, mode, capsys):
    """Of the start and of the middle; in mode locked, few-shot and probe have no trained weights to evaluate."""
    folder = tmp_path / "run"
    words = ["--mode", mode, "--output_dir", str(folder), "--eval.shots", "[1]", "--eval.classes", "colors.json"]
    siglit.train(parse("train", *words, "--train.steps", "3", "--train.keep_every", "2", "--train.log_every", "3"))
    texts = []
    for step in (0, 2):
        path = str(folder / f"checkpoints/step-{step:08}.ckpt")
        words_of_step = [*words, "--eval.checkpoint", path]
        for kind in KINDS:
            evaluate = getattr(siglit, f"eval_{kind}")
            evaluate(parse(f"eval-{kind}", *words_of_step))
            provenance = json.loads((folder / f"{kind}.json").read_text())["provenance"]
            if mode == "locked" and kind in ("fewshot", "probe"):
                assert "checkpoint" not in provenance
            else:
                assert (provenance["checkpoint"], provenance["step"]) == (path, step), kind
        trained = open_trained(parse("eval-retrieval", *words_of_step))
        texts.append(trained.encode_text(["a red square"]))
        assert siglit.search(parse("search", *words_of_step, "a red square"), "a red square")
    assert (texts[0] != texts[1]).any()
    siglit.report(parse("report", *words_of_step))
    assert "Traceback" not in capsys.readouterr().err
