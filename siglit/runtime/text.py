"""Parts of messages: counts with their nouns, and errors of others in a few words.

Knows nothing of what the messages say.
"""

import json


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 200 characters; the name of its class where it has no message."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]


def json_problem(error: ValueError | RecursionError) -> str:
    """Why `json.loads` refused a text, in words for someone who has not written a parser."""
    if isinstance(error, json.JSONDecodeError):
        start = "it is empty" if error.doc.strip() == "" else error.msg[:1].lower() + error.msg[1:]
        line = f"line {error.lineno}, " if error.doc.count("\n", 0, len(error.doc.rstrip())) > 0 else ""
        return start if error.doc.strip() == "" else f"{start} at {line}column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def plural(count: int, noun: str) -> str:
    """`1 shard`, `8,192 shards`, `2 classes`, `3 entries`, `4 keys`."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
