"""The experiment: one tree of dataclasses that every command reads.

Holds names, defaults and bounds, and nothing else: `siglit.parsing` reads YAML, and the module that a field belongs to
acts on it. The text under each field is the help that `siglit COMMAND --help` prints; `metadata` holds its bound.
"""

import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from siglit.errors import UserError

Format = Literal[
    "csv", "jsonl", "coco", "karpathy", "folder", "class_folders", "parquet", "webdataset", "xm3600", "hub"
]


@dataclass(frozen=True)
class Bound:
    """The values that a field accepts, beyond its type; null is always accepted where the type allows it."""

    text: str
    """What follows "it must be" in the message."""
    holds: Callable[[Any], bool]
    """Whether a value is within the bound."""


def _bound(text: str, holds: Callable[[Any], bool]) -> dict[str, Bound]:
    """A bound as the metadata of a dataclass field."""
    return {"bound": Bound(text, holds)}


# torch, faiss and sentencepiece hold sizes in 32 bits, and fail on larger ones in their own words.
_MAX_INT = 2**31 - 1
_ONE_OR_MORE = _bound("1 or more, at most 2,147,483,647", lambda v: 1 <= v <= _MAX_INT)
_ZERO_OR_MORE = _bound("0 or more, at most 2,147,483,647", lambda v: 0 <= v <= _MAX_INT)
_UP_TO_1024 = _bound("from 1 to 1,024", lambda v: 1 <= v <= 1024)
_WORKERS = _bound("from 0 to 1,024", lambda v: 0 <= v <= 1024)
_SEED = _bound("from 0 to 4,294,967,295", lambda v: 0 <= v < 2**32)
_POSITIVE_UP_TO_A_MILLION = _bound("greater than 0 and at most 1,000,000", lambda v: 0 < v <= 1e6)
_BIAS = _bound("between -1,000,000 and 1,000,000, or auto", lambda v: v == "auto" or abs(v) <= 1e6)
_FINITE_ZERO_OR_MORE = _bound("a finite number, 0 or greater", lambda v: 0 <= v < math.inf)
_POSITIVE = _bound("a finite number greater than 0", lambda v: 0 < v < math.inf)
_SHARE = _bound("between 0 and 1", lambda v: 0 <= v <= 1)
_POSITIVE_SHARE = _bound("more than 0 and at most 1", lambda v: 0 < v <= 1)
_COVERAGE = _bound("between 0.98 and 1, which is what SentencePiece takes", lambda v: 0.98 <= v <= 1)
_TEXT_AND_END = _bound("from 2, a piece of text and the end of the sentence, to 65,536", lambda v: 2 <= v <= 65_536)
_BETAS = _bound("two numbers from 0 to less than 1", lambda v: all(0 <= beta < 1 for beta in v))
_MEAN = _bound("three finite numbers, one per channel", lambda v: len(v) == 3 and all(map(math.isfinite, v)))
_STD = _bound(
    "three finite numbers greater than 0, one per channel", lambda v: len(v) == 3 and all(0 < s < math.inf for s in v)
)
_SHOTS = _bound("a list of numbers of 1 or more", lambda v: len(v) > 0 and all(1 <= n <= _MAX_INT for n in v))
_SEPARATOR = _bound("one character, such as ',' or '\\t'", lambda v: len(v) == 1 or v == r"\t")
_FOLDER_NAME = _bound(
    "the name of a folder: printable characters, at most 200 bytes, and no way upwards",
    lambda v: (
        v.isprintable() and v.strip() != "" and all(part != ".." and len(part.encode()) <= 200 for part in v.split("/"))
    ),
)
_PERCENTAGES = _bound("a mapping to finite numbers", lambda v: all(map(math.isfinite, v.values())))
_SPLITS = _bound("[train], [val] or both", lambda v: len(v) > 0)


@dataclass(frozen=True)
class SourceSpec:
    """Where a data set is and how to read it."""

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
    """Column of the key, the permanent name of an image. Default: the image's path as written; parquet `<file>:<row>`;
    hub `<split>:<row>`; webdataset the member's name up to its first dot. (Other formats have their own.)"""
    label_column: str | None = None
    """Column of an integer label. Default: none; parquet, hub: `label` if it holds integers; webdataset: .cls.
    (class_folders: position of the image's folder among all, sorted by name, from 0.)"""
    lang_column: str | None = None
    """Column of the language: one for all captions of the row, or a list with one per caption."""
    separator: str | None = field(default=None, metadata=_SEPARATOR)
    """csv: the character between cells. Default: a comma for .csv, a tab for .tsv and any other name."""
    split: str | None = None
    """karpathy: train (with restval), val or test; hub: name of the split. Required for both."""
    fold: str | None = None
    """Keep part of the samples, by a hash of the key: 0-8/10 keeps nine tenths, 9/10 the last one. Default: all."""


