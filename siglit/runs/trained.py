"""A trained run, ready to be evaluated: its text tower, its tokenizer, and the embeddings of a split's images.

The outputs of a locked image tower are in the experiment's cache. A trained tower embeds the images first, into a cache
in the run's folder that is named after the tower's weights. Shapes: N images, M texts, L tokens, D embedding width, W
width of the image tower.
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from siglit.evaluation.encoding import encode_ids, unit_rows
from siglit.evaluation.index import is_index_of, save_index
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.caches import open_cache, source_spec
from siglit.runs.checkpoints import LAST, newest
from siglit.runs.folder import ensure_folder
from siglit.runs.tokenizer import tokenizer_path

_logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_MAX_LOG_SCALE = 80.0
"""e⁸⁰ times a cosine is still finite in float32."""
_KEYS = {"mode", "tokenizer", "image_head", "text_tower", "built_for"}
"""What every checkpoint of siglit has under "siglit"."""
_SCALARS = ("log_scale", "logit_bias")
"""The loss's parameters in a checkpoint."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained run and the images of one split."""

    cache: EmbeddingCache
    """Outputs of the image tower, not normalized, with keys and captions."""
    image_head: torch.Tensor | None
    """(D, W) weight of the linear map behind the image tower; None where there is none and D is W."""
    image_center: torch.Tensor | None
    """(W,) mean of the training images' rows, which is subtracted before the head; None: nothing is."""
    tower: TextTower
    """The text tower in evaluation mode, on the device of the last call that encoded texts, at first the CPU."""
    tokenizer: Tokenizer
    """The tokenizer it was trained with."""
    logit_scale: float
    """Learned t."""
    logit_bias: float
    """Learned b."""
    step: int
    """Optimizer steps taken."""
    checkpoint: str
    """File it came from."""
    index_file: Path
    """Where `ensure_exact_index` keeps the index over `zimg`; another cache or head has another file."""
    batch_size: int
    """Texts per forward pass: eval.batch_size."""

    @cached_property
    def zimg(self) -> np.ndarray:
        """(N, D) float32 unit rows of the cache's images."""
        return self.encode_image(self.cache.gather(np.arange(len(self.cache))))

    def encode_image(self, rows: np.ndarray) -> np.ndarray:
        """Map (N, W) float16 outputs of the image tower, as caches hold them, to (N, D) float32 unit rows."""
        if self.image_center is None and self.image_head is None:
            return unit_rows(rows)
        zimg = torch.from_numpy(rows).float()
        if self.image_center is not None:
            zimg -= self.image_center
        return F.normalize(zimg if self.image_head is None else zimg @ self.image_head.T, dim=1).numpy()

    def encode_text(self, texts: Sequence[str], *, device: torch.device = _CPU, quiet: bool = False) -> np.ndarray:
        """Embed M texts as (M, D) float32 unit rows.

        Args:
            texts: captions, prompts or queries.
            device: where to run the text tower, which is moved there.
            quiet: show no progress.
        """
        return self.encode_ids(self.tokenizer(texts), device=device, quiet=quiet)

    def encode_ids(self, ids: np.ndarray, *, device: torch.device = _CPU, quiet: bool = False) -> np.ndarray:
        """Embed (M, L) ids of the run's tokenizer as (M, D) float32 unit rows; see `encode_text`."""
        return encode_ids(self.tower.to(device), ids, batch_size=self.batch_size, device=device, quiet=quiet)

    def ensure_exact_index(self) -> Path:
        """File of the exact faiss index over `zimg`, written if it is missing or damaged."""
        if not is_index_of(self.index_file, self.zimg):
            if self.index_file.exists():
                _logger.warning(f"{self.index_file} is damaged, or of other rows; it is written again")
            save_index(self.zimg, self.index_file)
        return self.index_file

    def origin(self) -> dict[str, Any]:
        """What a result was computed from, for its JSON: checkpoint, step, cache and the digest of its rows."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "cache": str(self.cache.path),
            "cache_digest": self.cache.digest,
        }


def open_trained(experiment: Experiment, split: Literal["train", "val"] | None = None) -> TrainedRun:
    """Load the run's checkpoint; a trained image tower embeds the images of the split, if no cache has them.

    Args:
        experiment: of the run.
        split: whose images to open; default: eval.split.

    Raises:
        UserError: there is no checkpoint, it is damaged or has weights that are not finite, or it was trained with
            another mode, tokenizer, image tower or head.
    """
    split = split or experiment.eval.split
    cache = open_cache(experiment, split) if experiment.mode == "locked" else None
    path, state = _read(experiment)
    description, weights = state["siglit"], state["state_dict"]
    if description["mode"] != experiment.mode:
        raise UserError(
            f"{path} was trained with mode {description['mode']}, but the experiment has {experiment.mode}; change it "
            "back"
        )
    tokenizer = _tokenizer(experiment, path, description)
    _check_finite(path, weights)
    encoder = _image_encoder(experiment, path, description, _part(weights, "image_tower."), cache)
    if cache is None:
        cache = _embed(experiment, split, encoder)
    head = None if encoder.head is None else encoder.head.weight.detach()
    center = None if encoder.center is None else encoder.center.detach()
    return TrainedRun(
        cache=cache,
        image_head=head,
        image_center=center,
        tower=_text_tower(path, description, _part(weights, "text_tower.")),
        tokenizer=tokenizer,
        logit_scale=math.exp(weights["log_scale"].item()),
        logit_bias=weights["logit_bias"].item(),
        step=int(state["global_step"]),
        checkpoint=path,
        index_file=_index_file(ensure_folder(experiment.folder), split, cache, [head, center]),
        batch_size=experiment.eval.batch_size,
    )


def _tokenizer(experiment: Experiment, path: str, description: dict[str, Any]) -> Tokenizer:
    """The experiment's tokenizer, if it is the one that the checkpoint was trained with."""
    config = experiment.tokenizer
    name = tokenizer_path(experiment.folder, config, experiment.text_tower.pretrained)
    tokenizer = load_tokenizer(name, config)
    if tokenizer.fingerprint != description["tokenizer"]:
        raise UserError(
            f"{path} was trained with another tokenizer than {name} of length {config.length}; set tokenizer.path, "
            ".length and .lowercase as they were in training"
        )
    return tokenizer


