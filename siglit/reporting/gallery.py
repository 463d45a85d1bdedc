"""Example queries with the images that a run retrieves for them, for the page of `siglit report`.

Knows a trained run and its data source; knows nothing of HTML. Shapes: N images, Q queries, D embedding width.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from siglit.config import Experiment, SourceSpec
from siglit.data.decode_image import BadImage, decode_image
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.runs.trained import TrainedRun
from siglit.runtime.progress import Meter

_SAMPLE, _SHOWN, _TOP_K = 256, 16, 5
"""Captions that are searched for, queries that are shown, and images of each."""
_SIDE = 96
"""Largest side of a thumbnail, in pixels."""
_BLOCK = 65_536
"""Images that are ranked at once."""


@dataclass(frozen=True)
class RetrievedImage:
    """One retrieved image."""

    key: str
    score: float
    """Cosine between image and query."""
    correct: bool
    """It is the query's own image, or has the same caption."""
    thumbnail: str | None
    """Data URI, if the image is on this machine."""


@dataclass(frozen=True)
class Query:
    """A caption and its retrieved images, best first."""

    text: str
    images: list[RetrievedImage]

    @property
    def hit(self) -> bool:
        """Whether the first image is correct."""
        return self.images[0].correct


@dataclass(frozen=True)
class Gallery:
    """Queries from an evenly spaced sample of captions, half hits and half misses as far as possible."""

    queries: list[Query]
    sampled: int
    """Captions in the sample."""
    hits: int
    """Hits in the sample."""
    note: str
    """Why thumbnails are missing; empty if none is."""


def collect_examples(experiment: Experiment, trained: TrainedRun) -> Gallery | None:
    """Retrieve images for an evenly spaced sample of captions and choose queries to show; None without captions."""
    cache = trained.cache
    if cache.num_captions == 0:
        return None
    sample = np.unique(np.linspace(0, cache.num_captions - 1, _SAMPLE).astype(int))
    texts = [cache.caption(int(number)) for number in sample]
    own = cache.caption_rows[sample]
    ztxt = trained.encode_text(texts, quiet=True)
    scores, rows = nearest(trained.zimg, ztxt, _TOP_K)
    correct = np.array(
        [
            [row == own[number] or text in cache.captions(int(row)) for row in rows[number]]
            for number, text in enumerate(texts)
        ]
    )
    chosen = choose(correct[:, 0], _SHOWN)
    keys = {cache.key(int(row)) for row in rows[chosen].flat}
    thumbnails, note = _thumbnails(experiment, keys)
    queries = []
    for number in chosen:
        images = [
            RetrievedImage(key := cache.key(int(row)), float(score), bool(is_correct), thumbnails.get(key))
            for row, score, is_correct in zip(rows[number], scores[number], correct[number], strict=True)
        ]
        queries.append(Query(texts[number], images))
    return Gallery(queries, len(sample), int(correct[:, 0].sum()), note)


def nearest(zimg: np.ndarray, ztxt: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The min(k, N) nearest images for each text, computed in blocks of images.

    Args:
        zimg: (N, D) unit rows.
        ztxt: (Q, D) unit rows.
        k: images per text.

    Returns:
        (Q, k) cosines, best first; (Q, k) rows of zimg.
    """
    texts, k = torch.from_numpy(ztxt), min(k, len(zimg))
    scores, rows = torch.empty(len(ztxt), 0), torch.empty(len(ztxt), 0, dtype=torch.int64)
    for start in range(0, len(zimg), _BLOCK):
        block = texts @ torch.from_numpy(zimg[start : start + _BLOCK]).T
        best = block.topk(min(k, block.shape[1]), dim=1)
        scores, rows = torch.cat([scores, best.values], 1), torch.cat([rows, best.indices + start], 1)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return scores.numpy(), rows.numpy()


def choose(hit: np.ndarray, count: int) -> list[int]:
    """Choose `count` of Q queries, half hits and half misses if there are enough of both, evenly spaced among each.

    Args:
        hit: (Q,) bool.
        count: queries to choose.

    Returns:
        Their numbers, ascending.
    """
    hits, misses = np.flatnonzero(hit), np.flatnonzero(~hit)
    num_misses = min(len(misses), max(count // 2, count - len(hits)))
    num_hits = min(len(hits), count - num_misses)
    return sorted([*_evenly_spaced(hits, num_hits), *_evenly_spaced(misses, num_misses)])


def _evenly_spaced(numbers: np.ndarray, count: int) -> list[int]:
    return numbers[np.linspace(0, len(numbers) - 1, count).astype(int)].tolist() if count > 0 else []


def _thumbnails(experiment: Experiment, keys: set[str]) -> tuple[dict[str, str], str]:
    """{key: thumbnail as a data URI}, and a note that says why some are missing."""
    split = experiment.eval.split
    spec = getattr(experiment.data, split)
    if spec is None:
        return {}, f"Images are not shown: data.{split} is not set."
    try:
        thumbnails = _read_thumbnails(spec, keys, experiment.cache.shard_size, experiment.data.max_image_pixels)
    except (UserError, OSError) as error:
        return {}, f"Images are not shown: they are not on the machine that wrote this page ({error})."
    missing = len(keys) - len(thumbnails)
    return thumbnails, f"{missing} of {len(keys)} images could not be read from data.{split}." if missing > 0 else ""


def _read_thumbnails(spec: SourceSpec, keys: set[str], unit_size: int, max_pixels: int) -> dict[str, str]:
    source = open_source(spec)
    thumbnails: dict[str, str] = {}
    tried = 0
    with Meter("thumbnails", len(keys), "images") as meter:
        for unit in source.units(unit_size):
            if tried == len(keys):
                break
            for sample in source.load(unit):
                if sample.key not in keys or sample.key in thumbnails:
                    continue
                tried += 1
                try:
                    thumbnails[sample.key] = thumbnail(decode_image(sample.image_bytes(), max_pixels, draft=_SIDE))
                except (BadImage, OSError):
                    continue
                finally:
                    meter.advance(1)
    return thumbnails


def thumbnail(image: Image.Image) -> str:
    """The image as a JPEG of at most 96 pixels per side, as a data URI."""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return data_uri(data.getvalue(), "image/jpeg")


def data_uri(data: bytes, mime_type: str) -> str:
    """The bytes as a data URI."""
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
