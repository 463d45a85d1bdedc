"""Queries with the pictures that a run finds for them, for the page of `siglit report`.

Knows a trained run and where its images lie; knows nothing of HTML. Shapes: N images, Q queries, D embedding width.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from siglit.config import Experiment, SourceSpec
from siglit.data.images import BadImage, decode_image
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.runs.trained import TrainedRun
from siglit.runtime.progress import Meter

_SAMPLE, _SHOWN, _ANSWERS = 256, 16, 5
_SIDE = 96
_BLOCK = 65_536


@dataclass(frozen=True)
class Answer:
    """An image that was found."""

    key: str
    score: float
    """Cosine."""
    right: bool
    """It is the query's own image, or has the same caption."""
    picture: str | None
    """Data URI of a thumbnail, if the image is on this machine."""


@dataclass(frozen=True)
class Query:
    """A caption and what was found for it."""

    text: str
    answers: list[Answer]

    @property
    def hit(self) -> bool:
        """The first answer is right."""
        return self.answers[0].right


@dataclass(frozen=True)
class Gallery:
    """Some queries of an evenly drawn sample: hits and misses both, as far as there are any."""

    queries: list[Query]
    sampled: int
    """Captions that were tried."""
    hits: int
    """How many of these were hits."""
    note: str
    """Why pictures are missing, or nothing."""


def draw_gallery(experiment: Experiment, trained: TrainedRun) -> Gallery | None:
    """Ask for the images of an evenly drawn sample of captions and choose queries to show; None without captions."""
    cache = trained.cache
    if cache.num_captions == 0:
        return None
    asked = np.unique(np.linspace(0, cache.num_captions - 1, _SAMPLE).astype(int))
    texts = [cache.caption(int(number)) for number in asked]
    own = cache.caption_rows[asked]
    ztxt = trained.encode_text(texts, quiet=True)
    scores, found = nearest(trained.zimg, ztxt, _ANSWERS)
    right = np.array(
        [
            [row == own[number] or text in cache.captions(int(row)) for row in found[number]]
            for number, text in enumerate(texts)
        ]
    )
    chosen = choose(right[:, 0], _SHOWN)
    keys = {cache.key(int(row)) for row in found[chosen].flat}
    pictures, note = _pictures(experiment, keys)
    queries = []
    for number in chosen:
        answers = [
            Answer(key := cache.key(int(row)), float(score), bool(is_right), pictures.get(key))
            for row, score, is_right in zip(found[number], scores[number], right[number], strict=True)
        ]
        queries.append(Query(texts[number], answers))
    return Gallery(queries, len(asked), int(right[:, 0].sum()), note)


def nearest(zimg: np.ndarray, ztxt: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of (N, D) images for (Q, D) texts: (Q, k) cosines, best first, and (Q, k) rows; a block at a time.

    k is N where there are fewer images.
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
    """Numbers of `count` queries, evenly drawn from hits and misses, half of each unless there are too few.

    Args:
        hit: (Q,) bool.
        count: how many.
    """
    hits, misses = np.flatnonzero(hit), np.flatnonzero(~hit)
    of_misses = min(len(misses), max(count // 2, count - len(hits)))
    of_hits = min(len(hits), count - of_misses)
    return sorted([*_evenly(hits, of_hits), *_evenly(misses, of_misses)])


def _evenly(numbers: np.ndarray, count: int) -> list[int]:
    return numbers[np.linspace(0, len(numbers) - 1, count).astype(int)].tolist() if count else []


def _pictures(experiment: Experiment, keys: set[str]) -> tuple[dict[str, str], str]:
    """Thumbnails by key as data URIs, and why there are fewer than keys."""
    split = experiment.eval.split
    spec = getattr(experiment.data, split)
    if spec is None:
        return {}, f"data.{split} is not set, so that there is nothing to show pictures of."
    try:
        found = _read(spec, keys, experiment.cache.shard_size, experiment.data.max_image_pixels)
    except (UserError, OSError) as error:
        return {}, f"The images are not on the machine that made this page: {error}"
    missing = len(keys) - len(found)
    return found, f"{missing} of {len(keys)} images could not be read from data.{split}." if missing else ""


def _read(spec: SourceSpec, keys: set[str], unit_size: int, max_pixels: int) -> dict[str, str]:
    source = open_source(spec)
    found: dict[str, str] = {}
    seen = 0
    with Meter("pictures", len(keys), "images") as meter:
        for unit in source.units(unit_size):
            if seen == len(keys):
                break
            for sample in source.load(unit):
                if sample.key not in keys or sample.key in found:
                    continue
                seen += 1
                try:
                    found[sample.key] = thumbnail(decode_image(sample.image_bytes(), max_pixels, draft=_SIDE))
                except (BadImage, OSError):
                    continue
                finally:
                    meter.advance(1)
    return found


def thumbnail(image: Image.Image) -> str:
    """A JPEG of at most 96 pixels a side, as a data URI."""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return data_uri(data.getvalue(), "image/jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Bytes of a MIME type as a URI that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
