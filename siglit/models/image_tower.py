"""The image tower: a timm model, its weights, its pooling and its transform; frozen unless it is trained.

Knows nothing of caches or text. Pixels arrive as uint8, a quarter of the bytes of float32, and are normalized on the
tower's device.
Shapes: N images, H = W = image_size, T tokens, C tower width, D embedding width (C, or 2 C for `cls+avg`).
"""

import difflib
import hashlib
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models._hub import load_state_dict_from_path
from torch import nn
from typing_extensions import override

from siglit.config import ImageTowerConfig
from siglit.errors import UserError
from siglit.models.hub import describe_failure, hub_or_cache
from siglit.models.unused import freeze_unused, graph_only
from siglit.runtime.files import check_regular, open_regular
from siglit.runtime.paths import expand
from siglit.runtime.text import first_line

_LOCAL = "local-dir:"
_HUB = ("hf-hub:", "hf_hub:")
_LOADING = ("pretrained", "checkpoint_path", "cache_dir")
"""Prefixes of the arguments of timm.create_model that choose where weights come from."""
_TOKEN_POOLINGS = ("cls", "avg", "map", "cls+avg")


class ImageTower(nn.Module):
    """A timm model with its pooling: uint8 pixels in, embeddings out.

    Attributes:
        pretrained: names of the parameters that came from weights, as in `named_parameters`.
        unused: names of the parameters that the pooling never uses; they are frozen. Empty unless `trainable`.
    """

    def __init__(self, config: ImageTowerConfig, *, trainable: bool = False):
        """Build the timm model and load its weights.

        Args:
            config: which model, and where its weights come from.
            trainable: the parameters that the forward uses require gradients; otherwise all are frozen and the tower
                is in evaluation mode.

        Raises:
            UserError: the name is unknown, the weights cannot be loaded or do not fit, or the model does not support
                image_tower.pooling or the image size.
        """
        super().__init__()
        self.config = config
        # Any: timm models have no common type with forward_features and the like.
        self.backbone: Any = _build(config)
        _check_pooling(self.backbone, config)
        # Convolutions are faster on (N, H, W, C) in memory, on a CPU and with bf16 on CUDA. A ViT has a single one.
        several = sum(isinstance(m, nn.Conv2d) for m in self.backbone.modules()) > 1
        self._memory_format = torch.channels_last if several else torch.contiguous_format
        own = timm.data.resolve_model_data_config(self.backbone)
        # timm's data config does not include an img_size passed to create_model.
        built_for = config.model_args.get("img_size") or own["input_size"][-1]
        self.image_size = int(config.image_size or (built_for if isinstance(built_for, int) else built_for[-1]))
        self.interpolation = config.interpolation or str(own["interpolation"])
        self.crop_pct = 1.0 if config.resize == "squash" else float(own["crop_pct"])
        mean, std = config.mean or list(own["mean"]), config.std or list(own["std"])
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"image_tower.mean and std need one number for each of 3 channels, got {mean} and {std}")
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)
        self.eval().requires_grad_(trainable)
        row = self._probe()
        self.embedding_width = row.shape[1]
        self.unused = freeze_unused(self, row)
        self.train(trainable)
        loaded = config.pretrained or config.weights is not None
        self.pretrained = frozenset(name for name, _ in self.named_parameters()) if loaded else frozenset[str]()

    @override
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed (N, 3, H, W) uint8 pixels as (N, D), not normalized."""
        # The layers pass the layout on. Weights keep theirs: FSDP2 refuses others, and they are small.
        x = (pixels.contiguous(memory_format=self._memory_format) - self.mean) / self.std
        pooling = self.config.pooling
        if pooling == "tower":
            return self.backbone(x)
        tokens = self.backbone.forward_features(x)  # (N, T, C)
        if pooling == "map":
            return self.backbone.forward_head(tokens, pre_logits=True)
        prefix = self.backbone.num_prefix_tokens
        parts = []
        if pooling in ("cls", "cls+avg"):
            parts.append(tokens[:, 0])
        if pooling in ("avg", "cls+avg"):
            parts.append(tokens[:, prefix:].mean(1))
        return torch.cat(parts, dim=1)

    def transform(self, *, squash: bool = False) -> Callable[[Image.Image], torch.Tensor]:
        """Return the function from an RGB image to (3, H, W) uint8 pixels.

        Args:
            squash: resize without cropping even where image_tower.resize says otherwise.
        """
        squash = squash or self.config.resize == "squash"
        return timm.data.create_transform(
            input_size=(3, self.image_size, self.image_size),
            interpolation=self.interpolation,
            crop_mode="squash" if squash else "center",
            crop_pct=1.0 if squash else self.crop_pct,
            normalize=False,
        )

    def draft(self) -> int | None:
        """Pixels that the short side of a JPEG decoded at a reduced scale must keep: what `transform` resizes it to.

        None where images are decoded at full size.
        """
        return math.floor(self.image_size / self.crop_pct) if self.config.jpeg_draft else None

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the tower that determines an embedding; weights by their hash."""
        weights = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.backbone.state_dict().items()):
            weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {
            "model": self.config.model,
            "model_args": self.config.model_args,
            "weights": weights.hexdigest(),
            "pooling": self.config.pooling,
            "width": self.embedding_width,
            "transform": {
                "image_size": self.image_size,
                "resize": self.config.resize,
                "jpeg_draft": self.config.jpeg_draft,
                "crop_pct": self.crop_pct,
                "interpolation": self.interpolation,
                "mean": [round(v / 255, 6) for v in self.mean.flatten().tolist()],
                "std": [round(v / 255, 6) for v in self.std.flatten().tolist()],
            },
        }

    def _probe(self) -> torch.Tensor:
        """(1, D) embedding of a blank image; autograd keeps the graph but no activations."""
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        try:
            with graph_only():
                row: torch.Tensor = self(blank)
        except (AssertionError, RuntimeError) as error:
            raise UserError(
                f"{self.config.model} does not take images of {self.image_size} pixels ({first_line(error)}); "
                "set image_tower.image_size, or image_tower.model_args.img_size"
            ) from error
        if row.ndim != 2:
            raise UserError(
                f"{self.config.model} with pooling {self.config.pooling!r} returns {tuple(row.shape)}, expected "
                "(1, D), one row per image; choose another image_tower.pooling or set model_args.global_pool"
            )
        return row


