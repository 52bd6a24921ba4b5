"""What the weights say about the units of a dictionary: tokens, neighbours, a map of all."""

from typing import Any

import numpy as np

from neuron_explainer.analysis.decoder_map import decoder_map
from neuron_explainer.analysis.input_tokens import InputReader
from neuron_explainer.analysis.matching import nearest
from neuron_explainer.analysis.token_lists import TokenValues
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.weight_names import Dimension
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session

CHEAP = 2e11
"""Multiplications of a run of the whole vocabulary, up to which the tokens that excite a latent are shown:
a few seconds on two cores."""


def logits(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The tokens that a unit raises and lowers, the histogram of all, and those that excite it."""
    id, unit, k = request["dictionary"], request["unit"], request["k"]
    source = session.source(id, ("path", "d"))
    _check_unit(session, id, unit)
    found = session.directions(id).top_logits(unit, k)
    excited, why = _excited_by(session, id, unit, k)
    tokens = [each.token for each in (*found.top, *found.bottom, *(excited or ()))]
    script = session.names.script().use("analysis.directions", "Directions")
    what = repr(source.location)
    if source.kind == "latent":
        what = session.names.autoencoder(script, id)
    script.add(f"top = Directions(context, {what}).top_logits({unit}, {k})")
    parts = {
        "top": "[[t.token, t.value] for t in top.top]",
        "bottom": "[[t.token, t.value] for t in top.bottom]",
        "counts": "list(top.counts)",
    }
    if excited is not None:
        script.use("analysis.input_tokens", "InputReader")
        reader = f"InputReader(context, {what}, location={source.location!r})"
        script.add(f"excited = {reader}.top_tokens([{unit}], {k})[0].top")
        parts["excited_by"] = "[[t.token, t.value] for t in excited]"
    return {
        "dictionary": id,
        "unit": unit,
        "top": _list(found.top),
        "bottom": _list(found.bottom),
        "histogram": {"edges": list(found.edges), "counts": list(found.counts)},
        "skewness": found.skewness,
        "kurtosis": found.kurtosis,
        "excited_by": None if excited is None else _list(excited),
        "note": found.note,
        "excited_note": why,
        **session.vocabulary(tokens),
        "python": script.result(parts).text(),
    }


def _list(values: TokenValues) -> list[dict[str, Any]]:
    return [{"id": each.token, "value": each.value} for each in values]


def _check_unit(session: Session, id: str, unit: int) -> None:
    n_units = session.directions(id).units.n_units
    if not 0 <= unit < n_units:
        raise Refusal(
            404,
            "index_out_of_range",
            f"There is no unit {unit} in {id}: they are 0 to {n_units - 1}.",
            loc=("path", "i"),
            allowed=[f"0 to {n_units - 1}"],
        )


def _excited_by(
    session: Session, id: str, unit: int, k: int
) -> tuple[TokenValues | None, str | None]:
    """The tokens that excite a unit, or why they are not known."""
    source = session.sources[id]
    place = ActivationLocation.parse(source.location)
    if source.kind == "latent" and place.path in _COMPUTED:
        sizes = session.model.sizes
        of_layer = 12 * sizes[Dimension.RESIDUAL_STREAM_CHANNELS] ** 2
        if session.model.n_vocab * of_layer * (1 + (place.layer or 0)) > CHEAP:
            return None, "Running every token of the vocabulary up to this layer takes too long."
    try:
        what: Any = session.autoencoder(id) if source.kind == "latent" else source.location
        reader = InputReader(session.context, what, location=source.location)
        dictionary = id if source.kind == "latent" else None
        found = session.kept(
            ("excited", id, unit, k),
            lambda: reader.top_tokens([unit], k)[0],
            dictionary=dictionary,
        )
    except NeuronExplainerError as error:
        return None, str(error)
    return found.top, found.note


_COMPUTED = ("attn.v_out", "resid.torso.delta_attn", "mlp.post_act", "resid.torso.delta_mlp")


def neighbours(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The latents of the same dictionary whose decoder rows are most alike, by cosine."""
    id, unit, k = request["dictionary"], request["unit"], request["k"]
    session.source(id, ("path", "d"))
    autoencoder = session.autoencoder(id, ("path", "d"))
    _check_unit(session, id, unit)
    found = nearest(autoencoder, unit, k=k)
    script = session.names.script().use("analysis.matching", "nearest")
    name = session.names.autoencoder(script, id)
    script.add(f"found = nearest({name}, {unit}, k={k})")
    units, cosines = np.asarray(found.units), np.asarray(found.cosines)
    return {
        "items": [
            {"dictionary": id, "unit": int(other), "cosine": float(cosine), "label": None}
            for other, cosine in zip(units, cosines, strict=True)
        ],
        "python": script.result(
            {"units": "list(map(int, found.units))", "cosines": "list(map(float, found.cosines))"}
        ).text(),
    }


def dictionary_map(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The plane of the two largest principal components of a dictionary's decoder rows."""
    id = request["dictionary"]
    source = session.source(id, ("path", "d"))
    if source.kind != "latent" or source.autoencoder is None:
        raise Refusal(
            404, "no_map", f"{id} has no autoencoder at hand, whose directions a map shows."
        )
    found = session.kept(
        ("map", id),
        lambda: decoder_map(session.autoencoder(id, ("path", "d")), "pca"),
        dictionary=id,
        of_model=False,
    )
    known = np.flatnonzero(np.isfinite(found.coordinates).all(axis=1))
    script = session.names.script().use("analysis.decoder_map", "decoder_map")
    script.add(f"found = decoder_map({session.names.autoencoder(script, id)}, 'pca')")
    return {
        "x": found.coordinates[known, 0].tolist(),
        "y": found.coordinates[known, 1].tolist(),
        "unit": known.tolist(),
        "method": found.method,
        "explained": found.explained,
        "python": script.result({"coordinates": "found.coordinates.tolist()"}).text(),
    }
