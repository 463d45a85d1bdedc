"""The Hugging Face Hub: where it cannot be reached, what is asked of it is looked for in its cache alone, at once.

huggingface_hub by itself tries six times for each file, up to a minute for one name.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from huggingface_hub import constants, get_session


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Load within it by Hub name: huggingface_hub is in its offline mode if the Hub does not answer.

    Only the first answer is waited for, up to huggingface_hub's own limit (HF_HUB_ETAG_TIMEOUT, 10 s); a download may
    take as long as it takes.

    Raises:
        ConnectionError: the Hub does not answer, and the cache does not hold what was loaded.
    """
    offline = constants.HF_HUB_OFFLINE
    reason = None if offline else _unreachable()
    constants.HF_HUB_OFFLINE = offline or reason is not None
    try:
        yield
    except OSError as error:  # as are all of huggingface_hub's, and what transformers makes of them
        if reason is None:
            raise
        raise ConnectionError(f"{constants.ENDPOINT} {reason}, and its cache here does not hold it") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _unreachable() -> str | None:
    """Why the Hub does not answer, or None."""
    answers: SimpleQueue[str | None] = SimpleQueue()
    limit = constants.HF_HUB_ETAG_TIMEOUT

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=limit)
            answers.put(None)
        except Exception as error:  # of httpx or requests, by huggingface_hub's version
            answers.put(f"cannot be reached: {error or type(error).__name__}")

    # In a thread that nobody waits for: the limit of a request holds anew for each address, and not for names.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=limit)
    except Empty:
        return f"does not answer within {limit} s"
