"""A whole training run of open_clip is the same with our SigLipLoss in the place of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT

# What a user writes to swap the loss, and then open_clip's own command.
PROGRAM = """
import json
import sys
import open_clip
import torch
from open_clip_train.main import main
from siglit.loss import SigLipLoss

# open_clip names the device to DDP, which refuses that on a CPU.
wrap = torch.nn.parallel.DistributedDataParallel
torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **options: wrap(model, **options)

model, ours, words = sys.argv[1:]
open_clip.add_model_config(model)
if ours == "ours":
    open_clip.factory.SigLipLoss = SigLipLoss
main(json.loads(words))
"""
MODEL = {
    "embed_dim": 16,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PAIRS = 24


@pytest.fixture
def listing(tmp_path):
    """Random images with captions of their own, in open_clip's CSV."""
    draw = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for number in range(PAIRS):
        path = tmp_path / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path}\tpicture {number} of {draw.integers(1000)}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL))
    return tmp_path / "pairs.csv"


def trained(listing, whose, processes, exchange):
    """Losses of three epochs as open_clip prints them, and the weights that it leaves."""
    folder = listing.parent
    (folder / "train.py").write_text(PROGRAM)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = f"""--model tiny --siglip --loss-dist-impl {exchange} --device cpu --precision fp32 --workers 0 --epochs 3
        --batch-size {8 // processes} --lr 1e-2 --warmup 1 --log-every-n-steps 1 --dist-backend gloo --seed 0
        --dataset-type csv --train-data {listing} --logs {folder} --name {whose}""".split()
    done = subprocess.run(
        # As one word: the launcher would take some of them for its own.
        [sys.executable, *start, str(folder / "train.py"), str(folder / "tiny.json"), whose, json.dumps(words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = (folder / whose / "out.log").read_text()
    losses = [float(value) for value in re.findall(r"Contrastive_loss: ([-\d.e+]+)", log)]
    kept = torch.load(folder / whose / "checkpoints" / "epoch_3.pt", weights_only=True, map_location="cpu")
    return losses, kept["state_dict"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("open_clip_train", "pandas", "webdataset"))),
    reason="open_clip_torch[training] is not installed",
)
@pytest.mark.parametrize(("processes", "exchange"), [(1, "bidir"), (2, "bidir"), (2, "gather")])
def test_losses_and_weights_are_those_of_open_clips_own(listing, processes, exchange):
    """Three epochs of its `main`, optimizer, schedule and DDP included; float32, so to rounding."""
    ours, our_weights = trained(listing, "ours", processes, exchange)
    theirs, their_weights = trained(listing, "theirs", processes, exchange)
    assert len(ours) == 9
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert max(ours) > 1.01 * min(ours)  # it did learn
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        # A bias of keys shifts all scores of a query alike: its gradient is rounding, which Adam makes full steps of.
        if not name.endswith("in_proj_bias"):
            torch.testing.assert_close(
                weight, their_weights[name], rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