@dataclass(frozen=True)
class DataConfig:
    """Image–caption samples and how they are decoded."""

    train: SourceSpec
    """Samples to train on."""
    val: SourceSpec | None = None
    """Held-out samples for validation and eval-retrieval; default: none."""
    workers: int | None = field(default=None, metadata=_WORKERS)
    """Processes that decode images, per device; default: the usable cores divided by the devices, at most 16."""
    max_skipped: float = field(default=0.01, metadata=_SHARE)
    """precompute fails if a larger share of images is unusable (or has an embedding beyond float16), 0.0–1.0."""
    max_image_pixels: int = field(default=178_956_970, metadata=_ONE_OR_MORE)
    """Images with more pixels than this are skipped as decompression bombs; default: Pillow's own limit, which this
    cannot raise."""
    random_crop: float | None = field(default=None, metadata=_POSITIVE_SHARE)
    """Unlocked and scratch: train on random crops that keep at least this share of the area, 0.0–1.0; default: none."""
    random_flip: bool = False
    """Unlocked and scratch: mirror training images with probability 0.5."""
    corrupt: list[Literal["image", "text", "alignment"]] = field(default_factory=list)
    """For the noise study (paper, section 4.9): replace training images by noise, replace texts by random tokens, or
    shuffle the pairs; several are applied one after the other."""
    corrupt_share: float = field(default=0.0, metadata=_SHARE)
    """Probability of each corruption for each pair, 0.0–1.0."""


@dataclass(frozen=True)
class ImageTowerConfig:
    """The image tower: a timm model."""

    model: str = "vit_base_patch16_224.augreg_in21k"
    """A timm model name with its tag, or `local-dir:FOLDER`, or `hf-hub:OWNER/NAME`."""
    pretrained: bool = True
    """Load the model's weights from the Hub; ignored if `weights` is set."""
    weights: str | None = None
    """Local weights instead: .safetensors, .pth/.pt (tensors only) or .npz (AugReg)."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further architecture arguments of timm.create_model, such as img_size; not those that choose what to load."""
    pooling: Literal["tower", "cls", "avg", "map", "cls+avg"] = "tower"
    """How tokens become one embedding: the tower's default, class token, patch average, its MAP head, or class token
    and patch average concatenated."""
    image_size: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Input side in pixels; default: the tower's."""
    resize: Literal["squash", "crop"] = "squash"
    """Squash to a square (as SigLIP does), or resize the short side and crop the center."""
    jpeg_draft: bool = False
    """Decode JPEGs of at least twice the input size at 1/2, 1/4 or 1/8 scale: faster, embeddings differ slightly."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None
    """Resampling filter; default: the tower's."""
    mean: list[float] | None = field(default=None, metadata=_MEAN)
    """Pixel mean per channel, on a scale of 0–1; default: the tower's."""
    std: list[float] | None = field(default=None, metadata=_STD)
    """Pixel standard deviation per channel, on a scale of 0–1; default: the tower's."""
    head: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Width of a trained linear projection after the tower (or after its cached embeddings); default: none, texts are
    embedded at the tower's width."""
    center: bool = False
    """Mode locked: subtract the mean of the training images' rows from every row, before the head; for towers whose
    embeddings are all alike, such as those of a classifier."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto: bf16 on CUDA, fp32 elsewhere. Embeddings are always stored as float16."""


