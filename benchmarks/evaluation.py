"""Retrieval against faiss and CLIP_benchmark, and encoding captions against the text tower alone.

    python -m benchmarks.evaluation --json evaluation.json

Sets are random unit rows, each text near its image. siglit and faiss take turns; memory is that of a process of its own
for each, beyond the embeddings. CLIP_benchmark is run once, in its own process: it is too slow for turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common import begin_peak, interleaved, parser, peak, plain_options, ratio, report
from siglit.config import TextTowerConfig
from siglit.evaluation.encoding import encode_ids
from siglit.evaluation.retrieval import retrieval_metrics
from siglit.models.text_tower import PRESETS, TextTower

VOCABULARY, KS = 32_000, (1, 5, 10)
OURS, FAISS, CLIP, LIMIT = "siglit", "faiss.knn, both ways", "CLIP_benchmark", "one product alone, in blocks"
CLIP_BATCH = 64
"""Its --batch_size, by default."""
Run = Callable[[], dict[str, float]]


def main() -> None:
    """Measure each size, then the encoding; report. With --alone: one contender in this process."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", default=[1000, 5000, 50_000], help="sizes of the set")
    options.add_argument("--per-image", type=int, default=5, help="captions of an image")
    options.add_argument("--dim", type=int, default=768, help="embedding width")
    options.add_argument("--clip-most", type=int, default=5000, help="images that CLIP_benchmark is run with at most")
    options.add_argument("--repeats", type=int, default=3, help="turns")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where siglit and the product rank")
    options.add_argument("--tower", choices=list(PRESETS), default="S", help="size of the text tower")
    options.add_argument("--length", type=int, default=16, help="tokens of a caption")
    options.add_argument("--distinct", type=int, default=2048, help="distinct captions that are encoded")
    options.add_argument("--captions", type=int, default=10_240, help="captions that are encoded, drawn from these")
    options.add_argument("--batch", type=int, default=512, help="captions of a forward pass")
    options.add_argument("--alone", choices=[OURS, FAISS, CLIP, LIMIT], help="only this, once, with the first size")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.alone:
        figures = alone(args)
        print(figures)
        if args.json:
            args.json.write_text(json.dumps(figures), encoding="utf-8")
        return
    table: list[tuple[str, str, str]] = []
    figures = {"options": plain_options(args), "retrieval": {}}
    for images in args.images:
        figures["retrieval"][images] = retrieval(images, args)
        table += table_rows(images, args, figures["retrieval"][images])
    figures["encoding"] = encoding(args)
    table += [
        ("encode_ids / forward passes of the distinct captions", f"{figures['encoding']['ratio']:.3f}", "< 1.05"),
        ("encode_ids", f"{figures['encoding']['captions_per_second']:,.0f} captions/s", ""),
    ]
    report(f"evaluation, D = {args.dim}, median of {args.repeats} turns", table, figures, args.json)


def contenders(images: int, args: argparse.Namespace) -> dict[str, Run]:
    """Return the contenders on one set; each returns R@K if it computes that."""
    rng = np.random.default_rng(0)
    zimg = unit(rng.standard_normal((images, args.dim), np.float32))
    image_of_text = np.repeat(np.arange(images), args.per_image)
    ztxt = rng.standard_normal((len(image_of_text), args.dim), np.float32)
    # Noise that leaves a cosine of about 0.2, of which wrong pairs have their share too.
    ztxt *= 5 / np.sqrt(args.dim)
    ztxt += zimg[image_of_text]
    ztxt = unit(ztxt)
    texts_of, images_of = torch.from_numpy(ztxt), torch.from_numpy(zimg)

    def knn() -> dict[str, float]:
        faiss.knn(ztxt, zimg, max(KS), metric=faiss.METRIC_INNER_PRODUCT)
        faiss.knn(zimg, ztxt, max(KS), metric=faiss.METRIC_INNER_PRODUCT)
        return {}

    on_device = [rows.to(args.device) for rows in (images_of, texts_of)]

    def products() -> dict[str, float]:
        for rows in on_device[0].split(1024):
            for columns in on_device[1].split(2048):
                torch.mm(rows, columns.T)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return {}

    return {
        OURS: lambda: retrieval_metrics(zimg, ztxt, image_of_text, KS, device=args.device, quiet=True),
        FAISS: knn,
        CLIP: lambda: clip_benchmark(images_of, texts_of, torch.from_numpy(image_of_text)),
        LIMIT: products,
    }


