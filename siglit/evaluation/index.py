"""faiss indices over images: the exact one that is saved and searched, and an approximate one that is compared with it.

Arrays and files in, numbers out; knows nothing of caches and towers. Rows are unit rows and scores inner products.
Shapes: N images, T texts, D embedding width, K answers.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from siglit.runtime.files import atomic_write, file_hash
from siglit.runtime.progress import Meter

_logger = logging.getLogger(__name__)
_QUERIES_AT_ONCE = _ROWS_AT_ONCE = 16_384
_NEIGHBOURS = 10
_NPROBES = (1, 4, 16, 64)
_FATAL = re.compile(r"(?<!\d)0+(?!\d)|(?:HNSW1|NSG[12])(?!\d)")
"""Numbers in a factory string that faiss accepts and then aborts on, divides by or searches with forever."""


@dataclass(frozen=True)
class NprobeResult:
    """Text → image search in some of an inverted file's lists."""

    nprobe: int
    """Lists searched for each query."""
    recall: float
    """R@1, a fraction."""
    ms_per_query: float
    """Milliseconds, when all queries are searched together."""


@dataclass(frozen=True)
class ApproximateIndex:
    """An approximate index over a set of images."""

    factory: str
    """faiss's factory string."""
    faiss_index: Any
    """The index that is searched, on GPUs where possible."""
    on_cpu: Any
    """The same on the CPU; the same object where there are no GPUs."""
    seconds: float
    """Time that training it and adding all images took when it was built."""
    path: Path
    """Its file."""