@dataclass(frozen=True)
class CacheConfig:
    """The embedding cache and how precompute fills it."""

    path: str | None = None
    """Folder that holds one cache per split; default: cache/<name>."""
    shard_size: int = field(default=8192, metadata=_ONE_OR_MORE)
    """Samples per shard, the unit that is committed and assigned to a device (webdataset: one shard per tar)."""
    batch_size: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Images per forward pass, per device; default: 128 on CUDA, 32 on a CPU."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the image tower runs."""
    devices: int = field(default=1, metadata=_UP_TO_1024)
    """Devices (or processes on the CPU) per machine that share the shards."""
    nodes: int = field(default=1, metadata=_ONE_OR_MORE)
    """Machines, started by torchrun or SLURM; all must see the folder of the cache."""
    splits: list[Literal["train", "val"]] = field(default_factory=lambda: ["train", "val"], metadata=_SPLITS)
    """Splits that precompute embeds; [val] for a data set used only for evaluation."""
    retry_skipped: bool = False
    """Rebuild shards with skipped images, for example after fixing these images."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to token ids."""

    path: str | None = None
    """A SentencePiece .model, or a transformers tokenizer (folder or Hub name); default: the tokenizer of
    text_tower.pretrained, else one trained on the captions."""
    vocab_size: int = field(default=32_000, metadata=_ONE_OR_MORE)
    """Pieces of a trained SentencePiece vocabulary; small caption sets yield fewer."""
    length: int = field(default=16, metadata=_TEXT_AND_END)
    """Tokens per caption, end-of-sentence included; longer captions are truncated."""
    lowercase: bool | None = None
    """Lower-case the text first; default: true for SentencePiece, the tokenizer's own setting for transformers."""
    character_coverage: float = field(default=1.0, metadata=_COVERAGE)
    """Share of characters that a trained vocabulary covers, 0.98–1.0; 0.9995 for large Chinese or Japanese sets."""


@dataclass(frozen=True)
class TextTowerConfig:
    """The text tower: a SigLIP text transformer from random weights, or a pretrained transformers model."""

    size: Literal["micro", "S", "M", "B", "L12", "L"] = "B"
    """Preset of width, depth and heads; L12 is the paper's four-chip text tower."""
    width: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Hidden width; default: the preset's."""
    depth: int | None = field(default=None, metadata=_UP_TO_1024)
    """Layers; default: the preset's."""
    heads: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Attention heads; default: the preset's."""
    mlp_width: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Width of the MLP's hidden layer; default: four times the width."""
    embedding_width: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Bottleneck K: tokens are embedded at this width and projected to the tower's, N × K + K × W parameters instead of
    N × W; default: none."""
    pretrained: str | None = None
    """A pretrained text model instead, by folder or Hub name (BERT, MiniLM, XLM-R, …), with a new head to the width of
    the image embeddings; size and the widths above are ignored. Its tokenizer is used unless tokenizer.path is set."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How a pretrained model's token states become one embedding: their mean, the first, or the last of the text."""
    locked: bool = False
    """Freeze the pretrained model and train only the head."""


