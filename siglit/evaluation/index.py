"""faiss indices over a set's images: the exact one that is saved and searched, and an approximate one set against it.

Arrays and files in, numbers out; knows nothing of caches and towers. Rows are unit rows and scores inner products.
Shapes: N images, T texts, D embedding width, K answers.
"""

import json
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

_QUERIES_AT_ONCE = 16_384
_NEIGHBOURS = 10
_NPROBES = (1, 4, 16, 64)
_FATAL = re.compile(r"(?<!\d)0+(?!\d)|(?:HNSW1|NSG[12])(?!\d)")
"""Numbers in a factory string that faiss takes, and then aborts, divides by or searches with for ever."""


@dataclass(frozen=True)
class Probe:
    """Text → image search with some of an inverted file's lists."""

    nprobe: int
    """Lists searched for each query."""
    recall: float
    """R@1, a fraction."""
    ms_per_query: float
    """Milliseconds, of all queries at once."""


@dataclass(frozen=True)
class Built:
    """An approximate index over a set's images."""

    factory: str
    """faiss's factory string."""
    index: Any
    """What is searched: faiss's, on GPUs where it can be."""
    kept: Any
    """The same on the CPU, the very same where there are no GPUs."""
    seconds: float
    """Training and adding all images, when that was done."""
    path: Path
    """Its file."""


