"""What the stages share of a run: its folder, its caches, its tokenizer and its trained text tower.

Knows where a run keeps things; computes nothing.
"""

import hashlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from siglit.cache import CacheError, EmbeddingCache
from siglit.checkpoints import LAST, newest
from siglit.config import Experiment, ImageTowerConfig, SourceSpec, TextTowerConfig
from siglit.data.sources import source_identity
from siglit.errors import UserError
from siglit.evaluation.encoding import unit_rows
from siglit.evaluation.retrieval import save_index
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece


def is_first_process() -> bool:
    """Tell whether this is the first of all processes of the run, also before Lightning has set up the group."""
    node = int(os.environ.get("NODE_RANK", "0"))  # all that is set where machines are started by hand
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0 and node == 0


def quiet_lightning() -> None:
    """Silence what Lightning says of itself; what matters of a run is said by its stage."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for harmless in (
        "Experiment logs directory",  # its rows are kept, see siglit.training
        "Checkpoint directory .* exists and is not empty",
        ".*does not have many workers",
        ".*The number of training batches .* is smaller than the logging interval",
        ".*LeafSpec.* is deprecated",
        ".*torch.distributed.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=harmless)


def check_accelerator(field: str, accelerator: str) -> None:
    """Refuse CUDA where there is none.

    Raises:
        UserError: `field` asks for it in vain.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{field} is cuda, but this machine has no CUDA device; use cpu or auto")


def output_dir(experiment: Experiment) -> Path:
    """Return the run's folder, made if it is missing."""
    assert experiment.output_dir is not None
    folder = Path(experiment.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but results need a folder; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_path(experiment: Experiment, split: str) -> Path:
    """Folder of the cache of a split, "train" or "val"."""
    assert experiment.cache.path is not None
    return Path(experiment.cache.path) / split


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def summary(experiment: Experiment) -> dict[str, Any]:
    """Return the run's summary.json, empty if there is none."""
    path = output_dir(experiment) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_to_summary(experiment: Experiment, command: str, value: Any) -> None:
    """Put one command's figures into the run's summary.json, beside those of the others."""
    write_json(output_dir(experiment) / "summary.json", {**summary(experiment), command: value})


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
            print(f"the source of {cache.path} cannot be compared here: {error}", file=sys.stderr)
        return
    if asked is not None:
        cache.check_fingerprint({"source": asked}, ["source"])


def file_hash(path: str) -> str:
    """BLAKE2b of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_path(experiment: Experiment) -> str:
    """Where the run's tokenizer is, or will be once it is trained."""
    return experiment.tokenizer.path or str(output_dir(experiment) / "tokenizer.model")


def ensure_tokenizer(experiment: Experiment, captions: Iterable[str]) -> str:
    """Return the path of the run's tokenizer, trained on the captions if it has none yet.

    Raises:
        UserError: the one that is there was trained with other settings.
    """
    path = Path(tokenizer_path(experiment))
    if experiment.tokenizer.path is not None:
        return str(path)
    config = experiment.tokenizer
    settings = {k: getattr(config, k) for k in ("vocab_size", "character_coverage", "lowercase")}
    note = path.with_suffix(".json")
    if path.exists():
        made = json.loads(note.read_text(encoding="utf-8")) if note.exists() else settings
        differing = [k for k in settings if made.get(k) != settings[k]]
        if differing:
            k = differing[0]
            raise UserError(
                f"{path} was trained with tokenizer.{k} {made.get(k)}, the experiment asks for {settings[k]}; "
                "remove the file, or choose another --output_dir"
            )
        return str(path)
    model = train_sentencepiece(captions, config)
    write_json(note, settings)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_bytes(model)
    os.replace(unfinished, path)
    return str(path)


@dataclass(frozen=True)
class TrainedText:
    """The trained text side of a run, ready to encode."""

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


def load_trained(experiment: Experiment, cache: EmbeddingCache) -> TrainedText:
    """Load the text tower of the run, checked against the cache it is to meet.

    Raises:
        UserError: there is no checkpoint, it is not one of siglit's, or it belongs to another image tower or tokenizer.
    """
    checkpoints = output_dir(experiment) / "checkpoints"
    path = experiment.eval.checkpoint or str(newest(checkpoints) or checkpoints / LAST)
    if not Path(path).is_file():
        raise UserError(
            f"there is no checkpoint {path}; run `siglit train` with this experiment, or set eval.checkpoint"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        about = state["siglit"]
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of siglit ({str(error).splitlines()[0][:120]})") from error
    if about["image_tower"] != cache.fingerprint["image_tower"]:
        raise UserError(
            f"{path} was trained on embeddings of {_tower_words(about['image_tower'])}, but {cache.path} holds those "
            f"of {_tower_words(cache.fingerprint['image_tower'])}; train again, or set cache.path"
        )
    tokenizer = load_tokenizer(tokenizer_path(experiment), experiment.tokenizer)
    if tokenizer.fingerprint != about["tokenizer"]:
        raise UserError(
            f"{path} was trained with another tokenizer than {tokenizer_path(experiment)} of length "
            f"{experiment.tokenizer.length}; set tokenizer.path, .length and .lowercase as they were in training"
        )
    tower = TextTower(TextTowerConfig(**about["text_tower"]), **about["built_for"])
    weights = state["state_dict"]
    tower.load_state_dict({k.removeprefix("tower."): v for k, v in weights.items() if k.startswith("tower.")})
    return TrainedText(
        tower=tower.eval(),
        tokenizer=tokenizer,
        logit_scale=math.exp(weights["log_scale"].item()),
        logit_bias=weights["logit_bias"].item(),
        step=int(state["global_step"]),
        checkpoint=path,
    )


def image_index(experiment: Experiment, cache: EmbeddingCache) -> Path:
    """Return the run's faiss index over the cache's images, built if it is missing; another cache has another file."""
    path = output_dir(experiment) / f"images-{experiment.eval.split}-{cache.digest[:16]}.faiss"
    if not path.exists():
        save_index(unit_rows(cache.gather(np.arange(len(cache)))), path)
    return path


def _asked_for(config: ImageTowerConfig, made: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what the experiment says of the tower, in the fingerprint's form, and the fields that it says.

    Training needs neither the tower nor its weights on the machine, so only what the experiment states is compared; a
    local weights file is compared by hash where it is there.
    """
    if made["image_tower"].get("imported"):  # nothing but the name is known of what somebody else embedded
        return {"image_tower": {"model": config.model}}, ["image_tower.model"]
    weights = config.weights and os.path.expandvars(os.path.expanduser(config.weights))
    stated: dict[str, Any] = {"model": config.model, "model_args": config.model_args, "pooling": config.pooling}
    if weights and os.path.isfile(weights):
        stated["weights_file"] = file_hash(weights)
    transform: dict[str, Any] = {"resize": config.resize}
    transform |= {k: getattr(config, k) for k in ("image_size", "interpolation") if getattr(config, k)}
    transform |= {k: [round(v, 6) for v in getattr(config, k)] for k in ("mean", "std") if getattr(config, k)}
    merged = {**made["image_tower"], **stated, "transform": {**made["image_tower"]["transform"], **transform}}
    return {**made, "image_tower": merged}, ["image_tower"]


def _tower_words(tower: dict[str, Any]) -> str:
    if tower.get("imported"):
        return f"{tower['model']} (imported)"
    return f"{tower['model']} (pooling {tower['pooling']}, weights {tower['weights'][:8]})"
