"""One file per command, and the table of all of them: what each does, its flags, and the function that does it.

Imports no command: `siglit --help` lists them without torch. A command's function takes an `Experiment` (or folders),
raises UserError or CacheError on bad input, and returns a result dataclass; `str(result)` is what the command prints.
A new command needs a file here, an entry in COMMANDS, its function in both lists of `siglit/__init__.py` and a row in
README's table.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Flags = Mapping[str, dict[str, Any]]
"""{"--rows": arguments of argparse's add_argument}."""

_CACHE = {"help": "folder of a cache, such as cache/NAME/train"}
_CACHES = {"help": "folder of a cache, complete or not, or a folder of caches, such as cache/NAME with train and val"}

_STUDY = {"-c": {"dest": "config", "required": True, "metavar": "STUDY.yaml", "help": "the study file"}}
_OUT = {"--out": {"default": "docs/studies", "help": "folder of reports and records; default: docs/studies"}}
_FULL = {"--full": {"action": "store_true", "help": "the longer form of the study, for GPUs"}}

_RUN = ("mode", "name", "output_dir")
_IMAGES = ("data", "image_tower", "cache")
_TEXT = ("tokenizer", "text_tower")
_EVALUATION = (*_RUN, *_IMAGES, *_TEXT, "eval")
_TRAINING = (*_RUN, "seed", "data", "image_tower", *_TEXT, "loss", "optim", "train")
_ALL = (*_TRAINING, "cache", "eval")


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    function: str
    """`module:function` within this package."""
    reads: tuple[str, ...] = ()
    """Sections and fields of the experiment that it reads, which --help lists."""
    words: str | None = None
    """Name of its positional words, which are joined to one string."""
    flags: Flags = field(default_factory=dict)
    """Options in addition to the experiment's fields; keyword arguments of the function."""
    shorthands: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """{flag: the option and value that it stands for}."""
    alternatives: Mapping[str, "Command"] = field(default_factory=dict)
    """{flag: the command that runs in place of this one}."""
    folders: Flags | None = None
    """Arguments of a command that takes folders instead of an experiment."""
    default_config: str | None = None
    """Packaged experiment file that is used unless -c names one."""

    def load(self) -> Callable[..., Any]:
        """Import the command's module and return its function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return function


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "train and evaluate on a generated set, with no network and no data",
        "quickstart:quickstart",
        reads=_ALL,
        default_config="quickstart.yaml",
    ),
    "precompute": Command(
        "encode images once with the frozen tower into the cache",
        "precompute:precompute",
        reads=(*_RUN, *_IMAGES, "eval.name"),
    ),
    "tokenizer train": Command(
        "train a SentencePiece vocabulary on the captions",
        "tokenizer_train:tokenizer_train",
        reads=("name", "output_dir", "data", "tokenizer", "text_tower.pretrained"),
    ),
    "train": Command(
        "train the text tower on the cache, or both towers on images",
        "train:train",
        reads=(*_TRAINING, "cache", "eval.batch_size"),
        shorthands={"--resume": ("--train.resume", "true")},
        alternatives={"--dry-run": Command("show parameter groups and schedule without training", "dry_run:dry_run")},
    ),
    "plan": Command(
        "estimate memory, time and disk of a training run",
        "plan:plan",
        reads=(*_TRAINING, "cache.path", "cache.shard_size"),
        flags={
            "--devices": {"type": int, "help": "devices that share the batch; default: train.devices × train.nodes"},
            "--gpu-memory": {
                "type": float,
                "help": "GiB of memory of each device; default: this machine's GPU",
            },
            "--examples-per-second": {
                "type": float,
                "help": "speed of one device; default: measured here in a few steps, if this machine has such a device",
            },
            "--rows": {"type": int, "help": "images to train on; default: counted in the cache or the source"},
            "--largest-batch": {
                "action": "store_true",
                "help": "also find the largest global batch that fits, with the sigmoid and with the softmax loss",
            },
        },
    ),
    "eval-retrieval": Command(
        "report Recall@K of images and captions", "eval_retrieval:eval_retrieval", reads=_EVALUATION
    ),
    "eval-zeroshot": Command(
        "classify images by the texts of their classes", "eval_zeroshot:eval_zeroshot", reads=_EVALUATION
    ),
    "eval-fewshot": Command(
        "classify images by ridge regression on a few labelled images per class",
        "eval_fewshot:eval_fewshot",
        reads=_EVALUATION,
    ),
    "eval-probe": Command(
        "classify images by logistic regression on the image tower's outputs",
        "eval_probe:eval_probe",
        reads=_EVALUATION,
    ),
    "eval-logits": Command(
        "report histogram and calibration of the logits of pairs, and nearest captions",
        "eval_logits:eval_logits",
        reads=(*_EVALUATION, "loss.name", "train.batch_size"),
    ),
    "report": Command(
        "summarize a run in one HTML page, runs/<name>/report.html",
        "report:report",
        reads=(*_EVALUATION, "loss.name", "train.batch_size"),
    ),
    "plot": Command(
        "draw the curves of runs in one figure: siglit plot RUN RUN ...",
        "plot:plot",
        folders={
            "runs": {"nargs": "+", "help": "output folders of runs, such as runs/NAME"},
            "--out": {"default": "curves.png", "help": "the PNG file to write; default: curves.png"},
        },
    ),
    "study run": Command(
        "train what is missing of a study, a grid of runs that decides one claim",
        "study:study_run",
        folders={
            **_STUDY,
            "--part": {
                "default": "1/1",
                "help": "such as 2/4: the second of four parts, for other processes or machines",
            },
            **_OUT,
            "--work": {"default": "runs/studies", "help": "folder for the runs; default: runs/studies"},
            **_FULL,
            "--smoke": {"action": "store_true", "help": "every arm once, for two steps on drawn images"},
        },
    ),
    "study report": Command(
        "decide a study's claim from its records: a page, a table and a plot",
        "study:study_report",
        folders={**_STUDY, **_OUT, **_FULL},
    ),
    "study plan": Command(
        "count the missing runs of a study and estimate their time",
        "study:study_plan",
        folders={
            **_STUDY,
            "--devices": {"type": int, "default": 1, "help": "devices that share the runs; default: 1"},
            "--examples-per-second": {
                "type": float,
                "help": "speed of one device; default: that of the records, else measured here in a few steps",
            },
            **_OUT,
            **_FULL,
        },
    ),
    "search": Command(
        "find the images for a sentence: siglit search WORDS -c FILE",
        "search:search",
        reads=_EVALUATION,
        words="query",
    ),
    "cache info": Command(
        "describe a cache: size, skipped images, fingerprint", "cache:cache_info", folders={"path": _CACHES}
    ),
    "cache verify": Command(
        "check every byte of a cache: checksums, counts, keys, finite values",
        "cache:cache_verify",
        folders={
            "path": _CACHES,
            "--repair": {"action": "store_true", "help": "delete bad shards, so that precompute rebuilds them"},
        },
    ),
    "cache skipped": Command("list the skipped images as CSV", "cache:cache_skipped", folders={"path": _CACHES}),
    "cache merge": Command(
        "merge caches of the same image tower: siglit cache merge OUT IN IN ...",
        "cache:cache_merge",
        folders={
            "out": {"help": "folder of the new cache"},
            "parts": {"nargs": "+", "help": "folders of complete caches"},
        },
    ),
    "cache export": Command(
        "write a cache as .npy and parquet, in clip-retrieval's layout",
        "cache_exchange:cache_export",
        folders={"path": _CACHE, "out": {"help": "new folder"}},
    ),
    "cache import": Command(
        "make a cache from embeddings in .npy and parquet, or in HDF5",
        "cache_exchange:cache_import",
        folders={
            "out": {"help": "folder of the new cache"},
            "--embeddings": {"required": True, "help": ".npy file (rows, D), folder of them, or HDF5 (`embedding`)"},
            "--metadata": {"help": "parquet file, or folder with one per .npy file"},
            "--model": {"required": True, "help": "model that computed them; compared with image_tower.model"},
            "--key": {"help": "column of the image's key; default: key, else image_path"},
            "--caption": {"help": "column of a caption or a list of captions; default: captions, else caption"},
            "--label": {"help": "column of an integer class label; default: label, if it exists"},
        },
    ),
}
