"""`siglit precompute` against its two halves alone: the tower's forward pass, and decoding with the same workers.

    python -m benchmarks.precompute --json precompute.json

Pictures are generated JPEGs, the tower has random weights; each turn fills a new cache. The halves share the machine's
cores on a CPU, so that there no more than the slower of the two *on all cores* can be reached where both need them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import siglit
from benchmarks.common import interleaved, parser, picture, ratio, report
from siglit import embedding
from siglit.config import CacheConfig, DataConfig, Experiment, ImageTowerConfig, SourceSpec
from siglit.data.decode_workers import UnitPixels, pixel_batches
from siglit.data.sources import open_source
from siglit.models.image_tower import ImageTower


def main() -> None:
    """Make pictures, take turns, report."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=512, help="pictures")
    options.add_argument("--width", type=int, default=640, help="pixels across")
    options.add_argument("--height", type=int, default=480, help="pixels down")
    options.add_argument("--jpeg-draft", action="store_true", help="decode at a reduced scale where it suffices")
    options.add_argument("--model", default="vit_tiny_patch16_224", help="timm model")
    options.add_argument("--batch", type=int, default=64, help="images per forward pass")
    options.add_argument("--shard", type=int, default=256, help="images per shard")
    options.add_argument("--workers", type=int, default=1, help="decoding processes")
    options.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="where the tower runs")
    options.add_argument("--repeats", type=int, default=3, help="turns")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    table = [
        ("precompute / the slower half alone", f"{figures['of_slower_half']:.1%}", "≥ 95 %"),
        ("precompute / both halves one after the other", f"{figures['of_both_in_turn']:.1%}", ""),
        ("writing shards / precompute", f"{figures['writing']:.2%}", "< 2 %"),
        *((f"images/s: {name}", f"{rate:,.1f}", "") for name, rate in figures["images_per_second"].items()),
    ]
    size = f"{args.images} JPEGs of {args.width} × {args.height}, {args.workers} workers"
    report(f"precompute: {args.model}, {size}, median of {args.repeats} turns", table, figures, args.json)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Images/s of precompute and of its halves, and what their ratios come to."""
    draw_pictures(folder, args)
    tower_config = ImageTowerConfig(model=args.model, pretrained=False, jpeg_draft=args.jpeg_draft)
    source = SourceSpec(format="csv", path=str(folder / "pictures.csv"))
    tower = ImageTower(tower_config).to(args.accelerator)
    units = open_source(source).units(args.shard)
    turn, inside, writing = 0, [], []

    def whole() -> None:
        nonlocal turn
        turn += 1
        cache = CacheConfig(
            path=str(folder / f"cache{turn}"),
            shard_size=args.shard,
            batch_size=args.batch,
            accelerator=args.accelerator,
        )
        experiment = Experiment(
            data=DataConfig(train=source, workers=args.workers),
            output_dir=str(folder / "run"),
            image_tower=tower_config,
            cache=cache,
        )
        writing.append(0.0)
        with mock.patch.object(embedding, "_write", timed(embedding._write, writing)):
            # The time of the stage is that of its work, without loading the tower before it.
            inside.append(siglit.precompute(experiment).splits["train"].seconds)

    def decode() -> list[torch.Tensor]:
        dataset = UnitPixels(open_source(source), units, tower.transform(), args.batch, 10**8, tower.draft())
        return [batch.pixels for batch in pixel_batches(dataset, args.workers, args.accelerator == "cuda")]

    pixels = decode()

    def embed() -> None:
        # Precision as precompute chooses it: bf16 on CUDA.
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=args.accelerator == "cuda"):
            for batch in pixels:
                tower(batch.to(args.accelerator, non_blocking=True)).float().cpu()

    seconds = interleaved({"whole": whole, "tower": embed, "decoding": lambda: decode() and None}, args.repeats)
    # The first turn does not count, see `interleaved`.
    inside, writing = inside[1:], writing[1:]
    pairs = list(zip(seconds["tower"], seconds["decoding"], strict=True))
    rates = {"precompute": inside, "tower alone": seconds["tower"], "decoding alone": seconds["decoding"]}
    return {
        "of_slower_half": ratio([max(pair) for pair in pairs], inside),
        "of_both_in_turn": ratio([sum(pair) for pair in pairs], inside),
        "writing": ratio(writing, inside),
        "images_per_second": {name: round(args.images / statistics.median(t), 1) for name, t in rates.items()},
        "options": {name: value for name, value in vars(args).items() if name != "json"},
    }


def timed(function, seconds: list[float]):
    """Add the time of each call to the last of `seconds`."""

    def call(*args) -> None:
        begun = time.perf_counter()
        function(*args)
        seconds[-1] += time.perf_counter() - begun

    return call


def draw_pictures(folder: Path, args: argparse.Namespace) -> None:
    """Write pictures as JPEGs of quality 90 and pictures.csv, one caption each."""
    rng = np.random.default_rng(0)
    lines = ["filepath,title"]
    for number in range(args.images):
        picture(rng, args.width, args.height).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,picture {number}")
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
