"""Random numbers as hashes: the same for the same words, whatever was drawn before, so that nothing has to be kept."""

import numpy as np

_MASK = (1 << 64) - 1


def draw(*words: int | np.ndarray) -> np.ndarray:
    """Hash whole numbers to uniform 64-bit ones; other words, or another order of them, give independent ones.

    Args:
        words: whole numbers and arrays of them, taken modulo 2⁶⁴, that broadcast; at least one is an array.

    Returns:
        uint64 of the shape that they broadcast to.

    Source: SplitMix64 (Steele, Lea and Flood 2014), https://prng.di.unimi.it/splitmix64.c
    """
    # An array from the start: numpy warns of the overflow that is meant where both numbers are scalars.
    state = np.zeros(1, np.uint64)
    for word in words:
        whole = word if isinstance(word, np.ndarray) else np.array(int(word) & _MASK, np.uint64)
        state = _splitmix64(state ^ whole.astype(np.uint64))
    return state


def choose_captions(seed: int, epoch: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draw one of each row's captions from (seed, epoch, row).

    Args:
        seed: of the run.
        epoch: number of the pass.
        rows: (k,) int64.
        counts: (k,) captions of each row, 1 … 2³².

    Returns:
        (k,) int64 in [0, counts), uniform to within counts / 2³².
    """
    return below(counts, draw(seed, epoch, rows))


def below(counts: int | np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Scale uniform 64-bit numbers to whole numbers in [0, counts), int64; uniform to within counts / 2³²."""
    counts = np.asarray(counts).astype(np.uint64)
    return ((drawn >> np.uint64(32)) * counts >> np.uint64(32)).astype(np.int64)


def _splitmix64(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
