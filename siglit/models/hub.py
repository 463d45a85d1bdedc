"""The Hugging Face Hub: if it cannot be reached, load from its local cache at once.

Knows nothing of models. huggingface_hub by itself retries six times per file, up to a minute for one name.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from huggingface_hub import constants, get_session


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
