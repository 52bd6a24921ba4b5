"""Vectors of texts without a model: counts of words and of pieces of words, hashed to a fixed width.

Of an explanation with “quoted” parts only these count: the other words are ours, not the unit's.

Shape legend: ``n`` texts, ``w`` width.
"""

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

WIDTH = 512
_PIECES = (3, 4)  # characters
_WORD = re.compile(r"\w+|[^\w\s]")
_QUOTED = re.compile("“([^”]*)”")
_LONGEST = 20_000  # characters of a text
_LONGEST_WORD = 40


def embed(texts: Sequence[str], width: int = WIDTH) -> npt.NDArray[np.float64]:
    """``[n, w]``: vectors of length 1; zeros for a text without words."""
    return np.stack([_vector(text, width) for text in texts]) if texts else np.zeros((0, width))


@lru_cache(maxsize=2048)
def _vector(text: str, width: int) -> npt.NDArray[np.float64]:
    words = _words(text[:_LONGEST])
    if not words:
        return np.zeros(width)
    hashes, weights = (np.concatenate(part) for part in zip(*words, strict=True))
    found = np.bincount(hashes % width, weights, minlength=width).astype(np.float64)
    return found / max(float(np.linalg.norm(found)), 1e-30)


def _words(text: str) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    parts = _QUOTED.findall(text)
    return [
        _features(word.casefold()) for word in _WORD.findall(" ".join(parts) if parts else text)
    ]


@lru_cache(maxsize=20_000)
def _features(word: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Hashes of a word and its pieces, and their weights with a sign that is part of the hash."""
    around = f"<{word[:_LONGEST_WORD]}>"
    pieces = [around[i : i + n] for n in _PIECES for i in range(len(around) - n + 1)]
    # A word's pieces count as much as the word itself, however long it is.
    weights = np.array([1.0] + [1 / len(pieces)] * len(pieces))
    hashes = np.array(
        [zlib.crc32(each.encode(errors="surrogatepass")) for each in (f"={word}", *pieces)],
        np.int64,
    )
    return hashes & 0x7FFFFFFF, np.where(hashes >> 31, weights, -weights)
