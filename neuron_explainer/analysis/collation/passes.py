"""One pass over a corpus: forward passes, and what each batch adds to every dictionary and location.

The batches of the corpus are divided into parts, always in the same way. A pass takes the batches of a part
in their order, and any number of parts in any order.
"""

from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from neuron_explainer import __version__
from neuron_explainer.activations.harvest import check_context_length
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.coactivation import TogetherActive, sample_limit
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.examples import Examples
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.moments import Totals
from neuron_explainer.analysis.collation.places import Places, duplicates_of
from neuron_explainer.analysis.collation.seen import Seen
from neuron_explainer.analysis.collation.units import Watched
from neuron_explainer.analysis.records import Collected
from neuron_explainer.errors import InputError
from neuron_explainer.models.model_context import ModelContext


class Collation:
    """A pass over the windows of a corpus.

    Args:
        context: the model.
        watched: what to look at.
        windows: each batch of the corpus once.
        config: how many examples to keep, and more.
    """

    def __init__(
        self,
        context: ModelContext,
        watched: list[Watched],
        windows: TokenWindows,
        config: CollateConfig,
    ) -> None:
        _check_windows(context, windows)
        self.context, self.watched, self.windows, self.config = context, watched, windows, config
        self.sources = list(dict.fromkeys(place for each in watched for place in each.sources))
        for place in self.sources:
            context.get_or_create_model().require(place.path)
        corpus = windows.corpus
        self.seed = (config.seed + int(corpus.source_fingerprint, 16)) % 2**64
        """Seed of the sampling keys: the corpus is part of it, so that the keys of two corpora, whose
        positions are the same numbers, are independent."""
        self.duplicates = duplicates_of(windows)
        self._limit = 0.0
        if config.coactivation_tokens:
            self._limit = sample_limit(windows, config.coactivation_tokens, self.seed)
        n_batches = windows.batches_per_epoch
        self.parts = [
            range(n_batches * i // config.parts, n_batches * (i + 1) // config.parts)
            for i in range(config.parts)
        ]
        """The batches of each part; some may be empty."""

    def findings(self, watched: Watched) -> Findings:
        """Nothing yet about the units of one place."""
        window, width = watched.shown(self.config)
        together = None
        if self.config.coactivation_tokens and watched.kind != "head":
            together = TogetherActive(watched.n_units, self._limit, self.seed)
        return Findings(
            Totals(watched.n_units, watched.dense),
            Examples(watched.n_units, self.config, self.seed, watched.signed, window, width),
            together,
        )

    @torch.no_grad()
    def see(self, number: int) -> Iterator[tuple[int, Seen]]:
        """The units of each place in a batch, with the place's index in ``watched``."""
        batch = self.windows.batch(number)
        places = Places.of(batch, self.duplicates, self.config.keep_bos)
        model = self.context.get_or_create_model()
        device = model.device
        pad = None if batch.pad is None else batch.pad.to(device)
        captured = model.capture(batch.tokens.to(device), self.sources, pad=pad)
        if len(places):
            for index, watched in enumerate(self.watched):
                yield index, watched.see(captured, places)

    # ---- the end -----------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values, apart from what is looked at."""
        windows = self.windows.describe()
        return {
            "config": asdict(self.config),
            "windows": {k: v for k, v in windows.items() if k not in ("rank", "world", "epochs")},
        }

    def provenance(self, model_sha256: str) -> dict[str, Any]:
        """Names and hashes of model and corpus, and versions, as JSON values."""
        corpus = self.windows.corpus
        return {
            "model": self.context.model_name,
            "model_sha256": model_sha256,
            "corpus": self.windows.describe()["corpus"],
            "corpus_fingerprint": corpus.fingerprint,
            "source_fingerprint": corpus.source_fingerprint,
            "versions": {name: metadata.version(name) for name in ("torch", "numpy")}
            | {"neuron_explainer": __version__},
        }

    def result(self, watched: Watched, found: Findings, provenance: dict[str, Any]) -> Collected:
        """All that was found out about the units of one place. The findings are used up."""
        starts, _ = self.windows.contexts()
        kept = {"n_contexts": len(starts), "n_duplicates": len(self.duplicates)}
        seeds = {"key_seed": self.seed}
        statistics = found.totals.result()
        examples, limits = found.examples.result()
        return Collected(
            kind=watched.kind,
            location=watched.location,
            name=watched.name,
            signed=watched.signed,
            statistics=statistics,
            examples=examples,
            coactivation=(
                None if found.together is None else found.together.result(self.config.partners)
            ),
            settings={**self.settings(), **kept, **seeds},
            provenance={**provenance, **watched.provenance()},
            stratum_limits=limits,
        )


def _check_windows(context: ModelContext, windows: TokenWindows) -> None:
    if windows.epochs != 1 or windows.world != 1:
        raise InputError(
            "collating reads each token once, and divides the corpus among processes by itself: make "
            f"windows with epochs=1 and world=1, found {windows.epochs} and {windows.world}."
        )
    check_context_length(context, windows.context_length)
