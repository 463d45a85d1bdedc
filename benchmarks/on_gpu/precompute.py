"""`siglit precompute` on JPEG files against the bare tower on pixels that lie on the device, and decoding alone.

Files are generated, a few pictures under many names; weights are random. Precision and decoding processes are what
precompute chooses by itself: bfloat16 on CUDA, one process per core.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

import siglit
from benchmarks.common import begin_peak, interleaved, peak, ratio
from benchmarks.on_gpu.record import Record
from benchmarks.precompute import draw_pictures
from siglit.config import CacheConfig, DataConfig, Experiment, ImageTowerConfig, SourceSpec
from siglit.data.decode_workers import UnitPixels, pixel_batches
from siglit.data.sources import open_source
from siglit.models.image_tower import ImageTower
from siglit.runtime import machine

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much is embedded."""

    models: tuple[str, str] = ("vit_base_patch16_224", "vit_base_patch8_224")
    images: tuple[int, int] = (32_768, 8192)
    """Of each model."""
    distinct: int = 256
    """Pictures; each has many names."""
    width: int = 640
    height: int = 480
    batch: int = 256
    shard: int = 4096
    turns: int = 3


TINY = Sizes(("test_vit", "test_vit"), images=(16, 16), distinct=4, width=64, height=48, batch=4, shard=8, turns=1)


def vit_b16(record: Record, tiny: bool) -> None:
    """196 tokens of an image: decoding may be the slower half."""
    _precompute(record, TINY if tiny else Sizes(), 0)


def vit_b8(record: Record, tiny: bool) -> None:
    """784 tokens of an image."""
    _precompute(record, TINY if tiny else Sizes(), 1)


def _precompute(record: Record, sizes: Sizes, which: int) -> None:
    """Images/s of precompute and of its halves, in turns."""
    images = sizes.images[which]
    config = ImageTowerConfig(model=sizes.models[which], pretrained=False)
    workers = machine.default_workers(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _write_pictures(folder, images, sizes)
        inside: list[float] = []
        held: list[int] = []
        turns = {
            "siglit precompute": _whole(folder, source, config, sizes, inside, held, record.device),
            "bare tower, pixels on the device": _bare(config, images, sizes.batch, record.device),
            "decoding alone": _decoding(source, config, sizes, workers, record.device),
        }
        seconds = interleaved(turns, sizes.turns)
    # Without loading the tower before it; the first turn does not count.
    whole, tower, decoding = inside[1:], *list(seconds.values())[1:]
    rates = {
        name: images / statistics.median(taken) for name, taken in zip(turns, (whole, tower, decoding), strict=True)
    }
    of_tower, of_slower = ratio(tower, whole), ratio([max(pair) for pair in zip(tower, decoding, strict=True)], whole)
    record.figures(images=images, workers=workers, images_per_second=rates, of_tower=of_tower, of_slower=of_slower)
    for name, rate in rates.items():
        record.row(name, f"{rate:,.0f} images/s")
    record.row("precompute / bare tower", f"{of_tower:.1%}")
    record.row("precompute / the slower half", f"{of_slower:.1%}", "≥ 95 %")
    record.row("decoding processes", str(workers))
    if record.device == "cuda":
        record.figures(peak_bytes=max(held))
        record.row("peak memory of precompute", f"{max(held) / MIB:,.0f} MiB")


def _write_pictures(folder: Path, images: int, sizes: Sizes) -> SourceSpec:
    """JPEGs of the few pictures, links to them under further names, and a CSV of all."""
    draw_pictures(folder, argparse.Namespace(images=sizes.distinct, width=sizes.width, height=sizes.height))
    for number in range(sizes.distinct, images):
        os.link(folder / f"{number % sizes.distinct}.jpg", folder / f"{number}.jpg")
    lines = ["filepath,title", *(f"{number}.jpg,picture {number}" for number in range(images))]
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceSpec(format="csv", path=str(folder / "pictures.csv"))


def _whole(
    folder: Path,
    source: SourceSpec,
    tower: ImageTowerConfig,
    sizes: Sizes,
    seconds: list[float],
    held: list[int],
    device: str,
) -> Callable[[], None]:
    """Fill a new cache; add the seconds of the work itself to `seconds`, and its memory to `held`."""
    experiment = Experiment(
        data=DataConfig(train=source),
        output_dir=str(folder / "run"),
        image_tower=tower,
        cache=CacheConfig(
            path=str(folder / "cache"), shard_size=sizes.shard, batch_size=sizes.batch, accelerator=device
        ),
    )

    def turn() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        before, _ = begin_peak(device)
        seconds.append(siglit.precompute(experiment).splits["train"].seconds)
        held.append(peak(device) - before)

    return turn


def _bare(config: ImageTowerConfig, images: int, batch: int, device: str) -> Callable[[], None]:
    """Forward passes over one batch, as many as the images make."""
    tower = ImageTower(config).to(device)
    pixels = torch.randint(0, 256, (batch, 3, tower.image_size, tower.image_size), dtype=torch.uint8, device=device)

    def turn() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            for _ in range(images // batch):
                tower(pixels)
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


def _decoding(
    spec: SourceSpec, config: ImageTowerConfig, sizes: Sizes, workers: int, device: str
) -> Callable[[], None]:
    """Decode all images as precompute does, and drop them."""
    source = open_source(spec)
    tower = ImageTower(config)
    dataset = UnitPixels(source, source.units(sizes.shard), tower.transform(), sizes.batch, 10**8, tower.draft())

    def turn() -> None:
        with closing(pixel_batches(dataset, workers, device == "cuda")) as batches:
            for _ in batches:
                pass

    return turn
