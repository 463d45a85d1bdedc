"""The experiment: one tree of dataclasses that every command reads.

Holds names, units and defaults, and nothing else: reading YAML is the command's affair, acting on a field is the
affair of the module that the field belongs to. The text under each field is the help that `siglit COMMAND --help`
prints.
"""

import json
import math
import operator
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from siglit.errors import UserError

Format = Literal[
    "csv", "jsonl", "coco", "karpathy", "folder", "class_folders", "parquet", "webdataset", "xm3600", "hub"
]


@dataclass(frozen=True)
class SourceSpec:
    """Where a data set lies and how to read it."""

    format: Format
    """csv, jsonl, coco, karpathy, folder, class_folders (a folder of images for each class, as ImageNet's), parquet,
    webdataset, xm3600 or hub."""
    path: str
    """Listing file (csv, jsonl, coco, karpathy, xm3600), folder, or hub name. For parquet and webdataset: a file, a
    folder, or a pattern with globs, braces ({00000..00012}) and commas. ~ and ${VARIABLES} expand."""
    images: str | None = None
    """Folder that relative image paths start from. Default: the listing's folder; xm3600: `images` next to it."""
    image_column: str | None = None
    """Column of the image. Default: csv filepath; jsonl image or filepath; folder file_name; parquet and hub image."""
    caption_column: str | None = None
    """Column of the captions (a text, or a list of texts), or several, comma-separated. Default: csv title; jsonl
    caption or title; folder text or caption; parquet and hub caption; webdataset .txt, else caption of the .json."""
    key_column: str | None = None
    """Column of the key, which names an image for good. Default: the image's path as written; parquet `<file>:<row>`;
    hub `<split>:<row>`; webdataset the member's name up to its first dot. (Other formats have their own.)"""
    label_column: str | None = None
    """Column of an integer label. Default: none; parquet, hub: `label` if it holds integers; webdataset: .cls.
    (class_folders: the place of the image's folder among the others, sorted by name, from 0.)"""
    lang_column: str | None = None
    """Column of the language: one for all captions of the row, or a list with one per caption."""
    separator: str | None = None
    """csv: one character between cells. Default: a comma for .csv, a tab for .tsv and any other name."""
    split: str | None = None
    """karpathy: train (with restval), val or test. hub: the split's name. Both need it."""
    fold: str | None = None
    """Keep part of the samples, by a hash of the key: 0-8/10 keeps nine tenths, 9/10 the last one. Default: all."""


@dataclass(frozen=True)
class DataConfig:
    """Image–caption samples and how they are decoded."""

    train: SourceSpec
    """Samples to train on."""
    val: SourceSpec | None = None
    """Held-out samples for validation and eval-retrieval; default: none."""
    workers: int | None = None
    """Processes that decode images, per device; default: the usable cores shared out among the devices, at most 16."""
    max_skipped: float = 0.01
    """Largest share of images that may be unusable (or whose embedding float16 cannot hold) before precompute fails,
    0.0–1.0."""
    max_image_pixels: int = 178_956_970
    """Images with more pixels than this are skipped as decompression bombs; Pillow's own limit, and the largest."""
    random_crop: float | None = None
    """Unlocked and scratch: train on random crops that keep at least this share of the area, 0.0–1.0; default: none."""
    random_flip: bool = False
    """Unlocked and scratch: mirror every other training image, at random."""
    corrupt: list[Literal["image", "text", "alignment"]] = field(default_factory=list)
    """For the noise study (paper, section 4.9): put noise in place of training images, random tokens in place of texts,
    or exchange pairs; several apply one after the other."""
    corrupt_share: float = 0.0
    """Probability of each corruption for each pair, 0.0–1.0."""


