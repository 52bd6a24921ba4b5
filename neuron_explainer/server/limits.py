"""How much a request may ask for. ``/model`` states these limits, so that a page can respect them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BODY_BYTES = 256 << 10
IMPORT_BYTES = 32 << 20
"""Of a request that imports labels: the only one that may be larger than :data:`BODY_BYTES`."""
MOST_CLIENTS = 4096


@dataclass(frozen=True)
class Limits:
    """Largest sizes and counts of one request."""

    max_tokens: int = 256
    """Of a prompt; never more than the context window of the model."""
    texts: int = 8
    units: int = 64
    per_token_top_k: int = 32
    node_top_k: int = 200
    interventions: int = 64
    heads: int = 144
    new_tokens: int = 128
    lens_positions: int = 64
    page: int = 200
    """Rows of a table of units."""
    examples_page: int = 50
    search: int = 50
    query_characters: int = 200
    label_characters: int = 2_000
    body_bytes: int = BODY_BYTES
    import_bytes: int = IMPORT_BYTES
    queue: int = 8
    """Requests that may wait for the model."""
    autoencoder_bytes: int = 4 << 30
    """Memory for autoencoders; those used longest ago are dropped."""
    kept_bytes: int = 512 << 20
    """Memory for results of earlier requests to the model; those used longest ago are dropped."""
    seconds: float = 30.0
    """That the model may work on one request."""
    header_seconds: float = 10.0
    """In which the head of a request must have arrived."""
    token_search_seconds: float = 1.0
    """That a search by token goes on to dictionaries whose examples have not been read yet."""
    compute_per_second: float = 10.0
    """Requests to the model of one client that is not on this machine."""


class RateLimit:
    """A bucket of tokens for each client: ``rate`` requests a second, and as many at once.

    Args:
        rate: requests a second.
        clock: seconds; a test gives its own.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.clock = rate, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, client: str) -> float:
        """Take a token: 0 if there is one, else the seconds until there will be."""
        now = self.clock()
        with self._lock:
            level, then = self._buckets.pop(client, (self.rate, now))
            level = min(self.rate, level + (now - then) * self.rate)
            taken = level >= 1
            self._buckets[client] = (level - taken, now)  # the one used last stands last
            if len(self._buckets) > MOST_CLIENTS:
                del self._buckets[next(iter(self._buckets))]
        return 0.0 if taken else (1 - level) / self.rate
