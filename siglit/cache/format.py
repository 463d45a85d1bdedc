"""What a shard and its index look like, and the rules that decide whether one is whole.

Reads single shards with h5py and judges them; writes nothing and knows no cache as a whole. The bytes are specified in
cache/README.md; a change here is a change there.
Shapes: n rows (images) of a shard, D embedding width, m captions of a shard, s skipped images of a shard.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT_NAME = "siglit-cache"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
ALIGNMENT = 4096
DATASETS: dict[str, np.dtype[Any]] = {
    "embedding": np.dtype("<f2"),
    "key_bytes": np.dtype("|u1"),
    "key_offsets": np.dtype("<i8"),
    "caption_bytes": np.dtype("|u1"),
    "caption_offsets": np.dtype("<i8"),
    "caption_ptr": np.dtype("<i8"),
    "label": np.dtype("<i8"),
    "lang_code": np.dtype("<u2"),
    "lang_bytes": np.dtype("|u1"),
    "lang_offsets": np.dtype("<i8"),
    "skipped_key_bytes": np.dtype("|u1"),
    "skipped_key_offsets": np.dtype("<i8"),
    "skipped_reason_bytes": np.dtype("|u1"),
    "skipped_reason_offsets": np.dtype("<i8"),
}
"""Every dataset of a shard and its type, in the order in which they are written and enter the checksum."""
_DESCRIBED_LENGTH = 200
_REMAKE_SHARD = "delete it and run `siglit precompute` again"


class CacheError(ValueError):
    """A cache, or what was to become one, is wrong; the text says what is, what was wanted and what to do."""


@dataclass(frozen=True)
class ShardRecord:
    """What index.json keeps of one shard, so that it can be mapped without opening it as HDF5.

    Attributes:
        file: name of the shard in its folder.
        size: bytes of the file.
        rows: n.
        dim: D.
        captions: m.
        skipped: s.
        labelled: rows that have a label.
        with_lang: captions that have a language.
        checksum: `content_checksum` of its datasets.
        datasets: name → [byte offset in the file or None where there are no bytes, *shape].
    """

    file: str
    size: int
    rows: int
    dim: int
    captions: int
    skipped: int
    labelled: int
    with_lang: int
    checksum: str
    datasets: dict[str, list[Any]]


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.h5"


def shard_files(folder: Path) -> dict[int, Path]:
    """The committed shards in `folder`, number → path, ascending; unfinished files are not among them."""
    found = ((re.fullmatch(r"shard-(\d{6,})\.h5", path.name), path) for path in folder.glob("shard-*.h5"))
    return dict(
        sorted((int(match[1]), path) for match, path in found if match and shard_name(int(match[1])) == match[0])
    )


def pack_strings(strings: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Put strings end to end as UTF-8.

    Args:
        strings: k of them.
        what: what they are, for the error.

    Returns:
        (bytes,) uint8 and (k + 1,) int64 offsets; string i is bytes[offsets[i]:offsets[i + 1]].

    Raises:
        CacheError: one is not a string, or not a string that UTF-8 can hold (a file name in another encoding).
    """
    encoded = []
    for position, string in enumerate(strings):
        try:
            encoded.append(string.encode())
        except (AttributeError, UnicodeEncodeError):
            raise CacheError(
                f"{what} {position} is {string!r}, text that UTF-8 can hold was wanted; rename it"
            ) from None
    offsets = np.zeros(len(encoded) + 1, DATASETS["key_offsets"])
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def unpack_strings(blob: np.ndarray, offsets: np.ndarray) -> Iterator[str]:
    """The strings that `pack_strings` was given, in order."""
    data = blob.tobytes()
    return (data[start:end].decode() for start, end in pairwise(offsets.tolist()))


