"""Vectors of texts without a model: counts of words and of pieces of words, hashed to a fixed width.

Of an explanation with “quoted” parts only these count: the other words are ours, not the unit's.

Shape legend: ``n`` texts, ``w`` width.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WIDTH = 512
_PIECES = (3, 4)  # characters
_WORD = re.compile(r"\w+|[^\w\s]")
_QUOTED = re.compile("“([^”]*)”")
_LONGEST = 20_000  # characters of a text


def embed(texts: Sequence[str], width: int = WIDTH) -> npt.NDArray[np.float64]:
    """``[n, w]``: vectors of length 1; zeros for a text without words."""
    found = np.zeros((len(texts), width))
    for row, text in zip(found, texts, strict=True):
        for feature, weight in _features(text[:_LONGEST]):
            number = zlib.crc32(feature.encode(errors="surrogateescape"))
            row[number % width] += weight if number & 1 << 31 else -weight
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(norms > 0, norms, 1)


def _features(text: str) -> list[tuple[str, float]]:
    parts = _QUOTED.findall(text)
    found = []
    for word in _WORD.findall(" ".join(parts) if parts else text):
        lower = word.casefold()
        found.append((f"={lower}", 1.0))
        around = f"<{lower}>"
        pieces = [around[i : i + n] for n in _PIECES for i in range(len(around) - n + 1)]
        # A word's pieces count as much as the word itself, however long it is.
        found += [(piece, 1 / len(pieces)) for piece in pieces]
    return found