@dataclass(frozen=True)
class ImageTowerConfig:
    """The image tower: a timm model."""

    model: str = "vit_base_patch16_224.augreg_in21k"
    """A timm model name with its tag, or `local-dir:FOLDER`, or `hf-hub:OWNER/NAME`."""
    pretrained: bool = True
    """Load the weights that the name stands for from the Hub; unused when `weights` is given."""
    weights: str | None = None
    """Local weights instead: .safetensors, .pth/.pt (tensors only) or .npz (AugReg)."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model for the architecture, such as img_size; none that say what to load."""
    pooling: Literal["tower", "cls", "avg", "map", "cls+avg"] = "tower"
    """Tokens to one embedding: the tower's own way, class token, patch average, its MAP head, or two side by side."""
    image_size: int | None = None
    """Input side in pixels; default: the tower's."""
    resize: Literal["squash", "crop"] = "squash"
    """Squash to a square (as SigLIP does), or resize the short side and crop the centre."""
    jpeg_draft: bool = False
    """Decode JPEGs of twice the input or more to 1/2, 1/4 or 1/8 of their size: faster, but rows differ slightly."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None
    """Resampling filter; default: the tower's."""
    mean: list[float] | None = None
    """Pixel mean per channel, on a scale of 0–1; default: the tower's."""
    std: list[float] | None = None
    """Pixel standard deviation per channel, on a scale of 0–1; default: the tower's."""
    head: int | None = None
    """Width of a trained linear map behind the tower (or behind its cached embeddings); default: none, and texts are
    embedded at the tower's width."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto: bf16 on CUDA, fp32 elsewhere. Rows are stored as float16 in any case."""


@dataclass(frozen=True)
class CacheConfig:
    """The embedding cache and the run that fills it."""

    path: str | None = None
    """Folder that holds one cache per split; default: cache/<name>."""
    shard_size: int = 8192
    """Samples per shard: the unit that is committed, resumed and dealt out to devices (tars: one shard per file)."""
    batch_size: int = 128
    """Images per forward pass, per device."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the image tower runs."""
    devices: int = 1
    """Devices (or processes on the CPU) per machine that share the shards."""
    nodes: int = 1
    """Machines, started by torchrun or SLURM; they share the folder of the cache."""
    splits: list[Literal["train", "val"]] = field(default_factory=lambda: ["train", "val"])
    """Splits that precompute embeds; [val] for a set that is only evaluated on."""
    retry_skipped: bool = False
    """Make the shards again that list skipped images, as after these were mended."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to token ids."""

    path: str | None = None
    """A SentencePiece .model, or a transformers tokenizer (folder or name); default: that of text_tower.pretrained,
    else train one on the captions."""
    vocab_size: int = 32_000
    """Pieces of a trained SentencePiece vocabulary; small caption sets end up with fewer."""
    length: int = 16
    """Tokens per caption, end-of-sentence included; longer captions are cut."""
    lowercase: bool | None = None
    """Lower-case the text first; default: yes for SentencePiece, as the tokenizer itself does for transformers ones."""
    character_coverage: float = 1.0
    """Share of characters that a trained vocabulary covers, 0.0–1.0; 0.9995 for Chinese and Japanese at scale."""


