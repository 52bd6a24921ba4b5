"""The debugger: which nodes make a prediction, on one prompt or two, also under interventions.

The numbers are those of :class:`~neuron_explainer.analysis.effects.Effects`. A reply can be sent in parts
(:func:`streamed`): what is known after the pass of the model first, then the rows of one sublayer after the
other, and last the whole reply.
"""

import hashlib
import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from neuron_explainer.analysis.effects import Best, Effects, Node, paired_nodes
from neuron_explainer.analysis.node_parts import MLP_PLACES, Goal, Kind, Part, last_logits
from neuron_explainer.analysis.targets import Target, logit_difference, token_id
from neuron_explainer.analysis.trace import goal_of
from neuron_explainer.errors import InputError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import align
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.server.compute.changes import Changes, check_position, read_changes
from neuron_explainer.server.compute.keeping import PassMemory
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session
from neuron_explainer.server.snippets import Script

CHOOSING = ("write_norm", "direct", "act_grad")
"""Metrics by which nodes are chosen."""
_KINDS = ("neuron", "head", "pair", "latent")
_ATTENTION_PLACES = ("attn.v_out", "resid.torso.delta_attn")
Row = tuple[Node | None, Node | None]
"""The same node on both prompts; None where a prompt does not have it."""


@dataclass
class Prompt:
    """A prompt of a request, with its tokens of interest."""

    ids: list[int]
    target: list[int]
    against: list[int]

    def goal(self, session: Session) -> Target:
        """Mean logit of the target tokens minus mean logit of the distractors."""
        return logit_difference(session.model, self.target, self.against or None)


def read_prompts(session: Session, request: dict[str, Any]) -> list[Prompt]:
    """The prompts of a request. A prompt without a target gets its likeliest next token."""
    found = []
    for number, given in enumerate(request["prompts"]):
        loc = ("body", "prompts", number)
        ids = session.ids(given["text"], (*loc, "text"))
        target = _token_ids(session, given.get("target") or [], (*loc, "target"))
        against = _token_ids(session, given.get("distractor") or [], (*loc, "distractor"))
        if not target:
            target = [int(plain_logits(session, ids).argmax())]
        found.append(Prompt(ids, target, against))
    return found


def _token_ids(session: Session, tokens: Sequence[str | int], loc: tuple[Any, ...]) -> list[int]:
    found = []
    for number, token in enumerate(tokens):
        try:
            found.append(token_id(session.model, token))
        except InputError as error:
            near = _near(session, token)
            raise Refusal(
                422, "not_one_token", str(error), loc=(*loc, number), allowed=near
            ) from None
    return found


def _near(session: Session, token: str | int) -> list[str] | None:
    """Single tokens that someone may have meant: with a space or without, and the first piece."""
    if isinstance(token, int) or not token:
        return None
    stripped = token.strip()
    candidates = [f" {stripped}", stripped, stripped.capitalize(), f" {stripped.capitalize()}"]
    ids = [(text, session.model.prompt_ids(text)[0]) for text in candidates if text.strip()]
    near = [text for text, pieces in ids if len(pieces) == 1]
    first = session.model.prompt_ids(token)[0][:1]
    near += [session.context.decode(first)] if first else []
    return list(dict.fromkeys(near)) or None


def plain_logits(session: Session, ids: list[int]) -> Tensor:
    """``[v]`` float64: after the last token, with nothing changed. Kept."""

    def run() -> Tensor:
        with torch.no_grad():
            return _logits(session, ids, None)

    return session.kept(("logits", tuple(ids)), run)


def _logits(session: Session, ids: list[int], hooks: TransformerHooks | None) -> Tensor:
    sees_logits = hooks is not None and not hooks.logits.is_empty()
    goal = Goal.of_logits(session.model, Target("none", lambda r: r.logits[:, 0]), sees_logits)
    found = session.model.capture([ids], goal.places, hooks=session.watched(hooks))
    return last_logits(session.model, found)[0].double()