@dataclass(frozen=True)
class IndexComparison:
    """An approximate index compared with exact search, texts → images."""

    factory: str
    """faiss's factory string."""
    metrics: dict[str, float]
    """{"text_to_image/R@1": …}, fractions of texts whose image is among the first K answers."""
    exact: dict[str, float]
    """The same metrics of the exact search."""
    neighbours: float
    """Share of the exact ten nearest images that are among the index's first ten, correct answers or not."""
    bytes_per_vector: float
    """Size of the file divided by the number of images."""
    build_seconds: float
    """Time that training it and adding all images took."""
    query_seconds: float
    """Time of the search for all texts."""
    ms_per_query: float
    """The same per text, milliseconds."""
    nprobe: int | None
    """Lists searched by default; None for an index without an inverted file."""
    sweep: list[NprobeResult]
    """Results of searching more lists; empty for an index without an inverted file."""
    file: str
    """Path of the index."""

    @property
    def gap(self) -> dict[str, float]:
        """What the approximation costs: exact minus approximate."""
        return {name: self.exact[name] - value for name, value in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, flat, then the exact ones, their gap, and the other fields."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("metrics", "exact")}
        return {**self.metrics, "exact": self.exact, "gap": self.gap, **rest}

    def __str__(self) -> str:
        """Recall in percent with the gap, then size and speed, then a line for each number of lists."""
        gap = {name: round(100 * value, 1) + 0.0 for name, value in self.gap.items()}  # + 0.0: no -0.0
        recalls = [
            f"{name.removeprefix('text_to_image/')} {100 * value:.1f} ({gap[name]} below exact)"
            for name, value in self.metrics.items()
        ]
        lines = [
            f"{self.factory}: text → image {', '.join(recalls)}",
            f"  {100 * self.neighbours:.1f} % of the exact {_NEIGHBOURS} nearest, {self.bytes_per_vector:,.0f} bytes "
            f"per image, built in {self.build_seconds:.1f} s, {self.ms_per_query:.3f} ms per query; {self.file}",
        ]
        return "\n".join(
            lines + [f"  nprobe {p.nprobe}: R@1 {100 * p.recall:.1f}, {p.ms_per_query:.3f} ms" for p in self.sweep]
        )


def save_index(zimg: np.ndarray, path: Path) -> None:
    """Write an exact inner-product index (faiss IndexFlatIP) over (N, D) float32 unit rows, atomically."""
    index = faiss.IndexFlatIP(zimg.shape[1])
    index.add(zimg)
    _write(index, path)


def is_index_of(path: Path, zimg: np.ndarray) -> bool:
    """Tell whether a file is the index that `save_index` writes over these rows; False if it is damaged or missing."""
    try:
        index = _read(path)
    except (OSError, RuntimeError, MemoryError):
        return False
    if type(index) is not faiss.IndexFlatIP or (index.ntotal, index.d) != zimg.shape:
        return False
    # faiss checks no sums: a changed bit would be searched like any other. Another processor rounds the last digits of
    # the rows otherwise.
    blocks = ((start, zimg[start : start + _ROWS_AT_ONCE]) for start in range(0, len(zimg), _ROWS_AT_ONCE))
    return all(np.allclose(index.reconstruct_n(start, len(rows)), rows, rtol=0, atol=1e-6) for start, rows in blocks)


def nearest_images(path: Path, ztxt: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search a saved index; returns (T, K) scores, best first, and (T, K) rows, K = `top_k` or the index's size."""
    index = _read(path)
    return index.search(ztxt, min(top_k, index.ntotal))


def load_or_build(zimg: np.ndarray, factory: str, path: Path) -> ApproximateIndex:
    """Load the index that `build` saved at this path, or build it; other images need another path."""
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        # faiss opens only a file that it wrote itself, byte for byte.
        saved = _read(path) if note["factory"] == factory and note["blake2b"] == file_hash(path) else None
        if saved is not None and (saved.ntotal, saved.d) == zimg.shape:
            return ApproximateIndex(factory, _on_gpus(saved), saved, float(note["seconds"]), path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # it is missing, damaged, or of a kind that faiss writes but cannot read
    if path.exists():
        _logger.warning(f"{path} or {_note(path).name} is damaged; the index is built again")
    return build(zimg, factory, path)


def build(zimg: np.ndarray, factory: str, path: Path) -> ApproximateIndex:
    """Build an index over the images and save it.

    It is built, and later searched, on all GPUs if faiss has any and supports this index there.

    Args:
        zimg: (N, D) float32 unit rows.
        factory: such as "HNSW32" or "IVF4096,PQ64"; https://github.com/facebookresearch/faiss/wiki/The-index-factory.
        path: file of the index; an existing one is replaced. A JSON file beside it says how it was built.

    Raises:
        ValueError: faiss does not know this index, or cannot build it over these images.
    """
    problem = f"faiss cannot build {factory!r} over {len(zimg):,} images of width {zimg.shape[1]}"
    fatal = _FATAL.search(factory)
    if fatal is not None:
        raise ValueError(f"{problem}: {fatal[0]} is too small a number")
    try:
        empty = faiss.index_factory(zimg.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index = _on_gpus(empty)
        begun = time.perf_counter()
        with Meter(f"building {factory}", len(zimg), "images") as meter:
            index.train(zimg)
            index.add(zimg)
            meter.advance(len(zimg))
        seconds = time.perf_counter() - begun
        index.search(zimg[:1], 1)  # some can be built but not searched
    except (RuntimeError, MemoryError) as error:
        reason = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", " ".join(str(error).split()))
        raise ValueError(f"{problem}: {reason}") from error
    on_cpu = index if index is empty else faiss.index_gpu_to_cpu(index)
    _note(path).unlink(missing_ok=True)
    _write(on_cpu, path)
    note = {"factory": factory, "seconds": seconds, "blake2b": file_hash(path)}
    with atomic_write(_note(path)) as file:
        file.write(json.dumps(note).encode())
    return ApproximateIndex(factory, index, on_cpu, seconds, path)


def compare(
    index: ApproximateIndex,
    zimg: np.ndarray,
    ztxt: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> IndexComparison:
    """Search an index for every text and compare its answers with those of exact search.

    Recall counts the first K answers in their order, in both searches, so that the gap is due to the index alone; where
    scores tie, `retrieval_metrics` is stricter.

    Args:
        index: the index over `zimg`.
        zimg: (N, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) row of `zimg` of each text.
        ks: cut-offs.
    """
    depth = min(max(*ks, _NEIGHBOURS), len(zimg))
    exact, _ = _timed_search(
        "searching exactly", lambda block: faiss.knn(block, zimg, depth, metric=faiss.METRIC_INNER_PRODUCT)[1], ztxt
    )
    title = f"searching {index.factory}"
    approximate, seconds = _timed_search(title, lambda block: index.faiss_index.search(block, depth)[1], ztxt)
    inverted = faiss.try_extract_index_ivf(index.on_cpu)
    return IndexComparison(
        factory=index.factory,
        metrics=_recall(approximate, image_of_text, ks),
        exact=_recall(exact, image_of_text, ks),
        neighbours=_overlap(approximate[:, :_NEIGHBOURS], exact[:, :_NEIGHBOURS]),
        bytes_per_vector=index.path.stat().st_size / len(zimg),
        build_seconds=index.seconds,
        query_seconds=seconds,
        ms_per_query=1e3 * seconds / len(ztxt),
        nprobe=None if inverted is None else int(inverted.nprobe),
        sweep=[] if inverted is None else _sweep(index, int(inverted.nlist), ztxt, image_of_text, depth),
        file=str(index.path),
    )


def _sweep(
    index: ApproximateIndex, nlist: int, ztxt: np.ndarray, image_of_text: np.ndarray, depth: int
) -> list[NprobeResult]:
    """Measure R@1 and time with increasing numbers of an inverted file's lists; leaves the index set to the largest.

    `depth` answers are searched for as in `compare`: for fewer, faiss orders tied images differently.
    """
    space = faiss.ParameterSpace() if index.faiss_index is index.on_cpu else faiss.GpuParameterSpace()
    sweep = []
    for lists in sorted({min(lists, nlist) for lists in _NPROBES}):
        space.set_index_parameter(index.faiss_index, "nprobe", lists)
        title = f"searching {index.factory}, nprobe {lists}"
        rows, seconds = _timed_search(title, lambda block: index.faiss_index.search(block, depth)[1], ztxt)
        recall = _recall(rows, image_of_text, [1])["text_to_image/R@1"]
        sweep.append(NprobeResult(lists, recall, 1e3 * seconds / len(ztxt)))
    return sweep


def _on_gpus(index: Any) -> Any:
    """Return the index on all GPUs; unchanged if faiss has no GPUs or does not support this index there."""
    if not hasattr(faiss, "index_cpu_to_all_gpus") or faiss.get_num_gpus() == 0:
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError:
        return index


def _timed_search(
    title: str, search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the (T, K) rows that a search finds for (T, D) queries, and the seconds it took."""
    parts = []
    begun = time.perf_counter()
    with Meter(title, len(queries), "captions") as meter:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            parts.append(search(queries[start : start + _QUERIES_AT_ONCE]))
            meter.advance(len(parts[-1]))
    return np.concatenate(parts), time.perf_counter() - begun


def _recall(rows: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Share of texts whose image is among the first K of (T, K) rows; faiss fills up with row −1."""
    correct = rows == image_of_text[:, None]
    return {f"text_to_image/R@{k}": float(correct[:, :k].any(1).mean()) for k in ks}


def _overlap(approximate: np.ndarray, exact: np.ndarray) -> float:
    """Share of each query's rows in `exact` that are among its rows in `approximate`, in any order; both (T, K)."""
    hits = sum(int((approximate == exact[:, place : place + 1]).any(1).sum()) for place in range(exact.shape[1]))
    return hits / exact.size


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _write(index: Any, path: Path) -> None:
    with atomic_write(path) as file:
        faiss.write_index(index, file.name)


def _read(path: Path) -> Any:
    """Open an index; faiss 1.11 or later maps the file, so that vectors are read when they are needed."""
    return faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
