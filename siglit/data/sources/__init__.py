"""Opens a data set on disk or on the Hugging Face hub by its format.

Decodes no image; knows nothing of YAML, towers or caches.
"""

from typing import Any

from siglit.config import SourceSpec
from siglit.data.sources.listing_source import ListingSource, listing_file, listing_identity
from siglit.data.sources.options import check_options, identity_of
from siglit.data.sources.samples import Source
from siglit.data.sources.table_source import TableSource
from siglit.data.sources.tar_source import TarSource
from siglit.runtime.paths import files_of


def open_source(spec: SourceSpec) -> Source:
    """Open a data set: find its files, read its listing, check its columns and keys. No image is opened.

    Raises:
        UserError: the format or an option is unknown, a listing is missing or empty, a column is missing, a key occurs
            twice, …
    """
    check_options(spec)
    if spec.format == "webdataset":
        return TarSource(spec)
    if spec.format in ("parquet", "hub"):
        return TableSource(spec)
    return ListingSource(spec)


def source_identity(spec: SourceSpec) -> dict[str, Any] | None:
    """`open_source(spec).identity()` without reading a listing; None for the Hub, which would need a request.

    Raises:
        UserError: there are no such files.
    """
    if spec.format == "hub":
        return None
    if spec.format in ("parquet", "webdataset"):
        return identity_of(spec, files_of(spec.path, ".tar" if spec.format == "webdataset" else ".parquet"))
    return listing_identity(spec, listing_file(spec))
