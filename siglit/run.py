"""What the stages share of a run: its folder, its caches and its tokenizer.

Knows where a run keeps things; computes nothing.
"""

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from siglit.cache import CacheError, EmbeddingCache
from siglit.config import Experiment, ImageTowerConfig, SourceSpec, TrainConfig
from siglit.data.sources import source_identity
from siglit.errors import UserError
from siglit.files import atomic_write, open_regular
from siglit.models.tokenizer import SentencePieceTokenizer, lowercases, train_sentencepiece


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
        r"Found \d+ module\(s\) in eval mode",  # a locked model's, on purpose
        ".*does not have many workers",
        ".*The number of training batches .* is smaller than the logging interval",
        ".*LeafSpec.* is deprecated",
        "Grad strides do not match bucket view strides",  # of the one channel of a depthwise kernel, as in ConvNeXt
        "FSDP2-wrapped module .* returned a view tensor",  # nothing here changes embeddings in place
    ):
        warnings.filterwarnings("ignore", message=harmless)


def check_accelerator(field: str, accelerator: str) -> None:
    """Refuse CUDA where there is none.

    Raises:
        UserError: `field` asks for it in vain.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{field} is cuda, but this machine has no CUDA device; use cpu or auto")


def device(field: str, accelerator: str) -> torch.device:
    """Return the device that `accelerator` means here; auto: CUDA where there is one.

    Raises:
        UserError: `field` asks for CUDA in vain.
    """
    check_accelerator(field, accelerator)
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def check_batch_size(train: TrainConfig) -> None:
    """Refuse a global batch that cannot be cut into equal parts.

    Raises:
        UserError: it cannot.
    """
    devices = train.devices * train.nodes
    if train.batch_size % devices:
        raise UserError(f"train.batch_size {train.batch_size} cannot be shared evenly by {devices} devices")


def check_batch_fits(train: TrainConfig, images: int) -> None:
    """Refuse a global batch of more pairs than there are images: an image gives one pair per pass.

    Args:
        train: the batch and the devices that share it.
        images: in one pass over data.train.

    Raises:
        UserError: train.batch_size is larger than the data.
    """
    if train.batch_size <= images:
        return
    devices = train.devices * train.nodes
    largest = images - images % devices
    advice = f"lower it to {largest} or less" if largest else f"{devices} devices need at least {devices} images"
    raise UserError(f"train.batch_size {train.batch_size} is larger than the {images} images of data.train; {advice}")


def check_launched(field: str, nodes: int) -> None:
    """Refuse several machines where nobody says which one this is: it would wait for the others, in silence.

    Raises:
        UserError: `field` asks for several, and neither torchrun nor SLURM has started this process.
    """
    if nodes > 1 and "MASTER_ADDR" not in os.environ and not SLURMEnvironment.detect():
        raise UserError(
            f"{field} is {nodes}, but this process was not started by torchrun or SLURM, which tell the machines of "
            f"each other: torchrun --nnodes {nodes} --nproc-per-node DEVICES --node-rank 0 --master-addr HOST "
            "-m siglit … on the first one, with --node-rank 1 on the next"
        )


def check_slurm_tasks(section: str, devices: int, nodes: int) -> None:
    """Refuse a job of SLURM that has not one task for each device: those that are too few wait for ever.

    Args:
        section: "train" or "cache", whose devices these are, for the message.
        devices: per machine.
        nodes: machines.

    Raises:
        UserError: SLURM has started this process as one of more, fewer or otherwise placed tasks.
    """
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():  # within a job, torchrun starts the ranks
        return
    tasks, per_node, machines = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES"))
    placed = per_node == str(devices) or (per_node is None and tasks == "1")
    if placed and tasks == str(devices * nodes) and machines in (None, str(nodes)):
        return
    asked = {"--ntasks": tasks, "--ntasks-per-node": per_node, "--nodes": machines}
    raise UserError(
        f"SLURM has started {' '.join(f'{option} {value}' for option, value in asked.items() if value)}, but "
        f"{section}.devices is {devices} and {section}.nodes {nodes}, and each device needs one task: start the job "
        f"with --nodes {nodes} --ntasks-per-node {devices} (not with --ntasks alone), or set {section}.devices and "
        f"{section}.nodes to what SLURM gives"
    )


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


def result_path(experiment: Experiment, kind: str, suffix: str = ".json") -> Path:
    """File of an evaluation's result: zeroshot.json, zeroshot-imagenet.json (eval.name), zeroshot-train.json."""
    split = None if experiment.eval.split == "val" else experiment.eval.split
    return output_dir(experiment) / ("-".join(part for part in (kind, experiment.eval.name, split) if part) + suffix)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


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
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_path(experiment: Experiment) -> str:
    """Where the run's tokenizer is, or will be once it is trained; a pretrained text tower brings its own."""
    given = experiment.tokenizer.path or experiment.text_tower.pretrained
    return given or str(output_dir(experiment) / "tokenizer.model")


def ensure_tokenizer(experiment: Experiment, captions: Iterable[str]) -> str:
    """Return the path of the run's tokenizer, trained on the captions if it has none yet.

    `tokenizer.json` beside it keeps what it was trained with, and as actual_vocab_size how many pieces it has; fewer
    than tokenizer.vocab_size are said on stderr.

    Raises:
        UserError: the one that is there was trained with other settings.
    """
    if experiment.tokenizer.path or experiment.text_tower.pretrained:
        return tokenizer_path(experiment)
    path = Path(tokenizer_path(experiment))
    config = experiment.tokenizer
    settings = {
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "lowercase": lowercases(config),
    }
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
    pieces = SentencePieceTokenizer(model, config.length, lowercases(config)).vocab_size
    write_json(note, {**settings, "actual_vocab_size": pieces})
    with atomic_write(path) as file:
        file.write(model)
    if pieces < config.vocab_size:
        print(
            f"{path} has {pieces:,} pieces, not tokenizer.vocab_size {config.vocab_size:,}: "
            "the captions support no more",
            file=sys.stderr,
            flush=True,
        )
    return str(path)


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
