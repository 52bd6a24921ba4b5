"""What the figures of a trained dictionary say, in sentences, with what is unusual marked.

The bounds are rules of thumb: they tell where to look, not what is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.tables import percent

MUCH_UNEXPLAINED = 0.5
MANY_DEAD = 0.1
DENSE = 0.1
"""A latent that fires on a larger share of tokens is called dense; such latents are seldom readable."""
MANY_DENSE = 0.01
L0_OFF = 0.05
LITTLE_RECOVERED = 0.7
SHRUNK = 0.95
NEARLY_EQUAL = 0.9
"""Decoder directions with a larger cosine are called near copies."""
MANY_COPIES = 0.01
STILL_FALLING = 0.02

Curve = Sequence[tuple[float, float]]
"""Points (tokens, value)."""


class Remark(NamedTuple):
    """A sentence about a dictionary."""

    text: str
    unusual: bool = False


def verdict(
    evaluation: Evaluation,
    target_l0: float | None = None,
    geometry: WeightGeometry | None = None,
    fvu_curve: Curve = (),
) -> list[Remark]:
    """What the figures say, in the order in which one would ask.

    Args:
        evaluation: the figures.
        target_l0: how many active latents per token were asked for.
        geometry: the decoder's lengths and angles.
        fvu_curve: FVU in the training log.
    """
    found = [_explained(evaluation), *_losses(evaluation), _l0(evaluation, target_l0)]
    found += [_dead(evaluation), _dense(evaluation), *_shrinkage(evaluation)]
    if geometry is not None:
        found += _copies(geometry)
    return found + _still_falling(fvu_curve)


def n_dead(evaluation: Evaluation) -> int:
    """How many latents fired on none of the tokens."""
    return int((evaluation.frequency == 0).sum())


def n_dense(evaluation: Evaluation) -> int:
    """How many latents fired on more than a share :data:`DENSE` of the tokens."""
    return int((evaluation.frequency > DENSE).sum())


def _explained(e: Evaluation) -> Remark:
    return Remark(
        f"The reconstructions explain {percent(e.explained_variance, 1)} of the variance (FVU {e.fvu:.3f}).",
        e.fvu > MUCH_UNEXPLAINED,
    )


def _losses(e: Evaluation) -> list[Remark]:
    if e.losses is None:
        return []
    found = e.losses
    text = (
        f"Spliced into the model, they raise its loss from {found.ce_original:.3f} to "
        f"{found.ce_spliced:.3f} nats per token"
    )
    if found.ce_spliced > found.ce_mean_ablated:
        return [Remark(f"{text}, which is worse than the mean activation in their place.", True)]
    return [
        Remark(
            f"{text}. They recover {percent(found.recovered_zero)} of the loss that zeros in their place "
            f"cost, and {percent(found.recovered_mean)} of what the mean activation costs.",
            found.recovered_mean < LITTLE_RECOVERED,
        )
    ]


def _l0(e: Evaluation, target: float | None) -> Remark:
    text = f"{e.l0:.1f} latents are active per token (L0)"
    if target is None:
        return Remark(f"{text}.")
    off = abs(e.l0 / target - 1) > L0_OFF
    return Remark(f"{text}, {'but' if off else 'as'} {target:g} were asked for.", off)


def _dead(e: Evaluation) -> Remark:
    dead = n_dead(e)
    if not dead:
        return Remark(f"No latent is dead: each of the {e.n_latents:,} fired.")
    return Remark(
        f"{dead:,} of the {e.n_latents:,} latents ({percent(e.dead_share, 1)}) never fired: they are dead, "
        f"or rarer than one in {e.n_tokens:,} tokens.",
        e.dead_share > MANY_DEAD,
    )


def _dense(e: Evaluation) -> Remark:
    dense = n_dense(e)
    if not dense:
        return Remark(f"No latent is dense (active on more than {percent(DENSE)} of tokens).")
    share = float(e.frequency[e.frequency > DENSE].sum()) / e.l0
    return Remark(
        f"{dense:,} {'latent is' if dense == 1 else 'latents are'} dense (active on more than "
        f"{percent(DENSE)} of tokens) and {'makes' if dense == 1 else 'make'} up {percent(share)} of all "
        "activity.",
        dense > MANY_DENSE * e.n_latents,
    )


def _shrinkage(e: Evaluation) -> list[Remark]:
    if not e.relative_reconstruction_bias < SHRUNK:  # NaN where every reconstruction is 0
        return []
    return [
        Remark(
            f"The reconstructions are too short: {1 / e.relative_reconstruction_bias:.2f} times as long, "
            "they would fit best. Fine-tuning the decoder repairs this.",
            True,
        )
    ]


def _copies(geometry: WeightGeometry) -> list[Remark]:
    if not len(geometry.nearest_cosine):
        return []
    share = float((geometry.nearest_cosine > NEARLY_EQUAL).double().mean())
    if not share:
        return []
    return [
        Remark(
            f"{percent(share, 1)} of decoder directions have a near copy (cosine above {NEARLY_EQUAL:g}).",
            share > MANY_COPIES,
        )
    ]


def _still_falling(curve: Curve) -> list[Remark]:
    """Whether FVU fell from the next-to-last fifth of training to the last."""
    if len(curve) < 10:
        return []
    end = curve[-1][0]
    last = [y for x, y in curve if x > 0.8 * end]
    before = [y for x, y in curve if 0.6 * end < x <= 0.8 * end]
    if not last or not before:
        return []
    old, new = sum(before) / len(before), sum(last) / len(last)
    if new >= old * (1 - STILL_FALLING):  # also where both are 0
        return []
    return [
        Remark(
            f"FVU was still falling when training ended after {end:,.0f} tokens (by {percent(1 - new / old)} "
            "over the last fifth): more training would help.",
            True,
        )
    ]


def target_l0(settings: Mapping[str, Any]) -> float | None:
    """How many active latents per token a dictionary's settings ask for; None if they do not say."""
    objective = settings.get("objective")
    if not isinstance(objective, Mapping):
        return None
    asked = objective.get("k", objective.get("target_l0"))
    return float(asked) if isinstance(asked, int | float) else None
