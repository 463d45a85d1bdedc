"""Exact retrieval on the device, both ways; the sets and contenders are those of `benchmarks.evaluation`."""

import argparse
import statistics
from dataclasses import dataclass

from benchmarks.common import begin_peak, interleaved, peak
from benchmarks.evaluation import LIMIT, OURS, contenders
from benchmarks.on_gpu.record import Record

MIB = 2**20
_APART = 1e-3
"""Products are rounded otherwise on another device, so that a rank here and there may differ."""


@dataclass(frozen=True)
class Sizes:
    """Of the sets."""

    images: int = 50_000
    compared: int = 5000
    """Images whose metrics are computed on the CPU too."""
    per_image: int = 5
    dim: int = 768
    turns: int = 3


TINY = Sizes(images=200, compared=50, dim=32, turns=1)


def exact_search(record: Record, tiny: bool) -> None:
    """Time and memory of R@K, median rank and mAP@10."""
    sizes = TINY if tiny else Sizes()
    runs = contenders(sizes.images, _arguments(sizes, record.device))
    before, way = begin_peak(record.device)
    metrics = runs[OURS]()
    held = peak(record.device) - before
    seconds = interleaved({name: runs[name] for name in (OURS, LIMIT)}, sizes.turns)
    record.figures(seconds=seconds, added_bytes=held, measured_by=way, metrics=metrics)
    texts = sizes.images * sizes.per_image
    size = f"{sizes.images:,} × {texts:,}"
    for name, taken in seconds.items():
        record.row(f"{size}: {name}", f"{statistics.median(taken):.3f} s")
    arrays = (sizes.images + texts) * sizes.dim * 4
    record.row(f"{size}: memory", f"{held / MIB:,.0f} MiB", f"{arrays / MIB:,.0f} MiB for the rows, and one block")


def against_cpu(record: Record, tiny: bool) -> None:
    """All metrics, on the device and on the CPU."""
    sizes = TINY if tiny else Sizes()
    there, here = (contenders(sizes.compared, _arguments(sizes, each))[OURS]() for each in (record.device, "cpu"))
    # Ranks are larger than 1, shares smaller: relative to the larger of the value and 1.
    apart = {name: abs(there[name] - value) / max(1.0, value) for name, value in here.items()}
    worst = max(apart, key=lambda name: apart[name])
    record.figures(device=there, cpu=here)
    size = f"{sizes.compared:,} × {sizes.compared * sizes.per_image:,}"
    record.row(f"{size}: device and CPU apart by at most", f"{apart[worst]:.1e} ({worst})", f"< {_APART:g}")
    if not apart[worst] < _APART:
        record.problem(f"{worst} is {there[worst]} on the device and {here[worst]} on the CPU")


def _arguments(sizes: Sizes, device: str) -> argparse.Namespace:
    """Options as `benchmarks.evaluation` has them."""
    return argparse.Namespace(per_image=sizes.per_image, dim=sizes.dim, device=device)
