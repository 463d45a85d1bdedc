"""Parts of messages: counts with their nouns, and first lines of errors. Knows nothing of what the messages say."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 200 characters; the name of its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plural(count: int, noun: str) -> str:
    """`1 shard`, `8,192 shards`, `2 classes`, `3 entries`, `4 keys`."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
