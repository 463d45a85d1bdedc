"""`siglit train` on a cache against the bare text tower, against open_clip on images and SAIL's rows in memory.

    python -m benchmarks.train --json train.json
    python -m benchmarks.train --parts open_clip --text S --batch 1024 --json open_clip.json
    python -m benchmarks.train --parts tower --device cuda --text L12 --batch 32768 --micro-batch 4096 --steps 20
    python -m benchmarks.train --text micro --batch 64 --rows 1024 --repeats 1 --steps 4 --image-tower test_vit

How the contenders are comparable:

- **siglit** is a whole run of the stage, Lightning, batches from the cache, loss, clipping, optimizer and metrics.csv
  included (a row every 10 steps, or every turn where a turn has fewer). It runs through the whole measurement, and the
  others take their turns between two of its steps. The first turn is not counted. What a run does rarely is left out:
  tokenizing, validation and checkpoints.
- **tower**: the bare tower is a copy of the one in training, forward and backward on fixed random tokens. A batch
  that does not fit in memory goes in micro-batches, whose activations siglit recomputes in backward: one forward
  pass more. So there are two bare towers then: one that recomputes the same micro-batches, which shows what siglit
  adds to a step, and one that goes forward and backward through each at once, which is what the step would cost if
  the batch fitted. `--micro-batch 0` takes the batch at once: nothing is recomputed anywhere. Loss and optimizer are
  timed alone, on tensors of the same shapes.
- **open_clip**: a step of its own towers and loss as `open_clip_train` takes it, with AdamW, which siglit is given
  there too. Its image tower is the timm model whose rows siglit would have in the cache, with random weights; the
  images are decoded already and lie on the device, one batch for all steps: in its favour, as decoding and augmenting
  would come on top. Both recompute the text tower, or neither; its images need no gradient.
- **sail**: the same step, a plain loop around siglit's tower, loss and optimizer, on batches of either kind. A turn
  begins with a batch in hand and the workers running. Memory is what belongs to the processes alone after a pass
  (anonymous pages, those that processes share counted once): the difference between N and N / 2 rows, per row. Rows of
  the cache are pages of a file, which the kernel can drop, and which all processes of a machine share.

Model FLOP/s count the tower's forward pass three times and the loss's two products, whatever is recomputed. The hours
of four devices are projected: tower and loss are shared out, the optimizer is not, and no exchange is counted.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser, plain_options, ratio, report
from benchmarks.train_contenders import (
    BARE,
    KEPT,
    LOSS,
    OPEN_CLIP,
    OPTIMIZER,
    forward_flops,
    image_tower,
    open_clip_step,
    parts_of_a_step,
)
from benchmarks.train_sail import sail
from benchmarks.train_turns import SIGLIT, in_turns, recipe, write_cache
from siglit.cache import EmbeddingCache
from siglit.models.text_tower import PRESETS
from siglit.training.module import SigLiT
from siglit.training.monitor import peak_flops

PARTS = ("tower", "open_clip", "sail")
STEPS_OF_THE_PAPER = 65_000
Rows = list[tuple[str, str, str]]


def main() -> None:
    """Write the caches, take the turns of each part, report."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    options.add_argument(
        "--text",
        nargs="+",
        choices=list(PRESETS),
        default=["S", "B"],
        help="sizes of the text tower; peers are measured with the first",
    )
    options.add_argument("--batch", type=int, default=4096, help="pairs of a step")
    options.add_argument("--micro-batch", type=int, default=512, help="captions that a tower takes at once; 0: all")
    options.add_argument("--length", type=int, default=16, help="tokens of a caption")
    options.add_argument("--dim", type=int, default=768, help="width of the rows (open_clip: its image tower's)")
    options.add_argument("--rows", type=int, help="rows of the cache; default: 16 batches, 65,536 at least")
    options.add_argument("--image-tower", default="vit_tiny_patch16_224", help="timm model that open_clip locks")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bf16, compiled towers")
    options.add_argument("--steps", type=int, default=1, help="steps of a turn")
    options.add_argument("--repeats", type=int, default=3, help="turns")
    args = options.parse_args()
    args.rows = args.rows or max(65_536, 16 * args.batch)
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"options": plain_options(args)}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"tower", "sail"} & set(args.parts):
            cache = write_cache(folder, args, dim=args.dim, count=args.rows)
        if "tower" in args.parts:
            figures["tower"] = {size: {} for size in args.text}
            for size in args.text:
                rows += tower(folder, args, size, cache, figures["tower"][size])
        if "open_clip" in args.parts:
            figures["open_clip"] = {}
            rows += open_clip(folder, args, figures["open_clip"])
        if "sail" in args.parts:
            figures["sail"] = {}
            rows += sail(folder, args, cache, figures["sail"])
    micro = f"micro-batches of {args.micro_batch}" if recomputing(args) else "no micro-batches"
    title = f"training at {args.batch} pairs × {args.length} tokens, {micro}, {args.device}, {args.threads} threads"
    report(f"{title}, median of {args.repeats} turns of {args.steps} steps", rows, figures, args.json)