@dataclass(frozen=True)
class TextTowerConfig:
    """The text tower: a SigLIP text transformer from random weights, or a pretrained transformers model."""

    size: Literal["micro", "S", "M", "B", "L12", "L"] = "B"
    """Preset of width, depth and heads; L12 is the paper's four-chip text tower."""
    width: int | None = None
    """Hidden width; default: the preset's."""
    depth: int | None = None
    """Layers; default: the preset's."""
    heads: int | None = None
    """Attention heads; default: the preset's."""
    mlp_width: int | None = None
    """Width of the MLP's hidden layer; default: four times the width."""
    embedding_width: int | None = None
    """Bottleneck K: tokens are embedded at this width and mapped to the tower's, N × K + K × W numbers instead of
    N × W; default: none."""
    pretrained: str | None = None
    """A pretrained text model instead, by folder or Hub name (BERT, MiniLM, XLM-R, …), with a new head to the width of
    the images; size and the widths above are then its own. Its tokenizer is taken unless tokenizer.path says else."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """Token states of a pretrained model to one embedding: their mean, the first, or the last one of the text."""
    locked: bool = False
    """Keep the pretrained model as it is and train the head alone."""


@dataclass(frozen=True)
class LossConfig:
    """The loss over all pairs of a global batch; docs/loss.md tells of each choice."""

    name: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid (arXiv:2303.15343, eq. 1), or softmax, the InfoNCE that the paper compares it with."""
    logit_scale: float = 10.0
    """Start of t, which multiplies the cosine; t' = log t is learned."""
    logit_bias: float = -10.0
    """Start of b, which is added to every logit; the softmax loss has none."""
    exchange: Literal["bidir", "shift", "reduce", "gather"] = "bidir"
    """How image embeddings travel between devices; the value does not depend on it."""
    chunk_size: int | None = None
    """Pairs are worked on in tiles of this side; default: chosen for the device."""
    ambiguous: Literal["negative", "drop", "positive"] = "negative"
    """Other pairs of a batch with the same caption (or label): negatives (as in the paper), left out, or positives."""
    same: Literal["caption", "label"] = "caption"
    """What makes two pairs ambiguous: equal captions, or also equal labels."""
    negatives: Literal["all", "random", "hardest", "easiest"] = "all"
    """Which negatives of the global batch count (paper, section 4.7)."""
    negatives_per_positive: float | None = None
    """How many of them for each pair of the batch, unless all."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["lion", "adamw", "adafactor"] = "lion"
    """Lion (timm), AdamW (torch), or the Adafactor of ScalingViT (timm's adafactorbv)."""
    lr: float = 1e-4
    """Peak learning rate."""
    image_lr_multiplier: float = 0.1
    """Of the rate, for image weights that came pretrained."""
    text_lr_multiplier: float = 1.0
    """Of the rate, for text weights that came pretrained."""
    weight_decay: float = 1e-7
    """Decay per step at the peak, in the paper's units (not multiplied by lr), on matrix weights only."""
    decay_pretrained: bool = False
    """Decay the matrices that came pretrained too; the paper (section 4.5) found it better not to."""
    betas: tuple[float, float] | None = None
    """Momentum coefficients; default: (0.9, 0.99) for Lion, (0.9, 0.95) for AdamW and Adafactor."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """After the warm-up: a cosine to 0 at the end, the peak, or 1 / sqrt(1 + steps / timescale) of it."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    warmup_examples: int | str | None = None
    """The same in examples, such as 200M, instead of in steps."""
    cooldown_steps: int = 0
    """Steps at the end over which the rate falls linearly to 0, for constant and rsqrt."""
    cooldown_examples: int | str | None = None
    """The same in examples, instead of in steps."""
    timescale_steps: int = 10_000
    """Timescale of rsqrt."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class TrainConfig:
    """Training."""

    batch_size: int = 4096
    """Global batch: pairs over all devices in one step."""
    micro_batch_size: int | None = None
    """Pairs per pass of the towers and device: larger batches than fit in memory, same gradients, at most a third
    more time; default: all at once."""
    steps: int | None = None
    """Optimiser steps; give this, examples or epochs."""
    examples: int | str | None = None
    """Pairs to train on, such as 450M; give this, steps or epochs."""
    epochs: float | None = None
    """Passes over the images, one caption per image and pass; give this, steps or examples."""
    shuffle: Literal["auto", "rows", "blocks"] = "auto"
    """Order of a pass: an exact permutation of the rows, or of blocks of 4096 rows mixed 32 at a time, for caches
    larger than memory; auto: blocks where the embeddings take more than half of the free memory."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    devices: int = 1
    """Devices (or processes on the CPU) that share the global batch."""
    nodes: int = 1
    """Machines, started by torchrun or SLURM."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Lightning precision; auto: bf16-mixed on CUDA, 32-true elsewhere."""
    compile: bool = False
    """Compile the towers with torch.compile: a minute at the start for faster steps."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """On several devices, auto: ddp; fsdp2 also shares out weights, gradients and the optimiser's state, for towers too
    large for one. One device has nothing to share, whatever is asked for."""
    log_every: int = 10
    """Steps between rows of metrics.csv."""
    val_every: int = 500
    """Steps between validation retrieval and checkpoints, which are also made at the end; 0: only there."""
    val_rows: int = 5000
    """Validation during training uses this many held-out images at most; eval-retrieval uses all."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers beside metrics.csv, each with its pip extra."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder (`siglit train --resume`); a run that SLURM has started
    again does so by itself."""
    resume_changed: bool = False
    """Continue also where the experiment differs from the run's in a field that changes the training curve, such as
    optim.lr or train.steps."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of a trained run."""

    checkpoint: str | None = None
    """Checkpoint to evaluate; default: checkpoints/last.ckpt of the output folder."""
    split: Literal["val", "train"] = "val"
    """Cache to evaluate on and to search in."""
    batch_size: int = 512
    """Captions (or images, in the validation of a trained image tower) per forward pass."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the towers run."""
    top_k: int = 10
    """Answers that `siglit search` prints."""
    name: str | None = None
    """What the evaluated set is called in the names of the result files, such as imagenet for zeroshot-imagenet.json;
    default: nothing, as for the experiment's own held-out images."""
    index: str | None = None
    """eval-retrieval: a faiss factory string such as "IVF4096,PQ64"; the approximate index is reported beside the exact
    search; default: none."""
    folds: int = 1
    """eval-retrieval: cut the images into this many equal parts, in order, and report the mean over the parts as well;
    5 for the 1k figures of COCO's 5k images."""
    classes: str | None = None
    """eval-zeroshot: names of the classes, label 0 first: a JSON list, a text file with a name a line,
    `siglit:cifar10`, `siglit:cifar100`, `siglit:pets` or `open_clip:imagenet`; several names of one class are given as
    a list in JSON. Default: the names in the source."""
    templates: str | None = None
    """eval-zeroshot: prompts with {} for the name: a JSON list, a text file with a prompt a line, `siglit:photo`,
    `siglit:photos`, `siglit:pets`, `open_clip:openai_imagenet`, `open_clip:simple_imagenet` or `big_vision:clip_paper`
    (openai_imagenet and "{}"). Default: "{}" alone."""
    canonicalize: bool = False
    """eval-zeroshot: names and templates in lower case, without punctuation and with spaces for _, as big_vision has
    them for the paper's figures; a name ends at its first comma."""
    shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])
    """eval-fewshot: labelled training images per class."""
    seeds: int = 3
    """eval-fewshot: draws of the shots, from seeds 0, 1, …"""
    paper: dict[str, float] = field(default_factory=dict)
    """report: the paper's figures to stand beside ours, in per cent, by result file and metric, such as
    {"zeroshot-imagenet/top1": 79.7}."""


