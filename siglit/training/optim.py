"""Parameter groups, optimizers, learning-rate schedules and durations.

Knows nothing of towers: whether a parameter decays follows from the type of its module, never from its name, and the
caller says which parameters came pretrained.

Weight decay is in the paper's units: one step is `lr_multiplier · (lr · update + weight_decay · p)`. torch and timm
multiply the weight decay by the learning rate of the group, so groups carry `weight_decay / lr`.
Source: big_vision's `optax.make` and `utils.create_learning_rate_schedule`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from siglit.config import OptimConfig, TrainConfig, count
from siglit.errors import UserError
from siglit.runtime.text import plural
from siglit.training.lightning_internals import unscale_gradients_before_step

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def parameter_groups(model: nn.Module, config: OptimConfig, multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Kernels decay: the matrices of linear, convolution and attention layers. Embedding tables (also where a layer shares
    them), position embeddings, norms, biases, probes and other bare parameters (t' and b) do not; nor does anything
    that came pretrained, unless `config.decay_pretrained` says so of its kernels.

    Args:
        model: any module; frozen parameters are left out.
        config: peak learning rate and weight decay.
        multipliers: {full name of a parameter that came pretrained: multiplier of its learning rate}. The multiplier
            does not scale the weight decay.

    Returns:
        Groups for a torch optimizer, none of them empty, with the keys params, lr, weight_decay and name.
    """
    # A shared parameter has several names: it counts as pretrained if any of them is listed.
    named = dict(model.named_parameters(remove_duplicate=False))
    assert multipliers.keys() <= named.keys(), f"no such parameters: {sorted(multipliers.keys() - named.keys())}"
    pretrained = {named[name]: multiplier for name, multiplier in multipliers.items()}
    kernels = _kernels(model)
    members: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_pretrained = parameter in pretrained
            decays = parameter in kernels and (config.decay_pretrained or not is_pretrained)
            key = is_pretrained, pretrained.get(parameter, 1.0), not decays
            members.setdefault(key, []).append(parameter)
    groups = []
    for (is_pretrained, multiplier, is_bare), params in sorted(members.items(), key=lambda item: item[0]):
        lr = config.lr * multiplier
        weight_decay = 0.0 if is_bare else config.weight_decay / lr
        name = _group_name(is_pretrained, multiplier, is_bare)
        groups.append({"params": params, "lr": lr, "weight_decay": weight_decay, "name": name})
    return groups


def _group_name(is_pretrained: bool, multiplier: float, is_bare: bool) -> str:
    name = "no decay" if is_bare else "kernels"
    if is_pretrained:
        name = f"pretrained {name}"
    return name if multiplier == 1 else f"{name} ×{multiplier:g}"


def _kernels(model: nn.Module) -> set[torch.Tensor]:
    """The weights that decay."""
    kernels: set[torch.Tensor] = set()
    tables: set[torch.Tensor] = set()
    for module in model.modules():
        if isinstance(module, _LAYERS):
            kernels.add(module.weight)
        elif isinstance(module, nn.Embedding):
            tables.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            # Either the first one or the other three are set; the output projection is a Linear of its own.
            projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            kernels.update(weight for weight in projections if weight is not None)
    return kernels - tables


def build_optimizer(model: nn.Module, config: OptimConfig, multipliers: Mapping[str, float]) -> torch.optim.Optimizer:
    """Build the experiment's optimizer over `parameter_groups`, each group at its peak learning rate.

    Args:
        model: any module, already on its device.
        config: optimizer, peak learning rate and weight decay.
        multipliers: as for `parameter_groups`.
    """
    return _optimizer(parameter_groups(model, config, multipliers), config)


def _optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    if config.name == "lion":
        from timm.optim import Lion

        return Lion(groups, lr=config.lr, betas=config.betas or (0.9, 0.99))
    beta1, beta2 = config.betas or (0.9, 0.95)
    if config.name == "adafactor":
        from timm.optim import AdafactorBigVision

        # big_vision factors from 32 on, timm from 16. timm's bfloat16 momentum also rounds the update, which
        # big_vision takes from before the rounding; float32 follows big_vision at two more bytes per parameter.
        # With unscaled_wd the schedule would not scale the weight decay.
        return AdafactorBigVision(
            groups,
            lr=config.lr,
            min_dim_size_to_factor=32,
            beta2_cap=beta2,
            momentum=beta1,
            momentum_dtype=torch.float32,
            unscaled_wd=False,
        )
    has_values = not any(parameter.is_meta for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), fused=has_values)
    unscale_gradients_before_step(optimizer)  # or Lightning would not clip them
    return optimizer


