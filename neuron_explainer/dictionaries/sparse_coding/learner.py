"""One dictionary of sparse coding in training: its state, how it learns, and the autoencoder it becomes.

Shape legend: ``n`` inputs, ``l`` latents (atoms of the dictionary), ``r`` rows.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.dictionaries.sparse_coding.config import SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.dictionary_update import (
    initial_dictionary,
    moving_average,
    updated_dictionary,
)
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.fista import fista, ista
from neuron_explainer.models.autoencoders.nonlinearities import Fista
from neuron_explainer.models.locations import ActivationLocation

_SOLVERS = {"fista": fista, "ista": ista}


class DictionaryLearner:
    """A dictionary, its Hessian and its statistics; :meth:`tensors` is the whole state."""

    def __init__(self, config: SparseCodingConfig, n_inputs: int, like: Tensor) -> None:
        """A new dictionary for rows of width ``n_inputs``, with the dtype and device of ``like``."""
        self.config = config
        n_latents = config.n_latents
        self.dictionary = initial_dictionary(n_inputs, n_latents, config.seed).to(like)
        """Φ, ``[n, l]``."""
        self.hessian = like.new_zeros(n_latents)
        """H, ``[l]``: moving average of the mean square of each latent."""
        self.act_l1 = like.new_zeros(n_latents)
        """``[l]``: moving average of the mean of each latent."""
        self.averages = torch.zeros(4, dtype=torch.float64)
        """Moving averages over rows: ‖x‖², ‖x - Φ a‖², active latents, solves that were cut short."""
        self.counts = torch.zeros(2, dtype=torch.int64)
        """Number of parts and of rows learned from."""
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=like.device)
        """``[l]``: number of rows on which each latent was active."""
        self.last_fired = torch.zeros(n_latents, dtype=torch.int64, device=like.device)
        """``[l]``: the part in which each latent was last active; 0 if it never was."""

    _TENSORS = ("dictionary", "hessian", "act_l1", "averages", "counts", "fired", "last_fired")

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by name."""
        return {name: getattr(self, name) for name in self._TENSORS}

    @classmethod
    def from_tensors(
        cls, config: SparseCodingConfig, tensors: Mapping[str, Tensor], device: torch.device
    ) -> "DictionaryLearner":
        """The inverse of :meth:`tensors`."""
        dictionary = tensors["dictionary"]
        learner = cls(config, len(dictionary), dictionary.to(device)[:0])
        for name in cls._TENSORS:
            where = getattr(learner, name).device
            # Copied, because files are mapped at any address, and the rounding of matrix products
            # may depend on the address.
            setattr(learner, name, tensors[name].to(where, copy=True))
        return learner

    @torch.no_grad()
    def learn(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Code rows ``[r, n]``, weighted by ``weights`` ``[r]``, and take one step."""
        c = self.config
        solved = _SOLVERS[c.solver](
            x,
            self.dictionary,
            c.penalty,
            max_iterations=c.max_iterations,
            tolerance=c.tolerance,
        )
        latents = solved.latents
        residual = x - latents @ self.dictionary.T
        self._update_statistics(x, residual, latents, solved.violation)
        self.dictionary = updated_dictionary(
            self.dictionary,
            residual,
            latents,
            self.hessian,
            step_size=c.step_size,
            floor=c.hessian_floor,
            weights=weights,
        )

    def _update_statistics(
        self, x: Tensor, residual: Tensor, latents: Tensor, violation: Tensor
    ) -> None:
        history, active = self.config.history, latents > 0
        self.hessian = moving_average(self.hessian, latents.square().mean(0), history)
        self.act_l1 = moving_average(self.act_l1, latents.mean(0), history)
        cut_short = violation > self.config.tolerance
        # Over each row by itself first: what is summed over many is summed in float64.
        by_row = [x.square().sum(1), residual.square().sum(1), active.sum(1), cut_short]
        means = torch.stack([row.cpu().double().mean() for row in by_row])
        self.averages = moving_average(self.averages, means, history)
        self.counts = self.counts + torch.tensor([1, len(x)])
        self.fired = self.fired + active.sum(0)
        self.last_fired[active.any(0)] = self.counts[0].to(self.last_fired.device)

    @property
    def _share(self) -> float:
        """The divisor that corrects moving averages for their start at zero."""
        return float(1 - (1 - 1 / self.config.history) ** int(self.counts[0]))

    def statistics(self) -> dict[str, float]:
        """The number of rows so far and, as averages over recent parts, how well they were coded.

        ``snr``: Σ‖x‖² / Σ‖x - Φ a‖², not in dB (absent if the error is zero). ``act_l1_max`` and
        ``act_l1_min``: the largest and smallest mean of a latent. ``l0``. ``cut_short``: the share of rows
        whose solve ended at ``max_iterations``.
        """
        signal, noise, l0, cut_short = (self.averages / self._share).tolist()
        act_l1 = self.act_l1 / self._share
        found = {
            "rows": int(self.counts[1]),
            "act_l1_max": float(act_l1.max()),
            "act_l1_min": float(act_l1.min()),
            "l0": l0,
            "cut_short": cut_short,
        }
        return {"snr": signal / noise, **found} if noise else found

    def autoencoder(
        self,
        location: ActivationLocation | None,
        model_name: str | None,
        metadata: Mapping[str, Any],
    ) -> Autoencoder:
        """The dictionary as a tied autoencoder whose nonlinearity is FISTA.

        Its inputs are neither centred nor scaled, as in training.
        """
        c, (parts, rows) = self.config, self.counts.tolist()
        facts = {"method": "sparse coding", "config": asdict(c), **self.statistics(), **metadata}
        autoencoder = Autoencoder(
            c.n_latents,
            len(self.dictionary),
            Fista(c.penalty, c.max_iterations, c.tolerance),
            tied=True,
            input_normalization="none",
            location=location,
            model_name=model_name,
            metadata=facts,
            device=self.dictionary.device,
            dtype=self.dictionary.dtype,
        )
        with torch.no_grad():
            autoencoder.encoder.weight.copy_(self.dictionary.T)
        autoencoder.stats_last_nonzero.copy_(parts - self.last_fired)
        autoencoder.latents_activation_frequency.copy_(self.fired / rows)
        autoencoder.latents_mean_square.copy_(self.hessian / self._share)
        return autoencoder