@dataclass(frozen=True)
class LossConfig:
    """The loss over all pairs of a global batch; docs/loss.md describes each choice."""

    name: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid (arXiv:2303.15343, eq. 1), or softmax, the InfoNCE that the paper compares it with."""
    logit_scale: float = field(default=10.0, metadata=_POSITIVE_UP_TO_A_MILLION)
    """Initial t, which multiplies the cosine; t' = log t is learned."""
    logit_bias: float | Literal["auto"] | None = field(default="auto", metadata=_BIAS)
    """Initial b, which is added to every logit. auto: -log of the negatives per positive of the global batch; or a
    number, -10 in the paper; null: no b at all, as for the softmax loss."""
    exchange: Literal["bidir", "shift", "reduce", "gather"] = "bidir"
    """How image embeddings are exchanged between devices; the loss value does not depend on it."""
    chunk_size: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Side of the tiles in which pairs are computed; default: chosen for the device."""
    ambiguous: Literal["negative", "drop", "positive"] = "negative"
    """Other pairs of the batch with the same caption (or label): negatives (as in the paper), dropped, or positives."""
    same: Literal["caption", "label"] = "caption"
    """What makes two pairs ambiguous: equal captions, or also equal labels."""
    negatives: Literal["all", "random", "hardest", "easiest"] = "all"
    """Which negatives of the global batch count (paper, section 4.7)."""
    negatives_per_positive: float | None = field(default=None, metadata=_FINITE_ZERO_OR_MORE)
    """Negatives per positive, unless negatives is all."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["lion", "adamw", "adafactor"] = "lion"
    """Lion (timm), AdamW (torch), or the Adafactor of ScalingViT (timm's adafactorbv)."""
    lr: float = field(default=1e-4, metadata=_POSITIVE)
    """Peak learning rate."""
    image_lr_multiplier: float = field(default=0.1, metadata=_POSITIVE)
    """Learning-rate multiplier for pretrained image weights."""
    text_lr_multiplier: float = field(default=1.0, metadata=_POSITIVE)
    """Learning-rate multiplier for pretrained text weights."""
    weight_decay: float = field(default=1e-7, metadata=_FINITE_ZERO_OR_MORE)
    """Decay per step at the peak, in the paper's units (not multiplied by lr), on matrix weights only."""
    decay_pretrained: bool = False
    """Also decay pretrained matrices; the paper (section 4.5) found it better not to."""
    betas: tuple[float, float] | None = field(default=None, metadata=_BETAS)
    """Momentum coefficients; default: (0.9, 0.99) for Lion, (0.9, 0.95) for AdamW and Adafactor."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """After the warm-up: cosine decay to 0, constant, or 1 / sqrt(1 + steps / timescale)."""
    warmup_steps: int = field(default=0, metadata=_ZERO_OR_MORE)
    """Steps of linear warm-up from 0."""
    warmup_examples: int | str | None = None
    """Warm-up in examples, such as 200M, instead of steps."""
    cooldown_steps: int = field(default=0, metadata=_ZERO_OR_MORE)
    """constant and rsqrt: steps at the end over which the learning rate falls linearly to 0."""
    cooldown_examples: int | str | None = None
    """Cool-down in examples, instead of steps."""
    timescale_steps: int = field(default=10_000, metadata=_ONE_OR_MORE)
    """rsqrt: steps of its timescale."""
    clip: float = field(default=1.0, metadata=_FINITE_ZERO_OR_MORE)
    """Maximum global gradient norm; 0 disables clipping."""


@dataclass(frozen=True)
class TrainConfig:
    """Training."""

    batch_size: int = field(default=4096, metadata=_ONE_OR_MORE)
    """Global batch: pairs per step over all devices."""
    micro_batch_size: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Pairs per forward pass on each device, for batches larger than memory: same gradients, at most a third more time;
    default: all at once."""
    steps: int | None = field(default=None, metadata=_ONE_OR_MORE)
    """Optimizer steps; set this, examples or epochs."""
    examples: int | str | None = None
    """Pairs to train on, such as 450M; set this, steps or epochs."""
    epochs: float | None = field(default=None, metadata=_POSITIVE_UP_TO_A_MILLION)
    """Epochs over the images, one caption per image and epoch; set this, steps or examples."""
    shuffle: Literal["auto", "rows", "blocks"] = "auto"
    """Order of an epoch: rows, an exact permutation; blocks, blocks of 4096 rows shuffled 32 at a time, for caches
    larger than memory; auto: blocks if the embeddings take more than half of the free memory."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    devices: int = field(default=1, metadata=_UP_TO_1024)
    """Devices (or processes on the CPU) that share the global batch."""
    nodes: int = field(default=1, metadata=_ONE_OR_MORE)
    """Machines, started by torchrun or SLURM."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Lightning precision; auto: bf16-mixed on CUDA, 32-true elsewhere."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """Float32 matrix products and convolutions of the towers; high: TF32 where the hardware has it, with 10 bits of
    mantissa instead of 23, which is faster. For 32-true: mixed precision has few such products. The loss and all
    metrics stay float32."""
    compile: bool = False
    """Compile the towers with torch.compile: faster steps after about a minute at the start."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """On several devices, auto: ddp; fsdp2 also shards weights, gradients and optimizer state, for towers too large for
    one device. Ignored on one device."""
    log_every: int = field(default=10, metadata=_ONE_OR_MORE)
    """Steps between rows of metrics.csv."""
    val_every: int = field(default=500, metadata=_ZERO_OR_MORE)
    """Steps between validations and checkpoints; both also happen at the end; 0: only at the end."""
    keep_every: int = field(default=0, metadata=_ZERO_OR_MORE)
    """Steps between checkpoints that are kept for evaluation, checkpoints/step-00000040.ckpt, also of the start and the
    end; they hold the weights alone, so training resumes from the last checkpoint; 0: none."""
    val_rows: int = field(default=5000, metadata=_ONE_OR_MORE)
    """Held-out images that validation during training uses at most; eval-retrieval uses all."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers in addition to metrics.csv; each needs its pip extra."""
    resume: bool = False
    """Resume from the last checkpoint in the output folder (`siglit train --resume`); a job that SLURM requeued resumes
    by itself."""
    resume_changed: bool = False
    """Resume even if the experiment differs from the run's in a field that changes the training curve, such as optim.lr
    or train.steps."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of a trained run."""

    checkpoint: str | None = None
    """Checkpoint to evaluate, such as one of train.keep_every; default: checkpoints/last.ckpt of the output folder."""
    split: Literal["val", "train"] = "val"
    """Split to evaluate on and to search."""
    batch_size: int = field(default=512, metadata=_ONE_OR_MORE)
    """Captions (or images, when a trained image tower is validated) per forward pass."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the towers run."""
    top_k: int = field(default=10, metadata=_ONE_OR_MORE)
    """Images that `siglit search` prints."""
    name: str | None = None
    """Name of the evaluated set in the names of the result files, such as imagenet for zeroshot-imagenet.json; default:
    none, for the experiment's own held-out images."""
    index: str | None = None
    """eval-retrieval: a faiss factory string such as "IVF4096,PQ64"; results of this approximate index are reported
    beside those of the exact search; default: none."""
    folds: int = field(default=1, metadata=_ONE_OR_MORE)
    """eval-retrieval: split the images into this many equal parts, in order, and also report the mean over the parts;
    5 for the 1k results of COCO's 5k images."""
    classes: str | None = None
    """eval-zeroshot: class names, label 0 first: a JSON list, a text file with one name per line, `siglit:cifar10`,
    `siglit:cifar100`, `siglit:pets` or `open_clip:imagenet`; in JSON, a class with several names is a list. Default:
    the names of the class folders."""
    templates: str | None = None
    """eval-zeroshot: prompts with {} for the name: a JSON list, a text file with one prompt per line, `siglit:photo`,
    `siglit:photos`, `siglit:pets`, `open_clip:openai_imagenet`, `open_clip:simple_imagenet` or `big_vision:clip_paper`
    (openai_imagenet and "{}"). Default: only "{}"."""
    canonicalize: bool = False
    """eval-zeroshot: names and templates in lower case, without punctuation and with spaces for _, as big_vision does
    for the paper's results; a name ends at its first comma."""
    shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25], metadata=_SHOTS)
    """eval-fewshot: labelled training images per class."""
    seeds: int = field(default=3, metadata=_ONE_OR_MORE)
    """eval-fewshot: random draws of the shots, with seeds 0, 1, …"""
    paper: dict[str, float] = field(default_factory=dict, metadata=_PERCENTAGES)
    """report: the paper's numbers to show beside this run's, in percent, by result file and metric, such as
    {"zeroshot-imagenet/top1": 79.7}."""


