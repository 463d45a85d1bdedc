"""The caches of an experiment: where they are, and whether they are what the experiment asks for."""

import logging
import os
from pathlib import Path
from typing import Any

from siglit.cache import CacheError, EmbeddingCache
from siglit.config import Experiment, ImageTowerConfig, SourceSpec
from siglit.data.sources import source_identity
from siglit.errors import UserError
from siglit.runs.launch import is_first_process
from siglit.runtime.files import file_hash

_logger = logging.getLogger(__name__)


def cache_path(experiment: Experiment, split: str) -> Path:
    """Folder of the cache of a split, "train" or "val"."""
    return experiment.cache_folder / split


def open_cache(experiment: Experiment, split: str) -> EmbeddingCache:
    """Open the cache of a split and see that it is what the experiment asks for.

    Raises:
        UserError: there is none, or another tower or transform made it.
    """
    path = cache_path(experiment, split)
    spec = getattr(experiment.data, split)
    if spec is None:
        raise UserError(f"data.{split} is not set: there is nothing held out; set it, or choose another eval.split")
    try:
        cache = EmbeddingCache(path)
        cache.check_fingerprint(*_asked_for(experiment.image_tower, cache.fingerprint))
        _check_source(spec, cache)
    except CacheError as error:
        raise UserError(str(error)) from error
    if len(cache) == 0:
        raise UserError(f"{path} holds no image; see data.{split} in the experiment")
    return cache


def _check_source(spec: SourceSpec, cache: EmbeddingCache) -> None:
    """See that the cache was made of these samples; a machine without the files can only trust it."""
    made = cache.fingerprint.get("source")
    if not (isinstance(made, dict) and "format" in made and "files" in made):
        return  # imported or merged: not made of a source of the experiment
    try:
        asked = source_identity(spec)
    except UserError as error:
        if is_first_process():
            _logger.warning(f"the source of {cache.path} cannot be compared here: {error}")
        return
    if asked is not None:
        cache.check_fingerprint({"source": asked}, ["source"])


def _asked_for(config: ImageTowerConfig, made: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what the experiment says of the tower, in the fingerprint's form, and the fields that it says.

    Training needs neither the tower nor its weights on the machine, so only what the experiment states is compared; a
    local weights file is compared by hash where it is there. Fields that an earlier siglit did not record are left out.
    """
    if made["image_tower"].get("imported"):  # nothing but the name is known of what somebody else embedded
        return {"image_tower": {"model": config.model}}, ["image_tower.model"]
    weights = config.weights and os.path.expandvars(os.path.expanduser(config.weights))
    stated: dict[str, Any] = {"model": config.model, "model_args": config.model_args, "pooling": config.pooling}
    if weights is None and "weights_file" in made["image_tower"]:
        stated["weights_file"] = None
    elif weights and os.path.isfile(weights):
        stated["weights_file"] = file_hash(weights)
    transform: dict[str, Any] = {"resize": config.resize}
    if "jpeg_draft" in made["image_tower"]["transform"]:
        transform["jpeg_draft"] = config.jpeg_draft
    transform |= {k: getattr(config, k) for k in ("image_size", "interpolation") if getattr(config, k)}
    transform |= {k: [round(v, 6) for v in getattr(config, k)] for k in ("mean", "std") if getattr(config, k)}
    merged = {**made["image_tower"], **stated, "transform": {**made["image_tower"]["transform"], **transform}}
    return {**made, "image_tower": merged}, ["image_tower"]
