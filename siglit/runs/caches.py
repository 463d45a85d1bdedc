"""The caches of an experiment: opened, and checked against the experiment."""

import logging
import os
from typing import Any

from siglit.cache import CacheError, EmbeddingCache
from siglit.config import DataConfig, Experiment, ImageTowerConfig, SourceSpec
from siglit.data.sources import source_identity
from siglit.errors import UserError
from siglit.runs.launch import is_first_process
from siglit.runtime.files import file_hash

_logger = logging.getLogger(__name__)


def source_spec(data: DataConfig, split: str) -> SourceSpec:
    """Return data.train or data.val.

    Raises:
        UserError: data.val is not set.
    """
    spec: SourceSpec | None = getattr(data, split)
    if spec is None:
        raise UserError(f"data.{split} is not set; set it, or choose another eval.split")
    return spec


def open_cache(experiment: Experiment, split: str) -> EmbeddingCache:
    """Open the cache of a split, "train" or "val", and check its fingerprint against data and image_tower.

    Raises:
        UserError: data.val is not set, the cache is missing, empty or damaged, or it was made of another source or with
            another tower or transform.
    """
    path = experiment.cache_folder / split
    spec = source_spec(experiment.data, split)
    try:
        cache = EmbeddingCache(path)
        cache.check_fingerprint(*_expected_fingerprint(experiment.image_tower, cache.fingerprint))
        _check_source(spec, cache)
    except CacheError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from error
    if len(cache) == 0:
        raise UserError(f"{path} holds no image; check data.{split}")
    return cache


def _check_source(spec: SourceSpec, cache: EmbeddingCache) -> None:
    """Check that the cache was made of these samples, on a machine that has the files."""
    actual = cache.fingerprint.get("source")
    if not (isinstance(actual, dict) and "format" in actual and "files" in actual):
        return  # imported or merged: not made of a source of the experiment
    try:
        expected = source_identity(spec)
    except UserError as error:
        if is_first_process():
            _logger.warning(f"cannot check whether {cache.path} was made of {spec.path}: {error}")
        return
    if expected is not None:
        cache.check_fingerprint({"source": expected}, ["source"])


def _expected_fingerprint(config: ImageTowerConfig, actual: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fingerprint that the experiment's tower would give, and the fields to compare.

    Training needs neither the tower nor its weights on the machine, so what the experiment does not state is copied
    from the cache's `actual` fingerprint; a local weights file is compared by hash if it is there. Fields that an
    earlier siglit did not record are left out.
    """
    tower = actual.get("image_tower")
    if not isinstance(tower, dict) or not (tower.get("imported") or isinstance(tower.get("transform"), dict)):
        raise CacheError("its index.json does not say which image tower it was made with; make the cache again")
    if tower.get("imported"):  # of rows that somebody else embedded, only the model's name is known
        return {"image_tower": {"model": config.model}}, ["image_tower.model"]
    weights = config.weights and os.path.expandvars(os.path.expanduser(config.weights))
    stated: dict[str, Any] = {"model": config.model, "model_args": config.model_args, "pooling": config.pooling}
    if weights is None and "weights_file" in tower:
        stated["weights_file"] = None
    elif weights and os.path.isfile(weights):
        stated["weights_file"] = file_hash(weights)
    transform: dict[str, Any] = {"resize": config.resize}
    if "jpeg_draft" in tower["transform"]:
        transform["jpeg_draft"] = config.jpeg_draft
    transform |= {k: getattr(config, k) for k in ("image_size", "interpolation") if getattr(config, k)}
    transform |= {k: [round(v, 6) for v in getattr(config, k)] for k in ("mean", "std") if getattr(config, k)}
    merged = {**tower, **stated, "transform": {**tower["transform"], **transform}}
    return {**actual, "image_tower": merged}, ["image_tower"]