def content_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    r"""SHA-256 over all datasets of a shard, as 64 hexadecimal digits.

    Hashed are, for each of `DATASETS` in order, the ASCII line `name type shape\n` (`embedding <f2 8192x768`) and the
    values, little-endian, in C order.
    """
    digest = hashlib.sha256()
    for name, dtype in DATASETS.items():
        shape = "x".join(map(str, arrays[name].shape))
        digest.update(f"{name} {dtype.str} {shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype).data.cast("B") if arrays[name].size else b"")
    return digest.hexdigest()


def outside_datasets(record: ShardRecord) -> list[tuple[int, int]]:
    """The stretches of a shard's file that belong to no dataset: HDF5's metadata, the attributes, and padding.

    Returns:
        [(start, end), …] in bytes, ascending.
    """
    gaps, end = [], 0
    for offset, size in sorted(
        (offset, math.prod(shape) * DATASETS[name].itemsize)
        for name, (offset, *shape) in record.datasets.items()
        if offset is not None
    ):
        gaps.append((end, offset))
        end = offset + size
    return [*gaps, (end, record.size)]


def metadata_checksum(path: Path, record: ShardRecord) -> str:
    """SHA-256, as 64 hexadecimal digits, over all bytes of a shard's file but those of its datasets."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start, end in outside_datasets(record):
            file.seek(start)
            digest.update(file.read(max(0, end - start)))
    return digest.hexdigest()


def fingerprint_json(fingerprint: Mapping[str, Any]) -> str:
    """The one way in which a fingerprint is written: JSON, keys sorted, ASCII, no spaces.

    Raises:
        CacheError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(fingerprint, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"the fingerprint cannot be written as JSON ({error}); use numbers, strings and lists"
        ) from None


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two fingerprints differ, nested ones by their path.

    Args:
        a: the one that is here.
        b: the one that was asked for.

    Returns:
        One text per field, such as "image_tower.model: 'x' here, 'y' asked for"; empty if they are equal. Tuples equal
        lists, as both are the same JSON.
    """
    return list(_differences(json.loads(fingerprint_json(a)), json.loads(fingerprint_json(b)), ""))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        here, asked = a.get(name), b.get(name)
        if isinstance(here, dict) and isinstance(asked, dict):
            yield from _differences(here, asked, f"{prefix}{name}.")
        # Python holds 1 == True, JSON does not.
        elif (name in a) != (name in b) or here != asked or isinstance(here, bool) != isinstance(asked, bool):
            texts = [_described(side[name]) if name in side else "nothing" for side in (a, b)]
            yield f"{prefix}{name}: {texts[0]} here, {texts[1]} asked for"


def _described(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _DESCRIBED_LENGTH else text[:_DESCRIBED_LENGTH] + "…"


def open_shard(path: Path) -> h5py.File:
    """Open a committed shard for reading; the caller closes it.

    Raises:
        CacheError: it is missing, no HDF5 file, not a shard, or of a newer version.
    """
    if not path.is_file():
        raise CacheError(f"{path} is missing; run `siglit precompute` again, it makes the missing shards")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CacheError(f"{path} cannot be read as HDF5 ({error}); {_REMAKE_SHARD}") from None
    try:
        name, version = file.attrs["format"], int(file.attrs["version"])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        file.close()
        raise CacheError(f"{path} is no shard of a cache ({error}); {_REMAKE_SHARD}") from None
    if name != FORMAT_NAME or version > FORMAT_VERSION:
        file.close()
        raise CacheError(
            f"{path} has format {name!r}, version {version}; this siglit reads {FORMAT_NAME!r} up to version "
            f"{FORMAT_VERSION}: update siglit"
        )
    return file


def shard_fingerprint(file: h5py.File) -> dict[str, Any]:
    """The fingerprint that an open shard carries.

    Raises:
        CacheError: it carries none.
    """
    try:
        fingerprint: dict[str, Any] = json.loads(file.attrs["fingerprint"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise CacheError(f"{file.filename} has no fingerprint ({error}); {_REMAKE_SHARD}") from None
    return fingerprint


def describe_shard(file: h5py.File, path: Path) -> ShardRecord:
    """The index entry of an open shard, from what the file says of itself; the checksum is the stored one.

    Raises:
        CacheError: a dataset is missing, cannot be read, or is laid out so that it cannot be mapped.
    """
    try:
        labels, codes = file["label"][()], file["lang_code"][()]
        stored = {name: file[name] for name in DATASETS}
        for name, dataset in stored.items():
            if dataset.dtype != DATASETS[name] or dataset.chunks is not None or dataset.external:
                raise TypeError(f"dataset {name!r} has another type, or is not contiguous")
        return ShardRecord(
            file=path.name,
            size=path.stat().st_size,
            rows=len(stored["embedding"]),
            dim=stored["embedding"].shape[1],
            captions=len(codes),
            skipped=len(stored["skipped_key_offsets"]) - 1,
            labelled=int((labels >= 0).sum()),
            with_lang=int((codes > 0).sum()),
            checksum=str(file.attrs["checksum"]),
            datasets={name: [dataset.id.get_offset(), *dataset.shape] for name, dataset in stored.items()},
        )
    except (IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is no shard of a cache ({error}); {_REMAKE_SHARD}") from None


def shard_problems(
    path: Path, number: int, record: ShardRecord, fingerprint: Mapping[str, Any], outside: str | None
) -> list[str]:
    """What is wrong with a committed shard, one text per problem; empty if it is sound.

    Args:
        path: where it is.
        number: of the shard in the cache.
        record: what the index says of it.
        fingerprint: what the cache was made with.
        outside: the `metadata_checksum` that it had when the cache was completed; None where that is not known.

    Raises:
        CacheError: it is missing or no shard at all.
    """
    with open_shard(path) as file:
        try:
            there = describe_shard(file, path)
            arrays = {name: file[name][()] for name in DATASETS}
            stated = int(file.attrs["number"]), differing_fields(shard_fingerprint(file), fingerprint)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            return [f"it cannot be read ({error})"]
    if content_checksum(arrays) != there.checksum:
        return [f"its data is damaged, it does not have the checksum {there.checksum[:12]}… that it states"]
    differences = [name for name in vars(record) if getattr(record, name) != getattr(there, name)]
    problems = [f"{name} is {getattr(there, name)}, the index says {getattr(record, name)}" for name in differences]
    if outside not in (None, metadata_checksum(path, there)):
        problems.append("bytes outside of its datasets are not those of when the cache was completed")
    if stated[0] != number:
        problems.append(f"it was written as shard {stated[0]}")
    problems += [f"its settings differ from the index's: {text}" for text in stated[1]]
    return problems + _array_problems(arrays)


def _array_problems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What contradicts itself in the datasets of a shard, one text per problem; empty if they are sound."""
    n, m = len(arrays["embedding"]), len(arrays["lang_code"])
    problems = []
    for text, count in (("key", n), ("caption", m), ("lang", None), ("skipped_key", None), ("skipped_reason", None)):
        offsets, blob = arrays[f"{text}_offsets"], arrays[f"{text}_bytes"]
        if not _partitions(offsets, len(blob)) or count not in (None, len(offsets) - 1):
            problems.append(f"{text}_offsets do not divide {text}_bytes")
            continue
        try:
            list(unpack_strings(blob, offsets))
        except UnicodeDecodeError:
            problems.append(f"{text}_bytes is not UTF-8")
    if len(arrays["caption_ptr"]) != n + 1 or not _partitions(arrays["caption_ptr"], m):
        problems.append("caption_ptr does not divide the captions")
    if len(arrays["label"]) != n or (arrays["label"] < -1).any():
        problems.append("label has another length than embedding, or a value below -1")
    if (arrays["lang_code"] >= len(arrays["lang_offsets"]) - 1).any():
        problems.append("lang_code points outside the table of languages")
    if len(arrays["skipped_key_offsets"]) != len(arrays["skipped_reason_offsets"]):
        problems.append("there is not one reason for every skipped key")
    if not np.isfinite(arrays["embedding"]).all():
        problems.append("embedding holds values that are not finite")
    return problems


def _partitions(offsets: np.ndarray, length: int) -> bool:
    return len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == length and bool((np.diff(offsets) >= 0).all())
