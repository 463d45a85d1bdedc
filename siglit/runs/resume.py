"""What a run was trained as, its experiment.yaml, and what differs where it goes on.

Knows the fields of the experiment, and which of them move the weights; nothing of trainers and checkpoints.
"""

import logging
import sys
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml

from siglit.config import COUNTS, Experiment, count, plain
from siglit.errors import UserError
from siglit.runtime.files import write_bytes

_logger = logging.getLogger(__name__)

RECORD = "experiment.yaml"

_PLACES = ("data.train.path", "data.train.images")
"""Where the images lie: locked, a digest of the cache says whether they are the same; decoded, nothing does."""

_SAME_CURVE = {
    "names the run and its folder": ("name", "output_dir"),
    "says where things lie or what automatic choice to make; the checkpoint compares what came of it": (
        "cache",
        *_PLACES,
        "image_tower.weights",
        "tokenizer.path",
        "train.shuffle",
    ),
    "measures and records, but teaches nothing": (
        "data.val",
        "eval",
        "train.log_every",
        "train.loggers",
        "train.val_every",
        "train.val_rows",
    ),
    "computes the same gradients of the same global batch in another way, up to rounding": (
        "loss.chunk_size",
        "loss.exchange",
        "train.compile",
        "train.devices",
        "train.micro_batch_size",
        "train.nodes",
        "train.strategy",
    ),
    "says how many processes decode, and when to give up": ("data.max_skipped", "data.workers"),
}
"""Fields, and whole sections, that leave the training curve as it is, by reason. All others are taken to change it."""

_NOT_COMPARED = ("train.resume", "train.resume_changed")
"""They say how to begin, and have no effect later."""


class Difference(NamedTuple):
    """A field that is not what it was."""

    field: str
    before: Any
    now: Any
    mode: str = "locked"

    @property
    def changes_curve(self) -> bool:
        """Whether the weights would become others than those of the earlier experiment."""
        if self.field in _PLACES and self.mode != "locked":
            return True
        parts = self.field.split(".")
        names = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        return not any(names & set(kept) for kept in _SAME_CURVE.values())

    def __str__(self) -> str:
        """One line: old → new."""
        before, now = ("none" if value is None else value for value in (self.before, self.now))
        return f"{self.field}: {before} → {now}" + ", which changes the training curve" * self.changes_curve


def differences(earlier: Any, now: Any) -> list[Difference]:
    """Fields that differ between two experiments, in the order of the experiment.

    Args:
        earlier: an experiment as plain values; fields that it does not have, of a run of an older siglit, are left out.
        now: likewise.
    """
    before, after = _flat(earlier, Experiment), _flat(now, Experiment)
    return [
        Difference(name, before[name], value, after.get("mode", "locked"))
        for name, value in after.items()
        if name in before and not _is_same(name, before[name], value) and name not in _NOT_COMPARED
    ]


def check_resumed(folder: Path, trained_as: dict[str, Any] | None, experiment: Experiment, *, quiet: bool) -> None:
    """Print what differs from the experiment that the run was trained with, a line for each field.

    Args:
        folder: of the run.
        trained_as: the experiment of its checkpoint, see `siglit.config.plain`; None, in a checkpoint of an older
            siglit: the folder's experiment.yaml stands for it.
        experiment: what is to go on.
        quiet: print nothing, as on all ranks but the first.

    Raises:
        UserError: the training curve would change, and train.resume_changed does not accept that.
    """
    path = folder / RECORD
    if trained_as is not None:
        found = differences(trained_as, plain(experiment))
    elif path.exists():
        found = differences(_read(path), yaml.safe_load(experiment_yaml(experiment)))
    else:
        found = []
        if not quiet:
            _logger.info(f"there is no {path}: what has changed since is not known")
    for difference in () if quiet else found:
        _logger.info(f"resuming with {difference}")
    changing = [difference.field for difference in found if difference.changes_curve]
    if changing and not experiment.train.resume_changed:
        raise UserError(
            f"{folder} was trained with other values of {', '.join(changing)}: resumed with these, its training curve "
            "would be another. Change them back, add --train.resume_changed true to go on with them, or choose another "
            "--output_dir"
        )


def experiment_yaml(experiment: Experiment) -> str:
    """The experiment as a file: unset fields, default folders and train.resume are left out."""

    def values(section: Any) -> dict[str, Any]:
        pairs = ((field.name, getattr(section, field.name)) for field in fields(section))
        return {
            name: values(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
            for name, value in pairs
            if value is not None
        }

    named = replace(experiment, output_dir=None, cache=replace(experiment.cache, path=None)).with_default_folders()
    train = replace(experiment.train, resume=False, resume_changed=False)
    tree = values(replace(experiment, train=train))
    if experiment.output_dir == named.output_dir:
        del tree["output_dir"]
    if experiment.cache.path == named.cache.path:
        del tree["cache"]["path"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write_record(folder: Path, experiment: Experiment) -> None:
    """Leave the experiment in the run's folder; another file that is there under its name becomes experiment.N.yaml.

    Raises:
        OSError: it cannot be written; the earlier one is then there as before.
    """
    path, text = folder / RECORD, experiment_yaml(experiment).encode()
    if path.exists():
        if path.read_bytes() == text:
            return
        numbers = (number for number in range(1, sys.maxsize) if not (folder / f"experiment.{number}.yaml").exists())
        write_bytes(folder / f"experiment.{next(numbers)}.yaml", path.read_bytes())
    write_bytes(path, text)


def _is_same(name: str, before: Any, now: Any) -> bool:
    """Whether two values of a field mean the same: 200M examples are 200000000."""
    if name in COUNTS and before is not None and now is not None:
        return count(before) == count(now)
    return bool(before == now)


def _read(path: Path) -> Any:
    """The experiment in a file as plain values.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not YAML, so what has changed since is not known ({' '.join(str(error).split())}); mend it, "
            "or remove it"
        ) from error


def _flat(tree: Any, section: type, prefix: str = "") -> dict[str, Any]:
    """{dotted name: plain value} of the fields of a section; those that are not there have their default if it is None.

    The command leaves unset fields out of the file; any other default may be newer than the file.
    """
    tree = tree if isinstance(tree, dict) else {}
    kinds, found = get_type_hints(section), dict[str, Any]()
    for field in fields(section):
        kind = kinds[field.name]
        inner = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)
        if inner is not None:
            assert isinstance(inner, type)
            found |= _flat(tree.get(field.name), inner, f"{prefix}{field.name}.")
        elif field.name in tree or _may_be_unset(field):
            found[prefix + field.name] = tree.get(field.name)
    return found


def _may_be_unset(field: "Field[Any]") -> bool:
    return field.default is None or (field.default is MISSING and field.default_factory is MISSING)