@dataclass(frozen=True)
class Approximate:
    """An approximate index against the exact search, texts → images."""

    factory: str
    """faiss's factory string."""
    metrics: dict[str, float]
    """{"text_to_image/R@1": …}, fractions: the image is among the first K that the index gives."""
    exact: dict[str, float]
    """The same of the exact search."""
    neighbours: float
    """Share of the exact ten nearest images that are among the index's first ten, whether right or wrong."""
    bytes_per_vector: float
    """Size of the file by its images."""
    build_seconds: float
    """Training and adding all images."""
    query_seconds: float
    """Searching for all texts."""
    ms_per_query: float
    """The same for one of them, milliseconds."""
    nprobe: int | None
    """Lists searched by default, of an index with an inverted file."""
    sweep: list[Probe]
    """What searching more lists gives, of an index with an inverted file."""
    file: str
    """Where it is kept."""

    @property
    def gap(self) -> dict[str, float]:
        """What approximating costs: exact minus approximate."""
        return {name: self.exact[name] - value for name, value in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Flat metrics, the exact ones, their gap, then the rest."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("metrics", "exact")}
        return {**self.metrics, "exact": self.exact, "gap": self.gap, **rest}

    def __str__(self) -> str:
        """Recall in per cent with the gap, then size and speed, then a line for each number of lists."""
        gap = {name: round(100 * value, 1) + 0.0 for name, value in self.gap.items()}  # + 0.0: no -0.0
        told = [
            f"{name.removeprefix('text_to_image/')} {100 * value:.1f} ({gap[name]} below exact)"
            for name, value in self.metrics.items()
        ]
        lines = [
            f"{self.factory}: text → image {', '.join(told)}",
            f"  {100 * self.neighbours:.1f} % of the exact {_NEIGHBOURS} nearest, {self.bytes_per_vector:,.0f} bytes "
            f"per image, built in {self.build_seconds:.1f} s, {self.ms_per_query:.3f} ms per query; {self.file}",
        ]
        return "\n".join(
            lines + [f"  nprobe {p.nprobe}: R@1 {100 * p.recall:.1f}, {p.ms_per_query:.3f} ms" for p in self.sweep]
        )


def save_index(zimg: np.ndarray, path: Path) -> None:
    """Write an exact inner-product index (faiss IndexFlatIP) over (N, D) float32 unit rows, whole or not at all."""
    index = faiss.IndexFlatIP(zimg.shape[1])
    index.add(zimg)
    _write(index, path)


def is_index_of(path: Path, zimg: np.ndarray) -> bool:
    """Tell whether a file is a whole index over as many images of this width; a damaged one is none."""
    try:
        kept = _read(path)
    except (OSError, RuntimeError, MemoryError):
        return False
    return (kept.ntotal, kept.d) == zimg.shape


def nearest_images(path: Path, ztxt: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search a saved index; returns (T, K) scores, best first, and (T, K) rows, K = `top_k` or the index's size."""
    index = _read(path)
    return index.search(ztxt, min(top_k, index.ntotal))


def kept_or_built(zimg: np.ndarray, factory: str, path: Path) -> Built:
    """Take the index that `build` has kept under this path, or build it; other images need another path."""
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        # faiss is shown no file but the very one that it wrote.
        kept = _read(path) if note["factory"] == factory and note["blake2b"] == file_hash(path) else None
        if kept is not None and (kept.ntotal, kept.d) == zimg.shape:
            return Built(factory, _on_gpus(kept), kept, float(note["seconds"]), path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # none is there, or no whole one, or one that faiss writes and cannot read: all are built
    return build(zimg, factory, path)


def build(zimg: np.ndarray, factory: str, path: Path) -> Built:
    """Build an index over the images and keep it.

    It is built, and later searched, on all GPUs where faiss has any and knows how.

    Args:
        zimg: (N, D) float32 unit rows.
        factory: such as "HNSW32" or "IVF4096,PQ64"; https://github.com/facebookresearch/faiss/wiki/The-index-factory.
        path: file for the index; one that is there is replaced. A note of what it is lies beside it, as .json.

    Raises:
        ValueError: faiss knows no such index, or cannot build it over these images.
    """
    cannot = f"faiss cannot build {factory!r} over {len(zimg):,} images of width {zimg.shape[1]}"
    fatal = _FATAL.search(factory)
    if fatal:
        raise ValueError(f"{cannot}: {fatal[0]} is too small a number")
    try:
        made = faiss.index_factory(zimg.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index = _on_gpus(made)
        begun = time.perf_counter()
        with Meter(f"building {factory}", len(zimg), "images") as meter:
            index.train(zimg)
            index.add(zimg)
            meter.advance(len(zimg))
        seconds = time.perf_counter() - begun
        index.search(zimg[:1], 1)  # some are built that cannot be searched
    except (RuntimeError, MemoryError) as error:
        told = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", " ".join(str(error).split()))
        raise ValueError(f"{cannot}: {told}") from error
    kept = index if index is made else faiss.index_gpu_to_cpu(index)
    _note(path).unlink(missing_ok=True)
    _write(kept, path)
    note = {"factory": factory, "seconds": seconds, "blake2b": file_hash(path)}
    with atomic_write(_note(path)) as file:
        file.write(json.dumps(note).encode())
    return Built(factory, index, kept, seconds, path)


def compare(
    built: Built, zimg: np.ndarray, ztxt: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> Approximate:
    """Search an index for every text beside the exact search.

    Recall is read off the first K answers as they come, from both, so that the gap is the index's alone; where scores
    tie, `retrieval_metrics` is stricter.

    Args:
        built: the index over `zimg`.
        zimg: (N, D) float32 unit rows.
        ztxt: (T, D) float32 unit rows.
        image_of_text: (T,) row of `zimg` of each text.
        ks: cut-offs.
    """
    depth = min(max(*ks, _NEIGHBOURS), len(zimg))
    exact, _ = _searched(
        "searching exactly", lambda block: faiss.knn(block, zimg, depth, metric=faiss.METRIC_INNER_PRODUCT)[1], ztxt
    )
    found, seconds = _searched(f"searching {built.factory}", lambda block: built.index.search(block, depth)[1], ztxt)
    inverted = faiss.try_extract_index_ivf(built.kept)
    return Approximate(
        factory=built.factory,
        metrics=_recall(found, image_of_text, ks),
        exact=_recall(exact, image_of_text, ks),
        neighbours=_shared(found[:, :_NEIGHBOURS], exact[:, :_NEIGHBOURS]),
        bytes_per_vector=built.path.stat().st_size / len(zimg),
        build_seconds=built.seconds,
        query_seconds=seconds,
        ms_per_query=1e3 * seconds / len(ztxt),
        nprobe=None if inverted is None else int(inverted.nprobe),
        sweep=[] if inverted is None else _sweep(built, int(inverted.nlist), ztxt, image_of_text, depth),
        file=str(built.path),
    )


def _sweep(built: Built, nlist: int, ztxt: np.ndarray, image_of_text: np.ndarray, depth: int) -> list[Probe]:
    """R@1 and time with more and more of an inverted file's lists; the index is left with the most.

    As many answers are asked for as in `compare`: faiss orders images of one score otherwise for fewer of them.
    """
    space = faiss.ParameterSpace() if built.index is built.kept else faiss.GpuParameterSpace()
    sweep = []
    for lists in sorted({min(lists, nlist) for lists in _NPROBES}):
        space.set_index_parameter(built.index, "nprobe", lists)
        told = f"searching {built.factory}, nprobe {lists}"
        found, seconds = _searched(told, lambda block: built.index.search(block, depth)[1], ztxt)
        recall = _recall(found, image_of_text, [1])["text_to_image/R@1"]
        sweep.append(Probe(lists, recall, 1e3 * seconds / len(ztxt)))
    return sweep


def _on_gpus(index: Any) -> Any:
    """The index on all GPUs, or as it is where faiss has none, or has no such index for them."""
    if not hasattr(faiss, "index_cpu_to_all_gpus") or faiss.get_num_gpus() == 0:
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError:
        return index


def _searched(told: str, search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[np.ndarray, float]:
    """(T, K) rows that a search gives, and the seconds it took."""
    parts = []
    begun = time.perf_counter()
    with Meter(told, len(queries), "captions") as meter:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            parts.append(search(queries[start : start + _QUERIES_AT_ONCE]))
            meter.advance(len(parts[-1]))
    return np.concatenate(parts), time.perf_counter() - begun


def _recall(found: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Share of texts whose image is among the first K of (T, K) rows; faiss gives row −1 where it found no more."""
    right = found == image_of_text[:, None]
    return {f"text_to_image/R@{k}": float(right[:, :k].any(1).mean()) for k in ks}


def _shared(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the rows of `exact` that stand in the same line of `found`, in any order; both (T, K)."""
    hits = sum(int((found == exact[:, place : place + 1]).any(1).sum()) for place in range(exact.shape[1]))
    return hits / exact.size


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _write(index: Any, path: Path) -> None:
    with atomic_write(path) as file:
        faiss.write_index(index, file.name)


def _read(path: Path) -> Any:
    """Open an index whose vectors stay in the file until they are looked at, where faiss (1.11 or later) can do so."""
    return faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
