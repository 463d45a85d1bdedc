"""The embedding cache: shards of image embeddings with their keys and captions, written once, mapped for ever.

Knows files and arrays; knows nothing of towers, configurations or torch. The format is specified in cache/README.md.
"""

from siglit.cache.format import FORMAT_VERSION, CacheError, differing_fields
from siglit.cache.reader import EmbeddingCache
from siglit.cache.writer import committed_shards, finish, remove_unfinished, write_shard

__all__ = [
    "FORMAT_VERSION",
    "CacheError",
    "EmbeddingCache",
    "committed_shards",
    "differing_fields",
    "finish",
    "remove_unfinished",
    "write_shard",
]
