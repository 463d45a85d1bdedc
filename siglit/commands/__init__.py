"""One file per command, and the table of all of them: what each does, its flags, and the function that does it.

Imports no command: `siglit --help` lists them without torch. A function takes an `Experiment` (or folders), raises what
is wrong and returns a result dataclass whose text is printed.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Flags = Mapping[str, dict[str, Any]]
"""{"--rows": arguments of argparse's add_argument}."""

_CACHE = {"help": "folder of a cache, such as cache/NAME/train"}
_CACHES = {"help": "folder of a cache, finished or not, or a folder of caches, such as cache/NAME with train and val"}


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    function: str
    """`module:function` within this package."""
    words: str | None = None
    """Name of the words that are no options, joined to one text."""
    flags: Flags = field(default_factory=dict)
    """Options beside the experiment's fields; keyword arguments of the function."""
    shorthands: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """{flag: the field and value that it stands for}."""
    modes: Mapping[str, "Command"] = field(default_factory=dict)
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
        default_config="quickstart.yaml",
    ),
    "precompute": Command("encode images once with the frozen tower into the cache", "precompute:precompute"),
    "tokenizer train": Command("train a SentencePiece vocabulary on the captions", "tokenizer_train:tokenizer_train"),
    "train": Command(
        "train the text tower on the cache, or both towers on images",
        "train:train",
        shorthands={"--resume": ("--train.resume", "true")},
        modes={"--dry-run": Command("show parameter groups and schedule without training", "dry_run:dry_run")},
    ),
    "plan": Command(
        "estimate memory, time and disk of a training run",
        "plan:plan",
        flags={
            "--devices": {"type": int, "help": "devices that share the batch; default: train.devices × train.nodes"},
            "--gpu-memory": {"type": float, "help": "GiB of each device; default: those of this machine's GPU"},
            "--examples-per-second": {"type": float, "help": "of one device; default: measured here in a few steps"},
            "--rows": {"type": int, "help": "images to train on; default: counted in the cache or the source"},
        },
    ),
    "eval-retrieval": Command("report Recall@K of images and captions", "eval_retrieval:eval_retrieval"),
    "eval-zeroshot": Command("classify images by the texts of their classes", "eval_zeroshot:eval_zeroshot"),
    "eval-fewshot": Command(
        "classify images by ridge regression on a few labelled ones per class", "eval_fewshot:eval_fewshot"
    ),
    "eval-probe": Command("classify images by logistic regression on the locked tower", "eval_probe:eval_probe"),
    "eval-logits": Command(
        "histogram and calibration of the logits of pairs, and nearest captions", "eval_logits:eval_logits"
    ),
    "report": Command("summarize a run in one HTML page, runs/<name>/report.html", "report:report"),
    "plot": Command(
        "draw the curves of runs into one picture: siglit plot RUN RUN ...",
        "plot:plot",
        folders={
            "runs": {"nargs": "+", "help": "output folders of runs, such as runs/NAME"},
            "--out": {"default": "curves.png", "help": "the PNG file to write; default: curves.png"},
        },
    ),
    "search": Command("find the images for a sentence: siglit search WORDS -c FILE", "search:search", words="query"),
    "cache info": Command("describe a cache and what made it", "cache:cache_info", folders={"path": _CACHES}),
    "cache verify": Command(
        "read every byte of a cache again: checksums, counts, keys, finite values",
        "cache:cache_verify",
        folders={
            "path": _CACHES,
            "--repair": {"action": "store_true", "help": "delete bad shards, so that precompute makes them again"},
        },
    ),
    "cache skipped": Command("list the images without a row, as CSV", "cache:cache_skipped", folders={"path": _CACHES}),
    "cache merge": Command(
        "merge caches of one tower: siglit cache merge OUT IN IN ...",
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
        "make a cache of embeddings in .npy and parquet, or in HDF5",
        "cache_exchange:cache_import",
        folders={
            "out": {"help": "folder of the new cache"},
            "--embeddings": {"required": True, "help": ".npy file (rows, D), folder of them, or HDF5 (`embedding`)"},
            "--metadata": {"help": "parquet file, or folder with one per .npy file"},
            "--model": {"required": True, "help": "what made them; compared with image_tower.model"},
            "--key": {"help": "column that names the image; default: key, else image_path"},
            "--caption": {"help": "column of a text or a list of texts; default: captions, else caption"},
            "--label": {"help": "column of a class number; default: label if there"},
        },
    ),
}