def clip_benchmark(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor) -> dict[str, float]:
    """R@K by CLIP_benchmark's functions, called as its `evaluate` calls them."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    recall = {}
    for direction, rows, correct in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in KS:
            hits = batchify(recall_at_k, rows, correct, CLIP_BATCH, "cpu", k=k) > 0
            recall[f"{direction}/R@{k}"] = hits.double().mean().item()
    return recall


def retrieval(images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds in turns, and memory and seconds of each in its own process."""
    runs = {name: run for name, run in contenders(images, args).items() if name != CLIP}
    seconds = interleaved(runs, args.repeats)
    names = [*runs, *([CLIP] if images <= args.clip_most else [])]
    return {
        "seconds": seconds,
        "alone": {name: in_a_process(name, images, args) for name in names},
        "faiss / siglit": ratio(seconds[FAISS], seconds[OURS]),
        "siglit / product": ratio(seconds[OURS], seconds[LIMIT]),
    }


def table_rows(images: int, args: argparse.Namespace, figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the report on one set."""
    size = f"{images:,} × {images * args.per_image:,}"
    rows = [(f"{size}: {name}", f"{statistics.median(times):.2f} s", "") for name, times in figures["seconds"].items()]
    rows.append((f"{size}: faiss / siglit", f"{figures['faiss / siglit']:.2f}", "> 1"))
    rows.append((f"{size}: siglit / one product alone", f"{figures['siglit / product']:.2f}", ""))
    for name, by_itself in figures["alone"].items():
        figure = by_itself.get("failed") or f"{by_itself['added_bytes'] / 2**20:,.0f} MiB, {by_itself['seconds']:.2f} s"
        rows.append((f"{size}: {name}, in its own process", figure, ""))
    theirs, ours = (figures["alone"].get(name, {}).get("recall") for name in (CLIP, OURS))
    if theirs and ours:
        apart = max(abs(value - ours[name]) for name, value in theirs.items())
        rows.append((f"{size}: R@K, siglit and {CLIP} apart by at most", f"{apart:.2g}", "0"))
    return rows


def alone(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes added at the peak, seconds and R@K of one contender; a small set goes before it and does not count."""
    contenders(min(200, args.images[0]), args)[args.alone]()
    run = contenders(args.images[0], args)[args.alone]
    before, way = begin_peak(args.device)
    begun = time.perf_counter()
    metrics = run()
    seconds = time.perf_counter() - begun
    recall = {name: value for name, value in metrics.items() if "/R@" in name}
    return {"added_bytes": max(0, peak(args.device) - before), "seconds": seconds, "measured_by": way, "recall": recall}


def in_a_process(name: str, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """`alone`, with nothing else in its process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.json"
        words = ["--alone", name, "--images", images, "--per-image", args.per_image, "--dim", args.dim]
        words += ["--threads", args.threads, "--device", args.device, "--json", path]
        command = [sys.executable, "-m", "benchmarks.evaluation", *map(str, words)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
        return json.loads(path.read_text(encoding="utf-8"))


def encoding(args: argparse.Namespace) -> dict[str, float]:
    """Captions with many duplicates in any order, against the tower's passes over the distinct ones."""
    config = TextTowerConfig(size=args.tower)
    tower = TextTower(config, vocab_size=VOCABULARY, length=args.length, eos_id=1, pad_id=1, dim=args.dim).eval()
    rng = np.random.default_rng(0)
    distinct = np.unique(rng.integers(2, VOCABULARY, (args.distinct, args.length)).astype(np.uint16), axis=0)
    drawn = np.concatenate([np.arange(len(distinct)), rng.integers(0, len(distinct), args.captions - len(distinct))])
    ids = distinct[rng.permutation(drawn)]
    device = torch.device("cpu")

    def forward() -> None:
        with torch.inference_mode():
            for block in torch.from_numpy(distinct.astype(np.int64)).split(args.batch):
                F.normalize(tower(block), dim=1)

    seconds = interleaved(
        {
            "encode_ids": lambda: encode_ids(tower, ids, batch_size=args.batch, device=device, quiet=True),
            "forward": forward,
        },
        args.repeats,
    )
    return {
        "ratio": ratio(seconds["encode_ids"], seconds["forward"]),
        "captions_per_second": len(ids) / statistics.median(seconds["encode_ids"]),
        "distinct_per_second_forward": len(distinct) / statistics.median(seconds["forward"]),
    }


def unit(rows: np.ndarray) -> np.ndarray:
    """Normalize in place: the largest sets leave no memory for a copy."""
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


if __name__ == "__main__":
    main()
