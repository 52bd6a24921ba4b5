"""One node in detail: the tokens that it makes likelier, those that excite it, and where it looks."""

import math
from typing import Any

import torch

from neuron_explainer.analysis.effects import Effects, Node
from neuron_explainer.analysis.token_lists import TokenValues
from neuron_explainer.analysis.trace import goal_of
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.server.compute.debugging import Asked, read, read_node, write_effects
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session

N_TOKENS = 10


def node(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """What one row of the debugger's table opens.

    Takes what ``debug`` takes, with ``node``. ``promotes`` and ``demotes`` are of what the node writes on
    this prompt; ``excited_by`` is, for each token, what its embedding added to the stream before the node
    would add to its pre-activation (to first order, with the norm's scale frozen).
    """
    asked = read(session, request | {"position": "all"})
    prompt = asked.prompts[0]
    found = read_node(session, request["node"], prompt.ids, ("body",))
    _show(asked, request["node"], found)
    effects = asked.effects(0)
    activation = float(effects.values([found], "activation")[0])
    if math.isnan(activation):
        raise Refusal(
            422,
            "no_such_node",
            f"{found} is not there: expected a neuron, head or latent of this model at a token.",
            loc=("body", "node"),
        )
    write = effects.write(found)
    promotes, demotes = session.directions().tokens_of(write, N_TOKENS)
    excited = _excited(asked, found)
    attends = _attends(asked, found)
    lists = [promotes, demotes, *([excited] if excited else [])]
    return {
        "node": vars(found),
        "activation": activation,
        "write": {"norm": float(write.norm())},
        "promotes": _list(promotes),
        "demotes": _list(demotes),
        "excited_by": None if excited is None else _list(excited),
        "attends": attends,
        **session.vocabulary([*prompt.ids, *(v.token for each in lists for v in each)]),
        "python": _script(asked, found, excited is not None, attends is not None),
    }


def _show(asked: Asked, given: dict[str, Any], found: Node) -> None:
    """Have the pass hold the node: its dictionary, or pairs of tokens."""
    if found.kind == "pair":
        asked.pairs = True
    if found.kind != "latent":
        path = ActivationLocation.parse(found.location).path
        (asked.mlp if path.startswith("mlp.") else asked.attention).clear()
        return
    source = asked.session.sources[given["dictionary"]]
    of_mlp = source.site in ("mlp.post_act", "resid.torso.delta_mlp")
    (asked.mlp if of_mlp else asked.attention)[:] = [source.id]


def _list(values: TokenValues) -> list[dict[str, Any]]:
    return [{"id": each.token, "value": each.value} for each in values]


def _excited(asked: Asked, found: Node) -> TokenValues | None:
    """The tokens whose embeddings, added to the stream before a node, raise it most."""
    if found.kind not in ("neuron", "latent"):
        return None
    session, prompt = asked.session, asked.prompts[0]
    try:
        goal = goal_of(
            session.model,
            prompt.ids,
            found,
            autoencoders=session.contexts([*asked.mlp, *asked.attention]),
        )
        run = Effects(
            session.model, prompt.ids, goal, positions=[found.position], hooks=session.watched()
        ).run
    except NeuronExplainerError:
        return None
    return session.tokens_along(run.last_gradient[found.position], N_TOKENS)


@torch.no_grad()
def _attends(asked: Asked, found: Node) -> dict[str, Any] | None:
    """Where a head looks from its token, and from where later tokens look at it."""
    if found.kind not in ("head", "pair"):
        return None
    place = ActivationLocation("attn.qk_probs", ActivationLocation.parse(found.location).layer)
    session, hooks = asked.session, asked.changes[0].hooks()
    run = session.model.capture([asked.prompts[0].ids], place, hooks=session.watched(hooks))
    pattern = run[place][0, :, :, found.unit].double()
    return {
        "to": pattern[found.position, : found.position + 1].tolist(),
        "from": pattern[:, found.position].tolist(),
    }


def _script(asked: Asked, found: Node, excites: bool, attends: bool) -> str:
    script = asked.session.names.script().use("analysis.effects", "Effects", "Node")
    script.use("analysis.directions", "Directions")
    contexts = asked.session.names.contexts(script, [*asked.mlp, *asked.attention])
    script.add(f"autoencoders = {contexts}")
    write_effects(asked, script, 0, "a")
    script.add(
        f"node = {found!r}",
        "directions = Directions(context, '0/mlp.post_act')",
        f"promotes, demotes = directions.tokens_of(a.write(node), {N_TOKENS})",
    )
    parts = {
        "promotes": "[[t.token, t.value] for t in promotes]",
        "demotes": "[[t.token, t.value] for t in demotes]",
    }
    if excites:
        script.use("analysis.trace", "goal_of").use("analysis.input_tokens", "tokens_along")
        script.add(
            "goal = goal_of(model, ids_a, node, autoencoders=autoencoders)",
            "before = Effects(model, ids_a, goal, positions=[node.position]).run.last_gradient",
        )
        parts["excited_by"] = (
            f"[[t.token, t.value] for t in tokens_along(context, before[node.position], {N_TOKENS})]"
        )
    if attends:
        place = str(
            ActivationLocation("attn.qk_probs", ActivationLocation.parse(found.location).layer)
        )
        run = f"model.capture([ids_a], {place!r}, hooks=hooks_a)[{place!r}]"
        row = f"[0, {found.position}, : {found.position + 1}, {found.unit}]"
        parts["attends_to"] = f"{run}{row}.tolist()"
    return script.result(parts).text()
