"""Parameter groups, optimisers, learning-rate schedules and durations.

Knows nothing of towers: whether a parameter decays follows from the kind of module it belongs to, and whether it came
pretrained is told by the caller; names are looked at by nobody.

Decay is in the paper's units: one step is `schedule · (lr · update + weight_decay · p)`. torch and timm multiply the
decay by the learning rate of the group, so groups carry `weight_decay / lr`.
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

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def parameter_groups(model: nn.Module, config: OptimConfig, multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and decay.

    Kernels decay: the matrices of linear, convolution and attention layers. Embedding tables (also where a layer shares
    them), position embeddings, norms, biases, probes and other bare parameters (t' and b) do not; nor does anything
    that came pretrained, unless `config.decay_pretrained` says so of its kernels.

    Args:
        model: any module; frozen parameters are left out.
        config: peak learning rate and decay.
        multipliers: full names of the parameters that came pretrained -> multiplier of the learning rate. The
            multiplier does not scale the decay.

    Returns:
        Groups for a torch optimiser, none of them empty, with the keys params, lr, weight_decay and name.
    """
    # A shared parameter has several names: any of them tells that it came pretrained.
    named = dict(model.named_parameters(remove_duplicate=False))
    assert multipliers.keys() <= named.keys(), f"no such parameters: {sorted(multipliers.keys() - named.keys())}"
    pretrained = {named[name]: multiplier for name, multiplier in multipliers.items()}
    kernels = _kernels(model)
    members: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            new = parameter not in pretrained
            decays = parameter in kernels and (new or config.decay_pretrained)
            members.setdefault((not new, pretrained.get(parameter, 1.0), not decays), []).append(parameter)
    groups = []
    for (came_pretrained, multiplier, bare), params in sorted(members.items(), key=lambda item: item[0]):
        lr = config.lr * multiplier
        words = ["pretrained"] * came_pretrained + ["no decay" if bare else "kernels"]
        words += [f"×{multiplier:g}"] * (multiplier != 1)
        decay = 0.0 if bare else config.weight_decay / lr
        groups.append({"params": params, "lr": lr, "weight_decay": decay, "name": " ".join(words)})
    return groups


def _kernels(model: nn.Module) -> set[torch.Tensor]:
    found: set[torch.Tensor] = set()
    tables: set[torch.Tensor] = set()
    for module in model.modules():
        if isinstance(module, _LAYERS):
            found.add(module.weight)
        elif isinstance(module, nn.Embedding):
            tables.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            # One of them, or the other three; its output layer is a Linear of its own.
            projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            found.update(weight for weight in projections if weight is not None)
    return found - tables


