"""`siglit cache export | import`: between a cache and the files of clip-retrieval, or a plain HDF5 file.

clip-retrieval's layout is `img_emb/img_emb_0000.npy` and `metadata/metadata_0000.parquet`, with equal rows. Files are
read and written in blocks, and nothing is unpickled. Shapes: D embedding width.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from siglit.cache import CacheWriter, EmbeddingCache, PlainHdf5
from siglit.commands.cache import WrittenRows
from siglit.data.mean_row import mean_row
from siglit.data.sources.columns import Columns, parse_label, string_list
from siglit.errors import UserError
from siglit.runtime.files import atomic_write, check_regular
from siglit.runtime.text import plural

_BLOCK = 8192
_ROWS_PER_PART = 1_000_000
_HDF5 = (".h5", ".hdf5")


def cache_export(path: str, out: str) -> WrittenRows:
    """Write a cache in clip-retrieval's layout: float16 .npy, and parquet with key, caption (the first), captions.

    The parquet files also have `langs` and `label` if the cache does. `mean.npy` is the mean of all rows, (D,) float32,
    which image_tower.center subtracts if this is the training images' cache. A file gets its final name once it is
    complete.

    Raises:
        CacheError: `path` is not a complete cache.
        UserError: the folder `out` is not empty.
    """
    cache, folder = EmbeddingCache(path), Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty; export into another folder")
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    texts = iter(cache.keys), cache.iter_captions()
    parts = range(0, max(1, len(cache)), _ROWS_PER_PART)
    digits = max(4, len(str(len(parts) - 1)))
    for number, start in enumerate(parts):
        stop = min(start + _ROWS_PER_PART, len(cache))
        _write_npy(cache, start, stop, folder / "img_emb" / f"img_emb_{number:0{digits}d}.npy")
        _write_parquet(
            _metadata_blocks(cache, texts, start, stop),
            folder / "metadata" / f"metadata_{number:0{digits}d}.parquet",
            _schema(cache),
        )
    if len(cache) > 0:
        with atomic_write(folder / "mean.npy") as file:
            np.save(file, mean_row(cache))
    return WrittenRows(out, len(cache), cache.dim)


def cache_import(
    out: str,
    embeddings: str,
    model: str,
    metadata: str | None = None,
    key: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> WrittenRows:
    """Make a cache from existing embeddings.

    Args:
        out: folder of the new cache.
        embeddings: a .npy file (rows, D), a folder of them, or an HDF5 file with a dataset `embedding`.
        model: the model that computed them; part of the fingerprint, compared with image_tower.model.
        metadata: a parquet file, or a folder with one per .npy file, in the order of their names.
        key: column or dataset of the image's key; default: key, else image_path.
        caption: of a caption or a list of captions; default: captions, else caption, else none.
        label: of an integer class label; default: label, if it exists.

    Raises:
        UserError: files are missing, cannot be read, or differ in their numbers of rows.
        CacheError: rows cannot be stored, or two have the same key.
    """
    columns = {"key": key, "captions": caption, "label": label}
    source = Path(embeddings)
    if source.suffix in _HDF5:
        blocks, files = _hdf5_blocks(source, columns), [source]
    elif metadata is None:
        raise UserError(f"{embeddings} has embeddings only; give their keys with --metadata, a parquet file or folder")
    else:
        arrays, tables = _files(source, ".npy"), _files(Path(metadata), ".parquet")
        if len(arrays) != len(tables):
            raise UserError(
                f"{embeddings} has {plural(len(arrays), '.npy file')}, but {metadata} has "
                f"{plural(len(tables), 'parquet file')}; each .npy file needs one parquet file"
            )
        blocks, files = _pair_blocks(arrays, tables, columns), arrays
    fingerprint = {
        "image_tower": {"model": model, "imported": True},
        "source": {"imported": [{"file": file.name, "size": file.stat().st_size} for file in files]},
    }
    with CacheWriter(out, fingerprint) as writer:
        for block in blocks:
            writer.add(block["embedding"], block["key"], block["captions"], block["label"], block["langs"])
    cache = EmbeddingCache(out)
    return WrittenRows(out, len(cache), cache.dim)


def _write_npy(cache: EmbeddingCache, start: int, stop: int, path: Path) -> None:
    # Not through a memory map: on a full disk, writing to one kills the process.
    with atomic_write(path) as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (stop - start, cache.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(start, stop, _BLOCK):
            file.write(cache.gather(np.arange(first, min(first + _BLOCK, stop))).data)


def _schema(cache: EmbeddingCache) -> pa.Schema:
    fields = [("key", pa.string()), ("caption", pa.string()), ("captions", pa.list_(pa.string()))]
    fields += [("langs", pa.list_(pa.string()))] if cache.langs is not None else []
    fields += [("label", pa.int64())] if cache.labels is not None else []
    return pa.schema(fields)


def _metadata_blocks(
    cache: EmbeddingCache, texts: tuple[Iterator[str], Iterator[str]], start: int, stop: int
) -> Iterator[dict[str, list[Any]]]:
    """Columns of the rows from start to stop − 1; `texts` iterates over keys and captions from start on."""
    keys, captions = texts
    for first in range(start, stop, _BLOCK):
        ends = cache.caption_offsets[first : min(first + _BLOCK, stop) + 1].tolist()
        groups = [list(islice(captions, b - a)) for a, b in pairwise(ends)]
        block: dict[str, list[Any]] = {
            "key": list(islice(keys, len(groups))),
            "caption": [group[0] if group else None for group in groups],
            "captions": groups,
        }
        if cache.langs is not None:
            block["langs"] = [cache.langs[a:b].tolist() for a, b in pairwise(ends)]
        if cache.labels is not None:
            block["label"] = [None if x < 0 else x for x in cache.labels[first : first + len(groups)].tolist()]
        yield block


def _write_parquet(blocks: Iterator[dict[str, list[Any]]], path: Path, schema: pa.Schema) -> None:
    with atomic_write(path) as file, pq.ParquetWriter(file, schema) as writer:
        for block in blocks:
            writer.write_table(pa.table(block, schema))


def _files(path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob(f"*{suffix}"))
    if len(files) == 0:
        raise UserError(f"there is no {suffix} file in {path}; check the path")
    return files


def _pair_blocks(arrays: list[Path], tables: list[Path], given: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    for array_path, table_path in zip(arrays, tables, strict=True):
        rows = _map_npy(array_path)
        try:
            with pq.ParquetFile(table_path) as table:
                if rows.ndim != 2 or len(rows) != table.metadata.num_rows:
                    raise UserError(
                        f"{array_path} has shape {rows.shape}, but {table_path} has {table.metadata.num_rows} rows; "
                        "the array must be (rows, D) with as many rows as the table"
                    )
                columns = _choose_columns(given, table.schema_arrow.names, table_path)
                start = 0
                for batch in table.iter_batches(_BLOCK, columns=sorted(set(columns.values()))):
                    values = batch.to_pydict()
                    block = {name: values[column] for name, column in columns.items()}
                    embedding = np.array(rows[start : start + batch.num_rows])
                    yield _block(embedding, block, partial(_place, table_path, start))
                    start += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{table_path} is not a readable parquet file: {text}. Write it again.") from None


def _hdf5_blocks(path: Path, given: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    columns = _choose_columns(given, PlainHdf5(path, ["embedding"]).names(), path)
    start = 0
    for block in PlainHdf5(path, ["embedding", *columns.values()]).blocks(_BLOCK):
        values = {name: np.asarray(block[column]).tolist() for name, column in columns.items()}
        embedding = np.asarray(block["embedding"])
        yield _block(embedding, values, partial(_place, path, start))
        start += len(embedding)


def _choose_columns(given: dict[str, str | None], names: list[str], path: Path) -> dict[str, str]:
    """{key, captions, label, langs: column}: the given column, which must exist, else the first default that does."""
    defaults = {
        "key": ("key", "image_path"),
        "captions": ("captions", "caption"),
        "label": ("label",),
        "langs": ("langs",),
    }
    columns = {}
    for role, candidates in defaults.items():
        column = given.get(role) or next((name for name in candidates if name in names), None)
        if (column is None and role == "key") or (column is not None and column not in names):
            raise UserError(f"{path} has no {column or 'key'!r}, it has {', '.join(names)}; set --{role.rstrip('s')}")
        if column is not None:
            columns[role] = column
    if columns.get("captions") != "captions":
        columns.pop("langs", None)
    return columns


def _block(embedding: np.ndarray, values: dict[str, list[Any]], place: Callable[[int], str]) -> dict[str, Any]:
    """The arguments of `CacheWriter.add` for one block; `place` says in words where row i of it is.

    Raises:
        UserError: a key is neither text nor an integer, a caption is not text, or a label is not an integer.
    """
    columns, rows = Columns(key="key"), len(embedding)
    keys = [columns.key_of({"key": key}, "", place(i)) for i, key in enumerate(values["key"])]
    captions = [_texts(value, place(i)) for i, value in enumerate(values.get("captions", [None] * rows))]
    labels = [_label(value, place(i)) for i, value in enumerate(values.get("label", [None] * rows))]
    return {"embedding": embedding, "key": keys, "captions": captions, "label": labels, "langs": values.get("langs")}


def _place(path: Path, start: int, row: int) -> str:
    return f"row {start + row} of {path}"


def _texts(value: Any, place: str) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    texts = [text for text in value if text is not None] if isinstance(value, list) else value
    return string_list(texts, "the caption", place)


def _label(value: Any, place: str) -> int | None:
    # pandas turns integers with a gap among them into floats and a NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    label = parse_label(int(value) if isinstance(value, float) and value.is_integer() else value, f"{place}: the label")
    return None if label < 0 else label


def _map_npy(path: Path) -> np.ndarray:
    try:
        check_regular(path)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        text = str(error)
        reason = "it holds pickled objects, or something else" if "pickle" in text or "objects" in text else text
        raise UserError(
            f"{path} is not a plain .npy file ({reason}), and nothing is unpickled; write it with numpy.save"
        ) from None
    if not isinstance(rows, np.ndarray):  # of a zip archive, numpy opens a folder of arrays
        raise UserError(f"{path} is an .npz archive, but one array is expected; write it with numpy.save")
    return rows