@dataclass
class Asked:
    """What a request for nodes asks for, read and checked."""

    session: Session
    prompts: list[Prompt]
    changes: list[Changes]
    """One for each prompt."""
    positions: list[list[int] | None]
    """Of each prompt."""
    mlp: list[str]
    """Dictionaries whose latents stand for the MLPs' neurons."""
    attention: list[str]
    pairs: bool
    trace: dict[str, Any] | None
    index_map: list[int] | None
    """Of each token of the first prompt, the place in the second; -1 for none."""

    def effects(self, number: int) -> Effects:
        """The pass of one prompt."""
        session, prompt = self.session, self.prompts[number]
        hooks = self.changes[number].hooks()
        contexts = session.contexts([*self.mlp, *self.attention])
        target: Target | Goal = prompt.goal(session)
        if self.trace is not None:
            node = self.traced(number)
            target = goal_of(
                session.model,
                prompt.ids,
                node,
                through=self.trace.get("through"),
                downstream=prompt.goal(session),
                autoencoders=contexts,
                hooks=hooks,
            )
        session.guard()
        return Effects(
            session.model,
            prompt.ids,
            target,
            attention="pairs" if self.pairs else "heads",
            autoencoders=contexts,
            positions=self.positions[number],
            hooks=session.watched(hooks),
            of_tokens=True,
            at_once=False,
            memory=self._memory(number),
        )

    def _memory(self, number: int) -> PassMemory | None:
        session, prompt, changes = self.session, self.prompts[number], self.changes[number].each
        trace, inside = None, {each.dictionary for each in changes if each.dictionary is not None}
        if self.trace is not None:
            dictionary = self.trace["node"].get("dictionary")
            which = None if dictionary is None else session.which(dictionary)
            inside |= set() if dictionary is None else {dictionary}
            trace = self.traced(number), self.trace.get("through"), which
        return session.memory(
            # What a goal freezes, and pairs, choose other ways to compute the same.
            (tuple(prompt.ids), self.pairs, trace),
            (tuple(prompt.target), tuple(prompt.against)),
            [change.key(session) for change in changes],
            self.positions[number],
            [*self.mlp, *self.attention],
            inside,
        )

    def traced(self, number: int) -> Node:
        """The node that is traced, at its position in a prompt."""
        assert self.trace is not None
        node = read_node(self.session, self.trace["node"], self.prompts[0].ids, ("body", "trace"))
        if number == 0:
            return node
        assert self.index_map is not None
        position = self.index_map[node.position]
        attended = None if node.attended is None else self.index_map[node.attended]
        if position < 0 or (attended is not None and attended < 0):
            raise Refusal(
                422,
                "not_aligned",
                f"{node} stands at a token that the second prompt does not have.",
                loc=("body", "trace", "node", "position"),
            )
        return Node(node.location, node.kind, node.unit, position, attended)


def read_node(
    session: Session, given: dict[str, Any], ids: list[int], loc: Sequence[str | int]
) -> Node:
    """A node as requests name it: ``{location, unit, position, attended, dictionary}``."""
    place = ActivationLocation.parse(given["location"])
    dictionary = given.get("dictionary")
    kind = "latent" if dictionary is not None else given.get("kind")
    if dictionary is not None:
        source = session.source(dictionary, (*loc, "node", "dictionary"))
        if source.location != str(place):
            raise Refusal(
                422,
                "wrong_location",
                f"{dictionary} is of {source.location}, the node is at {place}.",
                loc=(*loc, "node", "location"),
                allowed=[source.location],
            )
        _check_latent(session, source.id, given["unit"], (*loc, "node", "unit"))
    attended = given.get("attended")
    if kind is None:
        kind = {"mlp.post_act": "neuron", "attn.v_out": "head", "attn.qk_probs": "pair"}.get(
            place.path
        )
        kind = "pair" if kind == "head" and attended is not None else kind
    if kind not in _KINDS:
        raise Refusal(
            422,
            "unknown_node",
            f"A node is a neuron at mlp.post_act, a head at attn.v_out, a pair of tokens at attn.qk_probs, "
            f"or a latent of a dictionary; found {kind or 'none of them'} at {place}.",
            loc=(*loc, "node", "location"),
            allowed=["mlp.post_act", "attn.v_out", "attn.qk_probs"],
        )
    if kind == "pair":
        place = ActivationLocation("attn.qk_probs", place.layer)
    session.model.require(place.path)
    place.expand(session.model.n_layers)
    position = check_position(given.get("position", -1), len(ids), (*loc, "node", "position"))
    if attended is not None:
        attended = check_position(attended, len(ids), (*loc, "node", "attended"))
    return Node(str(place), cast(Kind, kind), given["unit"], position, attended)


