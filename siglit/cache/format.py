"""The layout of a shard and its index entry, and the checks of a single shard.

Reads single shards with h5py; writes nothing and knows no cache as a whole. cache/README.md specifies the bytes and
must change together with this file.
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

from siglit.runtime.text import first_line

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
"""Every dataset of a shard and its type, in the order of the file and of the checksum."""
_MAX_VALUE_LENGTH = 200
_REMAKE_SHARD = "delete it and run `siglit precompute` again"


class CacheError(ValueError):
    """A cache, or an argument for writing one, is wrong; the message says what is, what was expected and what to do."""


@dataclass(frozen=True)
class ShardRecord:
    """What index.json says of one shard; enough to map it without opening it as HDF5.

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
        datasets: name → [byte offset in the file, *shape]; the offset is None where the dataset has no bytes.
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
    """The committed shards in `folder`, number → path, ascending; temporary files are left out."""
    candidates = ((re.fullmatch(r"shard-(\d{6,})\.h5", path.name), path) for path in folder.glob("shard-*.h5"))
    return dict(
        sorted((int(match[1]), path) for match, path in candidates if match and shard_name(int(match[1])) == match[0])
    )


def pack_strings(strings: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate strings as UTF-8.

    Args:
        strings: k strings.
        what: noun for the error, such as "caption".

    Returns:
        (bytes,) uint8 and (k + 1,) int64 offsets; string i is bytes[offsets[i]:offsets[i + 1]].

    Raises:
        CacheError: an item is not a string, or UTF-8 cannot encode it (a file name in another encoding).
    """
    encoded = []
    for position, string in enumerate(strings):
        try:
            encoded.append(string.encode())
        except (AttributeError, UnicodeEncodeError):
            raise CacheError(
                f"{what} {position} is {string!r}; expected text that UTF-8 can encode. Rename it"
            ) from None
    offsets = np.zeros(len(encoded) + 1, DATASETS["key_offsets"])
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def unpack_strings(blob: np.ndarray, offsets: np.ndarray) -> Iterator[str]:
    """The inverse of `pack_strings`: the strings in order."""
    data = blob.tobytes()
    return (data[start:end].decode() for start, end in pairwise(offsets.tolist()))


def content_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    r"""SHA-256 over all datasets of a shard, as 64 hexadecimal digits.

    It covers, for each of `DATASETS` in order, the ASCII line `name type shape\n` (`embedding <f2 8192x768`) and the
    values, little-endian, in C order.
    """
    digest = hashlib.sha256()
    for name, dtype in DATASETS.items():
        shape = "x".join(map(str, arrays[name].shape))
        digest.update(f"{name} {dtype.str} {shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype).data.cast("B") if arrays[name].size else b"")
    return digest.hexdigest()


def outside_datasets(record: ShardRecord) -> list[tuple[int, int]]:
    """Byte ranges of a shard's file that belong to no dataset: HDF5's metadata, the attributes, and padding.

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
    """SHA-256, as 64 hexadecimal digits, over all bytes of a shard's file outside its datasets."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start, end in outside_datasets(record):
            file.seek(start)
            digest.update(file.read(max(0, end - start)))
    return digest.hexdigest()


def fingerprint_json(fingerprint: Mapping[str, Any]) -> str:
    """The canonical form of a fingerprint: JSON with sorted keys, ASCII, no spaces.

    Raises:
        CacheError: the fingerprint holds a value that JSON cannot represent.
    """
    try:
        return json.dumps(fingerprint, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"the fingerprint cannot be written as JSON ({error}); use numbers, strings and lists"
        ) from None


def differing_fields(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two fingerprints differ, nested ones by their path.

    Args:
        actual: the fingerprint of a cache or shard.
        expected: the fingerprint that it should have.

    Returns:
        One message per field, such as "image_tower.model is 'x', expected 'y'"; empty if they are equal. Tuples equal
        lists, as both are the same JSON.
    """
    return list(_differences(json.loads(fingerprint_json(actual)), json.loads(fingerprint_json(expected)), ""))


def _differences(actual: Mapping[str, Any], expected: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in sorted(actual.keys() | expected.keys()):
        a, b = actual.get(name), expected.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        # In Python 1 == True, in JSON it is not.
        elif (name in actual) != (name in expected) or a != b or isinstance(a, bool) != isinstance(b, bool):
            texts = [_shortened(side[name]) if name in side else "nothing" for side in (actual, expected)]
            yield f"{prefix}{name} is {texts[0]}, expected {texts[1]}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[:_MAX_VALUE_LENGTH] + "…"


def open_shard(path: Path) -> h5py.File:
    """Open a committed shard for reading; the caller closes it.

    Raises:
        CacheError: the file is missing, not HDF5, not a shard, or of a newer version.
    """
    if not path.is_file():
        raise CacheError(f"{path} is missing; run `siglit precompute` again, which makes the missing shards")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CacheError(f"{path} cannot be read as HDF5 ({error}); {_REMAKE_SHARD}") from None
    try:
        name, version = str(file.attrs["format"]), int(file.attrs["version"])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        file.close()
        raise CacheError(f"{path} is not a shard of a cache ({error}); {_REMAKE_SHARD}") from None
    if name != FORMAT_NAME or version > FORMAT_VERSION:
        file.close()
        raise CacheError(
            f"{path} has format {name!r}, version {version}; this siglit reads {FORMAT_NAME!r} up to version "
            f"{FORMAT_VERSION}: update siglit"
        )
    return file


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose bytes are in this file: HDF5 can also read those of any other file on the machine.

    Raises:
        KeyError: there is no such dataset.
        TypeError: it is not a dataset, or a link or a view of another file.
    """
    # The link is looked at first: following it opens the other file.
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise TypeError(f"{name!r} is a link to another file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise TypeError(f"{name!r} is not a dataset")
    if dataset.is_virtual or dataset.external or dataset.file.filename != file.filename:
        raise TypeError(f"{name!r} is a view of another file")
    return dataset


def shard_fingerprint(file: h5py.File) -> dict[str, Any]:
    """The fingerprint in an open shard.

    Raises:
        CacheError: the attribute is missing or not JSON.
    """
    try:
        fingerprint: dict[str, Any] = json.loads(file.attrs["fingerprint"])
        if not isinstance(fingerprint, dict):
            raise TypeError("it is not a JSON object")
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise CacheError(f"{file.filename} has no fingerprint ({first_line(error)}); {_REMAKE_SHARD}") from None
    return fingerprint


def describe_shard(file: h5py.File, path: Path) -> ShardRecord:
    """The index entry of an open shard, from its datasets and attributes; the stored checksum is not verified.

    Raises:
        CacheError: a dataset is missing, cannot be read, or has a layout that cannot be mapped.
    """
    try:
        stored = {name: own_dataset(file, name) for name in DATASETS}
        labels, codes = stored["label"][()], stored["lang_code"][()]
        for name, dataset in stored.items():
            if dataset.dtype != DATASETS[name] or dataset.chunks is not None:
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
        raise CacheError(f"{path} is not a shard of a cache ({error}); {_REMAKE_SHARD}") from None


def shard_problems(
    path: Path, number: int, record: ShardRecord, fingerprint: Mapping[str, Any], checksum: str | None
) -> list[str]:
    """What is wrong with a committed shard, one message per problem; empty if it is sound.

    Args:
        path: its file.
        number: its number in the cache.
        record: its entry in the index.
        fingerprint: the settings that the cache was made with.
        checksum: its `metadata_checksum` when the cache was completed; None where that is not known.

    Raises:
        CacheError: the file is missing or not a shard.
    """
    with open_shard(path) as file:
        try:
            actual = describe_shard(file, path)
            arrays = {name: file[name][()] for name in DATASETS}
            stored_number = int(file.attrs["number"])
            differences = differing_fields(shard_fingerprint(file), fingerprint)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            return [f"it cannot be read ({error})"]
    if content_checksum(arrays) != actual.checksum:
        return [f"its data is damaged: it does not match the stored checksum {actual.checksum[:12]}…"]
    problems = [
        f"{name} is {getattr(actual, name)}, the index says {getattr(record, name)}"
        for name in vars(record)
        if getattr(record, name) != getattr(actual, name)
    ]
    if checksum not in (None, metadata_checksum(path, actual)):
        problems.append("bytes outside its datasets have changed since the cache was completed")
    if stored_number != number:
        problems.append(f"it was written as shard {stored_number}")
    problems += [f"its settings differ from the index's: {text}" for text in differences]
    return problems + _array_problems(arrays)


def _array_problems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Contradictions within the datasets of a shard, one message per problem; empty if they are sound."""
    n, m = len(arrays["embedding"]), len(arrays["lang_code"])
    problems = []
    for text, count in (("key", n), ("caption", m), ("lang", None), ("skipped_key", None), ("skipped_reason", None)):
        offsets, blob = arrays[f"{text}_offsets"], arrays[f"{text}_bytes"]
        if not _partitions(offsets, len(blob)) or count not in (None, len(offsets) - 1):
            problems.append(f"{text}_offsets do not partition {text}_bytes")
            continue
        try:
            list(unpack_strings(blob, offsets))
        except UnicodeDecodeError:
            problems.append(f"{text}_bytes is not UTF-8")
    if len(arrays["caption_ptr"]) != n + 1 or not _partitions(arrays["caption_ptr"], m):
        problems.append("caption_ptr does not partition the captions")
    if len(arrays["label"]) != n or (arrays["label"] < -1).any():
        problems.append("label has another length than embedding, or a value below -1")
    if (arrays["lang_code"] >= len(arrays["lang_offsets"]) - 1).any():
        problems.append("lang_code points outside the table of languages")
    if len(arrays["skipped_key_offsets"]) != len(arrays["skipped_reason_offsets"]):
        problems.append("the number of reasons differs from the number of skipped keys")
    if not np.isfinite(arrays["embedding"]).all():
        problems.append("embedding holds values that are not finite")
    return problems


def _partitions(offsets: np.ndarray, length: int) -> bool:
    """Whether the offsets begin with 0, never decrease and end with `length`."""
    return len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == length and bool((np.diff(offsets) >= 0).all())
