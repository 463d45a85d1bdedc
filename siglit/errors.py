"""`UserError`: the input or the configuration is wrong, not the program; and pieces of one-line messages."""


class UserError(ValueError):
    """The input or the configuration is wrong; the message says what is, what was expected and what to do.

    The command line prints the message as one line and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 200 characters; the name of its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plural(count: int, noun: str) -> str:
    """Count and noun, such as "1 shard" or "12,000 shards"; the noun takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