def _check_latent(session: Session, dictionary: str, unit: int, loc: Sequence[str | int]) -> None:
    """Refuse a latent that its dictionary does not have: it would look like one that is silent."""
    n_latents = session.autoencoder(dictionary, loc).n_latents
    if unit >= n_latents:
        last = n_latents - 1
        raise Refusal(
            422,
            "no_such_node",
            f"{dictionary} has no latent {unit}: they are 0 to {last}.",
            loc=loc,
            allowed=[f"0 to {last}"],
        )


def _check_layers(session: Session, layers: Sequence[int] | None) -> None:
    """Refuse layers that the model does not have: a table of them would be empty."""
    last = session.model.n_layers - 1
    for number, layer in enumerate(layers or ()):
        if layer > last:
            raise Refusal(
                422,
                "no_such_layer",
                f"There is no layer {layer}: they are 0 to {last}.",
                loc=("body", "layers", number),
                allowed=[f"0 to {last}"],
            )


def read(session: Session, request: dict[str, Any]) -> Asked:
    """Check everything that a request names."""
    _check_layers(session, request.get("layers"))
    prompts = read_prompts(session, request)
    index_map = None
    if len(prompts) == 2:
        index_map = align(prompts[0].ids, prompts[1].ids).tolist()
    changes = []
    for number, prompt in enumerate(prompts):
        other = prompts[1 - number].ids if len(prompts) == 2 else None
        moved = None
        if number == 1 and index_map is not None:
            moved = _mover(index_map)
        given = request.get("interventions", [])
        changes.append(read_changes(session, given, prompt.ids, other, moved))
    units, wanted = request.get("units", {}), request.get("dictionaries")
    for number, id in enumerate(wanted or ()):
        session.source(id, ("body", "dictionaries", number))
    asked = Asked(
        session,
        prompts,
        changes,
        _positions(request.get("position", -1), prompts, index_map),
        _dictionaries(session, MLP_PLACES, wanted) if units.get("mlp") == "latent" else [],
        _dictionaries(session, _ATTENTION_PLACES, wanted)
        if units.get("attention") == "latent"
        else [],
        units.get("attention") == "pair",
        request.get("trace"),
        index_map,
    )
    if asked.trace is not None:
        _of_traced(asked)
    return asked


def _mover(index_map: list[int]) -> Any:
    def moved(position: int) -> int | None:
        position = len(index_map) - 1 if position == -1 else position
        inside = 0 <= position < len(index_map) and index_map[position] >= 0
        return index_map[position] if inside else None

    return moved


def _of_traced(asked: Asked) -> None:
    """A latent can only be traced beside the dictionary that it belongs to."""
    assert asked.trace is not None
    dictionary = asked.trace["node"].get("dictionary")
    if dictionary is None or dictionary in (*asked.mlp, *asked.attention):
        return
    source = asked.session.source(dictionary, ("body", "trace", "node", "dictionary"))
    is_mlp = source.site in MLP_PLACES
    same = asked.mlp if is_mlp else asked.attention
    if same:
        raise Refusal(
            422,
            "not_shown",
            f"{dictionary} is not among the dictionaries of this table: {', '.join(same)}.",
            loc=("body", "trace", "node", "dictionary"),
            allowed=same,
        )
    same.append(dictionary)


def _positions(
    given: int | str, prompts: list[Prompt], index_map: list[int] | None
) -> list[list[int] | None]:
    """The positions of each prompt's nodes; those of the second are where the first's are there."""
    if given == "all":
        return [None] * len(prompts)
    assert isinstance(given, int)
    first = check_position(given, len(prompts[0].ids), ("body", "position"))
    if index_map is None:
        return [[first]]
    if first == len(prompts[0].ids) - 1:
        return [[first], [len(prompts[1].ids) - 1]]
    if index_map[first] < 0:
        raise Refusal(
            422,
            "not_aligned",
            f"The second prompt has no token that corresponds to position {first} of the first.",
            loc=("body", "position"),
        )
    return [[first], [index_map[first]]]


