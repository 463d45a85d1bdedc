"""The Hugging Face Hub: if it cannot be reached, load from its local cache at once.

Knows nothing of models, only how the libraries that load them talk. huggingface_hub by itself retries six times per
file, up to a minute for one name.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from huggingface_hub import constants, get_session

from siglit.runtime.text import first_line


def describe_failure(error: BaseException) -> str:
    """Why a library could not read the files of a model or tokenizer, as one short phrase without its own advice."""
    if isinstance(error, RecursionError):
        return "one of its JSON files is nested too deeply"
    text = first_line(error)
    if "custom code" in text:
        return "it needs code of its own, which siglit never runs"
    # Whatever a library stumbles over where a file has another layout is no news to the reader.
    stumbles = (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError)
    if isinstance(error, stumbles) or "backend tokenizer" in text:
        return "its files are missing or of another kind"
    return text


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' remarks on the files that it reads: what matters raises an exception."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Context for loading by Hub name, with huggingface_hub in offline mode if the Hub does not answer.

    Waits for one answer, up to huggingface_hub's own limit (HF_HUB_ETAG_TIMEOUT, 10 s); downloads have no limit.

    Raises:
        ConnectionError: the Hub does not answer, and its local cache does not hold the requested files.
    """
    offline = constants.HF_HUB_OFFLINE
    reason = None if offline else _unreachable()
    constants.HF_HUB_OFFLINE = offline or reason is not None
    try:
        yield
    except OSError as error:  # the base of huggingface_hub's errors, and of transformers' for them
        if reason is None:
            raise
        raise ConnectionError(f"{constants.ENDPOINT} {reason}, and its cache here does not hold it") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _unreachable() -> str | None:
    """Why the Hub does not answer; None if it does."""
    answers: SimpleQueue[str | None] = SimpleQueue()
    limit = constants.HF_HUB_ETAG_TIMEOUT

    def send_request() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=limit)
            answers.put(None)
        except Exception as error:  # httpx or requests, depending on huggingface_hub's version
            answers.put(f"cannot be reached: {error or type(error).__name__}")

    # In a daemon thread: the request's own limit starts again for each address and excludes name resolution.
    threading.Thread(target=send_request, daemon=True).start()
    try:
        return answers.get(timeout=limit)
    except Empty:
        return f"does not answer within {limit} s"
