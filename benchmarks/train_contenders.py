"""The contenders of `benchmarks.train`: the parts of its own step, and open_clip on images.

Knows nothing of turns. Each contender is a function that takes `--steps` steps of its own.
Shapes: B pairs of a step, L tokens, D embedding width.
"""

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.train_turns import VOCABULARY
from siglit.config import OptimConfig
from siglit.loss import sigmoid_loss
from siglit.models.text_tower import PRESETS
from siglit.training.module import SigLiT

BARE, KEPT = "bare tower, recomputed alike", "bare tower, nothing recomputed"
LOSS, OPTIMIZER = "loss", "optimizer"
OPEN_CLIP = "open_clip, images, --lock-image"
_MAX_LOG_SCALE = math.log(100)


def parts_of_a_step(module: SigLiT, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward of the bare tower, the loss, and clipping with the optimizer, each `--steps` times.

    They work on a copy of what the run trains. Without micro-batches nothing is recomputed on either side, and there
    is one bare tower only.
    """
    device, micro = module.device, args.micro_batch or args.batch
    # Together: the copied optimizer must hold the copied weights.
    tower, optimizer = copy.deepcopy((module.text_tower, module.optimizers(use_pl_optimizer=False)))
    if args.device == "cuda":
        tower.compile()
    ids = torch.randint(2, VOCABULARY, (args.batch, args.length), device=device)
    gradient, zimg, ztxt = (F.normalize(torch.randn(args.batch, args.dim, device=device), dim=1) for _ in range(3))
    if args.device == "cuda":
        zimg, ztxt = zimg.bfloat16(), ztxt.bfloat16()
    log_scale, bias = (module.log_scale.detach().clone(), module.logit_bias.detach().clone())
    sides = [tensor.requires_grad_() for tensor in (ztxt, log_scale, bias)]
    given = [(parameter, torch.randn_like(parameter)) for parameter in tower.parameters()]

    def recomputed() -> None:
        with autocast(args):
            *parts, last = ids.split(micro)
            out = torch.cat([*(checkpoint(tower, part, use_reentrant=False) for part in parts), tower(last)])
        out.backward(gradient.to(out.dtype))
        tower.zero_grad()

    def kept() -> None:
        for part, upstream in zip(ids.split(micro), gradient.split(micro), strict=True):
            with autocast(args):
                out = tower(part)
            out.backward(upstream.to(out.dtype))
        tower.zero_grad()

    def loss() -> None:
        sigmoid_loss(zimg, ztxt, log_scale.exp(), bias, statistics={}).backward()
        for tensor in sides:
            tensor.grad = None

    def optimize() -> None:
        for parameter, gradient in given:
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(tower.parameters(), OptimConfig.clip)
        optimizer.step()
        tower.zero_grad()

    runs = {KEPT: kept, LOSS: loss, OPTIMIZER: optimize}
    if micro < args.batch:
        runs[BARE] = recomputed
    return {name: _several(run, args.steps) for name, run in runs.items()}


def forward_flops(module: SigLiT, length: int) -> int:
    """Floating-point operations of the text tower's products for one caption, forward.

    Every weight of a linear layer takes two for each token, but the head, which sees one token; attention takes
    2 · 2 · L² · width a layer.
    """
    model = module.text_tower.model
    kernels = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.head.weight.numel()
    attention = 4 * length**2 * model.config.hidden_size * model.config.num_hidden_layers
    return 2 * ((kernels - head) * length + head) + attention


def open_clip_step(size: str, args: argparse.Namespace) -> Callable[[], None]:
    """`--steps` training steps of open_clip's own towers and loss, as `open_clip_train.train` takes them.

    The text tower has the widths of siglit's and what open_clip's SigLIP models have: no causal mask, the last token,
    a head with bias. Where siglit trains in micro-batches, it recomputes its text layers (`--grad-checkpointing`).
    """
    from open_clip.loss import SigLipLoss
    from open_clip.model import CustomTextCLIP

    width, depth, heads = PRESETS[size]
    text = {"context_length": args.length, "vocab_size": VOCABULARY, "width": width, "heads": heads, "layers": depth}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    tower = image_tower(args.image_tower)
    side = tower.default_cfg["input_size"][-1]
    image = {"timm_model_name": args.image_tower, "timm_pool": tower.global_pool, "timm_proj": "none"}
    image |= {"image_size": side}
    model = CustomTextCLIP(tower.num_features, image, text, init_logit_bias=-10.0, output_dict=True)
    model.to(args.device).train().lock_image_tower()
    if args.micro_batch and args.micro_batch < args.batch:
        model.text.set_grad_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": 0.2},
    ]
    optimizer, loss = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6), SigLipLoss()
    images = torch.randn(args.batch, 3, side, side, device=args.device)
    ids = torch.randint(2, VOCABULARY, (args.batch, args.length), device=args.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(args):
            losses = loss(**model(images, ids), output_dict=True)
        sum(losses.values()).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOG_SCALE)

    return _several(step, args.steps)


def image_tower(name: str) -> Any:
    """The timm model without its weights, for its shapes."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The arithmetic of all contenders: bfloat16 on CUDA, float32 elsewhere."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def _several(run: Callable[[], None], steps: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(steps):
            run()

    return turn
