"""Only kernels decay, by the paper's amount; the schedule rises from 0 and falls to 0."""

import math

import pytest
import torch
from torch import nn

from siglit.config import OptimConfig, TextTowerConfig
from siglit.models.text_tower import TextTower
from siglit.optim import build_optimizer, cosine_schedule, parameter_groups


class Model(nn.Module):
    """One module of every kind that matters, one of them frozen."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.no_bias = nn.Linear(3, 4, bias=False)
        self.conv = nn.Conv2d(3, 4, 2)
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.probe = nn.Parameter(torch.ones(1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(model, group):
    found = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in found}


def test_only_weights_of_linear_and_convolution_layers_decay():
    model = Model()
    decayed, rest = parameter_groups(model, 0.1, 1e-3)
    assert names(model, decayed) == {"linear.weight", "no_bias.weight", "conv.weight"}
    assert decayed["weight_decay"] == pytest.approx(100)
    assert rest["weight_decay"] == 0
    assert {"linear.bias", "embedding.weight", "norm.weight", "batch_norm.bias", "log_scale", "probe"} < names(
        model, rest
    )


@pytest.mark.parametrize(
    "model",
    [Model(), TextTower(TextTowerConfig(size="micro"), vocab_size=9, length=4, eos_id=1, pad_id=1, dim=8)],
    ids=["one of each", "text tower"],
)
def test_every_trainable_parameter_is_in_exactly_one_group(model):
    found = [id(p) for group in parameter_groups(model, 0.1, 1e-3) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}


def test_in_the_text_tower_matrices_decay_and_tables_do_not():
    tower = TextTower(TextTowerConfig(size="micro"), vocab_size=9, length=4, eos_id=1, pad_id=1, dim=8)
    decayed, rest = parameter_groups(tower, 0.1, 1e-3)
    # q, k, v, out, fc1 and fc2 of three layers, and the head.
    assert len(names(tower, decayed)) == 3 * 6 + 1
    assert all(name.endswith("weight") for name in names(tower, decayed))
    assert not any("embedding" in name or "norm" in name for name in names(tower, decayed))
    assert sum("embedding" in name for name in names(tower, rest)) == 2


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize(("lr", "decay"), [(1e-4, 1e-3), (3e-2, 1e-3), (1e-3, 0.25)])
def test_one_step_at_the_peak_shrinks_kernels_by_the_decay_itself(name, lr, decay):
    """Without gradient, p becomes (1 - wd) p whatever the learning rate; all else stays as it is."""
    model = Model().double()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=lr, weight_decay=decay))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, p in model.named_parameters():
        share = 1 - decay if n in ("linear.weight", "no_bias.weight", "conv.weight") else 1
        torch.testing.assert_close(p.detach(), before[n] * share, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_decay_follows_the_schedule(name):
    """At half the peak rate, half the decay, as big_vision's schedule multiplies both."""
    model = Model().double()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-3, weight_decay=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    before = model.linear.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(model.linear.weight.detach(), before * (1 - 0.5e-2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("config", "kind", "betas"),
    [
        (OptimConfig(name="lion"), "Lion", (0.9, 0.99)),
        (OptimConfig(name="adamw"), "AdamW", (0.9, 0.95)),
        (OptimConfig(name="lion", betas=(0.8, 0.9)), "Lion", (0.8, 0.9)),
        (OptimConfig(name="adamw", betas=(0.8, 0.9)), "AdamW", (0.8, 0.9)),
    ],
)
def test_the_optimiser_that_was_asked_for(config, kind, betas):
    optimizer = build_optimizer(Model(), config)
    assert type(optimizer).__name__ == kind
    assert {group["betas"] for group in optimizer.param_groups} == {betas}
    assert {group["lr"] for group in optimizer.param_groups} == {config.lr}


def test_lion_steps_by_the_sign_of_the_gradient():
    model = Model().double()
    optimizer = build_optimizer(model, OptimConfig(name="lion", lr=1e-2, weight_decay=0))
    before = model.probe.detach().clone()
    model.probe.grad = torch.tensor([[3.0, -0.001, 0.0, 7e5]], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(before - model.probe.detach(), torch.tensor([[0.01, -0.01, 0, 0.01]]).double())


def test_schedule_rises_in_a_line_and_falls_in_a_cosine():
    values = [cosine_schedule(step, 10, 50) for step in range(51)]
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    assert values[10:] == pytest.approx([(1 + math.cos(math.pi * done / 40)) / 2 for done in range(41)])
    assert (values[0], values[10], values[30], values[50]) == pytest.approx((0, 1, 0.5, 0))


def test_schedule_at_its_edges():
    """No warm-up begins at the peak; past the end it stays 0; a warm-up as long as the run has no cosine."""
    assert cosine_schedule(0, 0, 10) == 1
    assert cosine_schedule(25, 0, 10) == pytest.approx(0)
    assert [cosine_schedule(step, 4, 4) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