class ImageEncoder(nn.Module):
    """The image side of training: the tower, or rows of a locked tower from the cache; then the head, if any.

    Attributes:
        dim: width of the output embeddings.
        pretrained: names of the parameters that came from weights, as in `named_parameters`.
        unused: names of the parameters that the tower never uses; they are frozen.
    """

    def __init__(self, tower: ImageTower | None, *, width: int, head: int | None, center: torch.Tensor | None = None):
        """Put a head of random weights on a tower or on cached rows.

        Args:
            tower: trainable; None: the inputs are rows of the cache.
            width: of the tower's embeddings or of the rows.
            head: width of a linear head without a bias; None: no head.
            center: (width,) what is subtracted from each row, the mean of the training rows; None: nothing. The mean
                of the rows as the tower made them, not of unit rows, so that a head sees the same directions scaled
                as before. Source: the mean removal of "All-but-the-Top" (arXiv:1702.01417).
        """
        super().__init__()
        self.tower = tower
        # A frozen parameter rather than a buffer: DDP would send a buffer to all ranks at every step.
        self.center = None if center is None else nn.Parameter(center, requires_grad=False)
        self.head = nn.Linear(width, head, bias=False) if head else None
        self.dim = head or width
        self.pretrained = (
            frozenset(f"tower.{name}" for name in tower.pretrained) if tower is not None else frozenset[str]()
        )
        self.unused = [f"tower.{name}" for name in tower.unused] if tower is not None else []

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (N, 3, H, W) uint8 pixels, or (N, width) rows of the cache, as (N, dim), not normalized."""
        rows = images.float() if self.tower is None else self.tower(images)
        if self.center is not None:
            rows = rows - self.center
        return rows if self.head is None else self.head(rows)


def _build(config: ImageTowerConfig) -> nn.Module:
    _check_arguments(config.model_args)
    folder = config.model.removeprefix(_LOCAL) if config.model.startswith(_LOCAL) else None
    name = config.model if folder is None else _LOCAL + (folder := expand(folder, "image_tower.model"))
    known = config.model.startswith((_LOCAL, *_HUB)) or timm.is_model(config.model.split(".")[0])
    if not known:
        near = difflib.get_close_matches(config.model.split(".")[0], timm.list_models(), n=5)
        hint = f"names like it: {', '.join(near)}" if len(near) > 0 else "see timm.list_models()"
        raise UserError(f"timm {timm.__version__} has no image_tower.model {config.model!r}; {hint}")
    # timm accepts a folder that lacks tensors, because num_classes is 0; `_load_weights` refuses it.
    pretrained = config.pretrained and config.weights is None and folder is None
    by_hub = pretrained or name.startswith(_HUB)
    if folder is not None and Path(folder).is_dir():
        try:
            check_regular(folder)
        except OSError as error:
            raise UserError(f"cannot load {config.model}: {error.strerror}; name a folder of plain files") from error
    try:
        with hub_or_cache() if by_hub else nullcontext():
            backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, **config.model_args)
    except Exception as error:
        if isinstance(error, TypeError) and config.model_args:
            raise UserError(
                f"{config.model} does not take image_tower.model_args {config.model_args}: {first_line(error)}"
            ) from error
        if by_hub:
            raise UserError(
                f"cannot load {config.model} ({first_line(error)}). Without access to the Hub give the weights as a "
                "file (image_tower.weights: FILE.safetensors) or a folder (image_tower.model: local-dir:FOLDER)"
            ) from error
        if folder is not None:
            raise UserError(
                f"cannot load {config.model} ({describe_failure(error)}). Name a folder as timm saves it: config.json, "
                "with the name of the architecture, and the weights"
            ) from error
        raise UserError(
            f"cannot build {config.model} ({first_line(error)}); check image_tower.model and image_tower.model_args"
        ) from error
    if config.weights is not None:
        path = expand(config.weights, "image_tower.weights")
        try:
            open_regular(path).close()
        except OSError as error:
            raise UserError(f"image_tower.weights {path} cannot be read: {error.strerror}") from error
        _load_weights(backbone, path)
    elif folder is not None and config.pretrained:
        _load_weights(backbone, folder)
    return backbone


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse model_args that load weights from a place that the experiment's other fields do not name."""
    for name in arguments:
        if name.startswith(_LOADING):
            raise UserError(
                f"image_tower.model_args.{name} says where weights come from, but model_args are for the architecture; "
                "use image_tower.weights, image_tower.model or image_tower.pretrained"
            )


