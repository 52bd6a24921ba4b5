"""What a collation looks for: :class:`CollateConfig`."""

from dataclasses import dataclass

from neuron_explainer.errors import InputError
from neuron_explainer.settings.fields import check_types


@dataclass(frozen=True)
class CollateConfig:
    """How many examples of which kind a collation keeps of each unit.

    With the defaults a unit has at most 41 examples. ``bytes_per_unit`` in ``examples.py`` says how much
    memory a setting takes.
    """

    top: int = 16
    """Examples with the largest values; of signed units also as many with the most negative ones."""
    intervals: int = 5
    """Equal intervals of [0, largest value], with examples drawn from each; 0 for none."""
    per_interval: int = 3
    """Examples drawn from each interval."""
    uniform: int = 5
    """Examples drawn from all contexts with a positive value, each with the same probability."""
    weighted: int = 5
    """Examples drawn with a probability that grows with the value."""
    weight_exponent: float = 1.0
    """The probability of a weighted example is in proportion to its value to this power."""
    inactive: int = 0
    """Examples drawn from the contexts where the unit is never active."""
    window: int = 64
    """Tokens shown of an example, at most."""
    head_window: int = 32
    """Tokens shown of an example of an attention head, at most. Only pairs of tokens that fit into this
    are looked at."""
    coactivation_tokens: int = 0
    """Number of tokens, drawn from the corpus, on which pairs of active units are counted; 0 for none."""
    partners: int = 10
    """How many units that are often active together with a unit are listed."""
    keep_bos: bool = False
    """Count start tokens and separators too. Only those that stand in the text can be in examples."""
    seed: int = 0
    """Seed of everything that is drawn."""
    parts: int = 16
    """The number of parts in which the corpus is summed up: at most this many processes help. The sums
    differ in their last bits from those with another number."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("top", "intervals", "per_interval", "uniform", "weighted", "inactive", "partners")
        for name in (*counts, "coactivation_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, found {getattr(self, name)}.")
        for name in counts[:-1]:
            if getattr(self, name) > 1000:
                raise InputError(f"{name} must be at most 1000, found {getattr(self, name)}.")
        if self.intervals > 100:
            raise InputError(f"intervals must be at most 100, found {self.intervals}.")
        if not 1 <= self.window <= 4096:
            raise InputError(f"window must be 1 to 4096, found {self.window}.")
        if not 1 <= self.head_window <= 256:
            raise InputError(f"head_window must be 1 to 256, found {self.head_window}.")
        if not self.weight_exponent > 0:
            raise InputError(f"weight_exponent must be above 0, found {self.weight_exponent}.")
        if self.parts < 1:
            raise InputError(f"parts must be at least 1, found {self.parts}.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2**63, found {self.seed}.")
