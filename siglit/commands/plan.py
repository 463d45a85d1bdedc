"""`siglit plan`: what a training run will take, said before it runs: memory, micro-batch, time, device-hours, disk.

Needs neither data nor pretrained weights. Memory is counted by `planning.memory`; speed is measured by a few real
training steps on random pairs (`planning.throughput`), or given. It assumes that devices scale linearly and that
reading keeps up.
"""

from dataclasses import asdict, dataclass, replace

import torch

from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.planning.memory import RandomData, estimate_memory
from siglit.planning.throughput import Probe, measure_throughput
from siglit.runs.folder import ensure_folder
from siglit.runs.launch import check_batch_fits, check_batch_size, quiet_lightning
from siglit.runtime.files import write_json
from siglit.training.optim import total_steps
from siglit.training.trainer import lightning_precision

_GIB = 2**30
_FILLED = 0.9
"""Share of a device's memory that a run may plan on; the rest is for fragmentation, kernels and the driver."""


@dataclass(frozen=True)
class Plan:
    """What the run will take. Bytes are per device unless said otherwise; GiB are 2^30 bytes."""

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
    """Kept for backward by one pair more."""
    activation_bytes: int
    """Kept for backward by the pairs of one pass; with micro-batches, of one tower at a time."""
    loss_bytes: int
    """Tiles and rows."""
    pairs_per_device: int
    micro_batch_size: int | None
    """The largest that fits, the whole per-device batch included; None where the memory is not known."""
    asked_micro_batch_size: int | None
    memory_gib: float | None
    peak_bytes: int
    """With the micro-batch that was asked for, else with the one that fits, else with the whole batch."""
    fits: bool | None
    steps: int | None
    examples: int | None
    examples_per_second: float | None
    """Of one device."""
    probe: Probe | None
    days: float | None
    device_hours: float | None
    rows: int | None
    cache_bytes: int | None
    """Embeddings alone, over all shards."""
    embedding_width: int
    checkpoint_bytes: int

    def __str__(self) -> str:
        """A table."""
        width = max(len(name) for name, _ in self._lines())
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        towers = {name: f"{count / 1e6:,.1f} M parameters" for name, count in self.parameters.items() if count}
        if self.mode == "locked":
            towers = {"image tower": "locked: its embeddings come from the cache", **towers}
        return [
            ("planned for", f"{self.devices} × {self.device}, {self.precision}, {self.pairs_per_device:,} pairs each"),
            *towers.items(),
            ("", ""),
            ("weights", _bytes(self.weight_bytes)),
            ("gradients", _bytes(self.gradient_bytes)),
            (f"state of {self.optimizer}", _bytes(self.optimizer_bytes)),
            ("activations", self._activations()),
            ("loss", f"{_bytes(self.loss_bytes)} in tiles and rows"),
            ("peak per device", self._peak()),
            ("micro-batch", self._micro_batch()),
            ("", ""),
            ("length", self._length()),
            ("speed", self._speed()),
            ("time", self._time()),
            ("cache on disk", self._cache()),
            ("checkpoint", _bytes(self.checkpoint_bytes)),
        ]

    def _activations(self) -> str:
        passed = min(
            self.asked_micro_batch_size or self.micro_batch_size or self.pairs_per_device, self.pairs_per_device
        )
        return (
            f"{_bytes(self.activation_bytes)} for {passed:,} pairs in one pass "
            f"({self.activation_bytes_per_pair / 1e6:,.2f} MB a pair)"
        )

    def _peak(self) -> str:
        if self.device.startswith("CPU"):
            return f"{_bytes(self.peak_bytes)} of tensors; malloc may hold up to as much again"
        if self.memory_gib is None:
            return f"{_bytes(self.peak_bytes)} (memory of the device not known: give --gpu-memory)"
        told = "fits" if self.fits else "DOES NOT FIT"
        return f"{_bytes(self.peak_bytes)} of {self.memory_gib:,.0f} GiB: {told} ({_FILLED:.0%} are planned on)"

    def _micro_batch(self) -> str:
        if self.memory_gib is None:
            asked = self.asked_micro_batch_size
            return f"as asked for, {asked:,}" if asked else "none asked for"
        if self.micro_batch_size is None:
            return "even one pair does not fit; see train.strategy fsdp2, or a smaller tower"
        if self.micro_batch_size >= self.pairs_per_device:
            return "not needed: all pairs of a device fit in one pass"
        asked = self.asked_micro_batch_size
        told = f"asked for is {asked:,}" if asked else f"set train.micro_batch_size: {self.micro_batch_size}"
        return f"needed: at most {self.micro_batch_size:,} pairs fit in one pass; {told}"

    def _length(self) -> str:
        if self.steps is None or self.examples is None:
            return "not known, as the number of images is not: give --rows"
        return f"{self.steps:,} steps, {self.examples:,} examples"

    def _speed(self) -> str:
        if self.examples_per_second is None:
            return "not known"
        rate = f"{_digits(self.examples_per_second)} examples/s on one device"
        if self.probe is None:
            return f"{rate} (given)"
        return (
            f"{rate}, measured here: {self.probe.hardware}; step of {self.probe.pairs:,} random pairs, "
            f"{_digits(self.probe.seconds_per_pair * 1e3)} ms a pair and {_digits(self.probe.optimizer_seconds * 1e3)} "
            "ms for the optimiser; without reading and exchange"
        )

    def _time(self) -> str:
        if self.days is None or self.device_hours is None:
            return "not known"
        told = _duration(self.days * 86_400)
        if self.devices > 1:
            told += f" on {self.devices} such devices, if they scale linearly"
        return told + (f"; {_digits(self.device_hours)} device-hours" if self.device_hours >= 1 else "")

    def _cache(self) -> str:
        if self.mode != "locked":
            return "none: images are read in training"
        if self.cache_bytes is None or self.rows is None:
            return f"{self.embedding_width * 2:,} bytes an image, and its captions (how many is not known: --rows)"
        told = f"{self.rows:,} images × {self.embedding_width} × 2 bytes"
        return f"{_bytes(self.cache_bytes)} of embeddings ({told}), and captions"


