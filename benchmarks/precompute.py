"""`siglit precompute` against its two halves alone: the tower's forward pass, and decoding with the same workers.

    python -m benchmarks.precompute --json precompute.json

Pictures are generated JPEGs, the tower has random weights; each turn fills a new cache. The halves share the machine's
cores on a CPU, so that there no more than the slower of the two *on all cores* can be reached where both need them.

    python -m benchmarks.precompute --against-plain --model tf_efficientnet_lite0 --width 224 --height 224

compares `siglit precompute` on a CPU with itself as it would be without reused memory, with the layout of the weights
and 128 images per pass, in turns of two processes: images/s, the share of the time spent in the kernel, and memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import siglit
from benchmarks.common import interleaved, parser, peak_rss, picture, plain_options, ratio, report
from siglit import embedding
from siglit.commands import precompute
from siglit.config import CacheConfig, DataConfig, Experiment, ImageTowerConfig, SourceSpec
from siglit.data.decode_workers import UnitPixels, pixel_batches
from siglit.data.sources import open_source
from siglit.models.image_tower import ImageTower
from siglit.runtime import malloc


def main() -> None:
    """Make pictures, take turns, report."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=512, help="pictures")
    options.add_argument("--width", type=int, default=640, help="pixels across")
    options.add_argument("--height", type=int, default=480, help="pixels down")
    options.add_argument("--jpeg-draft", action="store_true", help="decode at a reduced scale where it suffices")
    options.add_argument("--model", default="vit_tiny_patch16_224", help="timm model")
    options.add_argument("--batch", type=int, help="images per forward pass; default: 64, against plain the command's")
    options.add_argument("--shard", type=int, default=256, help="images per shard")
    options.add_argument("--workers", type=int, default=1, help="decoding processes")
    options.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="where the tower runs")
    options.add_argument("--repeats", type=int, default=3, help="turns")
    options.add_argument("--against-plain", action="store_true", help="compare with plain malloc, layout and batch")
    options.add_argument("--one", choices=["now", "plain"], help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one_turn(args)))
        return
    if args.against_plain:
        against_plain(args)
        return
    args.batch = args.batch or 64
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


def against_plain(args: argparse.Namespace) -> None:
    """Take turns with plain precompute, each in a process of its own, and report."""
    turns: dict[str, list[dict[str, float]]] = {"now": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder), args)
        command = [sys.executable, "-m", "benchmarks.precompute", *sys.argv[1:], "--folder", folder, "--one"]
        for turn in range(args.repeats):
            for name in ("now", "plain") if turn % 2 == 0 else ("plain", "now"):
                done = subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True)
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    now, plain = ({k: [t[k] for t in turns[name]] for k in turns[name][0]} for name in ("now", "plain"))
    cpu = [[u + s for u, s in zip(of["user"], of["system"], strict=True)] for of in (now, plain)]
    rows = [
        ("images/s, now / plain", f"{ratio(plain['seconds'], now['seconds']):.2f}", "≥ 3 for a convolution tower"),
        ("images per CPU second, now / plain", f"{ratio(cpu[1], cpu[0]):.2f}", ""),
    ]
    for name, of in (("now", now), ("plain", plain)):
        share = statistics.median(s / (u + s) for u, s in zip(of["user"], of["system"], strict=True))
        seconds, most = statistics.median(of["seconds"]), statistics.median(of["peak"])
        rows += [
            (f"{name}: images/s", f"{args.images / seconds:,.1f}", ""),
            (f"{name}: share of the system in the CPU's time", f"{share:.1%}", "< 10 %" if name == "now" else ""),
            (f"{name}: peak memory of the process", f"{most / 2**20:,.0f} MiB", ""),
        ]
    title = f"precompute on a CPU: {args.model}, {args.images} JPEGs of {args.width} × {args.height}"
    figures = {"turns": turns, "options": plain_options(args) | {"folder": None}}
    report(f"{title}, median of {args.repeats} turns", rows, figures, args.json)


def one_turn(args: argparse.Namespace) -> dict[str, float]:
    """Precompute once; return wall seconds, CPU seconds with those of the decoders, and peak bytes."""
    plain = args.one == "plain"
    cache = CacheConfig(
        path=tempfile.mkdtemp(dir=args.folder),
        shard_size=args.shard,
        batch_size=args.batch or (128 if plain else None),
        accelerator="cpu",
    )
    experiment = Experiment(
        data=DataConfig(
            train=SourceSpec(format="csv", path=str(args.folder / "pictures.csv")),
            workers=args.workers,
        ),
        output_dir=str(args.folder / "run"),
        image_tower=ImageTowerConfig(model=args.model, pretrained=False, jpeg_draft=args.jpeg_draft),
        cache=cache,
    )
    with ExitStack() as stack:
        # Three more passes, which would count for as many images as a batch has.
        stack.enter_context(mock.patch.object(embedding._Encoder, "tower_rate", return_value=None))
        if plain:
            stack.enter_context(mock.patch.object(malloc, "_glibc", return_value=None))
            stack.enter_context(mock.patch.object(precompute, "ImageTower", _contiguous_tower))
        begun = resource.getrusage(resource.RUSAGE_SELF)
        seconds = siglit.precompute(experiment).splits["train"].seconds
    own, decoders = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "user": own.ru_utime - begun.ru_utime + decoders.ru_utime,
        "system": own.ru_stime - begun.ru_stime + decoders.ru_stime,
        "peak": peak_rss(),
    }


def _contiguous_tower(config: ImageTowerConfig) -> ImageTower:
    tower = ImageTower(config)
    tower._memory_format = torch.contiguous_format
    return tower


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
