"""Parameter groups, optimisers and the learning-rate schedule.

Knows nothing of towers: groups follow from the kind of module a parameter belongs to, not from its name.
"""

import math

import torch
from torch import nn

from siglit.config import OptimConfig

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameter_groups(model: nn.Module, weight_decay: float, peak_lr: float) -> list[dict]:
    """Split trainable parameters into decayed kernels and the rest.

    Kernels are the weights of Linear and convolution layers; embedding tables, norms, biases and bare parameters (t'
    and b) are not decayed. torch and timm multiply decay by the learning rate where big_vision does not: dividing by
    the peak gives the paper's decay.

    Args:
        model: any module.
        weight_decay: decay per step at the peak, in the paper's units.
        peak_lr: learning rate that the optimiser will multiply by.

    Returns:
        Two groups for a torch optimiser, kernels first.
    """
    kernels = [m.weight for m in model.modules() if isinstance(m, _DECAYED) and m.weight.requires_grad]
    decayed = {id(p) for p in kernels}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in decayed]
    return [
        {"params": kernels, "weight_decay": weight_decay / peak_lr},
        {"params": rest, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build Lion (timm) or AdamW (torch) over `parameter_groups`."""
    groups = parameter_groups(model, config.weight_decay, config.lr)
    if config.name == "lion":
        from timm.optim import Lion

        return Lion(groups, lr=config.lr, betas=config.betas or (0.9, 0.99))
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas or (0.9, 0.95))


def cosine_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up from 0, then a cosine to 0 at `total_steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
