"""What the runs of a study share and what is made once: caches and tokenizers."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from siglit.cache import CacheError, exclusive
from siglit.commands.precompute import precompute
from siglit.commands.tokenizer_train import tokenizer_train
from siglit.config import Experiment
from siglit.runs.launch import is_first_process
from siglit.studies.records import canonical

_logger = logging.getLogger(__name__)


class SharedFiles:
    """Makes them where they are missing; the caller holds a lock on the folder of all studies' runs."""

    def __init__(self, work: Path):
        """Take the folder of a study's runs, where the tokenizers go."""
        self._work = work
        self._prepared = set[str]()

    def precompute(self, experiment: Experiment, splits: list[Any]) -> None:
        """Fill the caches of these splits, once for each."""
        if experiment.mode != "locked":
            return
        specs = {split: asdict(spec) for split in splits if (spec := getattr(experiment.data, split)) is not None}
        key = canonical([str(experiment.cache_folder), specs, asdict(experiment.image_tower)])
        if key in self._prepared:
            return
        folder = str(self._work / "precompute")
        cache = replace(experiment.cache, splits=splits)
        precompute(replace(experiment, output_dir=folder, cache=cache))
        self._prepared.add(key)

    def tokenizer(self, experiment: Experiment) -> str | None:
        """The tokenizer that all runs with the same captions and settings share; None if the experiment has one."""
        if experiment.tokenizer.path is not None or experiment.text_tower.pretrained is not None:
            return None
        settings = asdict(experiment.tokenizer)
        del settings["length"]
        described = canonical([asdict(experiment.data.train), settings]).encode()
        folder = self._work / "tokenizers" / hashlib.blake2b(described, digest_size=8).hexdigest()
        path = folder / "tokenizer.model"
        if not path.exists():
            tokenizer_train(replace(experiment, output_dir=str(folder)))
        return str(path)


@contextlib.contextmanager
def waiting_for(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder's lock; waits while another process holds it."""
    waited = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(folder))
            except CacheError:
                if not waited and is_first_process():
                    _logger.info(f"waiting for {what}")
                waited = True
                time.sleep(0.5)
                continue
            yield
            return