_RANGES = {
    "1 or more": (
        lambda v: v >= 1,
        (
            "cache.shard_size",
            "cache.batch_size",
            "cache.devices",
            "cache.nodes",
            "image_tower.image_size",
            "tokenizer.vocab_size",
            "text_tower.width",
            "text_tower.depth",
            "text_tower.heads",
            "text_tower.mlp_width",
            "text_tower.embedding_width",
            "image_tower.head",
            "optim.timescale_steps",
            "train.batch_size",
            "train.micro_batch_size",
            "loss.chunk_size",
            "train.steps",
            "train.devices",
            "train.nodes",
            "train.log_every",
            "train.val_rows",
            "eval.batch_size",
            "eval.top_k",
            "eval.folds",
            "eval.seeds",
            "data.max_image_pixels",
        ),
    ),
    "2 or more, a piece of text and the end of the sentence": (lambda v: v >= 2, ("tokenizer.length",)),
    "0 or more": (
        lambda v: v >= 0,
        (
            "data.workers",
            "seed",
            "optim.warmup_steps",
            "optim.cooldown_steps",
            "optim.clip",
            "train.val_every",
        ),
    ),
    "a finite number of 0 or more": (
        lambda v: 0 <= v < math.inf,
        ("loss.negatives_per_positive", "optim.weight_decay"),
    ),
    "finite": (math.isfinite, ("loss.logit_bias",)),
    "a finite number of more than 0": (
        lambda v: 0 < v < math.inf,
        (
            "optim.lr",
            "optim.image_lr_multiplier",
            "optim.text_lr_multiplier",
            "loss.logit_scale",
            "train.epochs",
        ),
    ),
    "between 0 and 1": (
        lambda v: 0 <= v <= 1,
        ("data.max_skipped", "data.corrupt_share", "tokenizer.character_coverage"),
    ),
    "two numbers from 0 to less than 1": (lambda v: all(0 <= beta < 1 for beta in v), ("optim.betas",)),
    "more than 0 and at most 1": (lambda v: 0 < v <= 1, ("data.random_crop",)),
    "three numbers, one per channel": (lambda v: len(v) == 3, ("image_tower.mean", "image_tower.std")),
    "a list of numbers of 1 or more": (lambda v: len(v) > 0 and min(v) >= 1, ("eval.shots",)),
    "[train], [val] or both": (lambda v: len(v) > 0, ("cache.splits",)),
}


