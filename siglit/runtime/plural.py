"""Counts with their nouns, for messages."""


def plural(count: int, noun: str) -> str:
    """`1 shard`, `8,192 shards`, `2 classes`, `3 entries`."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
