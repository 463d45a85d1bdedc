"""Commit shards, each whole or not at all, and complete a cache with its index.

Knows nothing of ranks or images: the caller decides which process writes which shard, and in what order.
Shapes: n rows (images) of a shard, D embedding width, m captions of a shard.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from siglit.cache.format import (
    ALIGNMENT,
    DATASETS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    CacheError,
    ShardRecord,
    content_checksum,
    describe_shard,
    differing_fields,
    fingerprint_json,
    metadata_checksum,
    open_shard,
    pack_strings,
    shard_files,
    shard_fingerprint,
    shard_name,
)
from siglit.cache.keys import find_duplicate_key
from siglit.runtime.files import explain_write_error, fsync_folder, leftovers, write_bytes
from siglit.runtime.text import plural


def write_shard(
    folder: Path,
    number: int,
    *,
    embeddings: np.ndarray,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    langs: Sequence[Sequence[str]] | None = None,
    labels: Sequence[int | None] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    fingerprint: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Commit one shard: afterwards either all of it is on the disk, or nothing.

    The file is built in memory (as large again as the float16 embeddings) and then written as bytes: HDF5 itself
    neither explains a full disk nor survives one. Deletes index.json, as a cache that still gets shards is not
    complete.

    Args:
        folder: the cache's folder; created if it does not exist.
        number: of the shard, from 0; not yet committed.
        embeddings: (n, D) floats, the tower's outputs; stored as float16. n may be 0.
        keys: n different strings.
        captions: n lists of any length.
        langs: language codes, parallel to `captions`; "" where a caption has none.
        labels: n class numbers ≥ 0; None where a row has none.
        skipped: (key, reason) of the images that have no row.
        fingerprint: the settings that the embeddings were computed with; JSON.
        versions: {software: version} to record beside h5py's; for people, never compared.

    Returns:
        The path of the shard.

    Raises:
        CacheError: the lengths of the arguments differ, a value is not finite in float16, a key occurs twice, or the
            shard is already committed.
        OSError: the file could not be written; the message says why and what to do.
    """
    folder = Path(folder)
    path = folder / shard_name(number)
    if path.exists():
        raise CacheError(f"{path} is already committed and is never replaced; skip it, or delete it first")
    arrays = {
        "embedding": _float16(embeddings, keys),
        **_text_arrays(keys, captions, langs, skipped),
        "label": _label_array(labels, len(keys)),
    }
    software = {"h5py": h5py.__version__, "HDF5": h5py.version.hdf5_version, **(versions or {})}
    created_by = ", ".join(f"{name} {version}" for name, version in software.items())
    commit_arrays(folder, number, arrays, fingerprint, created_by)
    return path


