"""The loss at a batch of the paper: time against the bare products and peers, memory, and very large batches.

Contenders, turns and memory are those of `benchmarks.loss`. What the arithmetic leads to expect is computed from two
rates of this card, measured beside it: of a matrix product, and of a copy. Shapes: n pairs, D embedding width.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import interleaved, ratio
from benchmarks.loss import difference
from benchmarks.loss_contenders import LIMITS, OURS, PEERS, RECOMPUTED, Pairs, contenders
from benchmarks.loss_memory import measure
from benchmarks.on_gpu.record import Record
from siglit.loss import elementwise
from siglit.loss.memory import memory_bytes

MIB = 2**20
_DTYPE = "bfloat16"
_APART = 5e-2
"""How much peers whose logits are bfloat16 may differ from siglit, relatively."""
_MILLISECONDS = {False: 12.0, True: 17.0}
"""Expected on an H100 at n = 32,768 and D = 1,024, locked and with both sides."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    n: int = 32_768
    dim: int = 1024
    calls: int = 10
    """Of a turn."""
    turns: int = 5
    large: tuple[int, int] = (262_144, 1_048_576)
    warm_up: int = 16_384
    """Pairs: enough for tiles as large as in the batches that are measured."""
    product: int = 8192
    """Rows and columns of the matrices that the rates are measured with."""


TINY = Sizes(n=256, dim=32, calls=1, turns=1, large=(512, 1024), warm_up=128, product=128)


def locked(record: Record, tiny: bool) -> None:
    """Time with gradients of the texts alone."""
    _times(record, tiny=tiny, unlocked=False)


def both_sides(record: Record, tiny: bool) -> None:
    """Time with gradients of images and texts."""
    _times(record, tiny=tiny, unlocked=True)


def memory(record: Record, tiny: bool) -> None:
    """Bytes at the peak beyond inputs and gradients, of each contender."""
    sizes = TINY if tiny else Sizes()
    added: dict[str, dict[str, int]] = {}
    for unlocked in (False, True):
        side = _side(unlocked)
        added[side] = {}
        for name in _names(record):
            args = _arguments(name, sizes.n, sizes, unlocked, record.device)
            found = record.attempt(f"{side}, {name}", lambda args=args: measure(args, sizes.warm_up))
            if found is not None:
                added[side][name] = found["added_bytes"]
                expected = _expected_memory(sizes.n, sizes, unlocked, record) if name == OURS[0] else ""
                record.row(f"{side}, {name}", f"{found['added_bytes'] / MIB:,.0f} MiB", expected)
                record.figures(n=sizes.n, dim=sizes.dim, added_bytes=added, measured_by=found["measured_by"])


def large_batch(record: Record, tiny: bool) -> None:
    """A large batch on one device."""
    _large(record, 0, tiny)


def very_large_batch(record: Record, tiny: bool) -> None:
    """A very large batch on one device."""
    _large(record, 1, tiny)


def rates(record: Record, size: int) -> tuple[float, float]:
    """FLOP/s of a bfloat16 matrix product and bytes/s of a copy (read and written), on random data."""
    left, right = (torch.randn(size, size, device=record.device).bfloat16() for _ in "xy")
    source = torch.empty(8 * size * size, dtype=torch.float32, device=record.device).normal_()
    out, target = torch.empty_like(left), torch.empty_like(source)
    seconds = interleaved(
        {
            "product": _repeated(lambda: torch.mm(left, right, out=out), 10, record.device),
            "copy": _repeated(lambda: target.copy_(source), 10, record.device),
        },
        repeats=3,
    )
    product, copy = (statistics.median(seconds[name]) / 10 for name in ("product", "copy"))
    return 2 * size**3 / product, 2 * source.nbytes / copy