def _dictionaries(session: Session, sites: Sequence[str], wanted: list[str] | None) -> list[str]:
    """The dictionaries whose latents stand for neurons or heads; of one site, each layer once."""
    if wanted is not None:
        for number, id in enumerate(wanted):
            session.source(id, ("body", "dictionaries", number))
    ids = list(session.sources) if wanted is None else wanted
    several = [session.sources[id] for id in ids]
    several = [each for each in several if each.kind == "latent" and each.site in sites]
    several = [each for each in several if each.autoencoder is not None]
    if not several:
        raise Refusal(
            422,
            "no_dictionary",
            f"There is no dictionary of {' or '.join(sites)} to show latents of.",
            loc=("body", "dictionaries"),
            allowed=[
                each.id
                for each in session.sources.values()
                if each.site in sites and each.kind == "latent"
            ],
        )
    found: dict[int | None, str] = {}
    for each in several:
        if each.site != several[0].site or each.layer in found:
            if wanted is None:
                continue
            raise Refusal(
                422,
                "overlapping_dictionaries",
                f"{several[0].id} and {each.id} cover the same part of the model: give one of them.",
                loc=("body", "dictionaries"),
                allowed=[several[0].id],
            )
        found[each.layer] = each.id
    return list(found.values())


# --- the reply ---