COUNTS = ("train.examples", "optim.warmup_examples", "optim.cooldown_examples")
"""Fields that `count` reads."""
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def count(value: int | str) -> int:
    """A number of examples: 450000000 or "450M"; K, M and B are thousands, millions and billions.

    Raises:
        ValueError: the value is not a whole number of 0 or more, or has more than 18 digits.
    """
    parts = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?) ?([KMB]?)", str(value).strip(), re.IGNORECASE)
    number = float(parts[1]) * _SUFFIXES[parts[2].upper()] if parts else 0.5
    if number >= 1e18 or number != math.floor(number):
        raise ValueError(f"{str(value)!r:.80} is not a number of examples, such as 450M or 12800")
    return int(number)


@dataclass(frozen=True)
class Experiment:
    """One experiment: the same file for every command."""

    data: DataConfig
    """Image–caption samples."""
    mode: Literal["locked", "unlocked", "scratch"] = "locked"
    """How the image tower is trained. locked: not at all, its embeddings come from the cache; unlocked: from its
    pretrained weights; scratch: from random weights."""
    name: str = field(default="experiment", metadata=_FOLDER_NAME)
    """Name of the experiment, and of its default folders."""
    output_dir: str | None = None
    """Folder for results; default: runs/<name>."""
    seed: int = field(default=0, metadata=_SEED)
    """Random seed of weights, shuffling and caption choice."""
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    """The image tower."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The embedding cache."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to token ids."""
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The text tower."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""

    def __post_init__(self) -> None:
        """Check every field against its bound, and fields against each other.

        Raises:
            UserError: a field is out of bounds, or two fields contradict each other; the text names them.
        """
        _check_bounds(self)
        _check_eval_name(self.eval.name or "")
        for name in COUNTS:
            try:
                count(operator.attrgetter(name)(self) or 0)
            except ValueError as error:
                value = f"{str(operator.attrgetter(name)(self))!r:.80}"
                raise UserError(
                    f"{name} is {value}, but it must be a number of examples, such as 450M or 12800"
                ) from error
        _check_augmentation(self.data, self.mode)
        if self.image_tower.center and self.mode != "locked":
            raise UserError(
                f"image_tower.center subtracts the mean of cached rows, but mode is {self.mode}, whose tower changes; "
                "leave it out, or set mode: locked"
            )
        _check_loss(self.loss)

    @property
    def initial_bias(self) -> float | None:
        """The initial b, a number also where loss.logit_bias is auto; None: the loss has no b.

        With N negatives per positive, σ(−log N) = 1 / (N + 1) is the share of positives among the pairs: the loss
        starts at the prior. The paper's −10 (section 3.2) is −log of 22 thousand negatives.
        """
        loss = self.loss
        if loss.name == "softmax" or loss.logit_bias is None:
            return None
        if loss.logit_bias != "auto":
            return float(loss.logit_bias)
        all_negatives = self.train.batch_size - 1
        kept = all_negatives if loss.negatives_per_positive is None else loss.negatives_per_positive
        return -math.log(max(1.0, min(all_negatives, kept)))

    @property
    def folder(self) -> Path:
        """The run's folder: checkpoints and results."""
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def cache_folder(self) -> Path:
        """Folder of the caches, with one folder per split."""
        return Path(self.cache.path or f"cache/{self.name}")

    def with_default_folders(self) -> "Experiment":
        """Return a copy in which output_dir and cache.path are set."""
        return replace(
            self,
            output_dir=str(self.folder),
            cache=replace(self.cache, path=str(self.cache_folder)),
        )


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested dicts of JSON types, as checkpoints store it."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(experiment.with_default_folders())))
    return values