def _read(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """Path and content of eval.checkpoint, by default of the run's newest checkpoint."""
    folder = ensure_folder(experiment.folder) / "checkpoints"
    path = experiment.eval.checkpoint or str(newest(folder) or folder / LAST)
    if not Path(path).is_file():
        raise UserError(
            f"there is no checkpoint {path}; run `siglit train` with this experiment, or set eval.checkpoint"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on pickles that it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
        missing = _KEYS - state["siglit"].keys()
        int(state["global_step"])
        if not all(isinstance(weight, torch.Tensor) for weight in state["state_dict"].values()):
            missing = _KEYS
        if any(state["state_dict"][name].numel() != 1 for name in _SCALARS if name in state["state_dict"]):
            missing = _KEYS
    except OSError:
        raise
    except Exception:  # torch raises errors of many types for a file that is not a checkpoint
        missing = _KEYS
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of siglit, or is damaged; set eval.checkpoint to one, such as {folder / LAST}"
        )
    return path, state


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _check_finite(path: str, weights: dict[str, torch.Tensor]) -> None:
    """Refuse a model that has diverged: its metrics look like any others, and some of them look good."""
    for name in _SCALARS:
        if name not in weights:
            raise UserError(f"{path} has no {name}; train again, or set eval.checkpoint")
    non_finite = [name for name, value in weights.items() if not value.isfinite().all()]
    if weights["log_scale"].abs() > _MAX_LOG_SCALE:
        non_finite.append("log_scale")
    if non_finite:
        raise UserError(
            f"{path} has weights that are not finite ({non_finite[0]}); see in metrics.csv where training diverged, or "
            "set eval.checkpoint"
        )


def _text_tower(path: str, description: dict[str, Any], weights: dict[str, torch.Tensor]) -> TextTower:
    """The text tower with its trained weights, in evaluation mode."""
    try:
        tower = TextTower(TextTowerConfig(**description["text_tower"]), **description["built_for"])
        tower.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit the text towers of this version of siglit: {reason}; train again, or set "
            "eval.checkpoint"
        ) from error
    return tower.eval()