def _load_weights(backbone: Any, path: str) -> None:
    try:
        if path.endswith(".npz"):
            _check_depth(backbone, path)
            timm.models.load_checkpoint(backbone, path)
            return
        read = load_state_dict_from_path if Path(path).is_dir() else timm.models.load_state_dict
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on pickles that it then refuses
            state = read(path, weights_only=True)
        # Released checkpoints come in several layouts; each timm architecture has a function that converts its own.
        adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, backbone) if adapt is not None else state
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read the weights {path} into the image tower: {_weights_problem(error)}; expected .safetensors, "
            ".pth or .pt of tensors alone, .npz (AugReg), or a folder as timm saves it. Download or convert it again"
        ) from error
    heads = backbone.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {k: v for k, v in state.items() if k.rsplit(".", 1)[0] not in heads}
    expected = backbone.state_dict()
    problems = {
        "missing": [k for k in expected if k not in state],
        "not of this model": [k for k in state if k not in expected],
        "of another shape": [
            f"{k} {tuple(state[k].shape)}, expected {tuple(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    if any(problems.values()):
        listed = [f"{len(v)} {k}: {', '.join(v[:3])}{' …' if len(v) > 3 else ''}" for k, v in problems.items() if v]
        raise UserError(
            f"the weights {path} do not fit the image tower; {'; '.join(listed)}. "
            "Check image_tower.model and model_args"
        )
    backbone.load_state_dict(state)


def _weights_problem(error: Exception) -> str:
    """Why a file of weights cannot be read, without the libraries' advice to trust it."""
    text = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or "pickle" in text:
        return "it holds pickled objects, and siglit unpickles nothing"
    if isinstance(error, (AttributeError, TypeError)) or "load_pretrained" in text:
        return "it does not hold tensors by their names in this model"
    if isinstance(error, EOFError) or "No data left" in text:
        return "it is empty or cut off"
    return "it is damaged or cut off" if "miniz" in text else text.removeprefix("Error while deserializing header: ")


def _check_depth(backbone: Any, path: str) -> None:
    """Refuse a .npz of another depth: timm would read as many blocks as the tower has and ignore the rest."""
    with np.load(path) as arrays:
        numbered = {m[1] for name in arrays.files if (m := re.search(r"Transformer/encoderblock_(\d+)/", name))}
        stacked = [n for n in arrays.files if n.endswith("Transformer/encoderblock/LayerNorm_0/scale")]
        depth = arrays[stacked[0]].shape[0] if len(stacked) > 0 else len(numbered)
    if depth and depth != len(backbone.blocks):
        raise UserError(
            f"the weights {path} do not fit the image tower; they have {depth} blocks, expected "
            f"{len(backbone.blocks)}. Check image_tower.model and model_args"
        )


def _check_pooling(backbone: nn.Module, config: ImageTowerConfig) -> None:
    if config.pooling not in _TOKEN_POOLINGS:
        return
    if not hasattr(backbone, "num_prefix_tokens"):
        raise UserError(f"{config.model} has no tokens to pool; image_tower.pooling must be 'tower'")
    # num_prefix_tokens counts register tokens too, so it does not show whether there is a class token.
    holder = getattr(backbone, "embeds", backbone)
    if config.pooling in ("cls", "cls+avg") and getattr(holder, "cls_token", None) is None:
        raise UserError(f"{config.model} has no class token; image_tower.pooling can be 'tower' or 'avg'")
    if config.pooling == "map" and getattr(backbone, "attn_pool", None) is None:
        raise UserError(f"{config.model} has no MAP head; image_tower.pooling can be 'tower', 'cls' or 'avg'")
