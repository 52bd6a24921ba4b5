"""Interventions: hooks for the usual experiments, as values that compose with ``+``.

    hooks = ablate("9/attn.v_out", units=[6]) + steer("6/resid.torso.post_mlp", direction, 4.0, unit="norm")
    model.sample("The capital of France is", hooks=hooks)

Every function takes a location (a location without a layer means every layer), units and positions, and
returns :class:`~neuron_explainer.models.hooks.TransformerHooks`. The hooks say what they do when they are
printed. ``a + b`` runs ``a`` before ``b`` at each place.

**Units** are entries of the location's last axis: neurons, or channels of the stream. Where a location has
heads, units are heads (``3``), or single channels of heads (``"3.17"``). With ``autoencoders=``, units are
latents: the autoencoders are spliced in, and what they do not capture is added back, so that only the edit
changes anything.

**Positions** are counted from 0 in each row. Pads do not count, and a generation goes on counting:

- None: every token;
- an int, several ints, or a slice;
- ``"last"``: the last token of each row in a call. While sampling, this is the last token of the prompt
  and then each new token. (A model that keeps no keys and values reads the whole text at every step; there
  only the newest token is edited.)
- a bool tensor ``[b, s]`` or ``[s]`` by row and position, such as :func:`positions_where` makes.

Units and positions that a model or a text does not have are refused when the hooks are used, before the
forward pass runs.

The files, where each imports only from those before it: ``positions`` and ``units`` say what is edited,
``edit`` is the hook, ``alignment`` matches the tokens of two texts; ``values`` (set, scale, clamp),
``directions`` (steer, project out) and ``other_runs`` (patch, freeze, ablate by a reference) make hooks.
"""

from neuron_explainer.models.interventions.alignment import align
from neuron_explainer.models.interventions.directions import Direction, project_out, steer
from neuron_explainer.models.interventions.edit import Autoencoders, Edit
from neuron_explainer.models.interventions.other_runs import (
    add,
    freeze,
    mean_ablate,
    patch_from,
    resample_ablate,
)
from neuron_explainer.models.interventions.positions import (
    Positions,
    PositionsLike,
    positions_where,
)
from neuron_explainer.models.interventions.units import Units, UnitsLike
from neuron_explainer.models.interventions.values import ablate, clamp, scale, set_to

__all__ = [
    "Autoencoders",
    "Direction",
    "Edit",
    "Positions",
    "PositionsLike",
    "Units",
    "UnitsLike",
    "ablate",
    "add",
    "align",
    "clamp",
    "freeze",
    "mean_ablate",
    "patch_from",
    "positions_where",
    "project_out",
    "resample_ablate",
    "scale",
    "set_to",
    "steer",
]
