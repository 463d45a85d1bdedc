"""The record of a run's experiment, experiment.yaml, and what differs from it when the run is resumed.

Knows the fields of the experiment and which of them change the weights; knows neither trainers nor checkpoints.

Two checks that no option overrides come later: `SigLiT.on_load_checkpoint` (training/module.py: towers, tokenizer,
optimizer) and `EpochLoader.load_state_dict` (data/epoch_loader.py: the position in the data).
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
"""Where the images are: in mode locked, the cache's digest tells whether they are the same; else nothing does."""

_SAME_CURVE = {
    "names the run and its folder": ("name", "output_dir"),
    "says where files are, or lets siglit choose; the checkpoint compares their content, or the choice": (
        "cache",
        *_PLACES,
        "image_tower.weights",
        "tokenizer.path",
        "train.shuffle",
    ),
    "changes what is measured and logged, not what is trained": (
        "data.val",
        "eval",
        "train.keep_every",
        "train.log_every",
        "train.loggers",
        "train.val_every",
        "train.val_rows",
    ),
    "computes the same gradients of the same global batch in another way, equal up to rounding": (
        "loss.chunk_size",
        "loss.exchange",
        "train.compile",
        "train.devices",
        "train.micro_batch_size",
        "train.nodes",
        "train.strategy",
    ),
    "is an initial value, of which the checkpoint holds the learned one": ("loss.logit_scale",),
    "says how many processes decode, and when to give up on unusable images": ("data.max_skipped", "data.workers"),
}
"""{reason: fields and whole sections that do not change the training curve}. All others are assumed to change it."""

_NOT_COMPARED = ("train.resume", "train.resume_changed")
"""They say how to start, and have no effect on the training."""


class Difference(NamedTuple):
    """A field whose value differs from the earlier experiment's."""

    field: str
    before: Any
    now: Any
    mode: str = "locked"

    @property
    def changes_curve(self) -> bool:
        """Whether training with this value leads to other weights than with the earlier one."""
        if self.field in _PLACES and self.mode != "locked":
            return True
        if self.field == "loss.logit_bias":  # the checkpoint holds the learned b, if there is one
            return (self.before is None) != (self.now is None)
        parts = self.field.split(".")
        names = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        return not any(names & set(kept) for kept in _SAME_CURVE.values())

    def __str__(self) -> str:
        """One line: earlier value → new value, and whether that changes the training curve."""
        before, now = ("none" if value is None else value for value in (self.before, self.now))
        consequence = ", which changes the training curve" if self.changes_curve else ""
        return f"{self.field}: {before} → {now}{consequence}"


def differences(earlier: Any, now: Any) -> list[Difference]:
    """Fields that differ between two experiments, in the order of the experiment.

    Args:
        earlier: an experiment as plain values; fields that it lacks, as in a run of an older siglit, are not compared.
        now: the other experiment as plain values.
    """
    before, after = _flat(earlier, Experiment), _flat(now, Experiment)
    return [
        Difference(name, before[name], value, after.get("mode", "locked"))
        for name, value in after.items()
        if name in before and not _is_same(name, before[name], value) and name not in _NOT_COMPARED
    ]


def check_resumed(folder: Path, trained_as: dict[str, Any] | None, experiment: Experiment, *, quiet: bool) -> None:
    """Log what differs from the experiment that the run was trained with, one line for each field.

    Args:
        folder: of the run.
        trained_as: the experiment in its checkpoint, see `siglit.config.plain`; None for a checkpoint of an older
            siglit: then the folder's experiment.yaml is compared.
        experiment: to resume with.
        quiet: log nothing, as on all ranks but the first.

    Raises:
        UserError: the training curve would change and train.resume_changed is false, or experiment.yaml is not YAML.
    """
    path = folder / RECORD
    if trained_as is not None:
        changes = differences(trained_as, plain(experiment))
    elif path.exists():
        changes = differences(_read(path), yaml.safe_load(experiment_yaml(experiment)))
    else:
        changes = []
        if not quiet:
            _logger.info(f"{path} is missing: cannot tell what has changed since the run was trained")
    for difference in () if quiet else changes:
        _logger.info(f"changed since training: {difference}")
    changing = [difference.field for difference in changes if difference.changes_curve]
    if changing and not experiment.train.resume_changed:
        raise UserError(
            f"{folder} was trained with other values of {', '.join(changing)}: resuming with the new ones changes the "
            "training curve. Change them back, add --train.resume_changed true to accept that, or choose another "
            "--output_dir"
        )


def experiment_yaml(experiment: Experiment) -> str:
    """The experiment as YAML, without unset fields and default folders; train.resume and .resume_changed are false."""

    def values(section: Any) -> dict[str, Any]:
        pairs = ((field, getattr(section, field.name)) for field in fields(section))
        return {
            field.name: values(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
            for field, value in pairs
            if value is not None or field.default not in (None, MISSING)  # such as loss.logit_bias: null
        }

    experiment = experiment.with_default_folders()
    default = replace(experiment, output_dir=None, cache=replace(experiment.cache, path=None)).with_default_folders()
    train = replace(experiment.train, resume=False, resume_changed=False)
    tree = values(replace(experiment, train=train))
    if experiment.output_dir == default.output_dir:
        del tree["output_dir"]
    if experiment.cache.path == default.cache.path:
        del tree["cache"]["path"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write_record(folder: Path, experiment: Experiment) -> None:
    """Write experiment.yaml into the run's folder; an earlier one that differs is kept as experiment.N.yaml.

    Raises:
        OSError: it cannot be written; the earlier one is unchanged.
    """
    path, text = folder / RECORD, experiment_yaml(experiment).encode()
    if path.exists():
        if path.read_bytes() == text:
            return
        numbers = (number for number in range(1, sys.maxsize) if not (folder / f"experiment.{number}.yaml").exists())
        write_bytes(folder / f"experiment.{next(numbers)}.yaml", path.read_bytes())
    write_bytes(path, text)


def _is_same(name: str, before: Any, now: Any) -> bool:
    """Whether two values of a field mean the same: 200M examples equal 200000000."""
    if name in COUNTS and before is not None and now is not None:
        return count(before) == count(now)
    return bool(before == now)


def _read(path: Path) -> Any:
    """The experiment in a file as plain values.

    Raises:
        UserError: the file is not YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(
            f"{path} is not YAML, so siglit cannot tell what has changed since the run was trained ({reason}); fix or "
            "remove it"
        ) from error


def _flat(tree: Any, section: type, prefix: str = "") -> dict[str, Any]:
    """{dotted name: plain value} of the fields of a section.

    A missing field that may be unset is None, because unset fields are not written. Any other missing field is newer
    than the file and left out.
    """
    tree = tree if isinstance(tree, dict) else {}
    kinds, values = get_type_hints(section), dict[str, Any]()
    for field in fields(section):
        kind = kinds[field.name]
        inner = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)
        if inner is not None:
            assert isinstance(inner, type)
            values |= _flat(tree.get(field.name), inner, f"{prefix}{field.name}.")
        elif field.name in tree or _may_be_unset(field):
            values[prefix + field.name] = tree.get(field.name)
    return values


def _may_be_unset(field: "Field[Any]") -> bool:
    return field.default is None or (field.default is MISSING and field.default_factory is MISSING)
