"""Interventions from requests: as hooks, and as the Python that makes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuron_explainer.errors import shown
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import (
    ablate,
    align,
    mean_ablate,
    patch_from,
    scale,
    set_to,
    steer,
)
from neuron_explainer.models.language_model import Activations
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.weight_names import Dimension
from neuron_explainer.server.compute.keeping import Changed
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session
from neuron_explainer.server.snippets import Script

Value = float | None


@dataclass(frozen=True)
class Change:
    """One intervention: a unit, what is done to it, and where."""

    place: ActivationLocation
    unit: int | None
    position: int | None
    """None: every position, also those of a text that is still to be sampled."""
    action: str
    value: Value
    dictionary: str | None
    source: list[int] | None
    """The tokens of the prompt that values are taken from (``action`` "swap")."""

    def key(self, session: Session) -> Changed:
        """What tells it from other interventions."""
        which = None if self.dictionary is None else session.which(self.dictionary)
        source = None if self.source is None else tuple(self.source)
        rest = self.unit, self.position, self.action, self.value, self.dictionary, which, source
        return Changed(self.place, rest)


@dataclass(frozen=True)
class Changes:
    """The interventions of a request on one prompt."""

    session: Session
    ids: list[int]
    """The prompt."""
    each: list[Change]

    def hooks(self) -> TransformerHooks | None:
        """All of them, the first one first; None if there are none."""
        hooks = [_hooks(self.session, self.ids, change) for change in self.each]
        return sum(hooks[1:], hooks[0]) if hooks else None

    def write(self, script: Script, prompt: str) -> str:
        """Add what they need to a script; returns an expression for the hooks.

        Args:
            prompt: the script's variable for the prompt's tokens.
        """
        parts = [_text(self.session, script, change, prompt) for change in self.each]
        return " + ".join(parts) if parts else "None"


def read_changes(
    session: Session,
    given: Sequence[dict[str, Any]],
    ids: list[int],
    other: list[int] | None = None,
    moved: Callable[[int], int | None] | None = None,
    n_new: int = 0,
) -> Changes:
    """Interventions as requests state them, for one prompt.

    Args:
        given: ``{node: {location, unit, position, dictionary}, action, value, source}`` each.
        ids: the prompt's tokens.
        other: the tokens that ``swap`` takes values from, unless the intervention names a text.
        moved: where a position lies in this prompt, None for nowhere: then the intervention is left out.
            Default: where it is.
        n_new: how many tokens will follow the prompt, which interventions may be at too.
    """
    end, found = len(ids) + n_new, []
    for number, each in enumerate(given):
        loc = ("body", "interventions", number)
        node = each["node"]
        place = _place(session, node["location"], (*loc, "node", "location"))
        position = node.get("position")
        if position is not None and moved is not None:
            position = moved(position)
            if position is None:
                continue
        elif position == -1:
            position = len(ids) - 1
        elif position is not None:
            check_position(position, end, (*loc, "node", "position"))
        source = None
        if each["action"] == "swap":
            source = session.ids(each["source"], (*loc, "source")) if each.get("source") else other
            if source is None:
                raise Refusal(
                    422,
                    "no_source",
                    "swap takes values from another prompt: give a second prompt, or a source.",
                    loc=(*loc, "source"),
                )
        change = Change(
            place,
            node.get("unit"),
            position,
            each["action"],
            each.get("value"),
            node.get("dictionary"),
            source,
        )
        _check(session, change, loc)
        found.append(change)
    return Changes(session, ids, found)


def _place(session: Session, location: str, loc: Sequence[str | int]) -> ActivationLocation:
    place = ActivationLocation.parse(location)
    session.model.require(place.path)
    if place.site.per_layer and place.layer is None:
        raise Refusal(
            422,
            "no_layer",
            f"{location} is in every layer: name one, such as 0/{place}.",
            loc=loc,
            allowed=[f"{layer}/{place}" for layer in range(session.model.n_layers)],
        )
    place.expand(session.model.n_layers)
    return place


_FOR_HEADS = ("zero", "mean", "scale", "swap")


def _check(session: Session, change: Change, loc: Sequence[str | int]) -> None:
    """Refuse what an action cannot do at a place."""
    if change.action in ("set", "scale", "add") and change.value is None:
        raise Refusal(422, "no_value", f"{change.action} needs a value.", loc=(*loc, "value"))
    of_heads = change.place.site.shape[-1] in ("d_head", "h") and change.dictionary is None
    if of_heads and change.action not in _FOR_HEADS:
        raise Refusal(
            422,
            "invalid_action",
            f"{change.action} is for units with one number; at {change.place} a unit is a head.",
            loc=(*loc, "action"),
            allowed=_FOR_HEADS,
        )
    if change.dictionary is not None:
        source = session.source(change.dictionary, (*loc, "node", "dictionary"))
        if source.location != str(change.place):
            raise Refusal(
                422,
                "wrong_location",
                f"{source.id} is of {source.location}, the intervention is at {change.place}.",
                loc=(*loc, "node", "location"),
                allowed=[source.location],
            )
    _check_unit(session, change, (*loc, "node", "unit"))


def _check_unit(session: Session, change: Change, loc: Sequence[str | int]) -> None:
    """Refuse a unit that a place does not have, and none where one must be named."""
    if change.unit is None:
        if change.action == "add":
            raise Refusal(422, "no_unit", "add needs a unit.", loc=loc)
        if change.dictionary is not None and change.action in ("mean", "swap"):
            raise Refusal(422, "no_unit", f"{change.action} needs one latent's number.", loc=loc)
        return
    place = change.place
    if change.dictionary is not None:
        width = session.autoencoder(change.dictionary, loc).n_latents
    elif place.site.shape[-1] == "d_head":
        width = session.model.sizes[Dimension.ATTN_HEADS]
    else:
        width = place.site.width(session.model.sizes.__getitem__)
    if change.unit >= width:
        raise Refusal(
            422,
            "no_such_node",
            f"{change.dictionary or place} has no unit {change.unit}: they are 0 to {width - 1}.",
            loc=loc,
            allowed=[f"0 to {width - 1}"],
        )


def _hooks(session: Session, ids: list[int], change: Change) -> TransformerHooks:
    place, unit, position, value = change.place, change.unit, change.position, change.value
    given: dict[str, Any] = {}
    if change.dictionary is not None:
        if change.action == "add":
            (autoencoder,) = session.autoencoders([change.dictionary])
            return steer(place, (autoencoder, unit or 0), value or 0.0, position)
        given["autoencoders"] = session.contexts([change.dictionary])[0]
    match change.action:
        case "zero":
            return ablate(place, unit, position, **given)
        case "set":
            return set_to(place, value or 0.0, unit, position, **given)
        case "scale":
            return scale(place, 1.0 if value is None else value, unit, position, **given)
        case "add":
            rows = torch.eye(place.site.width(session.model.sizes.__getitem__))
            return steer(place, rows[unit or 0], value or 0.0, position)
    return _of_a_run(session, ids, change)


@torch.no_grad()
def _of_a_run(session: Session, ids: list[int], change: Change) -> TransformerHooks:
    """Mean over the prompt's own unchanged run, or the values of another prompt's run."""
    place, unit, position = change.place, change.unit, change.position
    if change.action == "swap":
        there = change.source or ids
        index_map = align(ids, there)
        run = _captured(session, there, place)
        if change.dictionary is None:
            return patch_from(place, run, unit, position, index_map=index_map)
        values = latent_values(session, change.dictionary, run[place], unit or 0)[0]
        context = session.contexts([change.dictionary])[0]
        # By value: a tensor of the prompt's length would not fit the tokens that are sampled after it.
        places: dict[float, list[int]] = {}
        for here, there_at in enumerate(index_map.tolist()):
            if there_at >= 0 and position in (None, here):
                places.setdefault(float(values[there_at]), []).append(here)
        each = [
            set_to(place, value, unit, at, autoencoders=context) for value, at in places.items()
        ]
        return sum(each, TransformerHooks())
    run = _captured(session, ids, place)
    if change.dictionary is None:
        return mean_ablate(place, run, unit, position)
    mean = float(latent_values(session, change.dictionary, run[place], unit or 0).mean())
    context = session.contexts([change.dictionary])[0]
    return set_to(place, mean, unit, position, autoencoders=context)


def _captured(session: Session, ids: list[int], place: ActivationLocation) -> Activations:
    key = "captured", tuple(ids), place
    return session.kept(key, lambda: session.model.capture([ids], place))


def latent_values(session: Session, dictionary: str, x: torch.Tensor, unit: int) -> torch.Tensor:
    """``[b, s]``: one latent on activations ``[b, s, …]``."""
    (autoencoder,) = session.autoencoders([dictionary])
    return autoencoder.encode(x.flatten(2).to(autoencoder.dtype))[..., unit]


# --- as Python ---

_FUNCTIONS = {"zero": "ablate", "set": "set_to", "scale": "scale", "add": "steer"}


def _text(session: Session, script: Script, change: Change, prompt: str) -> str:
    """The Python of one intervention."""
    place, unit, position = repr(str(change.place)), change.unit, change.position
    of_latents = ""
    if change.dictionary is not None:
        contexts = session.names.contexts(script, [change.dictionary])
        of_latents = f", autoencoders={contexts}[0]"
    function = _FUNCTIONS.get(change.action)
    if function is not None:
        script.use("models.interventions", function)
        if change.action == "add":
            return _steering(session, script, change)
        value = "" if change.action == "zero" else f"{change.value!r}, "
        return f"{function}({place}, {value}{unit}, {position}{of_latents})"
    if change.dictionary is not None:
        return _of_a_run_of_latents(session, script, change, prompt, of_latents)
    if change.action == "mean":
        script.use("models.interventions", "mean_ablate")
        return f"mean_ablate({place}, model.capture([{prompt}], {place}), {unit}, {position})"
    script.use("models.interventions", "align", "patch_from")
    run = f"model.capture([{change.source}], {place})"
    aligned = f"index_map=align({prompt}, {change.source})"
    return f"patch_from({place}, {run}, {unit}, {position}, {aligned})"


def _steering(session: Session, script: Script, change: Change) -> str:
    if change.dictionary is not None:
        autoencoder = session.names.autoencoder(script, change.dictionary)
        direction = f"({autoencoder}, {change.unit})"
    else:
        script.library("torch")
        width = change.place.site.width(session.model.sizes.__getitem__)
        direction = f"torch.eye({width})[{change.unit}]"
    return f"steer({str(change.place)!r}, {direction}, {change.value!r}, {change.position})"


def _of_a_run_of_latents(
    session: Session, script: Script, change: Change, prompt: str, of_latents: str
) -> str:
    assert change.dictionary is not None
    script.use("models.interventions", "set_to")
    place, unit = repr(str(change.place)), change.unit
    autoencoder = session.names.autoencoder(script, change.dictionary)
    ids = prompt if change.action == "mean" else str(change.source)
    run = f"model.capture([{ids}], {place})[{place}].flatten(2)"
    values = f"{autoencoder}.encode({run})[0, :, {unit}].detach()"
    if change.action == "mean":
        mean = f"float({values}.mean())"
        return f"set_to({place}, {mean}, {unit}, {change.position}{of_latents})"
    script.use("models.interventions", "align").use("models.hooks", "TransformerHooks")
    script.add(f"values = {values}", f"index_map = align({prompt}, {change.source}).tolist()")
    one = f"set_to({place}, float(values[there]), {unit}, here{of_latents})"
    here = "" if change.position is None else f" and here == {change.position}"
    pairs = f"for here, there in enumerate(index_map) if there >= 0{here}"
    return f"sum(({one} {pairs}), TransformerHooks())"


def check_position(position: int, length: int, loc: Sequence[str | int]) -> int:
    """A position of a prompt, where -1 is the last."""
    if not -1 <= position < length:
        raise Refusal(
            422,
            "no_such_position",
            f"Positions are 0 to {length - 1} in this text, or -1 for the last; found "
            f"{shown(position)}.",
            loc=loc,
            allowed=["-1", f"0 to {length - 1}"],
        )
    return length - 1 if position == -1 else position
