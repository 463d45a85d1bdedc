"""`siglit plan`: estimates a training run before it starts: memory, micro-batch, time, device-hours and disk space.

Needs neither data nor pretrained weights. Memory is counted by `planning.memory`; speed is measured with a few real
training steps on random pairs (`planning.throughput`), or given. It assumes that devices scale linearly and that
reading keeps up. A run on GPUs can be planned where there is none, but its speed has to be given then.
"""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from siglit.cache import EmbeddingCache
from siglit.config import Experiment, TrainConfig
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.planning.largest_batch import LargestBatch, largest_batches
from siglit.planning.memory import MemoryEstimate, RandomDataModule, estimate_memory
from siglit.planning.throughput import ThroughputMeasurement, measure_throughput
from siglit.runs.folder import ensure_folder
from siglit.runs.launch import check_batch_fits, check_batch_size, quiet_lightning
from siglit.runtime.files import write_json
from siglit.runtime.text import plural
from siglit.training.optim import total_steps
from siglit.training.trainer import lightning_precision

_logger = logging.getLogger(__name__)

_GIB = 2**30
_USABLE = 0.9
"""Share of a device's memory that a run may use; the rest is for fragmentation, kernels and the driver."""
_OPTIMIZERS = {"lion": "Lion", "adamw": "AdamW", "adafactor": "Adafactor"}


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are per device unless stated otherwise; a GiB is 2^30 bytes."""

    mode: str
    devices: int
    device: str
    precision: str
    parameters: dict[str, int]
    weight_bytes: int
    gradient_bytes: int
    optimizer: str
    optimizer_bytes: int
    activation_bytes_per_pair: int
    """Saved for backward per additional pair."""
    activation_bytes: int
    """Saved for backward by the pairs of one pass; with micro-batches, of one tower at a time."""
    loss_bytes: int
    """Its rows and one tile."""
    pairs_per_device: int
    micro_batch_size: int | None
    """The largest that fits, up to the per-device batch; None if the memory is not known or nothing fits."""
    requested_micro_batch_size: int | None
    """train.micro_batch_size."""
    memory_gib: float | None
    peak_bytes: int
    """With the requested micro-batch, else with the one that fits, else with the per-device batch."""
    fits: bool | None
    steps: int | None
    examples: int | None
    examples_per_second: float | None
    """Of one device."""
    throughput: ThroughputMeasurement | None
    """None if the speed was given."""
    days: float | None
    device_hours: float | None
    rows: int | None
    cache_bytes: int | None
    """Of the embeddings alone, over all shards."""
    embedding_width: int
    checkpoint_bytes: int
    """Of one file on disk, which holds all weights and optimizer state; a run keeps two."""
    kept_checkpoints: int | None
    """Files of train.keep_every; None if the length of the run is not known."""
    kept_bytes: int | None
    """Of all of them on disk."""
    largest_batches: list[LargestBatch] | None
    """Of each loss, if they were requested."""

    def __str__(self) -> str:
        """Return a table, and one of the largest batches if they were requested."""
        width = max(len(name) for name, _ in self._lines())
        lines = [f"{name:<{width}}  {value}".rstrip() for name, value in self._lines()]
        return "\n".join(lines + self._largest_batches())

    def _lines(self) -> list[tuple[str, str]]:
        towers = {name: f"{count / 1e6:,.1f} M parameters" for name, count in self.parameters.items() if count}
        if self.mode == "locked":
            towers = {"image tower": "locked: its embeddings come from the cache", **towers}
        return [
            (
                "planned for",
                f"{self.devices} × {self.device}, {self.precision}, {plural(self.pairs_per_device, 'pair')} each",
            ),
            *towers.items(),
            ("", ""),
            ("weights", _bytes(self.weight_bytes)),
            ("gradients", _bytes(self.gradient_bytes)),
            (f"optimizer state ({_OPTIMIZERS[self.optimizer]})", _bytes(self.optimizer_bytes)),
            ("activations", self._activations()),
            ("loss", f"{_bytes(self.loss_bytes)} for tiles and rows"),
            ("peak per device", self._peak()),
            ("micro-batch", self._micro_batch()),
            ("", ""),
            ("length", self._length()),
            ("speed", self._speed()),
            ("time", self._time()),
            ("cache on disk", self._cache()),
            ("checkpoint", _bytes(self.checkpoint_bytes)),
            *([] if self.kept_checkpoints == 0 else [("kept checkpoints", self._kept())]),
        ]

    def _activations(self) -> str:
        pairs = self.requested_micro_batch_size or self.micro_batch_size or self.pairs_per_device
        return (
            f"{_bytes(self.activation_bytes)} for {plural(min(pairs, self.pairs_per_device), 'pair')} in one pass "
            f"({self.activation_bytes_per_pair / 1e6:,.2f} MB per pair)"
        )

    def _peak(self) -> str:
        if self.device.startswith("CPU"):
            return f"{_bytes(self.peak_bytes)} of tensors; the process may use up to twice as much"
        if self.memory_gib is None:
            return f"{_bytes(self.peak_bytes)} (memory of the device not known; set --gpu-memory)"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{_bytes(self.peak_bytes)} of {_digits(self.memory_gib)} GiB: {verdict} (at most {_USABLE:.0%} is used)"

    def _micro_batch(self) -> str:
        requested = self.requested_micro_batch_size
        if self.memory_gib is None:
            return f"{requested:,}, as requested" if requested else "not set"
        if self.micro_batch_size is None:
            advice = "try train.strategy fsdp2, or a smaller tower" if self.devices > 1 else "try a smaller tower"
            return f"even one pair does not fit; {advice}"
        if self.micro_batch_size >= self.pairs_per_device:
            return "not needed: all pairs of a device fit in one pass"
        advice = f"requested: {requested:,}" if requested else f"set train.micro_batch_size: {self.micro_batch_size}"
        return f"needed: one pass holds at most {plural(self.micro_batch_size, 'pair')}; {advice}"

    def _length(self) -> str:
        if self.steps is None or self.examples is None:
            return "not known, because the number of images is not; set --rows"
        return f"{plural(self.steps, 'step')}, {plural(self.examples, 'example')}"

    def _speed(self) -> str:
        if self.examples_per_second is None:
            return "not known: this machine has no CUDA device to measure it on; set --examples-per-second"
        rate = f"{_digits(self.examples_per_second)} examples/s on one device"
        measured = self.throughput
        if measured is None:
            return f"{rate} (given)"
        return (
            f"{rate}, measured here: {measured.hardware}; step of {plural(measured.pairs, 'random pair')}, "
            f"{_digits(measured.seconds_per_pair * 1e3)} ms per pair and {_digits(measured.optimizer_seconds * 1e3)} "
            "ms for the optimizer; without reading and exchange"
        )

    def _time(self) -> str:
        if self.days is None or self.device_hours is None:
            return "not known"
        time = f"about {_duration(self.days * 86_400)} on {plural(self.devices, 'device')}"
        if self.devices > 1:
            time += ", if they scale linearly"
        return time + (f"; {_digits(self.device_hours)} device-hours" if self.device_hours >= 1 else "")

    def _cache(self) -> str:
        if self.mode != "locked":
            return "none: images are read in training"
        if self.cache_bytes is None or self.rows is None:
            return (
                f"{self.embedding_width * 2:,} bytes per image, and captions (number of images not known; set --rows)"
            )
        product = f"{plural(self.rows, 'image')} × {self.embedding_width} × 2 bytes"
        return f"{_bytes(self.cache_bytes)} of embeddings ({product}), and captions"

    def _kept(self) -> str:
        if self.kept_checkpoints is None or self.kept_bytes is None:
            return "number not known, because the length is not; set --rows"
        return f"{_bytes(self.kept_bytes)} for the weights of {plural(self.kept_checkpoints, 'step')}"

    def _largest_batches(self) -> list[str]:
        if self.largest_batches is None:
            return []
        one_pass, unit = self.requested_micro_batch_size, self.devices * (self.requested_micro_batch_size or 1)
        towers = f"micro-batches of {one_pass:,}" if one_pass else "all pairs of a device in one pass"
        lines = ["", f"largest global batch on {self.devices} × {self.device}, {towers}:"]
        cells = [(f"multiple of {unit:,}", "power of two", "peak", "bounded by")]
        for largest in self.largest_batches:
            part = f"{largest.bounded_by}, {_bytes(largest.part_bytes[largest.bounded_by])}"
            exact = f"{largest.batch_size:,}" if largest.batch_size else f"not even {unit:,}"
            power = f"{largest.power_of_two:,}" if largest.power_of_two else "none"
            cells.append((exact, power, _bytes(largest.peak_bytes), part))
        names = ["", *(largest.loss for largest in self.largest_batches)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for name, row in zip(names, cells, strict=True):
            *numbers, part = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join([f"  {name:<7}", *numbers, part.strip()]))
        return lines


def plan(
    experiment: Experiment,
    devices: int | None = None,
    gpu_memory: float | None = None,
    examples_per_second: float | None = None,
    rows: int | None = None,
    largest_batch: bool = False,
) -> Plan:
    """Plan the experiment's training and write plan.json into the run's folder.

    Args:
        experiment: what is trained.
        devices: devices that share the batch; default: the experiment's.
        gpu_memory: GiB of each; default: this machine's GPU, or not known.
        examples_per_second: of one device; default: measured here, or not known if the run is planned for GPUs and this
            machine has none.
        rows: images to train on; default: those of the cache or the source, where they can be counted.
        largest_batch: also search the largest global batch that fits, with the sigmoid and with the softmax loss.

    Raises:
        UserError: an argument is not positive, the batch cannot be divided among the devices or is larger than the
            data, the towers cannot be built, or the largest batch is requested for devices of unknown memory.
    """
    quiet_lightning()
    options = {"--devices": devices, "--gpu-memory": gpu_memory, "--examples-per-second": examples_per_second}
    for name, value in {**options, "--rows": rows}.items():
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}, but it must be more than 0")
    train = experiment.train if devices is None else replace(experiment.train, devices=devices, nodes=1)
    check_batch_size(train)
    rows = rows or _rows(experiment)
    if rows is not None:
        check_batch_fits(train, rows)
    device = _choose_device(train, gpu_memory)
    if largest_batch and device.memory_gib is None:
        raise UserError("--largest-batch needs the memory of each device, which is not known; set --gpu-memory, in GiB")
    plan = _plan(experiment, train.devices * train.nodes, device, examples_per_second, rows, largest_batch)
    write_json(ensure_folder(experiment.folder) / "plan.json", asdict(plan))
    return plan


@dataclass(frozen=True)
class _Device:
    """What each device of the run is."""

    type: str
    """Of torch: "cuda" or "cpu"."""
    memory_gib: float | None
    precision: str
    """Lightning's."""

    @property
    def usable_bytes(self) -> float | None:
        return None if self.memory_gib is None else _USABLE * self.memory_gib * _GIB

    def __str__(self) -> str:
        name = "CUDA device" if self.type == "cuda" else "CPU process"
        return name if self.memory_gib is None else f"{name} of {_digits(self.memory_gib)} GiB"