def _image_encoder(
    experiment: Experiment,
    path: str,
    description: dict[str, Any],
    weights: dict[str, torch.Tensor],
    cache: EmbeddingCache | None,
) -> ImageEncoder:
    """The image tower and head with their trained weights, in evaluation mode; reads no pretrained weights."""
    if description["image_head"] != experiment.image_tower.head:
        raise UserError(
            f"{path} was trained with image_tower.head {description['image_head']}, but the experiment has "
            f"{experiment.image_tower.head}; change it back"
        )
    centered = description.get("image_center") is not None
    if centered != experiment.image_tower.center:
        raise UserError(
            f"{path} was trained with image_tower.center {str(centered).lower()}, but the experiment has "
            f"{str(not centered).lower()}; change it back"
        )
    if cache is not None:
        expected, actual = description["image_tower"], cache.fingerprint["image_tower"]
        if expected != actual:
            raise UserError(
                f"{path} was trained on embeddings of {_describe_tower(expected)}, but {cache.path} holds those of "
                f"{_describe_tower(actual)}; train again, or set cache.path"
            )
        center = torch.zeros(cache.dim) if centered else None  # the weights have the training images' mean
        encoder = ImageEncoder(None, width=cache.dim, head=experiment.image_tower.head, center=center)
    else:
        tower = ImageTower(replace(experiment.image_tower, pretrained=False, weights=None))
        encoder = ImageEncoder(tower, width=tower.embedding_width, head=experiment.image_tower.head)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the image tower of the experiment: {reason}") from error
    return encoder.eval()


def _embed(experiment: Experiment, split: str, encoder: ImageEncoder) -> EmbeddingCache:
    """Embed the images of a split with the trained tower, or return the cache that has them already."""
    spec = source_spec(experiment.data, split)
    assert encoder.tower is not None
    weights = encoder.tower.fingerprint()["weights"]
    fabric = Fabric(accelerator=experiment.eval.accelerator, devices=1)
    encoder.tower.to(fabric.device)
    source = open_source(spec)
    source_digest = hashlib.blake2b(json.dumps(source.identity(), sort_keys=True).encode(), digest_size=4).hexdigest()
    path = ensure_folder(experiment.folder) / "embeddings" / weights[:16] / f"{split}-{source_digest}"
    try:
        embedded = embed_source(
            fabric,
            encoder.tower,
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
    encoder.cpu()
    if len(embedded.cache) == 0:
        raise UserError(f"{path} holds no image; check data.{split}")
    return embedded.cache


def _index_file(folder: Path, split: str, cache: EmbeddingCache, applied: Sequence[torch.Tensor | None]) -> Path:
    """File of the index over the cache's images, named after what it is computed from: rows, head and center."""
    name = cache.digest[:16]
    for tensor in applied:
        if tensor is not None:
            name += "-" + hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()
    return folder / f"images-{split}-{name}.faiss"


def _describe_tower(tower: Any) -> str:
    if not isinstance(tower, dict) or not tower.keys() >= {"model"}:
        return "an image tower that it does not name"
    if tower.get("imported"):
        return f"{tower['model']} (imported)"
    return f"{tower['model']} (pooling {tower['pooling']}, weights {tower['weights'][:8]})"
