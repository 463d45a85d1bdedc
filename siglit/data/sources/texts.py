"""Text in files: UTF-8, JSON objects, and strings that UTF-8 cannot store.

Knows nothing of columns, captions or formats. The message of every `UserError` begins with the given place.
"""

import json
from typing import Any

from siglit.errors import UserError
from siglit.runtime.text import json_problem

_JSON_KINDS = {list: "list", str: "string", bool: "true or false", int: "number", float: "number"}


def decode_text(data: bytes, place: str, offset: int = 0) -> str:
    """Decode UTF-8.

    Args:
        data: the bytes.
        place: opens the message.
        offset: byte of the file at which `data` begins, for the message.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise UserError(
            f"{place} is not UTF-8 at byte {offset + error.start} (0x{bad:02x}). Convert the file (iconv -t utf-8)."
        ) from error


def json_object(text: str, place: str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        UserError: the text is not JSON, or another JSON value than an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {json_problem(error)}. Fix it, or write it again.") from error
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {_JSON_KINDS[type(value)]}"
        raise UserError(f"{place} is {kind} in JSON, expected an object {{…}}. Check the format.")
    return value


def is_unicode(text: str) -> bool:
    """False where the text holds half of a surrogate pair, which JSON may escape but no encoding can store."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def replace_surrogates(text: str) -> str:
    """Put U+FFFD in place of halves of surrogate pairs (JSON of captions that were cut inside an emoji)."""
    return text if is_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
