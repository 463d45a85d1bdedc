"""The embedding cache: shards of image embeddings with their keys and captions, written once, then memory-mapped.

Knows files and arrays; knows nothing of towers, configurations or torch. The format is specified in cache/README.md.
"""

from siglit.cache.cache_writer import CacheWriter
from siglit.cache.checking import (
    Problem,
    Unfinished,
    find_problems_without_index,
    no_cache,
    read_unfinished,
    remove_shards,
    shards_with_skipped,
)
from siglit.cache.format import FORMAT_VERSION, CacheError, differing_fields, shard_files
from siglit.cache.keys import KnownKeys, find_duplicate, hash_keys
from siglit.cache.lock import exclusive
from siglit.cache.merging import concat, merge
from siglit.cache.plain_hdf5 import PlainHdf5
from siglit.cache.reader import EmbeddingCache
from siglit.cache.shard_writer import committed_shards, finish, remove_unfinished, write_shard

__all__ = [
    "FORMAT_VERSION",
    "CacheError",
    "CacheWriter",
    "EmbeddingCache",
    "KnownKeys",
    "PlainHdf5",
    "Problem",
    "Unfinished",
    "committed_shards",
    "concat",
    "differing_fields",
    "exclusive",
    "find_duplicate",
    "find_problems_without_index",
    "finish",
    "hash_keys",
    "merge",
    "no_cache",
    "read_unfinished",
    "remove_shards",
    "remove_unfinished",
    "shard_files",
    "shards_with_skipped",
    "write_shard",
]
