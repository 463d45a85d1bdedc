"""Groups and optimizers step as big_vision does; schedules and durations follow their formulas."""

import math

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from siglit.config import OptimConfig, TextTowerConfig, TrainConfig
from siglit.errors import UserError
from siglit.models.text_tower import TextTower
from siglit.training.optim import (
    build_optimizer,
    group_table,
    lr_multiplier,
    parameter_groups,
    state_bytes,
    total_steps,
)

KERNELS = {"wide.weight", "tall.weight", "small.weight", "conv.weight"}
KERNELS |= {"attention.in_proj_weight", "attention.out_proj.weight"}
PRETRAINED_KERNELS = {"pretrained.0.weight"}
MULTIPLIERS = {f"pretrained.{i}.{kind}": 0.1 for i in range(2) for kind in ("weight", "bias")}


class Model(nn.Module):
    """One module of every kind that matters, large enough to factor or not, one frozen, two that came pretrained."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(48, 40)
        self.tall = nn.Linear(33, 50, bias=False)
        self.small = nn.Linear(20, 24)
        self.conv = nn.Conv2d(33, 36, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(40, 35)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.probe = nn.Parameter(torch.ones(1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.pretrained = nn.Sequential(nn.Linear(34, 36), nn.LayerNorm(3))


def tower(**config):
    return TextTower(TextTowerConfig(size="micro", **config), vocab_size=9, length=4, eos_id=1, pad_id=1, dim=8)


def names(model, group):
    return {name for name, p in model.named_parameters() if any(p is member for member in group["params"])}


def by_name(model, config=OptimConfig(), multipliers=MULTIPLIERS):  # noqa: B008
    """{name of the group: names of its parameters}."""
    return {group["name"]: names(model, group) for group in parameter_groups(model, config, multipliers)}


def test_kernels_decay_and_nothing_else():
    groups = by_name(Model())
    assert groups["kernels"] == KERNELS
    assert groups["no decay"] == {
        *("wide.bias", "small.bias", "conv.bias", "attention.in_proj_bias", "attention.out_proj.bias"),
        *("embedding.weight", "norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias"),
        *("log_scale", "probe"),
    }


def test_attention_with_widths_of_its_own_has_three_more_kernels():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    expected = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert by_name(attention, multipliers={})["kernels"] == expected


def test_pretrained_parameters_have_their_multiplier_and_decay_only_if_decay_pretrained():
    assert by_name(Model())["pretrained no decay ×0.1"] == MULTIPLIERS.keys()
    groups = by_name(Model(), OptimConfig(decay_pretrained=True))
    assert groups["pretrained kernels ×0.1"] == PRETRAINED_KERNELS
    assert groups["pretrained no decay ×0.1"] == MULTIPLIERS.keys() - PRETRAINED_KERNELS
    assert groups["kernels"] == KERNELS
    # A multiplier of 1 is still known to be pretrained.
    groups = by_name(Model(), multipliers=dict.fromkeys(MULTIPLIERS, 1.0))
    assert groups["pretrained no decay"] == MULTIPLIERS.keys()


def test_weight_decay_is_the_papers_whatever_the_learning_rate_and_the_multiplier():
    groups = parameter_groups(Model(), OptimConfig(lr=2e-3, weight_decay=0.1, decay_pretrained=True), MULTIPLIERS)
    actual = {group["name"]: (group["lr"], group["lr"] * group["weight_decay"]) for group in groups}
    assert actual == {
        "kernels": (2e-3, pytest.approx(0.1)),
        "no decay": (2e-3, 0),
        "pretrained kernels ×0.1": (pytest.approx(2e-4), pytest.approx(0.1)),
        "pretrained no decay ×0.1": (pytest.approx(2e-4), 0),
    }


def test_a_shared_parameter_is_in_one_group_and_a_shared_table_does_not_decay():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "table": nn.Embedding(5, 4)})
    model["out"] = nn.Linear(4, 5)
    model["b"].weight, model["out"].weight = model["a"].weight, model["table"].weight
    groups = by_name(model, multipliers={})
    assert groups["kernels"] == {"a.weight"}
    assert "table.weight" in groups["no decay"]
    # Pretrained under any of its names.
    assert by_name(model, multipliers={"b.weight": 0.5})["pretrained no decay ×0.5"] == {"a.weight"}


def test_groups_without_parameters_are_left_out():
    assert by_name(nn.Linear(2, 2, bias=False), multipliers={}) == {"kernels": {"weight"}}
    assert by_name(nn.LayerNorm(2), multipliers={"weight": 0.1, "bias": 0.1}).keys() == {"pretrained no decay ×0.1"}


def test_a_name_that_the_model_does_not_have_is_noticed():
    with pytest.raises(AssertionError, match=r"pretrained\.weight"):
        parameter_groups(Model(), OptimConfig(), {"pretrained.weight": 0.1})


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, global_pool="map", class_token=False, num_classes=0
    )


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=9, **sizes))


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        # q, k, v, out, fc1 and fc2 of three layers, and the head.
        (tower(), 3 * 6 + 1),
        # The table of a bottleneck does not decay, its projection does.
        (nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 8, bias=False)), 1),
        # qkv, proj, fc1, fc2, the patches' projection, and q, kv, proj, fc1, fc2 of the MAP head.
        (vit(), 4 + 1 + 5),
        # q, k, v, out, fc1, fc2, and the pooler.
        (bert(), 6 + 1),
        # qkv, proj, fc1 and fc2, all of them Conv1D.
        (GPT2Model(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)), 4),
    ],
    ids=["text tower", "bottleneck", "timm", "BERT", "GPT-2"],
)
def test_in_real_towers_the_matrices_decay_and_every_parameter_has_one_group(model, kernels):
    groups = by_name(model, multipliers={})
    assert len(groups["kernels"]) == kernels
    assert all(name.endswith("weight") for name in groups["kernels"])
    tables = {name for name, _ in model.named_parameters() if "embedding" in name or "wte" in name or "norm" in name}
    assert not groups["kernels"] & tables
    members = [p for group in parameter_groups(model, OptimConfig(), {}) for p in group["params"]]
    assert sorted(map(id, members)) == sorted(map(id, model.parameters()))


class Lion:
    """optax.scale_by_lion(b1=0.9, b2=0.99)."""

    def __call__(self, grad, count, state):
        m = state.get("m", 0.0)
        state["m"] = 0.99 * m + 0.01 * grad
        return np.sign(0.9 * m + 0.1 * grad)


class Adam:
    """optax.scale_by_adam(b1=0.9, b2=0.95), eps 1e-8, with both corrections of the bias."""

    def __call__(self, grad, count, state):
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * grad
        state["v"] = 0.95 * state.get("v", 0.0) + 0.05 * grad**2
        m, v = state["m"] / (1 - 0.9 ** (count + 1)), state["v"] / (1 - 0.95 ** (count + 1))
        return m / (np.sqrt(v) + 1e-8)


class Adafactor:
    """big_vision.scale_by_adafactor(beta2_cap=0.95): factored from 32, no clipping, momentum 0.9 not debiased."""

    def __call__(self, grad, count, state):
        decay = min(0.95, 1 - (count + 1.0) ** -0.8)
        square = grad**2 + 1e-30
        order = np.argsort(grad.shape, kind="stable")
        if grad.ndim >= 2 and grad.shape[order[-2]] >= 32:
            d1, d0 = order[-2:]
            state["row"] = decay * state.get("row", 0.0) + (1 - decay) * square.mean(axis=d0, keepdims=True)
            state["col"] = decay * state.get("col", 0.0) + (1 - decay) * square.mean(axis=d1, keepdims=True)
            update = grad * (state["row"] / state["row"].mean(axis=d1, keepdims=True)) ** -0.5 * state["col"] ** -0.5
        else:
            state["v"] = decay * state.get("v", 0.0) + (1 - decay) * square
            update = grad * state["v"] ** -0.5
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * update
        return state["m"]


@pytest.mark.parametrize("decay_pretrained", [False, True])
@pytest.mark.parametrize(
    ("name", "rule", "steps"),
    # The cap of Adafactor's second beta is reached at step 43.
    [("lion", Lion(), 20), ("adamw", Adam(), 20), ("adafactor", Adafactor(), 60)],
)
def test_twenty_steps_and_more_equal_big_visions(name, rule, steps, decay_pretrained, device):
    """clip(1) → rule → · lr · multiplier → + wd · p on kernels → · schedule: equal to 1e-6."""
    config = OptimConfig(
        name=name, lr=1e-2, weight_decay=3e-2, decay_pretrained=decay_pretrained, warmup_steps=5, clip=1.0
    )
    decaying = KERNELS | (PRETRAINED_KERNELS if decay_pretrained else set())
    torch.manual_seed(0)
    model = Model().double().to(device)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, config, MULTIPLIERS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_multiplier(step, config, steps, 8))

    expected = {n: p.detach().cpu().numpy().copy() for n, p in trained.items()}
    states = {n: {} for n in trained}
    rng = np.random.default_rng(0)
    for count in range(steps):
        grads = {n: rng.normal(size=p.shape) * 10 ** rng.uniform(-3, 0) for n, p in trained.items()}
        for n, parameter in trained.items():
            parameter.grad = torch.from_numpy(np.array(grads[n])).to(device)
        nn.utils.clip_grad_norm_(trained.values(), config.clip)
        optimizer.step()
        scheduler.step()

        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        schedule = min(1, count / 5) * 0.5 * (1 + math.cos(math.pi * max(0, count - 5) / (steps - 5)))
        for n, p in expected.items():
            update = rule(grads[n] / max(1.0, norm), count, states[n]) * config.lr * MULTIPLIERS.get(n, 1.0)
            expected[n] = p - schedule * (update + config.weight_decay * p * (n in decaying))
    for n, parameter in trained.items():
        np.testing.assert_allclose(parameter.detach().cpu().numpy(), expected[n], rtol=1e-6, atol=1e-6, err_msg=n)


@pytest.mark.parametrize("name", ["lion", "adamw", "adafactor"])
def test_a_saved_optimizer_resumes_bit_for_bit(name, tmp_path, device):
    """Its state is read without unpickling."""

    def steps(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()

    config = OptimConfig(name=name, lr=1e-2)
    model, other = Model().to(device), Model().to(device)
    optimizer = build_optimizer(model, config, MULTIPLIERS)
    steps(model, optimizer, [1, 2])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    steps(model, optimizer, [3, 4])

    # As Lightning reads it, into the host's memory.
    saved = torch.load(tmp_path / "saved", weights_only=True, map_location="cpu")
    other.load_state_dict(saved["model"])
    resumed = build_optimizer(other, config, MULTIPLIERS)
    resumed.load_state_dict(saved["optimizer"])
    steps(other, resumed, [3, 4])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimConfig(name="lion"), {"betas": (0.9, 0.99)}),
        (OptimConfig(name="adamw"), {"betas": (0.9, 0.95), "fused": True}),
        (OptimConfig(name="adafactor"), {"momentum": 0.9, "beta2_cap": 0.95}),
        (OptimConfig(name="lion", betas=(0.8, 0.9)), {"betas": (0.8, 0.9)}),
        (OptimConfig(name="adamw", betas=(0.8, 0.9)), {"betas": (0.8, 0.9)}),
        (OptimConfig(name="adafactor", betas=(0.8, 0.9)), {"momentum": 0.8, "beta2_cap": 0.9}),
    ],
)
def test_betas_are_the_papers_or_those_of_the_experiment(config, expected):
    for group in build_optimizer(Model(), config, {}).param_groups:
        assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["lion", "adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_for_every_optimizer_in_mixed_precision(name, precision, device):
    """It refuses for optimizers that offer to unscale gradients, as fused ones do."""
    model = nn.Linear(2, 1, bias=False).to(device)
    optimizer = build_optimizer(model, OptimConfig(name=name), {})
    model.weight.grad = torch.tensor([[30.0, 40.0]], device=device)
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    MixedPrecision(precision, device, scaler).clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(model.weight.grad.cpu(), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("name", ["lion", "adamw", "adafactor"])
def test_state_bytes_are_those_of_the_state_after_a_step(name):
    model, config = Model(), OptimConfig(name=name)
    counted = state_bytes(parameter_groups(model, config, MULTIPLIERS), config)
    optimizer = build_optimizer(model, config, MULTIPLIERS)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert counted == sum(tensor.numel() * tensor.element_size() for tensor in kept)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert counted / trained == pytest.approx({"lion": 1, "adamw": 2, "adafactor": 1.1}[name], abs=0.1)


def values(total, batch_size=8, **config):
    return [lr_multiplier(step, OptimConfig(**config), total, batch_size) for step in range(total + 1)]


def test_cosine_rises_in_a_line_and_falls_to_zero():
    multipliers = values(50, warmup_steps=10)
    assert multipliers[:11] == pytest.approx([step / 10 for step in range(11)])
    assert multipliers[10:] == pytest.approx([(1 + math.cos(math.pi * done / 40)) / 2 for done in range(41)])
    assert (multipliers[0], multipliers[10], multipliers[30], multipliers[50]) == pytest.approx((0, 1, 0.5, 0))
    assert lr_multiplier(70, OptimConfig(warmup_steps=10), 50, 8) == pytest.approx(0)


def test_constant_stays_at_the_peak_until_it_cools_down():
    assert values(10, schedule="constant") == [1] * 11
    multipliers = values(10, schedule="constant", warmup_steps=2, cooldown_steps=4)
    assert multipliers == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_rsqrt_falls_from_the_end_of_the_warm_up_and_cools_down_on_top():
    """At three timescales after the warm-up it is half the peak; big_vision's warm-up is a plain line."""
    config = {"schedule": "rsqrt", "timescale_steps": 4, "warmup_steps": 2}
    multipliers = values(20, **config, cooldown_steps=4)
    assert multipliers[:3] == [0, 0.5, 1]
    assert (multipliers[6], multipliers[14]) == pytest.approx((1 / math.sqrt(2), 1 / 2))
    assert (multipliers[17], multipliers[18]) == pytest.approx((0.75 / math.sqrt(4.75), 0.5 / math.sqrt(5)))
    assert multipliers[20] == 0
    assert values(20, **config)[20] == pytest.approx(1 / math.sqrt(5.5))