def build_optimizer(model: nn.Module, config: OptimConfig, multipliers: Mapping[str, float]) -> torch.optim.Optimizer:
    """Build the experiment's optimiser over `parameter_groups`, each group at its peak rate.

    Args:
        model: any module, already on its device.
        config: optimiser, peak learning rate and decay.
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
        # big_vision takes from before the rounding; float32 keeps to its rule at two more bytes per number.
        # unscaled_wd would take the schedule off the decay.
        return AdafactorBigVision(
            groups,
            lr=config.lr,
            min_dim_size_to_factor=32,
            beta2_cap=beta2,
            momentum=beta1,
            momentum_dtype=torch.float32,
            unscaled_wd=False,
        )
    real = not any(parameter.is_meta for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), fused=real)
    # A fused step offers to unscale fp16 gradients itself, and Lightning refuses to clip what is not unscaled yet,
    # even in bf16. Without the offer the gradients are unscaled before they are clipped, as for all optimisers.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def state_bytes(groups: Sequence[Mapping[str, Any]], config: OptimConfig) -> int:
    """Bytes that the optimiser will keep between steps for these groups, found by a step without numbers."""
    shadows: list[dict[str, Any]] = []
    for group in groups:
        params = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        shadows.append({**group, "params": params})
    optimizer = _optimizer(shadows, config)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def lr_multiplier(step: int, config: OptimConfig, total_steps: int, batch_size: int) -> float:
    """Share of the peak learning rate at a step.

    A linear warm-up from 0, then a cosine to 0 at `total_steps`, the peak, or 1 / sqrt(1 + steps / timescale) counted
    from the end of the warm-up; for the last two, a linear fall to 0 over the last steps on top.

    Args:
        step: optimiser steps taken so far.
        config: the schedule.
        total_steps: steps of the whole training.
        batch_size: global batch, which turns examples into steps.

    Raises:
        UserError: a ramp is given twice, does not fit into the training, or a cosine is to have a cooldown.

    Source: big_vision `utils.create_learning_rate_schedule`.
    """
    warmup, cooldown = _ramp("warmup", config, batch_size), _ramp("cooldown", config, batch_size)
    if cooldown and config.schedule == "cosine":
        raise UserError(
            f"optim.schedule is cosine, which ends at 0 by itself, and a cooldown of {cooldown} steps is asked for; "
            "leave the cooldown out, or choose constant or rsqrt"
        )
    if warmup + cooldown > total_steps:
        raise UserError(
            f"a warm-up of {warmup} steps and a cooldown of {cooldown} do not fit into a training of {total_steps} "
            "steps; shorten them (optim.warmup_*, optim.cooldown_*), or train longer"
        )
    share = min(1.0, step / warmup) if warmup else 1.0
    after = max(0, step - warmup)
    if config.schedule == "cosine":
        share *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, after / max(1, total_steps - warmup)))
    elif config.schedule == "rsqrt":
        share /= math.sqrt(1 + after / config.timescale_steps)
    if cooldown:
        share *= min(1.0, max(0, total_steps - step) / cooldown)
    return share


def _ramp(name: str, config: OptimConfig, batch_size: int) -> int:
    steps, examples = getattr(config, f"{name}_steps"), getattr(config, f"{name}_examples")
    if examples is None:
        return int(steps)
    if steps:
        raise UserError(f"optim.{name}_steps is {steps} and optim.{name}_examples {examples}; give one of the two")
    # As big_vision rounds: to the nearest, but a ramp that is asked for has a step.
    return max(1, round(count(examples) / batch_size)) if count(examples) else 0


def total_steps(train: TrainConfig, rows: int) -> int:
    """Optimiser steps of the training; the last examples that do not fill a global batch are left out.

    Args:
        train: steps, examples or epochs, and the global batch.
        rows: examples in one pass.

    Raises:
        UserError: the duration is given twice or not at all, or comes to no step.
    """
    given = [name for name in ("steps", "examples", "epochs") if getattr(train, name) is not None]
    if len(given) != 1:
        told = " and ".join(f"train.{name}" for name in given) or "none of them"
        raise UserError(f"say how long to train: give one of train.steps, train.examples and train.epochs, not {told}")
    if train.steps is not None:
        return train.steps
    if train.examples is not None:
        steps = count(train.examples) // train.batch_size
    else:
        assert train.epochs is not None
        steps = math.floor(train.epochs * (rows // train.batch_size))
    # A set smaller than one batch is refused where the batches are made, with the sizes.
    if rows >= train.batch_size and steps < 1:
        raise UserError(
            f"the experiment comes to {steps} training steps of {train.batch_size} pairs; raise train.{given[0]}, "
            "or lower train.batch_size"
        )
    return steps


def group_table(
    groups: Sequence[Mapping[str, Any]], named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> str:
    """Tables of all parameters and of the groups, for a person.

    Equal parameters of numbered layers share a line. Decay is told in the paper's units, per step at the peak.

    Args:
        groups: from `parameter_groups`.
        named_parameters: of the same model; those in no group are called locked.
        config: what the groups were made with.
    """
    locked = {"name": "locked", "lr": 0.0, "weight_decay": 0.0}
    shown = [*groups, locked]
    number = {parameter: i for i, group in enumerate(groups) for parameter in group["params"]}
    alike: dict[tuple[Any, ...], list[str]] = {}
    members: list[list[nn.Parameter]] = [[] for _ in shown]
    for name, parameter in named_parameters:
        group = number.get(parameter, len(groups))
        members[group].append(parameter)
        layer = tuple("*" if part.isdigit() else part for part in name.split("."))
        alike.setdefault((layer, tuple(parameter.shape), group), []).append(name)

    lines = [("parameter", "shape", "numbers", "peak lr", "decay", "group")]
    for (_, shape, group), names in alike.items():
        numbers = f"{len(names) * math.prod(shape):,}"
        sides = " × ".join(map(str, shape)) or "scalar"
        lines.append((_common_name(names), sides, numbers, *_rates(shown[group]), shown[group]["name"]))
    summary = [("group", "parameters", "numbers", "peak lr", "decay")]
    for group, params in enumerate(members):
        if params:
            numbers = f"{sum(p.numel() for p in params):,}"
            summary.append((shown[group]["name"], str(len(params)), numbers, *_rates(shown[group])))
    everything = [parameter for params in members for parameter in params]
    total = (
        f"{len(everything)} parameters of {sum(p.numel() for p in everything):,} numbers: weights "
        f"{sum(p.nbytes for p in everything) / 1e6:,.1f} MB, state of {config.name} "
        f"{state_bytes(groups, config) / 1e6:,.1f} MB"
    )
    return "\n".join([*_aligned(lines, right=(2,)), "", *_aligned(summary, right=(1, 2)), "", total])


def _rates(group: Mapping[str, Any]) -> tuple[str, str]:
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