def _times(record: Record, *, tiny: bool, unlocked: bool) -> None:
    """Seconds of a call, of each contender."""
    sizes = TINY if tiny else Sizes()
    rate, bandwidth = rates(record, sizes.product)
    record.figures(n=sizes.n, dim=sizes.dim, matmul_flops=rate, copy_bytes_per_second=bandwidth)
    record.row(f"bfloat16 product of {sizes.product} × {sizes.product}", f"{rate / 1e12:,.3g} TFLOP/s")
    record.row("copy, bytes read and written", f"{bandwidth / 1e12:.3g} TB/s")
    pairs = Pairs.draw(sizes.n, sizes.dim, _DTYPE, unlocked, record.device)
    runs = contenders(pairs)
    usable = {}
    for name in (*_names(record), *LIMITS):
        once, run = (_repeated(runs[name], calls, record.device) for calls in (1, sizes.calls))
        if record.attempt(name, lambda once=once: [once()]) is not None:
            usable[name] = run
    compiled = elementwise.compiling(sizes.n**2)
    record.row(f"{OURS[0]}, elementwise part", "compiled" if compiled else "not compiled", "" if tiny else "compiled")
    if not (compiled or tiny):
        record.problem("the loss is not compiled here; on_gpu.log has torch's reason")
    _check_values(record, pairs, {name: runs[name] for name in usable if name not in LIMITS})
    seconds = {name: [turn / sizes.calls for turn in turns] for name, turns in interleaved(usable, sizes.turns).items()}
    record.figures(seconds=seconds)
    expected = _expected_seconds(sizes.n, sizes.dim, unlocked, rate, bandwidth)
    for name, turns in seconds.items():
        text = ""
        if name == OURS[0]:
            text = f"{1e3 * expected:.1f} ms by arithmetic"
            if not tiny:
                text += f"; {_MILLISECONDS[unlocked]:g} ms on an H100"
        record.row(name, f"{1e3 * statistics.median(turns):,.2f} ms", text)
    if OURS[0] in seconds:
        ours = seconds[OURS[0]]
        for name in (name for name in (PEERS[0], *LIMITS) if name in seconds):
            record.row(f"time of siglit / of {name}", f"{ratio(ours, seconds[name]):.2f}")


def _check_values(record: Record, pairs: Pairs, runs: dict[str, Callable[[], torch.Tensor | None]]) -> None:
    """Record how far the others' value and gradient are from siglit's."""
    if OURS[0] not in runs:
        return
    apart = difference(pairs, runs)
    record.figures(apart=apart)
    for name, both in apart.items():
        text = "value {:.1e}, gradient {:.1e}".format(*both)
        record.row(f"{name}: apart from siglit, relatively", text, f"< {_APART:g}")
        if not all(each < _APART for each in both):
            record.problem(f"siglit and {name} disagree: {text}")


def _large(record: Record, which: int, tiny: bool) -> None:
    """Time and memory of one call, both ways, after a call of one tile that compiles."""
    sizes = TINY if tiny else Sizes()
    n = sizes.large[which]
    rate, bandwidth = rates(record, sizes.product)
    for unlocked in (False, True):
        side = f"{n:,} pairs, {_side(unlocked)}"
        args = _arguments(OURS[0], n, sizes, unlocked, record.device)
        found = record.attempt(side, lambda args=args: measure(args, sizes.warm_up))
        if found is None:
            continue
        record.figures(**{_side(unlocked): {"n": n, "dim": sizes.dim, **found}})
        expected = _expected_seconds(n, sizes.dim, unlocked, rate, bandwidth)
        record.row(side, f"{found['seconds']:,.3f} s", f"{expected:,.3f} s by arithmetic")
        memory = _expected_memory(n, sizes, unlocked, record)
        record.row(f"{side}: memory added", f"{found['added_bytes'] / MIB:,.0f} MiB", memory)


def _expected_seconds(n: int, dim: int, unlocked: bool, rate: float, bandwidth: float) -> float:
    """Two products of n × n × D, or three; float32 cosines written and read, bfloat16 gradients written and read."""
    products = 3 if unlocked else 2
    return products * 2 * n**2 * dim / rate + n**2 * (4 + 4 + 2 + 2 * (products - 1)) / bandwidth


def _expected_memory(n: int, sizes: Sizes, unlocked: bool, record: Record) -> str:
    """What `siglit plan` counts: a tile, and the gradients in float32; less those that are returned in bfloat16."""
    held = memory_bytes(n, sizes.dim, dtype=torch.bfloat16, image_gradient=unlocked, device=record.device)
    returned = (2 if unlocked else 1) * n * sizes.dim * torch.bfloat16.itemsize
    return f"{(held.rows + held.tile - returned) / MIB:,.0f} MiB by siglit plan"


def _names(record: Record) -> list[str]:
    """Contenders other than the limits; a row says where open_clip is missing."""
    known = contenders(Pairs.draw(1, 1, _DTYPE, False, "cpu"))
    if PEERS[0] not in known:
        record.row(PEERS[0], "not installed: pip install open_clip_torch")
    return [name for name in (*OURS, *PEERS, RECOMPUTED) if name in known]


def _arguments(name: str, n: int, sizes: Sizes, unlocked: bool, device: str) -> argparse.Namespace:
    return argparse.Namespace(contender=name, n=n, dim=sizes.dim, dtype=_DTYPE, unlocked=unlocked, device=device)


def _repeated(run: Callable[[], object], calls: int, device: str) -> Callable[[], None]:
    """Several calls in a row, and a wait for the device: its clock starts late only once."""

    def turn() -> None:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


def _side(unlocked: bool) -> str:
    return "both sides" if unlocked else "locked"