def test_no_warm_up_begins_at_the_peak_and_one_as_long_as_the_training_ends_there():
    assert values(10)[0] == 1
    assert values(4, warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1]


def test_ramps_in_examples_equal_those_in_steps():
    steps = values(20, schedule="constant", warmup_steps=5, cooldown_steps=10)
    assert values(20, 200, schedule="constant", warmup_examples="1K", cooldown_examples=2000) == steps
    # Rounded to the nearest step, but never away.
    assert values(20, 300, warmup_examples="1K") == values(20, warmup_steps=3)
    assert values(20, 4096, warmup_examples=1) == values(20, warmup_steps=1)
    assert values(20, warmup_examples=0) == values(20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"warmup_steps": 2, "warmup_examples": "1K"}, "warmup_steps is 2 and optim.warmup_examples 1K"),
        (
            {"schedule": "rsqrt", "cooldown_steps": 2, "cooldown_examples": 0},
            "cooldown_steps is 2 and optim.cooldown_examples 0",
        ),
        ({"cooldown_steps": 2}, "cooldown of 2 steps"),
        ({"cooldown_examples": 16}, "cooldown of 2 steps"),
        ({"warmup_steps": 11}, "warm-up of 11 steps .* training of 10 steps"),
        ({"warmup_examples": 88}, "warm-up of 11 steps .* training of 10 steps"),
        ({"schedule": "constant", "warmup_steps": 6, "cooldown_steps": 5}, "cooldown of 5 does not fit"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        lr_multiplier(0, OptimConfig(**config), 10, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"steps": 7}, 7),
        ({"examples": "1K"}, 31),
        ({"examples": 1023}, 31),
        # 100 rows are three batches of 32 a pass.
        ({"epochs": 10}, 30),
        ({"epochs": 2.5}, 7),
    ],
)
def test_durations_are_whole_steps_without_the_last_partial_batch(config, steps):
    assert total_steps(TrainConfig(batch_size=32, **config), rows=100) == steps


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "none is set"),
        ({"steps": 2, "examples": "1K"}, "train.steps and train.examples are set"),
        ({"steps": 2, "epochs": 1.0}, "train.steps and train.epochs are set"),
        ({"examples": 31}, "0 training steps of 32 pairs; raise train.examples"),
        ({"epochs": 0.2}, "0 training steps of 32 pairs; raise train.epochs"),
    ],
)
def test_durations_without_a_meaning_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        total_steps(TrainConfig(batch_size=32, **config), rows=100)
    assert "\n" not in str(error.value)


