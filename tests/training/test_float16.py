"""float16 with a gradient scaler: an overflow skips a step and halves the scale, which a resumed run continues with."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import siglit
from tests.commands.test_train import RESUMED, losses, weights
from tests.conftest import on, parse


@pytest.fixture
def half(device, monkeypatch):
    """Words for training in float16; on a CPU, where Lightning takes bfloat16 instead, with torch's scaler for it."""
    if device == "cpu":
        plugin = lambda _: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # noqa: E731
        monkeypatch.setattr(_AcceleratorConnector, "_check_and_init_precision", plugin)
    return [*on(device), "--train.precision", "16-mixed", "--train.log_every", "1"]


def scaler(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["MixedPrecision"]


def test_training_skips_what_overflows_and_a_resumed_run_continues_with_its_scale(cached, project, half, device):
    """The same losses as without a stop: bit for bit on the CPU, on CUDA but for the order of its sums."""
    siglit.train(parse("train", *half, "--output_dir", "runs/whole"))
    siglit.train(parse("train", *half, "--output_dir", "runs/stopped", "--train.steps", "3"))
    before = scaler(project / "runs/stopped")
    siglit.train(parse("train", *half, "--output_dir", "runs/stopped", *RESUMED))
    whole, resumed = scaler(project / "runs/whole"), scaler(project / "runs/stopped")
    if device == "cpu":
        assert (before["scale"], before["_growth_tracker"]) == (2**15, 2), "the first of three steps was skipped"
    assert resumed == whole
    curve, other = losses(project / "runs/whole"), losses(project / "runs/stopped")
    assert other == (curve if device == "cpu" else pytest.approx(curve, rel=1e-2))
    assert curve[5] < 0.9 * curve[0]
    assert {w.dtype for w in weights(project / "runs/whole").values() if w.is_floating_point()} == {torch.float32}