def debug(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The whole debugger: tokens of interest, effects of tokens, and the table of nodes."""
    debugger = Debugger(session, request)
    for _ in debugger.sublayers():
        pass
    return debugger.reply()


def streamed(
    session: Session, request: dict[str, Any]
) -> Generator[tuple[str, dict[str, Any]], None, dict[str, Any]]:
    """The same in parts.

    Yields:
        First ``started``: ``prompts``, ``goal``, ``aligned``, ``cache_key``, ``vocab`` and ``vocab_bytes`` of
        the reply, and ``sublayers``, the number of events that follow. Then ``nodes`` for each sublayer:
        ``number`` (from 1), ``layer``, ``locations``, and ``nodes`` with their ``values`` as in the reply.
        They are the sublayer's nodes among the ``top_k`` of the sublayers so far: later ones may displace
        them, and every row of the reply has been among them.

    Returns:
        The reply of :func:`debug`.
    """
    debugger = Debugger(session, request)
    yield "started", debugger.started()
    for number, parts in enumerate(debugger.sublayers(), 1):
        yield "nodes", {"number": number, **debugger.rows(parts)}
    return debugger.reply()


class Debugger:
    """The passes of one request, and the tables that are read from them."""

    def __init__(self, session: Session, request: dict[str, Any]) -> None:
        self._began = time.perf_counter()
        self.session, self.request = session, request
        self.asked = read(session, request)
        self._read_at = time.perf_counter()
        self.effects = [self.asked.effects(n) for n in range(len(self.asked.prompts))]
        self._computed_at = time.perf_counter()
        self.metrics: list[str] = list(dict.fromkeys(request["metrics"]))
        self.best = [Best(*_choice(request)) for _ in self.effects]
        self._started: dict[str, Any] | None = None

    def started(self) -> dict[str, Any]:
        """What is known after the passes."""
        if self._started is None:
            asked, effects, request = self.asked, self.effects, self.request
            prompts = [_prompt(asked, each, n, request) for n, each in enumerate(effects)]
            self._started = {
                "prompts": prompts,
                "goal": effects[0].run.goal.name,
                "aligned": [] if asked.index_map is None else _pairs(asked),
                "cache_key": _key(request),
                **self.session.vocabulary(id for prompt in prompts for id in _ids_of(prompt)),
                "sublayers": effects[0].n_sublayers,
            }
        return self._started

    def sublayers(self) -> Iterator[list[list[Part]]]:
        """The parts of one sublayer after the other, as soon as they are there, of each prompt."""
        for several in zip(*(each.sublayers() for each in self.effects), strict=True):
            self.session.guard()
            for best, parts in zip(self.best, several, strict=True):
                best.add(parts)
            yield list(several)

    def rows(self, several: list[list[Part]]) -> dict[str, Any]:
        """The rows of the sublayer that has just been added."""
        chosen = [best.nodes(of=parts) for best, parts in zip(self.best, several, strict=True)]
        rows = self._paired(chosen)
        return {
            "layer": several[0][0].location.layer,
            "locations": list(dict.fromkeys(str(part.location) for part in several[0])),
            "nodes": [_node(self.asked, row) for row in rows],
            "values": self._values(rows, several),
        }

    def reply(self) -> dict[str, Any]:
        """Everything, when all rows have been there."""
        rows = self._paired([best.nodes() for best in self.best])
        values = self._values(rows, [each.parts for each in self.effects])
        totals = {m: _total(self.effects[0], m, values[m]["A"]) for m in self.metrics}
        direct = totals.get("direct")
        reply = self.started() | {
            "nodes": [_node(self.asked, row) for row in rows],
            "values": values,
            "totals": totals,
            "coverage": direct["shown"] / direct["all"] if direct and direct["all"] else None,
            "python": _script(self.asked, self.request, self.metrics),
            "timings": {
                "read_ms": _ms(self._began, self._read_at),
                "model_ms": _ms(self._read_at, self._computed_at),
                "total_ms": _ms(self._began, time.perf_counter()),
            },
        }
        del reply["sublayers"]
        return reply

    def _paired(self, chosen: list[list[Node]]) -> list[Row]:
        if len(chosen) == 2:
            return paired_nodes(self.effects[0], self.effects[1], chosen[0], chosen[1])
        return [(node, None) for node in chosen[0]]

    def _values(
        self, rows: list[Row], parts: Sequence[list[Part]]
    ) -> dict[str, dict[str, list[float]]]:
        """Metric -> prompt -> a number for each row."""
        found = [
            each.several_values([row[number] for row in rows], self.metrics, of_prompt)
            for number, (each, of_prompt) in enumerate(zip(self.effects, parts, strict=True))
        ]
        return {
            metric: {name: each[metric].tolist() for name, each in zip("AB", found, strict=False)}
            for metric in self.metrics
        }


def _ms(start: float, end: float) -> float:
    return round(1000 * (end - start), 1)


def _key(request: dict[str, Any]) -> str:
    text = json.dumps(request, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _choice(request: dict[str, Any]) -> tuple[list[str], int, list[int] | None]:
    """By which metrics nodes are chosen, how many, and in which layers."""
    measures = [m for m in CHOOSING if m in request["metrics"]] or ["act_grad"]
    layers = request.get("layers")
    return measures, request["top_k"], None if layers is None else sorted(set(layers))


def _total(effects: Effects, metric: str, shown: list[float]) -> dict[str, float]:
    known = [value for value in shown if not math.isnan(value)]
    return {"shown": math.fsum(known), "all": effects.total(metric)}


def _node(asked: Asked, row: Row) -> dict[str, Any]:
    node = row[0] or row[1]
    assert node is not None
    place = ActivationLocation.parse(node.location)
    dictionary = None
    if node.kind in ("latent", "error"):
        ids = (*asked.mlp, *asked.attention)
        dictionary = next(
            (id for id in ids if asked.session.sources[id].location == node.location), None
        )
    return {
        "location": node.location,
        "layer": place.layer,
        "unit": node.unit,
        "kind": node.kind,
        "position": None if row[0] is None else row[0].position,
        "position_b": None if row[1] is None else row[1].position,
        "attended": node.attended,
        "dictionary": dictionary,
        "label": None,
    }


def _pairs(asked: Asked) -> list[list[int | None]]:
    """The edit script of the tokens: ``[a, b]`` positions, null where one has none."""
    assert asked.index_map is not None
    pairs: list[list[int | None]] = []
    reached = 0
    for a, b in enumerate(asked.index_map):
        if b >= 0:
            pairs += [[None, extra] for extra in range(reached, b)]
            reached = b + 1
        pairs.append([a, b if b >= 0 else None])
    return pairs + [[None, extra] for extra in range(reached, len(asked.prompts[1].ids))]


def _prompt(asked: Asked, effects: Effects, number: int, request: dict[str, Any]) -> dict[str, Any]:
    """What is said about a prompt besides its nodes."""
    session, prompt, changes = asked.session, asked.prompts[number], asked.changes[number]
    with torch.no_grad():
        if asked.trace is None:
            logits = last_logits(session.model, effects.run.found)[0].detach().double()
        elif changes.each:
            logits = _logits(session, prompt.ids, changes.hooks())
        else:
            logits = plain_logits(session, prompt.ids)
        plain = plain_logits(session, prompt.ids) if changes.each else logits
    probs = logits.softmax(dim=-1)
    top = logits.topk(min(request["top_logits"], len(logits)))
    of_tokens = effects.of_tokens()
    return {
        "ids": prompt.ids,
        "target_ids": prompt.target,
        "distractor_ids": prompt.against,
        "target_probabilities": probs[prompt.target].tolist(),
        "distractor_probabilities": probs[prompt.against].tolist(),
        "goal_value": effects.target,
        "logit_difference": _difference(logits, prompt),
        "baseline_logit_difference": _difference(plain, prompt),
        "loss": _loss(session, prompt.ids, changes) if request.get("loss") else None,
        "top_logits": [
            {"id": id, "logit": value, "prob": float(probs[id])}
            for value, id in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
        "token_effects": {name: values.tolist() for name, values in vars(of_tokens).items()},
    }


def _difference(logits: Tensor, prompt: Prompt) -> float:
    up = logits[prompt.target].mean()
    return float(up - logits[prompt.against].mean() if prompt.against else up)


@torch.no_grad()
def _loss(session: Session, ids: list[int], changes: Changes) -> float | None:
    """Mean cross-entropy of the prompt's own next tokens, in nats; None for a single token."""
    if len(ids) < 2:
        return None
    logits, _ = session.model([ids], hooks=session.watched(changes.hooks()))
    logs = logits[0, :-1].float().log_softmax(dim=-1)
    return float(-logs.gather(-1, torch.tensor(ids[1:], device=logs.device)[:, None]).mean())


def _ids_of(prompt: dict[str, Any]) -> list[int]:
    top = [each["id"] for each in prompt["top_logits"]]
    return [*prompt["ids"], *prompt["target_ids"], *prompt["distractor_ids"], *top]


# --- as Python ---


def _script(asked: Asked, request: dict[str, Any], metrics: list[str]) -> str:
    script = asked.session.names.script().use("analysis.effects", "Effects")
    contexts = asked.session.names.contexts(script, [*asked.mlp, *asked.attention])
    script.add(f"autoencoders = {contexts}")
    names = ["a", "b"][: len(asked.prompts)]
    for number, name in enumerate(names):
        write_effects(asked, script, number, name)
    script.add(
        "",
        "",
        "def next_tokens(ids, hooks):",
        "    logits = model([ids], hooks=hooks)[0][0, -1].detach().double()",
        f"    top = logits.topk(min({request['top_logits']}, len(logits)))",
        "    return [top.indices.tolist(), top.values.tolist(), logits.softmax(-1)[top.indices].tolist()]",
        "",
        "",
    )
    measures, k, layers = _choice(request)
    choice = f"{measures}, {k}" + ("" if layers is None else f", {layers}")
    if len(names) == 2:
        script.use("analysis.effects", "aligned_nodes")
        script.add(f"nodes = aligned_nodes(a, b, {choice})")
        a, b = (f"[pair[{i}] for pair in nodes]" for i in (0, 1))
        value = f'{{"A": a.values({a}, m).tolist(), "B": b.values({b}, m).tolist()}}'
    else:
        script.add(f"nodes = a.chosen({choice})")
        value = '{"A": a.values(nodes, m).tolist()}'
    return script.result(
        {
            "goal_values": f"[{', '.join(f'{name}.target' for name in names)}]",
            "values": f"{{m: {value} for m in {metrics}}}",
            "next_tokens": f"[{', '.join(f'next_tokens(ids_{n}, hooks_{n})' for n in names)}]",
            "token_effects": f"[vars(each.of_tokens()) for each in ({', '.join(names)},)]",
        }
    ).text()


def write_effects(asked: Asked, script: Script, number: int, name: str) -> None:
    """Add the pass of one prompt to a script, as a variable."""
    prompt = asked.prompts[number]
    script.use("analysis.targets", "logit_difference")
    ids, target, hooks = (f"{what}_{name}" for what in ("ids", "target", "hooks"))
    against = f", {prompt.against}" if prompt.against else ""
    script.add(
        f"{ids} = {prompt.ids}",
        f"{target} = logit_difference(model, {prompt.target}{against})",
    )
    changes = asked.changes[number].write(script, ids)
    script.add(f"{hooks} = {changes}")
    goal = target
    if asked.trace is not None:
        script.use("analysis.trace", "goal_of").use("analysis.effects", "Node")
        goal = f"goal_{name}"
        through = asked.trace.get("through")
        script.add(
            f"{goal} = goal_of(",
            f"    model, {ids}, {asked.traced(number)!r}, through={through!r},",
            f"    downstream={target}, autoencoders=autoencoders, hooks={hooks},",
            ")",
        )
    pairs = "pairs" if asked.pairs else "heads"
    script.add(
        f"{name} = Effects(",
        f"    model, {ids}, {goal}, attention={pairs!r}, autoencoders=autoencoders,",
        f"    positions={asked.positions[number]}, hooks={hooks}, of_tokens=True,",
        ")",
    )