def test_the_table_lists_every_tensor_with_its_peak_lr_and_the_papers_decay():
    model, config = tower(), OptimConfig(lr=2e-4, weight_decay=1e-7)
    model.model.head.bias.requires_grad_(False)
    table = group_table(
        parameter_groups(model, config, {"model.final_layer_norm.weight": 0.1}), model.named_parameters(), config
    )
    parameters, groups, total = (part.splitlines() for part in table.split("\n\n"))
    cells = {line.split("  ")[0]: line.split() for line in parameters}
    fc1 = cells["model.encoder.layers.*.mlp.fc1.weight × 3"]
    assert fc1[3:] == ["512", "×", "128", "196,608", "0.0002", "1e-07", "kernels"]
    assert cells["model.head.weight"][-3:] == ["0.0002", "1e-07", "kernels"]
    assert cells["model.embeddings.token_embedding.weight"][-4:] == ["0.0002", "0", "no", "decay"]
    assert cells["model.final_layer_norm.weight"][-6:] == ["2e-05", "0", "pretrained", "no", "decay", "×0.1"]
    assert cells["model.head.bias"][-3:] == ["0", "0", "locked"]

    kernels, every = 3 * (4 * 128**2 + 2 * 128 * 512) + 8 * 128, sum(p.numel() for p in model.parameters())
    count = len(list(model.parameters()))
    assert [line.split() for line in groups[1:]] == [
        ["kernels", "19", f"{kernels:,}", "0.0002", "1e-07"],
        ["no", "decay", str(count - 21), f"{every - kernels - 128 - 8:,}", "0.0002", "0"],
        ["pretrained", "no", "decay", "×0.1", "1", "128", "2e-05", "0"],
        ["locked", "1", "8", "0", "0"],
    ]
    assert total == [
        f"{count} tensors of {every:,} parameters: weights {every * 4e-6:.1f} MB, "
        f"optimizer state (lion) {(every - 8) * 4e-6:.1f} MB"
    ]


def test_the_table_keeps_layers_apart_that_differ():
    """In shape, or in group; a number that they share stays."""
    model = nn.Sequential(nn.Sequential(*(nn.Linear(2, width) for width in (2, 2, 3, 2))), nn.Linear(2, 2))
    config = OptimConfig()
    table = group_table(parameter_groups(model, config, {"0.3.weight": 0.1}), model.named_parameters(), config)
    shown = [line.split("  ")[0] for line in table.splitlines() if ".weight" in line]
    assert shown == ["0.*.weight × 2", "0.2.weight", "0.3.weight", "1.weight"]