def plan(
    experiment: Experiment,
    devices: int | None = None,
    gpu_memory: float | None = None,
    examples_per_second: float | None = None,
    rows: int | None = None,
) -> Plan:
    """Plan the experiment's training and write plan.json into the run's folder.

    Args:
        experiment: what is to be trained.
        devices: that share the batch; default: the experiment's.
        gpu_memory: GiB of each; default: this machine's GPU, or not known.
        examples_per_second: of one device; default: measured here.
        rows: images to train on; default: those of the cache or the source, where they can be counted.

    Raises:
        UserError: a number is out of range, the batch is larger than the data, or the experiment cannot be built.
    """
    quiet_lightning()
    given = {"--devices": devices, "--gpu-memory": gpu_memory, "--examples-per-second": examples_per_second}
    for name, value in {**given, "--rows": rows}.items():
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}, but it must be more than 0")
    devices = devices or experiment.train.devices * experiment.train.nodes
    experiment = replace(experiment, train=replace(experiment.train, devices=devices, nodes=1))
    check_batch_size(experiment.train)
    rows = rows or _rows(experiment)
    if rows is not None:
        check_batch_fits(experiment.train, rows)
    plan = _planned(experiment, gpu_memory, examples_per_second, rows)
    write_json(ensure_folder(experiment.folder) / "plan.json", asdict(plan))
    return plan


def _planned(experiment: Experiment, gpu_memory: float | None, rate: float | None, rows: int | None) -> Plan:
    here = torch.cuda.is_available() and experiment.train.accelerator != "cpu"
    cuda = here or (gpu_memory is not None and experiment.train.accelerator != "cpu")
    if gpu_memory is None and here:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / _GIB
    precision = lightning_precision(experiment.train.precision, cuda=cuda)
    counted = estimate_memory(experiment, device="cuda" if cuda else "cpu", precision=precision)
    fitting = None if gpu_memory is None else counted.largest_micro_batch(_FILLED * gpu_memory * _GIB)
    wanted = experiment.train.micro_batch_size
    passed = min(wanted or fitting or counted.pairs, counted.pairs)
    probe = None
    if rate is None:
        probe = measure_throughput(experiment, precision, passed)
        rate = probe.examples_per_second(counted.pairs)
    steps = _steps(experiment, rows)
    width, devices = RandomData(experiment).width, experiment.train.devices
    seconds = None if steps is None else steps * experiment.train.batch_size / (rate * devices)
    return Plan(
        mode=experiment.mode,
        devices=devices,
        device=("CUDA device" if cuda else "CPU process")
        + (f" of {gpu_memory:,.0f} GiB" if gpu_memory is not None else ""),
        precision=precision,
        parameters=counted.parameters,
        weight_bytes=counted.weights,
        gradient_bytes=counted.gradients,
        optimizer=experiment.optim.name,
        optimizer_bytes=counted.optimizer,
        activation_bytes_per_pair=counted.kept(counted.pairs + 1) - counted.kept(counted.pairs),
        activation_bytes=counted.activations(passed),
        loss_bytes=counted.loss_tiles + counted.loss_rows,
        pairs_per_device=counted.pairs,
        micro_batch_size=fitting,
        asked_micro_batch_size=wanted,
        memory_gib=gpu_memory,
        peak_bytes=counted.peak(passed),
        fits=None if gpu_memory is None else counted.peak(passed) <= _FILLED * gpu_memory * _GIB,
        steps=steps,
        examples=None if steps is None else steps * experiment.train.batch_size,
        examples_per_second=rate,
        probe=probe,
        days=None if seconds is None else seconds / 86_400,
        device_hours=None if seconds is None else seconds / 3600 * devices,
        rows=rows,
        cache_bytes=rows * width * 2 if rows and experiment.mode == "locked" else None,
        embedding_width=width,
        checkpoint_bytes=counted.weights + counted.optimizer,
    )


def _digits(number: float) -> str:
    """Three digits or all before the point; never a power of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, so that the number is at least 2 where there is a smaller unit."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{seconds:,.0f} seconds" if seconds >= 2 else "less than 2 seconds"


def _bytes(number: int) -> str:
    return f"{number / _GIB:,.2f} GiB" if number >= _GIB // 10 else f"{number / 2**20:,.1f} MiB"


def _steps(experiment: Experiment, rows: int | None) -> int | None:
    if rows is None and experiment.train.epochs is not None:
        return None
    return total_steps(experiment.train, rows or experiment.train.batch_size)


def _rows(experiment: Experiment) -> int | None:
    """Images to train on, where that can be told without reading them."""
    if experiment.mode == "locked":
        path = experiment.cache_folder / "train"
        # Without its index a cache is not finished; a finished one that cannot be read is told of.
        if (path / "index.json").exists():
            return len(EmbeddingCache(path)) or None
    try:
        units = open_source(experiment.data.train).units(experiment.cache.shard_size)
    except (UserError, OSError):
        return None
    return sum(unit.stop - unit.start for unit in units) or None
