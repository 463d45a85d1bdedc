"""On CUDA everything a loss computes stays on the device, in the promised types, and Python reads none of it.

Traced, so it runs without a GPU. The gradients are those that forward keeps for backward.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.loss.composition import Selection, Tile
from siglit.loss.function import LossWithGradients
from siglit.loss.tiles import wide
from tests.fake_cuda import traced

N, DIM, CHUNK = 5, 4, 3


@pytest.fixture
def kept(monkeypatch):
    """What forward keeps for backward, in place of autograd's engine, which cannot be traced."""
    context = SimpleNamespace()
    context.save_for_backward = lambda *gradients: setattr(context, "gradients", gradients)
    apply = lambda compute, *inputs: LossWithGradients.forward(context, compute, *inputs)  # noqa: E731
    monkeypatch.setattr(LossWithGradients, "apply", apply)
    return context


def inputs(dtype, locked=False):
    """Images, texts, t and b."""
    sides = [torch.empty(N, DIM, dtype=dtype, device="cuda", requires_grad=learns) for learns in (not locked, True)]
    return [*sides, *(torch.empty((), device="cuda", requires_grad=True) for _ in range(2))]


def ids():
    return {name: torch.empty(N, dtype=torch.int64, device="cuda") for name in ("image_ids", "text_ids")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["plain", "ids, drop", "ids, positive", "softmax"])
def test_a_loss_reads_nothing_and_its_results_are_wide_and_on_the_device(kept, loss, dtype):
    with traced() as host:
        arguments = inputs(dtype)
        if loss == "softmax":
            value = softmax_loss(*arguments[:3], chunk_size=CHUNK)
        else:
            options = {"ambiguous": loss.removeprefix("ids, "), **ids()} if loss != "plain" else {}
            value = sigmoid_loss(*arguments, chunk_size=CHUNK, **options)
    results = [value, *kept.gradients]
    assert {result.device.type for result in results} == {"cuda"}
    assert {result.dtype for result in results} == {wide(dtype)}
    side = (N, DIM)
    assert [tuple(result.shape) for result in results] == [(), side, side, (), ()][: len(results)]
    assert host.names == []


@pytest.mark.parametrize("keep", ["random", "hardest"])
def test_masked_negatives_are_found_on_the_device(kept, keep):
    """Their number is a sum over all tiles and ranks, of which Python reads nothing."""
    with traced():
        value = sigmoid_loss(*inputs(torch.bfloat16), chunk_size=CHUNK, negatives=Negatives(keep, 2, seed=3), **ids())
    assert {result.device.type for result in (value, *kept.gradients)} == {"cuda"}


@pytest.mark.parametrize("loss", ["plain", "softmax"])
def test_a_locked_side_has_no_gradient(kept, loss):
    with traced():
        arguments = inputs(torch.bfloat16, locked=True)
        softmax_loss(*arguments[:3]) if loss == "softmax" else sigmoid_loss(*arguments)
    assert [gradient is None for gradient in kept.gradients][:3] == [True, False, False]


@pytest.mark.parametrize("mask", ["plain", "ids"])
def test_statistics_stay_on_the_device_until_they_are_logged(kept, mask):
    statistics = {}
    with traced():
        sigmoid_loss(*inputs(torch.bfloat16), statistics=statistics, **(ids() if mask == "ids" else {}))
    assert len(statistics) == 5
    assert {value.device.type for value in statistics.values()} == {"cuda"}


@pytest.mark.parametrize("keep", ["random", "hardest", "easiest"])
def test_a_tile_is_masked_on_the_device(keep):
    with traced():
        cosines, of_rows, of_columns = (torch.empty(size, device="cuda") for size in ((5, 7), 5, 7))
        tile = Tile(0, 0, [of_rows.long()], [of_columns.long()])
        masks = Selection("drop", Negatives(keep, 2, seed=3), threshold=1)(cosines, tile)
    assert {(mask.device.type, mask.dtype, tuple(mask.shape)) for mask in masks} == {("cuda", torch.bool, (5, 7))}


def test_tracing_would_notice():
    """Control: a read, tensors of two devices, and a number that is copied to the device."""
    with traced() as host:
        value, beside = torch.empty(3, device="cuda"), torch.empty(3)
        with pytest.raises(DataDependentOutputException):
            float(value.sum())
        with pytest.raises(DataDependentOutputException):
            bool(value.isfinite().all())
        with pytest.raises(RuntimeError, match="devices"):
            value + beside
        host.names.clear()
        value.new_tensor(4)
    assert "aten._to_copy.default" in host.names
