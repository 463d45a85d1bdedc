"""On CUDA a training step and the optimizers stay on the device, and Python reads nothing of what they compute.

Traced, so it runs without a GPU.
"""

from types import SimpleNamespace

import pytest
import torch

from siglit.config import ImageTowerConfig, OptimConfig, TextTowerConfig
from siglit.loss.function import LossWithGradients
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.text_tower import TextTower
from siglit.training.module import SigLiT
from siglit.training.optim import build_optimizer
from tests.conftest import TOWER, parse
from tests.fake_cuda import autocast, to_fake_cuda, traced

BATCH, LENGTH, WIDTH = 6, 8, 48


def text_tower():
    built_for = {"vocab_size": 64, "length": LENGTH, "eos_id": 1, "pad_id": 1, "dim": WIDTH}
    return TextTower(TextTowerConfig(width=32, depth=1, heads=2), **built_for)


def image_encoder(mode):
    if mode == "locked":
        return ImageEncoder(None, width=WIDTH, head=WIDTH)
    config = ImageTowerConfig(model=TOWER["model"], model_args=TOWER["model_args"], pretrained=False)
    return ImageEncoder(ImageTower(config, trainable=True), width=WIDTH, head=None)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_a_step_reads_nothing(project, monkeypatch, mode, precision):
    """Forward of both towers and the loss, which computes its gradients; it gets embeddings of the step's precision."""
    monkeypatch.chdir(project)
    module = SigLiT(parse("train", "--mode", mode, "--train.precision", "32-true", "--loss.ambiguous", "drop"), 100)
    module.image_tower, module.text_tower = image_encoder(mode), text_tower()
    module._device = torch.device("cuda", 0)
    module._trainer = SimpleNamespace(global_step=0, _logger_connector=SimpleNamespace(should_update_logs=False))
    dtypes = []
    real = LossWithGradients.forward
    noted = lambda context, compute, *inputs: (dtypes.append(inputs[0].dtype), real(context, compute, *inputs))[1]  # noqa: E731
    monkeypatch.setattr(LossWithGradients, "forward", staticmethod(noted))
    size, dtype = ((BATCH, WIDTH), torch.float16) if mode == "locked" else ((BATCH, 3, 32, 32), torch.uint8)
    with traced() as host:
        to_fake_cuda(module)
        batch = {name: torch.empty(BATCH, dtype=torch.int64, device="cuda") for name in ("image_ids", "text_ids")}
        batch["image"] = torch.empty(size, dtype=dtype, device="cuda")
        batch["ids"] = torch.empty(BATCH, LENGTH, dtype=torch.int64, device="cuda")
        host.names.clear()
        with autocast(monkeypatch, precision):
            loss = module.training_step(batch, 0)
    assert (loss.device.type, loss.dtype, loss.requires_grad) == ("cuda", torch.float32, True)
    assert dtypes == [precision]
    assert host.names == []


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_an_optimizer_keeps_its_state_on_the_device_and_reads_nothing_from_it(name):
    """Adafactor counts its steps in the host's memory, which costs no wait."""
    tower = text_tower()
    with traced() as host:
        to_fake_cuda(tower)
        optimizer = build_optimizer(tower, OptimConfig(name=name, lr=1e-3), {})
        for parameter in tower.parameters():
            parameter.grad = torch.empty_like(parameter)
        host.names.clear()
        for _ in range(2):
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
    state = {key: value for of_one in optimizer.state.values() for key, value in of_one.items()}
    on_host = {key for key, value in state.items() if isinstance(value, torch.Tensor) and not value.is_cuda}
    assert on_host == ({"step"} if name == "adafactor" else set())
    assert "aten._to_copy.default" not in host.names
