"""A process group of one: NCCL where the device is a GPU, gloo on the CPU. test_training.py has more ranks, by gloo."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from siglit.loss import SigLipLoss, sigmoid_loss, softmax_loss
from tests.loss.reference import (
    BIAS,
    EXCHANGES,
    MASKS,
    SCALE,
    assert_equal,
    batch,
    on_device,
    options,
    sigmoid,
    softmax,
    value_and_gradients,
)
from tests.loss.test_training import gradients, model_and_batch


@pytest.fixture
def group(device):
    """The group, on the device; ends with the test."""
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("mask", ["plain", "ids, positive", "hardest"])
def test_the_sigmoid_loss_is_that_of_one_process(group, device, exchange, mask):
    zimg, ztxt, ids = batch(9, 5)
    arguments, statistics = options(mask, ids), {}
    expected = value_and_gradients(sigmoid, zimg, ztxt, SCALE, BIAS, **arguments)
    arguments |= {"exchange": exchange, "chunk_size": 4, "statistics": statistics, "device": device}
    assert_equal(value_and_gradients(sigmoid_loss, zimg, ztxt, SCALE, BIAS, **arguments), expected)
    assert {value.device.type for value in statistics.values()} == {device}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_softmax_loss_is_that_of_one_process(group, device, exchange):
    inputs = *batch(9, 5)[:2], SCALE
    actual = value_and_gradients(softmax_loss, *inputs, exchange=exchange, chunk_size=4, device=device)
    assert_equal(actual, value_and_gradients(softmax, *inputs))


@pytest.mark.parametrize("mask", MASKS)
def test_a_model_in_ddp_has_the_gradients_of_the_model_alone(group, device, mask):
    model, pixels, words = (part.to(device) for part in model_and_batch(8, False))
    arguments = on_device(options(mask, batch(8, 5)[2]), device)
    model.loss_options |= arguments
    # A small bucket makes DDP reduce in several pieces.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    loss = wrapped(pixels, words)
    loss.backward()
    actual = {name: gradient.cpu() for name, gradient in gradients(model).items()} | {"loss": loss.detach().cpu()}
    alone, pixels, words = model_and_batch(8, False, None, loss=sigmoid)
    alone.loss_options |= options(mask, batch(8, 5)[2])
    loss = alone(pixels, words)
    loss.backward()
    expected = gradients(alone) | {"loss": loss.detach()}
    assert actual.keys() == expected.keys()
    assert_equal(list(actual.values()), list(expected.values()))


def test_open_clips_module_is_the_loss(group, device):
    inputs = *batch(7, 5)[:2], SCALE, BIAS
    assert_equal(value_and_gradients(SigLipLoss(), *inputs, device=device), value_and_gradients(sigmoid, *inputs))
