"""What a pass has found out so far about the units of one place."""

from dataclasses import dataclass

from neuron_explainer.analysis.collation.coactivation import TogetherActive
from neuron_explainer.analysis.collation.examples import Examples
from neuron_explainer.analysis.collation.moments import Totals
from neuron_explainer.analysis.collation.seen import Seen


@dataclass(eq=False)
class Findings:
    """What has been found out about the units of one place."""

    totals: Totals
    examples: Examples
    together: TogetherActive | None

    def add(self, seen: Seen, part: int) -> None:
        """Add a batch."""
        self.totals.add(seen, part)
        self.examples.add(seen)
        if self.together is not None:
            self.together.add(seen)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without the sample of tokens for pairs of units."""
        return self.totals.nbytes + self.examples.nbytes