def commit_arrays(
    folder: Path, number: int, arrays: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any], created_by: str
) -> None:
    """Commit a shard from its datasets as they are stored, such as those of another cache's shard."""
    name = shard_name(number)
    image = _hdf5_image(
        arrays,
        {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "number": number,
            "fingerprint": fingerprint_json(fingerprint),
            "checksum": content_checksum(arrays),
            "created_by": created_by,
        },
    )
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
        (folder / INDEX_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise explain_write_error(error, folder, name, len(image)) from error
    write_bytes(folder / name, image)


def committed_shards(folder: Path, fingerprint: Mapping[str, Any]) -> set[int]:
    """Numbers of the committed shards; empty for a folder that does not exist.

    Raises:
        CacheError: a shard cannot be read, or has another fingerprint; the message names the fields, with both values.
    """
    shards = shard_files(Path(folder))
    for path in shards.values():
        with open_shard(path) as file:
            differences = differing_fields(shard_fingerprint(file), fingerprint)
        if len(differences) > 0:
            raise CacheError(
                f"{path} was made with other settings: {'; '.join(differences)}. "
                f"Change the configuration back, or write into another folder, or delete {folder}"
            )
    return set(shards)


def remove_unfinished(folder: Path) -> int:
    """Delete the temporary shards and indexes of killed writers and return the number of deleted files.

    Call it with the folder locked, before writing. Other temporary files stay, such as those of a training run that is
    writing token ids.
    """
    temporary = [path for names in ("shard-*.h5", INDEX_NAME) for path in leftovers(folder, names)]
    for path in temporary:
        path.unlink(missing_ok=True)
    return len(temporary)


def finish(folder: Path, units: int, fingerprint: Mapping[str, Any]) -> None:
    """Complete the cache: check that all shards exist and fit each other, then write index.json.

    A cache that is already complete is compared with its index. Reads the keys, labels, languages, and the bytes
    outside the datasets (some 60 kB of a shard), but not the embeddings: `EmbeddingCache.verify` checks those.

    Args:
        folder: the cache's folder.
        units: number of shards; they are numbered 0 … units − 1.
        fingerprint: the one that all of them must have.

    Raises:
        CacheError: a shard is missing, superfluous, damaged, has another fingerprint or width, or shares a key with
            another.
        OSError: the index could not be written.
    """
    folder = Path(folder)
    committed = committed_shards(folder, fingerprint)
    missing, extra = sorted(set(range(units)) - committed), sorted(committed - set(range(units)))
    if len(missing) > 0 or units < 1:
        raise CacheError(
            f"{folder} is not complete: {len(missing)} of {plural(units, 'shard')} missing, the first is "
            f"{shard_name(missing[0] if len(missing) > 0 else 0)}; run `siglit precompute` again"
        )
    if len(extra) > 0:
        raise CacheError(
            f"{folder} has {plural(units + len(extra), 'shard')}, but its source needs {units} (the first extra one is "
            f"{shard_name(extra[0])}); write into another folder, or delete this one"
        )
    paths = [folder / shard_name(number) for number in range(units)]
    records, created_by = [], set()
    for path in paths:
        with open_shard(path) as file:
            records.append(describe_shard(file, path))
            created_by.add(str(file.attrs.get("created_by", "")))
    dim = _common_dim(folder, records)
    duplicate = find_duplicate_key(paths)
    if duplicate is not None:
        raise CacheError(
            f"{folder}: {duplicate}, but keys must be unique; fix the source, "
            f"delete both shards and run `siglit precompute` again"
        )
    checksums = [metadata_checksum(path, record) for path, record in zip(paths, records, strict=True)]
    _check_unchanged(folder, records, checksums)
    index = _index_bytes(records, dim, fingerprint, checksums, sorted(created_by))
    path = folder / INDEX_NAME
    if not path.exists() or path.read_bytes() != index:
        write_bytes(folder / INDEX_NAME, index)


def _check_unchanged(folder: Path, records: Sequence[ShardRecord], checksums: Sequence[str]) -> None:
    """Refuse to complete a complete cache again whose bytes outside the datasets have changed."""
    try:
        index = json.loads((folder / INDEX_NAME).read_bytes())
        before = dict(zip((shard["file"] for shard in index["shards"]), index["metadata_checksums"], strict=True))
    except (OSError, ValueError, KeyError, TypeError):  # no index, an index of an earlier version, or a damaged one
        return
    for record, checksum in zip(records, checksums, strict=True):
        if before.get(record.file, checksum) != checksum:
            raise CacheError(
                f"{folder / record.file}: bytes outside its datasets have changed since the cache was completed; "
                f"run `siglit cache verify --repair {folder}`, then `siglit precompute` again"
            )


def _float16(embeddings: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """(n, D) embeddings as stored; refuses other shapes and values that float16 cannot hold."""
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(embeddings) != len(keys):
        raise CacheError(
            f"embeddings are {embeddings.dtype} {embeddings.shape}; expected floats ({len(keys)}, D), one row per key"
        )
    if embeddings.size == 0 and len(keys) > 0:
        raise CacheError(f"embeddings are {embeddings.shape}: rows have no values; check the tower's output")
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(embeddings, DATASETS["embedding"])
    if not np.isfinite(stored).all():
        row, column = np.argwhere(~np.isfinite(stored))[0]
        raise CacheError(
            f"the embedding of {keys[row]!r} (row {row}) holds {embeddings[row, column]}; expected finite values up to "
            f"65504 (float16). Run the tower in float32, or leave the row out and list the image as skipped"
        )
    return stored


def _text_arrays(
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    langs: Sequence[Sequence[str]] | None,
    skipped: Sequence[tuple[str, str]],
) -> dict[str, np.ndarray]:
    """The datasets of keys, captions, languages and skipped images."""
    counts = [len(group) for group in captions]
    codes = [""] * sum(counts) if langs is None else [code for group in langs for code in group]
    if len(captions) != len(keys) or (langs is not None and [len(group) for group in langs] != counts):
        raise CacheError(
            f"{len(keys)} keys need as many lists of captions, got {len(counts)}, and one language per caption"
        )
    if isinstance(captions, str) or any(isinstance(group, str) for group in captions):
        raise CacheError("captions are text; expected a list of captions per row, such as ['a cat'] instead of 'a cat'")
    first_row: dict[str, int] = {}
    for row, key in enumerate(keys):
        if first_row.setdefault(key, row) != row:
            raise CacheError(
                f"key {key!r} is in row {first_row[key]} and in row {row}, but keys must be unique; fix the source"
            )
    table = ["", *sorted(set(codes) - {""})]
    if len(table) > np.iinfo(DATASETS["lang_code"]).max:
        raise CacheError(
            f"there are {len(table) - 1:,} languages, at most 65,534 are possible; check that langs are language codes"
        )
    number_of = {code: position for position, code in enumerate(table)}
    caption_ptr = np.zeros(len(counts) + 1, DATASETS["caption_ptr"])
    np.cumsum(counts, out=caption_ptr[1:])
    arrays = {
        "caption_ptr": caption_ptr,
        "lang_code": np.array([number_of[code] for code in codes], DATASETS["lang_code"]),
    }
    texts = {
        "key": keys,
        "caption": [caption for group in captions for caption in group],
        "lang": table,
        "skipped_key": [key for key, _ in skipped],
        "skipped_reason": [reason for _, reason in skipped],
    }
    for name, strings in texts.items():
        arrays[f"{name}_bytes"], arrays[f"{name}_offsets"] = pack_strings(strings, name)
    return arrays


def _label_array(labels: Sequence[int | None] | None, rows: int) -> np.ndarray:
    """(n,) labels as stored, −1 where a row has none."""
    if labels is None:
        return np.full(rows, -1, DATASETS["label"])
    if len(labels) != rows:
        raise CacheError(
            f"got {plural(len(labels), 'label')} for {plural(rows, 'row')}; give one per row, None where a row has none"
        )
    negative = [label for label in labels if label is not None and label < 0]
    if len(negative) > 0:
        raise CacheError(f"a label is {negative[0]}; expected class numbers ≥ 0, or None where a row has none")
    return np.array([-1 if label is None else label for label in labels], DATASETS["label"])


def _hdf5_image(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> memoryview:
    """The bytes of a shard, reproducible: no times, a fixed file version, a fixed order."""
    image = io.BytesIO()
    with h5py.File(
        image, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=ALIGNMENT, track_order=False
    ) as file:
        file.attrs.update(attributes)
        for name in DATASETS:
            # No chunks, maxshape or filters: a dataset with any of them cannot be mapped.
            file.create_dataset(name, data=arrays[name], dtype=DATASETS[name], track_times=False)
    return image.getbuffer()


def _common_dim(folder: Path, records: Sequence[ShardRecord]) -> int:
    """D of the cache. Shards without rows are ignored: a writer that skipped every image may not have known D."""
    filled = [record for record in records if record.rows]
    if len(filled) == 0:
        return max(record.dim for record in records)
    for record in filled:
        if record.dim != filled[0].dim:
            raise CacheError(
                f"{folder}: embeddings have width {filled[0].dim} in {filled[0].file}, {record.dim} in {record.file}; "
                f"delete the shards of the wrong tower and run `siglit precompute` again"
            )
    return filled[0].dim


def _index_bytes(
    records: Sequence[ShardRecord],
    dim: int,
    fingerprint: Mapping[str, Any],
    metadata_checksums: Sequence[str],
    created_by: Sequence[str],
) -> bytes:
    head = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "dim": dim,
        "rows": sum(record.rows for record in records),
        "captions": sum(record.captions for record in records),
        "skipped": sum(record.skipped for record in records),
        "created_by": created_by,
        "fingerprint": json.loads(fingerprint_json(fingerprint)),
    }
    # One shard per line: ten thousand of them stay readable and comparable with diff.
    lists = {"shards": [asdict(record) for record in records], "metadata_checksums": metadata_checksums}
    lines = {name: ",\n".join(map(json.dumps, values)) for name, values in lists.items()}
    tail = "".join(f',\n "{name}": [\n{text}\n]' for name, text in lines.items())
    return f"{json.dumps(head, indent=1)[:-2]}{tail}}}\n".encode()