def _choose_device(train: TrainConfig, gpu_memory: float | None) -> _Device:
    """Plan for GPUs if this machine has one or `gpu_memory` (GiB) is given, unless the experiment trains on the CPU."""
    here = torch.cuda.is_available() and train.accelerator != "cpu"
    cuda = here or (gpu_memory is not None and train.accelerator != "cpu")
    if gpu_memory is None and here:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / _GIB
    precision = lightning_precision(train.precision, cuda=cuda)
    return _Device("cuda" if cuda else "cpu", gpu_memory, precision)


def _plan(
    experiment: Experiment, devices: int, device: _Device, rate: float | None, rows: int | None, largest_batch: bool
) -> Plan:
    """Plan for so many of these devices; `rate` in examples per second is measured if it is None."""
    memory = estimate_memory(experiment, device=device.type, precision=device.precision, world_size=devices)
    fitting = None if device.usable_bytes is None else memory.largest_micro_batch(device.usable_bytes)
    requested = experiment.train.micro_batch_size
    pairs = min(requested or fitting or memory.pairs, memory.pairs)
    measured = None
    # A CPU says nothing of the speed of a GPU.
    if rate is None and (device.type == "cpu" or torch.cuda.is_available()):
        if device.type == "cpu" and experiment.train.accelerator == "auto":
            _logger.info(
                "this machine has no CUDA device: the run is planned for its CPU, and a few training steps measure the "
                "speed; --gpu-memory plans for GPUs"
            )
        measured = measure_throughput(
            experiment, precision=device.precision, pairs=memory.pairs, micro_batch_size=pairs
        )
        rate = measured.examples_per_second(memory.pairs)
    width = RandomDataModule(experiment).width
    time = _time_fields(experiment.train, rows, devices, rate)
    return Plan(
        mode=experiment.mode,
        devices=devices,
        device=str(device),
        precision=device.precision,
        optimizer=experiment.optim.name,
        **_memory_fields(memory, pairs, device.usable_bytes),
        pairs_per_device=memory.pairs,
        micro_batch_size=fitting,
        requested_micro_batch_size=requested,
        memory_gib=device.memory_gib,
        **time,
        **_disk_fields(experiment.train, memory, devices, time["steps"]),
        examples_per_second=rate,
        throughput=measured,
        rows=rows,
        cache_bytes=rows * width * 2 if rows and experiment.mode == "locked" else None,
        embedding_width=width,
        largest_batches=None
        if not largest_batch or device.usable_bytes is None
        else largest_batches(
            memory, experiment.loss, devices=devices, micro_batch_size=requested, budget=device.usable_bytes
        ),
    )


