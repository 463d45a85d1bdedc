"""A trained run, ready to be evaluated: its towers, its tokenizer, and the embeddings of a split's images.

A locked image tower left them in the cache; a trained one embeds the images first, into a cache of its own in the
run's folder, named after its weights. Shapes: N images, D embedding width.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from siglit.cache import CacheError, EmbeddingCache
from siglit.config import Experiment, TextTowerConfig
from siglit.data.sources import open_source
from siglit.embedding import embed_source
from siglit.errors import UserError
from siglit.evaluation.encoding import unit_rows
from siglit.evaluation.index import is_index_of, save_index
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.caches import open_cache
from siglit.runs.checkpoints import LAST, newest
from siglit.runs.folder import output_dir
from siglit.runs.tokenizer import tokenizer_path

_LARGEST_LOG_SCALE = 80.0
"""e⁸⁰ times a cosine is still a float32."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained run and the images of one split."""

    cache: EmbeddingCache
    """Outputs of the image tower, not normalised, with keys and captions."""
    zimg: np.ndarray
    """(N, D) float32 unit rows: the cache's, behind the head if there is one."""
    tower: TextTower
    """In evaluation mode, on the CPU."""
    tokenizer: Tokenizer
    """The tokenizer it was trained with."""
    logit_scale: float
    """Learned t."""
    logit_bias: float
    """Learned b."""
    step: int
    """Optimiser steps taken."""
    checkpoint: str
    """File it came from."""
    index_file: Path
    """Where `index_path` keeps the index over `zimg`: another cache or head has another file."""

    def ensure_exact_index(self) -> Path:
        """File of the exact faiss index over `zimg`, written if nobody has asked for it before, or if it is damaged."""
        if not is_index_of(self.index_file, self.zimg):
            save_index(self.zimg, self.index_file)
        return self.index_file

    def origin(self) -> dict[str, Any]:
        """What a result belongs to, for its JSON: checkpoint, step, cache and the digest of its rows."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "cache": str(self.cache.path),
            "cache_digest": self.cache.digest,
        }


def open_trained(experiment: Experiment, split: Literal["train", "val"] | None = None) -> TrainedRun:
    """Load the run's checkpoint, embed the images of a split (None: eval.split) if no cache holds them.

    Raises:
        UserError: there is no checkpoint, it is not one of siglit's, or it belongs to another cache or tokenizer.
    """
    if split is not None:
        experiment = replace(experiment, eval=replace(experiment.eval, split=split))
    locked = experiment.mode == "locked"
    cache = open_cache(experiment, experiment.eval.split) if locked else None
    path, state = _read(experiment)
    about, weights = state["siglit"], state["state_dict"]
    if about["mode"] != experiment.mode:
        raise UserError(
            f"{path} was trained with mode {about['mode']}, but the experiment says {experiment.mode}; change it back"
        )
    tokenizer = load_tokenizer(tokenizer_path(experiment), experiment.tokenizer)
    if tokenizer.fingerprint != about["tokenizer"]:
        raise UserError(
            f"{path} was trained with another tokenizer than {tokenizer_path(experiment)} of length "
            f"{experiment.tokenizer.length}; set tokenizer.path, .length and .lowercase as they were in training"
        )
    _check_finite(path, weights)
    side = _image_side(experiment, path, about, _part(weights, "image_tower."), cache)
    cache = cache or _embed(experiment, side)
    zimg, index_file = _behind_head(experiment, cache, side)
    tower = _text_tower(path, about, _part(weights, "text_tower."))
    return TrainedRun(
        cache=cache,
        zimg=zimg,
        tower=tower,
        tokenizer=tokenizer,
        logit_scale=math.exp(weights["log_scale"].item()),
        logit_bias=weights["logit_bias"].item(),
        step=int(state["global_step"]),
        checkpoint=path,
        index_file=index_file,
    )


_KEYS = {"mode", "tokenizer", "image_head", "text_tower", "built_for"}
"""What every checkpoint says of itself under "siglit"."""


def _read(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    kept = output_dir(experiment) / "checkpoints"
    path = experiment.eval.checkpoint or str(newest(kept) or kept / LAST)
    if not Path(path).is_file():
        raise UserError(
            f"there is no checkpoint {path}; run `siglit train` with this experiment, or set eval.checkpoint"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = _KEYS - state["siglit"].keys()
        state["state_dict"].items(), state["global_step"]
    except OSError:
        raise
    except Exception:  # whatever torch makes of bytes that are no checkpoint
        missing = _KEYS
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of siglit, or is damaged; set eval.checkpoint to one, such as {kept / LAST}"
        )
    return path, state


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _check_finite(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Refuse a model that has diverged: its figures would be numbers all the same, and some of them good ones."""
    for name in ("log_scale", "logit_bias"):
        if name not in weights:
            raise UserError(f"{path} has no {name}; train again, or set eval.checkpoint")
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if weights["log_scale"].abs() > _LARGEST_LOG_SCALE:
        broken.append("log_scale")
    if broken:
        raise UserError(
            f"{path} holds weights that are no finite numbers ({broken[0]}); see metrics.csv for where training went "
            "wrong, or set eval.checkpoint"
        )


