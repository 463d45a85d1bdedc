"""Headers of uncompressed tars: where the members of each sample lie.

Knows webdataset's naming; reads no member and knows nothing of samples (`tar_source.py`).
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from siglit.data.decode_image import IMAGE_EXTENSIONS
from siglit.data.sources.samples import read_part
from siglit.errors import UserError


@dataclass(frozen=True)
class Member:
    """One file of a tar: `offset` and `size` in bytes; `name` is for messages only, never a path."""

    name: str
    offset: int
    size: int


def index_tar(path: Path) -> dict[str, dict[str, Member]]:
    """Find the members of an uncompressed tar: {key: {extension: Member}}, in the order of the file.

    As in webdataset, a key is the name up to the first dot of its last part, and the extension the rest in lower case.

    Raises:
        UserError: the file is compressed, truncated or no tar; or a key has one extension, or an image, twice.
    """
    groups: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if info.isreg() and stem and extension:
                    key = f"{folder}/{stem}" if folder else stem
                    member = Member(info.name, info.offset_data, info.size)
                    _add_member(path, key, groups.setdefault(key, {}), extension.lower(), member)
            end = tar.offset
        # tarfile takes a broken header in the middle, or a cut between two members, for the end of the archive.
        if read_part(path, end, 512).strip(b"\0") or path.stat().st_size < end + 512:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")
    except UserError:
        raise
    except (tarfile.TarError, ValueError) as error:  # ValueError: a header whose size is no offset in a file
        magic = read_part(path, 0, 6)
        packed = any(magic.startswith(start) for start in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        state = "is compressed; images need byte offsets, so unpack it (gunzip, unzstd, …)"
        raise UserError(
            f"{path} {state if packed else f'is truncated, or not a tar: {error}. Download it again'}"
        ) from error
    return groups


def _add_member(path: Path, key: str, group: dict[str, Member], extension: str, member: Member) -> None:
    other = group.get(extension)
    if other is None and extension in IMAGE_EXTENSIONS:
        other = next((group[name] for name in group if name in IMAGE_EXTENSIONS), None)
    if other is not None:
        places = f"{other.name} at byte {other.offset} and {member.name} at byte {member.offset}"
        raise UserError(f"{path}: the key {key} occurs twice: {places}. Keys must be unique; write the tar again.")
    group[extension] = member