def recomputing(args: argparse.Namespace) -> bool:
    """Tell whether the activations of the towers are recomputed in backward."""
    return 0 < args.micro_batch < args.batch


def tower(folder: Path, args: argparse.Namespace, size: str, cache: EmbeddingCache, figures: dict[str, Any]) -> Rows:
    """Examples/s of `siglit train` against the bare text tower, and what else a step consists of."""
    flops = 0

    def make(module: SigLiT) -> dict[str, Any]:
        nonlocal flops
        # Forward and twice as much backward; the loss multiplies for the cosines and for one gradient.
        flops = 3 * args.batch * forward_flops(module, args.length) + 2 * 2 * args.batch**2 * args.dim
        return parts_of_a_step(module, args)

    experiment = recipe(folder, args, size=size, cache=cache, optimizer="lion")
    seconds = in_turns(experiment, make, steps=args.steps, repeats=args.repeats)
    mine = seconds[SIGLIT]
    bare = BARE if recomputing(args) else KEPT
    shares = {name: ratio(seconds[name], mine) for name in (bare, LOSS, OPTIMIZER)}
    shares["the rest: data, logging, Lightning"] = 1 - sum(shares.values())
    of_bare = {name: ratio(seconds[name], mine) for name in (BARE, KEPT) if name in seconds}
    step = {name: statistics.median(taken) / args.steps for name, taken in seconds.items()}
    figures |= {"of_bare": of_bare, "shares": shares, "step_seconds": step, "model_flops": flops}
    head = f"text {size}"
    targets = {bare: "≥ 93 %"}
    rows = [(f"{head}: examples/s of siglit / {n}", f"{v:.1%}", targets.get(n, "")) for n, v in of_bare.items()]
    rows += [(f"{head}: of a step, {name}", f"{share:.2%}", "") for name, share in shares.items() if name != bare]
    rows += [(f"{head}: examples/s, {n}", f"{args.batch / step[n]:,.1f}", "") for n in (SIGLIT, *of_bare)]
    return [*rows, *speed(size, args, flops, step, figures)]


def speed(size: str, args: argparse.Namespace, flops: int, step: dict[str, float], figures: dict[str, Any]) -> Rows:
    """Seconds and model FLOP/s of a step, their share of the peak where it is known, and hours of the paper's run."""
    head, rate = f"text {size}", flops / step[SIGLIT]
    target = "< 1.3 s on an H200" if (args.device, size, args.batch) == ("cuda", "L12", 32_768) else ""
    rows = [(f"{head}: a step of siglit", f"{step[SIGLIT]:.3f} s", target)]
    rows.append((f"{head}: model TFLOP/s", f"{rate / 1e12:.3f}", ""))
    if args.device == "cpu":
        return rows
    peak = peak_flops(torch.device("cuda", 0))
    four = (step[SIGLIT] - step[OPTIMIZER]) / 4 + step[OPTIMIZER]
    hours = {devices: STEPS_OF_THE_PAPER * taken / 3600 for devices, taken in ((1, step[SIGLIT]), (4, four))}
    figures |= {"hours": hours, "of_peak": peak and rate / peak}
    if peak:
        rows.append((f"{head}: of the peak of {peak / 1e12:.0f} TFLOP/s", f"{rate / peak:.1%}", ""))
    for devices, taken in hours.items():
        what = f"{head}: hours for {STEPS_OF_THE_PAPER:,} steps on {devices}"
        rows.append((f"{what}, projected" if devices > 1 else what, f"{taken:.1f}", ""))
    return rows


def open_clip(folder: Path, args: argparse.Namespace, figures: dict[str, Any]) -> Rows:
    """Examples/s of `siglit train` on the rows of a locked tower, as a multiple of open_clip's on its images."""
    size = args.text[0]
    cache = write_cache(folder, args, dim=image_tower(args.image_tower).num_features, count=args.rows)
    experiment = recipe(folder, args, size=size, cache=cache, optimizer="adamw")
    seconds = in_turns(
        experiment, lambda _: {OPEN_CLIP: open_clip_step(size, args)}, steps=args.steps, repeats=args.repeats
    )
    step = {name: statistics.median(taken) / args.steps for name, taken in seconds.items()}
    faster = ratio(seconds[OPEN_CLIP], seconds[SIGLIT])
    figures |= {"siglit_over_open_clip": faster, "step_seconds": step}
    head = f"text {size}, {args.image_tower}"
    rows = [(f"{head}: examples/s of siglit / {OPEN_CLIP}", f"{faster:.2f} ×", "")]
    return rows + [(f"{head}: examples/s, {name}", f"{args.batch / taken:,.1f}", "") for name, taken in step.items()]


if __name__ == "__main__":
    main()
