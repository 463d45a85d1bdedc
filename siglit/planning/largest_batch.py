"""The largest global batch that fits, for the sigmoid and for the softmax loss, by the estimate of `planning.memory`.

Counts and searches; runs nothing, and knows neither time nor files. Shapes: b pairs per device.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from siglit.config import LossConfig
from siglit.planning.memory import MemoryEstimate


@dataclass(frozen=True)
class LargestBatch:
    """The largest global batch with one of the losses."""

    loss: str
    batch_size: int
    """A multiple of devices × micro-batch, or of devices without micro-batches; 0 if not even one fits."""
    power_of_two: int | None
    """The largest power of two that fits and that the devices share evenly, if there is one."""
    peak_bytes: int
    """Of each device with `batch_size`, or with the smallest batch if none fits."""
    part_bytes: dict[str, int]
    """What the peak consists of, see `MemoryEstimate.parts`."""
    bounded_by: str
    """The part that grows most with the batch, or the largest one if no batch fits."""


def largest_batches(
    memory: MemoryEstimate, config: LossConfig, *, devices: int, micro_batch_size: int | None, budget: float
) -> list[LargestBatch]:
    """Search the largest global batch with the sigmoid loss and with the softmax loss.

    Args:
        memory: of the experiment.
        config: its loss; the other one is counted with all negatives.
        devices: that share the batch.
        micro_batch_size: pairs of one pass of the towers; None: all pairs of a device.
        budget: bytes of each device that a run may use.
    """
    names: tuple[Literal["sigmoid", "softmax"], ...] = ("sigmoid", "softmax")
    other = {"exchange": config.exchange, "chunk_size": config.chunk_size}
    losses = (config if name == config.name else LossConfig(name, **other) for name in names)  # type: ignore[arg-type]
    return [_largest(memory, loss, devices, micro_batch_size, budget) for loss in losses]


def _largest(
    memory: MemoryEstimate, loss: LossConfig, devices: int, micro_batch_size: int | None, budget: float
) -> LargestBatch:
    unit = micro_batch_size or 1

    def fits(pairs: int) -> bool:
        return pairs > 0 and memory.with_pairs(pairs, loss).peak(micro_batch_size) <= budget

    most = int(budget // memory.batch_per_pair)
    units = _last_true(lambda count: fits(count * unit), most // unit)
    batch_size = units * unit * devices
    powers = (2**exponent for exponent in range(batch_size.bit_length(), -1, -1)) if batch_size else ()

    def parts_of(units: int) -> dict[str, int]:
        return memory.with_pairs(units * unit, loss).parts(micro_batch_size)

    parts = parts_of(max(units, 1))
    of_half = parts_of(units // 2) if units > 1 else {}
    return LargestBatch(
        loss=loss.name,
        batch_size=batch_size,
        power_of_two=next((power for power in powers if power % devices == 0 and fits(power // devices)), None),
        peak_bytes=sum(parts.values()),
        part_bytes=parts,
        bounded_by=max(parts, key=lambda name: parts[name] - of_half.get(name, 0)),
    )


def _last_true(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits; 0 if none does.

    One micro-batch alone may not fit where two do, as all activations of both towers are kept then; from two on, more
    pairs take more memory, but for a tile that is smaller once the loss is compiled.
    """
    if not fits(2):
        return 1 if fits(1) else 0
    return bisect_left(range(most + 1), True, lo=2, key=lambda count: not fits(count)) - 1