def _memory_fields(memory: MemoryEstimate, pairs: int, usable_bytes: float | None) -> dict[str, Any]:
    """Fields of `Plan` that follow from memory alone; `pairs` are those of one pass."""
    peak = memory.peak(pairs)
    return {
        "parameters": memory.parameters,
        "weight_bytes": memory.weights,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "activation_bytes_per_pair": memory.saved(memory.pairs + 1) - memory.saved(memory.pairs),
        "activation_bytes": memory.activations(pairs),
        "loss_bytes": memory.loss.tile + memory.loss.rows,
        "peak_bytes": peak,
        "fits": None if usable_bytes is None else peak <= usable_bytes,
    }


def _disk_fields(train: TrainConfig, memory: MemoryEstimate, devices: int, steps: int | None) -> dict[str, Any]:
    """Fields of `Plan` on checkpoints, whose files are whole also where each device holds a shard."""
    shards = devices if train.strategy == "fsdp2" else 1
    kept: int | None = 0
    if train.keep_every:  # the start too, and the end if it is no multiple
        kept = None if steps is None else -(-steps // train.keep_every) + 1
    return {
        "checkpoint_bytes": (memory.weights + memory.optimizer) * shards,
        "kept_checkpoints": kept,
        "kept_bytes": None if kept is None else kept * memory.weights * shards,
    }


def _time_fields(train: TrainConfig, rows: int | None, devices: int, rate: float | None) -> dict[str, Any]:
    """Fields of `Plan` that follow from the length of the run and the examples per second of a device."""
    if rows is None and train.epochs is not None:
        return dict.fromkeys(("steps", "examples", "days", "device_hours"))
    steps = total_steps(train, rows or train.batch_size)
    seconds = None if rate is None else steps * train.batch_size / (rate * devices)
    return {
        "steps": steps,
        "examples": steps * train.batch_size,
        "days": None if seconds is None else seconds / 86_400,
        "device_hours": None if seconds is None else seconds / 3600 * devices,
    }


def _digits(number: float) -> str:
    """Format with three significant digits, or all before the point; never as a power of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Format in days, hours, minutes or seconds, the largest unit of which there are at least 2."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def _bytes(number: int) -> str:
    return f"{number / _GIB:,.2f} GiB" if number >= _GIB // 10 else f"{number / 2**20:,.1f} MiB"


def _rows(experiment: Experiment) -> int | None:
    """Return the number of images to train on, if it is known without reading them."""
    if experiment.mode == "locked":
        path = experiment.cache_folder / "train"
        # Without its index a cache is not finished. A finished one that cannot be read raises.
        if (path / "index.json").exists():
            return len(EmbeddingCache(path)) or None
    try:
        units = open_source(experiment.data.train).units(experiment.cache.shard_size)
    except (UserError, OSError):
        return None
    return sum(unit.stop - unit.start for unit in units) or None
