"""Texts as tokens, and the activations of a dictionary's units on texts."""

from typing import Any

import torch
from torch import Tensor

from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session


def tokenize(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """``{text}`` to ``{ids, vocab}``; any number of tokens, also none."""
    text = request["text"]
    ids = session.model.prompt_ids(text)[0] if text else []
    script = session.names.script().add(f"text = {text!r}")
    return {
        "ids": ids,
        **session.vocabulary(ids),
        "python": script.result({"ids": "model.prompt_ids(text)[0] if text else []"}).text(),
    }


def activations(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """Of chosen units, where they are active on each text; or of each token the most active units.

    Takes ``{texts, dictionary, units}`` or ``{texts, dictionary, top_k}``. A text of several is run
    by itself, so that its values do not depend on the others.
    """
    texts, units, k = request["texts"], request.get("units"), request.get("top_k") or 1
    source = session.source(request["dictionary"], ("body", "dictionary"))
    autoencoder = session.autoencoder(source.id) if source.kind == "latent" else None
    texts_ids = [session.ids(text, ("body", "texts", i)) for i, text in enumerate(texts)]
    rows = []
    for ids in texts_ids:
        session.guard()
        values = _values(session, source.location, autoencoder, ids)  # [s, u]
        if units is not None:
            _check_units(units, values.shape[1], source.id)
            rows.append({"ids": ids, "units": [_of_unit(values, unit) for unit in units]})
        else:
            rows.append({"ids": ids, "tokens": _of_tokens(values, k)})
    return {
        "dictionary": source.id,
        "texts": rows,
        "scale": max((_largest(row) for row in rows), default=0.0),
        **session.vocabulary(token for ids in texts_ids for token in ids),
        "python": _script(session, source.id, texts_ids, units, k),
    }


@torch.no_grad()
def _values(
    session: Session, location: str, autoencoder: Autoencoder | None, ids: list[int]
) -> Tensor:
    """``[s, u]`` float32."""
    found = session.model.capture([ids], location, hooks=session.watched())
    x = found[ActivationLocation.parse(location)][0].flatten(1)
    if autoencoder is None:
        return x.float()
    return autoencoder.encode(x.to(autoencoder.device, autoencoder.dtype)).float()


def _check_units(units: list[int], n_units: int, id: str) -> None:
    for number, unit in enumerate(units):
        if not 0 <= unit < n_units:
            raise Refusal(
                404,
                "index_out_of_range",
                f"There is no unit {unit} in {id}: they are 0 to {n_units - 1}.",
                loc=("body", "units", number),
                allowed=[f"0 to {n_units - 1}"],
            )


def _of_unit(values: Tensor, unit: int) -> dict[str, Any]:
    column = values[:, unit]
    places = column.nonzero()[:, 0].tolist()
    return {"unit": unit, "acts": [[place, float(column[place])] for place in places]}


def _of_tokens(values: Tensor, k: int) -> list[list[dict[str, Any]]]:
    """Of each token, its most active units; the lowest number first among equals."""
    _, units = top_k(values.abs(), min(k, values.shape[1]))
    found = values.gather(1, units)
    return [
        [
            {"unit": unit, "value": value}
            for unit, value in zip(its_units, its_values, strict=True)
            if value
        ]
        for its_units, its_values in zip(units.tolist(), found.tolist(), strict=True)
    ]


def _largest(row: dict[str, Any]) -> float:
    if "units" in row:
        return max((abs(value) for unit in row["units"] for _, value in unit["acts"]), default=0.0)
    return max((abs(each["value"]) for token in row["tokens"] for each in token), default=0.0)


def _script(
    session: Session,
    id: str,
    texts_ids: list[list[int]],
    units: list[int] | None,
    k: int,
) -> str:
    source = session.sources[id]
    script = session.names.script()
    script.add(f"texts = {texts_ids}", f"place = {source.location!r}")
    values = "model.capture([ids], place)[place][0].flatten(1)"
    if source.kind == "latent":
        script.add(f"autoencoder = {session.names.autoencoder(script, id)}")
        values = f"autoencoder.encode({values})"
    script.add(f"values = [{values}.detach() for ids in texts]  # a row for each token")
    if units is not None:
        return script.result({"values": f"[each[:, {units}].tolist() for each in values]"}).text()
    top = f"[each.abs().topk(min({k}, each.shape[1])).indices for each in values]"
    return script.result(
        {"values": f"[each.gather(1, i).tolist() for each, i in zip(values, {top})]"}
    ).text()