COUNTS = ("train.examples", "optim.warmup_examples", "optim.cooldown_examples")
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def count(value: int | str) -> int:
    """A number of examples: 450000000, or the same as "450M"; K, M and B stand for thousands, millions and billions.

    Raises:
        ValueError: it is not a whole number of 0 or more.
    """
    parts = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?) ?([KMB]?)", str(value).strip(), re.IGNORECASE)
    number = float(parts[1]) * _SUFFIXES[parts[2].upper()] if parts else 0.5
    if number != math.floor(number):
        raise ValueError(f"{value!r} is not a number of examples, such as 450M or 12800")
    return int(number)


@dataclass(frozen=True)
class Experiment:
    """One experiment: the same file for every command."""

    data: DataConfig
    """Image–caption samples."""
    mode: Literal["locked", "unlocked", "scratch"] = "locked"
    """What becomes of the image tower: locked, its embeddings come from the cache; unlocked, images go through it and
    it learns, from its pretrained weights; scratch, the same from random weights."""
    name: str = "experiment"
    """Name of the experiment; default folders are named after it."""
    output_dir: str | None = None
    """Folder for results; default: runs/<name>."""
    seed: int = 0
    """Seed of weights, shuffling and caption choice."""
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    """The image tower."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The embedding cache."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to token ids."""
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The text tower."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The sigmoid loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot mean anything.

        Raises:
            UserError: a field is out of its range; the text names it.
        """
        for bound, (holds, fields) in _RANGES.items():
            for name in fields:
                value = operator.attrgetter(name)(self)
                if value is not None and not holds(value):
                    raise UserError(f"{name} is {value}, but it must be {bound}")
        called = self.eval.name or ""
        if not called.isprintable() or "/" in called or len(called.encode()) > 100:
            raise UserError(
                f"eval.name is {called!r:.80}, but it must be a part of a file's name: printable characters without /, "
                "at most 100 bytes"
            )
        if called == "train" or called.endswith("-train"):
            raise UserError(
                f"eval.name is {called}, but it must be another: results of that name are those of --eval.split train"
            )
        for name in COUNTS:
            value = operator.attrgetter(name)(self)
            try:
                count(value or 0)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        if bool(self.data.corrupt) != (self.data.corrupt_share > 0):
            raise UserError(
                f"data.corrupt is {self.data.corrupt} and data.corrupt_share {self.data.corrupt_share}: "
                "name what to corrupt and give a share of more than 0, or leave out both"
            )
        if self.mode == "locked" and (self.data.random_crop is not None or self.data.random_flip):
            raise UserError(
                "data.random_crop and data.random_flip change images on their way into the tower, but mode locked "
                "takes their embeddings from the cache; leave them out, or set mode to unlocked or scratch"
            )
        loss = self.loss
        if (loss.negatives == "all") != (loss.negatives_per_positive is None):
            raise UserError(
                f"loss.negatives is {loss.negatives} and loss.negatives_per_positive {loss.negatives_per_positive}: "
                "give a number for random, hardest or easiest ones, and none for all"
            )
        if loss.name == "softmax" and (loss.ambiguous != "negative" or loss.negatives != "all"):
            raise UserError("loss.ambiguous and loss.negatives choose pairs of the sigmoid loss; the softmax takes all")

    @property
    def folder(self) -> Path:
        """The run's folder, for results."""
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def cache_folder(self) -> Path:
        """Folder of the caches, one for each split."""
        return Path(self.cache.path or f"cache/{self.name}")

    def with_default_folders(self) -> "Experiment":
        """Fill the folders that follow from the name."""
        return replace(
            self,
            output_dir=str(self.folder),
            cache=replace(self.cache, path=str(self.cache_folder)),
        )


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment in JSON's types, section by section, as checkpoints keep it."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(experiment.with_default_folders())))
    return values