def state_bytes(groups: Sequence[Mapping[str, Any]], config: OptimConfig) -> int:
    """Bytes that the optimizer keeps between steps for these groups, counted by a step on the meta device."""
    meta_groups: list[dict[str, Any]] = []
    for group in groups:
        params = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        meta_groups.append({**group, "params": params})
    optimizer = _optimizer(meta_groups, config)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def lr_multiplier(step: int, config: OptimConfig, total_steps: int, batch_size: int) -> float:
    """Multiplier of the peak learning rate at a step, 0.0–1.0.

    A linear warm-up from 0; then, by config.schedule, a cosine that reaches 0 at `total_steps`, the constant 1, or
    1 / sqrt(1 + steps / timescale) counted from the end of the warm-up. The last two are multiplied by a linear
    cooldown to 0.

    Args:
        step: optimizer steps taken so far.
        config: the schedule.
        total_steps: steps of the whole training.
        batch_size: global batch, which turns examples into steps.

    Raises:
        UserError: warm-up or cooldown is given both in steps and in examples, the two are longer than the training, or
            optim.schedule is cosine and has a cooldown.

    Source: big_vision `utils.create_learning_rate_schedule`.
    """
    warmup, cooldown = _ramp("warmup", config, batch_size), _ramp("cooldown", config, batch_size)
    if cooldown and config.schedule == "cosine":
        raise UserError(
            f"optim.schedule is cosine, which ends at 0 by itself, but the experiment has a cooldown of "
            f"{plural(cooldown, 'step')}; leave the cooldown out, or choose constant or rsqrt"
        )
    if warmup + cooldown > total_steps:
        ramps = f"a warm-up of {plural(warmup, 'step')}" + (f" and a cooldown of {cooldown:,}" if cooldown > 0 else "")
        raise UserError(
            f"{ramps} does not fit into a training of {plural(total_steps, 'step')}; shorten optim.warmup_* or "
            "optim.cooldown_*, or train longer"
        )
    multiplier = min(1.0, step / warmup) if warmup else 1.0
    after_warmup = max(0, step - warmup)
    if config.schedule == "cosine":
        multiplier *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, after_warmup / max(1, total_steps - warmup)))
    elif config.schedule == "rsqrt":
        multiplier /= math.sqrt(1 + after_warmup / config.timescale_steps)
    if cooldown:
        multiplier *= min(1.0, max(0, total_steps - step) / cooldown)
    return multiplier


def _ramp(name: str, config: OptimConfig, batch_size: int) -> int:
    """Steps of the ramp `name`, "warmup" or "cooldown"."""
    steps, examples = getattr(config, f"{name}_steps"), getattr(config, f"{name}_examples")
    if examples is None:
        return int(steps)
    if steps:
        raise UserError(f"optim.{name}_steps is {steps} and optim.{name}_examples {examples}; set one of the two")
    # Rounded to the nearest, as big_vision does, but a ramp of more than 0 examples has at least one step.
    return max(1, round(count(examples) / batch_size)) if count(examples) else 0


def total_steps(train: TrainConfig, rows: int) -> int:
    """Optimizer steps of the training; the last examples that do not fill a global batch are left out.

    Args:
        train: steps, examples or epochs, and the global batch.
        rows: examples in one pass.

    Raises:
        UserError: not exactly one of train.steps, train.examples and train.epochs is set, or they amount to no step.
    """
    given = [name for name in ("steps", "examples", "epochs") if getattr(train, name) is not None]
    if len(given) != 1:
        actual = f"{' and '.join(f'train.{name}' for name in given)} are set" if len(given) > 0 else "none is set"
        raise UserError(f"set exactly one of train.steps, train.examples and train.epochs; {actual}")
    if train.steps is not None:
        return train.steps
    if train.examples is not None:
        steps = count(train.examples) // train.batch_size
    else:
        assert train.epochs is not None
        steps = math.floor(train.epochs * (rows // train.batch_size))
    # `check_batch_fits` refuses a set that is smaller than one batch, with a better message.
    if rows >= train.batch_size and steps < 1:
        raise UserError(
            f"the experiment amounts to {steps} training steps of {plural(train.batch_size, 'pair')}; raise "
            f"train.{given[0]}, or lower train.batch_size"
        )
    return steps


def group_table(
    groups: Sequence[Mapping[str, Any]], named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> str:
    """Format two tables for a person: all parameter tensors, and the groups.

    Tensors of numbered layers that differ in the number alone share a line. Weight decay is in the paper's units, per
    step at the peak learning rate.

    Args:
        groups: from `parameter_groups`.
        named_parameters: of the same model; those in no group are listed as locked.
        config: what the groups were made with.
    """
    locked = {"name": "locked", "lr": 0.0, "weight_decay": 0.0}
    listed = [*groups, locked]
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    alike: dict[tuple[Any, ...], list[str]] = {}
    members: list[list[nn.Parameter]] = [[] for _ in listed]
    for name, parameter in named_parameters:
        group = group_of.get(parameter, len(groups))
        members[group].append(parameter)
        layer = tuple("*" if part.isdigit() else part for part in name.split("."))
        alike.setdefault((layer, tuple(parameter.shape), group), []).append(name)

    lines = [("tensor", "shape", "parameters", "peak lr", "weight decay", "group")]
    for (_, shape, group), names in alike.items():
        size = f"{len(names) * math.prod(shape):,}"
        sides = " × ".join(map(str, shape)) or "scalar"
        lines.append((_common_name(names), sides, size, *_lr_and_decay(listed[group]), listed[group]["name"]))
    summary = [("group", "tensors", "parameters", "peak lr", "weight decay")]
    for group, params in enumerate(members):
        if params:
            size = f"{sum(p.numel() for p in params):,}"
            summary.append((listed[group]["name"], str(len(params)), size, *_lr_and_decay(listed[group])))
    everything = [parameter for params in members for parameter in params]
    total = (
        f"{plural(len(everything), 'tensor')} of {sum(p.numel() for p in everything):,} parameters: weights "
        f"{sum(p.nbytes for p in everything) / 1e6:,.1f} MB, optimizer state ({config.name}) "
        f"{state_bytes(groups, config) / 1e6:,.1f} MB"
    )
    return "\n".join([*_aligned(lines, right=(2,)), "", *_aligned(summary, right=(1, 2)), "", total])


def _lr_and_decay(group: Mapping[str, Any]) -> tuple[str, str]:
    return f"{group['lr']:g}", f"{group['weight_decay'] * group['lr']:g}"


def _common_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns) + f" × {len(names)}"


def _aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
