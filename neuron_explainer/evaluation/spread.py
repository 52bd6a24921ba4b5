"""One figure measured several times: its mean, its spread, and what differences it can show."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neuron_explainer.errors import InputError

DETECTABLE = 2.8
"""Differences of this many standard deviations are found 80 % of the time, by a two-sided test at 5 %:
1.96 + 0.84."""


@dataclass(frozen=True, repr=False)
class Spread:
    """Measurements of one figure, such as with several seeds. NaN stands for "could not be measured"."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of some numbers, at least one."""
        found = tuple(map(float, values))
        if not found:
            raise InputError("a spread needs at least one measurement, found none.")
        return cls(found)

    @property
    def mean(self) -> float:
        """The mean of the measurements."""
        return math.fsum(self.values) / len(self.values)

    @property
    def sd(self) -> float:
        """The standard deviation of one measurement (n - 1 in the denominator); NaN if there is only one."""
        n, mean = len(self.values), self.mean
        if n < 2:
            return math.nan
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (n - 1))

    @property
    def smallest_difference(self) -> float:
        """The smallest difference between two single measurements that they can tell apart."""
        return DETECTABLE * self.sd

    def differs_from(self, other: "Spread", sds: float = 2.0) -> bool:
        """Whether the means lie more than ``sds`` standard deviations apart, of the larger of the two.

        False where one of them was measured only once: nothing is known of its spread.
        """
        return abs(self.mean - other.mean) > sds * max(self.sd, other.sd)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; None for what is not known."""
        numbers = {
            "mean": self.mean,
            "sd": self.sd,
            "smallest_difference": self.smallest_difference,
        }
        known = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        return {**known, "values": [x if math.isfinite(x) else None for x in self.values]}

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        one = len(self.values) < 2
        return f"{self.mean:{spec}}" if one else f"{self.mean:{spec}} ± {self.sd:{spec}}"

    def __repr__(self) -> str:
        return f"Spread({self:.4g} of {len(self.values)})"