def _check_bounds(section: Any, prefix: str = "") -> None:
    """Check the fields of a section, and of the sections in it, against the bounds in their metadata."""
    for entry in fields(section):
        name, value = prefix + entry.name, getattr(section, entry.name)
        if is_dataclass(value):
            _check_bounds(value, f"{name}.")
        bound = entry.metadata.get("bound")
        if isinstance(value, str):
            _check_string(name, value, blank=bound is not None)
        if bound is not None and value is not None and not bound.holds(value):
            shown = f"{value!r:.200}" if isinstance(value, str) else value
            raise UserError(f"{name} is {shown}, but it must be {bound.text}")


def _check_string(name: str, value: str, *, blank: bool) -> None:
    """Refuse strings that are no path or name: empty ones, as of "$UNSET", and what no file or record can hold."""
    if value == "" or (value.isspace() and not blank):
        raise UserError(f"{name} is {value!r}, but it must have a visible character; leave it out for the default")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{name} is {value!r:.200}, but it must be valid Unicode without null characters, as the run's records are "
            "UTF-8; rename the file if it has such a name"
        )


def _check_eval_name(name: str) -> None:
    if not name.isprintable() or "/" in name or len(name.encode()) > 100:
        raise UserError(
            f"eval.name is {name!r:.80}, but it must be a part of a file's name: printable characters without /, "
            "at most 100 bytes"
        )
    if name == "train" or name.endswith("-train"):
        raise UserError(
            f"eval.name is {name}, but it must be another: results of that name are those of --eval.split train"
        )


def _check_augmentation(data: DataConfig, mode: str) -> None:
    if (len(data.corrupt) > 0) != (data.corrupt_share > 0):
        raise UserError(
            f"data.corrupt is {data.corrupt} and data.corrupt_share {data.corrupt_share}: "
            "name what to corrupt and give a share of more than 0, or leave out both"
        )
    if mode == "locked" and (data.random_crop is not None or data.random_flip):
        raise UserError(
            "data.random_crop and data.random_flip change images before the tower, but mode locked takes embeddings "
            "from the cache; leave them out, or set mode to unlocked or scratch"
        )


def _check_loss(loss: LossConfig) -> None:
    per_positive = "null" if loss.negatives_per_positive is None else loss.negatives_per_positive
    if (loss.negatives == "all") != (loss.negatives_per_positive is None):
        raise UserError(
            f"loss.negatives is {loss.negatives} and loss.negatives_per_positive {per_positive}: "
            "set negatives_per_positive for random, hardest or easiest negatives, and leave it out for all"
        )
    if loss.name == "softmax" and (loss.ambiguous != "negative" or loss.negatives != "all"):
        raise UserError(
            "loss.ambiguous and loss.negatives choose pairs of the sigmoid loss, but loss.name is softmax, which uses "
            "all pairs; leave them out"
        )