def _text_tower(path: str, about: dict[str, Any], weights: dict[str, torch.Tensor]) -> TextTower:
    """The text tower as it was trained."""
    try:
        tower = TextTower(TextTowerConfig(**about["text_tower"]), **about["built_for"])
        tower.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit the text towers of this version of siglit: {told}; train again, or set "
            "eval.checkpoint"
        ) from error
    return tower.eval()


def _image_side(
    experiment: Experiment,
    path: str,
    about: dict[str, Any],
    weights: dict[str, torch.Tensor],
    cache: EmbeddingCache | None,
) -> ImageEncoder:
    """The image side as it was trained, without the weights that it started from."""
    if about["image_head"] != experiment.image_tower.head:
        raise UserError(
            f"{path} was trained with image_tower.head {about['image_head']}, but the experiment says "
            f"{experiment.image_tower.head}; change it back"
        )
    if cache is not None:
        if about["image_tower"] != cache.fingerprint["image_tower"]:
            raise UserError(
                f"{path} was trained on embeddings of {_tower_words(about['image_tower'])}, but {cache.path} holds "
                f"those of {_tower_words(cache.fingerprint['image_tower'])}; train again, or set cache.path"
            )
        side = ImageEncoder(None, width=cache.dim, head=experiment.image_tower.head)
    else:
        tower = ImageTower(replace(experiment.image_tower, pretrained=False, weights=None))
        side = ImageEncoder(tower, width=tower.embedding_width, head=experiment.image_tower.head)
    try:
        side.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the image tower of the experiment: {told}") from error
    return side.eval()


def _embed(experiment: Experiment, side: ImageEncoder) -> EmbeddingCache:
    """Embed the images of eval.split with the trained tower."""
    split = experiment.eval.split
    spec = getattr(experiment.data, split)
    if spec is None:
        raise UserError(f"data.{split} is not set: there is nothing held out; set it, or choose another eval.split")
    assert side.tower is not None
    weights = side.tower.fingerprint()["weights"]
    fabric = Fabric(accelerator=experiment.eval.accelerator, devices=1)
    side.tower.to(fabric.device)
    source = open_source(spec)
    made_of = hashlib.blake2b(json.dumps(source.identity(), sort_keys=True).encode(), digest_size=4).hexdigest()
    path = output_dir(experiment) / "embeddings" / weights[:16] / f"{split}-{made_of}"
    try:
        done = embed_source(
            fabric,
            side.tower,
            source,
            path,
            f"embedding {split}",
            experiment.cache,
            max_image_pixels=experiment.data.max_image_pixels,
            workers=experiment.data.workers,
            precision=experiment.image_tower.precision,
            weights_file=None,  # the trained weights are not those of the file
        )
    except CacheError as error:
        raise UserError(str(error)) from error
    side.cpu()
    if len(done.cache) == 0:
        raise UserError(f"{path} holds no image; see data.{split} in the experiment")
    return done.cache


def _behind_head(experiment: Experiment, cache: EmbeddingCache, side: ImageEncoder) -> tuple[np.ndarray, Path]:
    """Unit rows of the cache's images, and the file of the index over them."""
    rows = cache.gather(np.arange(len(cache)))
    name = cache.digest[:16]
    if side.head is None:
        zimg = unit_rows(rows)
    else:
        weight = side.head.weight.detach()
        zimg = F.normalize(torch.from_numpy(rows).float() @ weight.T, dim=1).numpy()
        name += "-" + hashlib.blake2b(weight.numpy().tobytes(), digest_size=8).hexdigest()
    return zimg, output_dir(experiment) / f"images-{experiment.eval.split}-{name}.faiss"


def _tower_words(tower: dict[str, Any]) -> str:
    if tower.get("imported"):
        return f"{tower['model']} (imported)"
    return f"{tower['model']} (pooling {tower['pooling']}, weights {tower['weights'][:8]})"
