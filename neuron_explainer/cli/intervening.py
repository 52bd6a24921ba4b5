"""Intervening and attributing: effects, patch, circuit, steer.

Each verb also prints the Python that does the same.
"""

import argparse
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, positive, say
from neuron_explainer.cli.open import find_autoencoders, model_options, open_model
from neuron_explainer.errors import InputError
from neuron_explainer.tables import escaped, percent, text_table

if TYPE_CHECKING:
    from neuron_explainer.models.autoencoder_context import AutoencoderContext
    from neuron_explainer.models.language_model import LanguageModel
    from neuron_explainer.models.locations import ActivationLocation
    from neuron_explainer.models.model_context import ModelContext
    from neuron_explainer.models.weight_names import LayerIndex

_KING = "The king gave his daughter a golden"


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_effects(verbs)
    _register_patch(verbs)
    _register_circuit(verbs)
    _register_steer(verbs)


def _target_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="TOKEN",
        help="a token, mostly with the space before it; may be given several times",
    )
    verb.add_argument("--against", action="append", metavar="TOKEN", help="tokens to compare with")


def _common(verb: argparse.ArgumentParser) -> None:
    model_options(verb)
    verb.add_argument("--bos", action="store_true", help="put the start token before the text")


def _register_effects(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "effects",
        "which parts of the model make a prediction",
        run_effects,
        show_effects,
        example=f"neuron-explainer effects '{_KING}' --target ' ring' --against ' apple'",
    )
    verb.add_argument("text", help="the prompt")
    _target_options(verb)
    _common(verb)
    verb.add_argument("--autoencoder", action="append", default=[], help="latents instead of units")
    verb.add_argument("--prompt-b", metavar="TEXT", help="a second prompt, shown beside")
    verb.add_argument(
        "--attention", choices=("heads", "pairs"), default="heads", help="(default: heads)"
    )
    verb.add_argument("--top", type=positive, default=10, help="nodes a measure (default: 10)")
    verb.add_argument("--ablate", action="store_true", help="also measure what removing each does")


def _register_patch(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "patch",
        "put another prompt's activations into each layer and position",
        run_patch,
        show_patch,
        example="neuron-explainer patch 'The old king said to the' --source 'The old queen said to the' "
        "--target ' queen' --against ' king'",
    )
    verb.add_argument("text", help="the prompt whose run is changed")
    verb.add_argument(
        "--source", required=True, metavar="TEXT", help="the prompt that values come from"
    )
    _target_options(verb)
    _common(verb)
    verb.add_argument(
        "--location", default="resid.torso.post_mlp", help="(default: resid.torso.post_mlp)"
    )


def _register_circuit(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "circuit",
        "which connections make a prediction, and how much of it they make alone",
        run_circuit,
        show_circuit,
        example="neuron-explainer circuit 'The old king said to the' --corrupt 'The old queen said to the' "
        "--target ' queen' --against ' king'",
    )
    verb.add_argument("text", help="the prompt")
    verb.add_argument(
        "--corrupt",
        required=True,
        metavar="TEXT",
        help="a prompt of as many tokens; connections outside a circuit carry what is computed on it",
    )
    _target_options(verb)
    _common(verb)
    verb.add_argument(
        "--ig-steps",
        type=positive,
        default=5,
        metavar="N",
        help="steps of the integrated gradients that score connections (default: 5)",
    )
    verb.add_argument(
        "--edges",
        type=positive,
        metavar="N",
        help="connections of the circuit (default: 5 %% of all)",
    )
    verb.add_argument("--top", type=positive, default=10, help="connections listed (default: 10)")


def _register_steer(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "steer",
        "continue a text with a latent's direction added",
        run_steer,
        show_steer,
        example="neuron-explainer steer 'Once upon a time' --autoencoder ae-resid-delta-mlp --layer 2 "
        "--latent 5 --strength 8 --seed 0",
    )
    verb.add_argument("text", help="the prompt")
    _common(verb)
    verb.add_argument(
        "--autoencoder", required=True, help="name, run's folder, folder, file or URL"
    )
    verb.add_argument("--location", metavar="PLACE", help="which one, where there are several")
    verb.add_argument("--layer", type=int, help="which layer")
    verb.add_argument("--latent", type=int, required=True, help="number of the latent")
    verb.add_argument(
        "--strength",
        type=float,
        default=5.0,
        help="times its direction, what one unit of it adds (default: 5)",
    )
    verb.add_argument("--num-tokens", type=positive, default=30, help="(default: 30)")
    verb.add_argument("--temperature", type=float, default=0.8, help="(default: 0.8)")
    verb.add_argument("--seed", type=int, default=0, help="(default: 0)")


# --- what they share ---


def _opened(args: argparse.Namespace) -> tuple["ModelContext", list[str]]:
    """The model, and the lines of Python that open it."""
    context = open_model(args.model, args.device)
    name = args.model or context.reference
    lines = [
        "from neuron_explainer.models.open_model import open_model",
        f"model = open_model({name!r}).get_or_create_model()",
    ]
    return context, lines


def _target(args: argparse.Namespace) -> str:
    against = "" if args.against is None else f", {args.against!r}"
    return f"logit_difference(model, {args.target!r}{against})"


def _notes(args: argparse.Namespace, model: "LanguageModel") -> list[str]:
    """What to say about the target tokens, such as that the prompt goes on with a space."""
    from neuron_explainer.analysis.targets import likelier_spellings

    return likelier_spellings(model, args.text, [*args.target, *(args.against or [])], args.bos)


def _show_notes(result: Result) -> None:
    for note in result["notes"]:
        say(f"Note: {note}")


def _autoencoders(
    name: str, context: "ModelContext", args: argparse.Namespace
) -> tuple["AutoencoderContext", str]:
    """The autoencoders of a name or path, and the Python expression for them."""
    from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
    from neuron_explainer.models.model_registry import make_autoencoder_context

    found = find_autoencoders(name, args.model, getattr(args, "location", None))
    model = context.get_or_create_model()
    if found.model is not None:  # a name of the registry
        made = make_autoencoder_context(found.model, name, model.device, dtype=model.dtype)
        return made, f"make_autoencoder_context({found.model!r}, {name!r})"
    layers: dict[LayerIndex, str] = {}
    places: set[ActivationLocation | None] = set()
    for entry in found.entries:
        places.add(None if entry.location is None else entry.location.at(None))
        layers[None if entry.location is None else entry.location.layer] = entry.source
    (place, *more) = places
    if more or place is None:
        raise InputError(
            f"{name}: expected autoencoders of one known location; say which: --location."
        )
    config = AutoencoderConfig(place, layers)
    text = f"AutoencoderContext(AutoencoderConfig({str(place)!r}, {layers!r}), model.device)"
    return AutoencoderContext(config, model.device, dtype=model.dtype), text


def _imports(autoencoders: str) -> list[str]:
    """What the Python expression for autoencoders needs."""
    if autoencoders.startswith("make"):
        return ["from neuron_explainer.models.model_registry import make_autoencoder_context"]
    module = "neuron_explainer.models.autoencoder_context"
    return [f"from {module} import AutoencoderConfig, AutoencoderContext"]


def _show_python(result: Result) -> None:
    say("\nThe same in Python:\n")
    say("\n".join(f"    {line}" for line in result["python"].splitlines()))


# --- effects ---


def run_effects(args: argparse.Namespace) -> Result:
    """The nodes (neurons, heads, latents, …) that contribute most to a prediction."""
    from neuron_explainer.analysis.effects import nodes
    from neuron_explainer.analysis.node_parts import final_norm
    from neuron_explainer.analysis.targets import logit_difference

    context, lines = _opened(args)
    model = context.get_or_create_model()
    opened = [_autoencoders(name, context, args) for name in args.autoencoder]
    measures = ["direct", "act_grad", *(["patching"] if args.prompt_b is not None else [])]
    measures += ["ablation"] if args.ablate else []
    freeze = final_norm(model)
    table = nodes(
        model,
        args.text,
        logit_difference(model, args.target, args.against),
        measures,
        args.top,
        prompt_b=args.prompt_b,
        attention=args.attention,
        autoencoders=[made for made, _ in opened],
        freeze=freeze,
        bos=args.bos,
    )
    settings = [repr(args.text), _target(args), repr(measures), str(args.top)]
    settings += [] if args.prompt_b is None else [f"prompt_b={args.prompt_b!r}"]
    settings += [f"attention={args.attention!r}"] if args.attention != "heads" else []
    settings += [f"autoencoders=[{', '.join(text for _, text in opened)}]"] if opened else []
    settings += [] if freeze else ["freeze=()"]
    settings += ["bos=True"] if args.bos else []
    imports = ["from neuron_explainer.analysis.effects import nodes"]
    imports += ["from neuron_explainer.analysis.targets import logit_difference"]
    imports += list(dict.fromkeys(line for _, text in opened for line in _imports(text)))
    python = "\n".join([*imports, *lines, f"table = nodes(model, {', '.join(settings)})"])
    return {
        "model": context.reference,
        "target": table.target_name,
        "notes": _notes(args, model),
        "value": table.target,
        "tokens": table.tokens,
        "totals": dict(table.totals),
        "freeze": list(freeze),
        "coverage": {name: table.coverage(name) for name in table.totals},
        "rank_correlation": table.rank_correlation,
        "nodes": [
            {
                "node": str(table.nodes[i]),
                "token": table.tokens[table.nodes[i].position],
                **{name: float(values[i]) for name, values in table.values.items()},
                **{f"{name} (second)": float(values[i]) for name, values in table.other.items()},
            }
            for i in table.order("act_grad")
        ],
        "python": python,
    }


def show_effects(result: Result) -> None:
    """A line a node, the largest act × grad first."""
    from neuron_explainer.analysis.effects import explained, rank_agreement

    shares = " and ".join(
        explained(name, sum(node[name] for node in result["nodes"]), result["totals"][name])
        for name in ("direct", "act_grad")
    )
    say(f"{result['target']}: {result['value']:+.4f} ({result['model']})")
    _show_notes(result)
    say(f"The {len(result['nodes'])} nodes shown explain {shares}.")
    if not result["freeze"]:
        say("The final norm's scale is not frozen, so that direct effects do not sum to the value.")
    if result["rank_correlation"] is not None:
        say(rank_agreement(result["rank_correlation"]))
    columns = [name for name in result["nodes"][0] if name not in ("node", "token")]
    rows = [
        [node["node"], escaped(repr(node["token"])), *(f"{node[name]:+.4f}" for name in columns)]
        for node in result["nodes"]
    ]
    say(text_table(["node", "token", *columns], rows, n_left=2, rule=True))
    _show_python(result)


# --- patch ---


def run_patch(args: argparse.Namespace) -> Result:
    """How far each layer and position carries the difference between two prompts."""
    import torch

    from neuron_explainer.analysis.sweeps import patching, sweep
    from neuron_explainer.analysis.targets import logit_difference, token_texts
    from neuron_explainer.models.interventions import align

    context, lines = _opened(args)
    model = context.get_or_create_model()
    here, there = model.prompt_ids([args.text, args.source], args.bos)
    index_map = align(here, there)
    positions = [place for place, other in enumerate(index_map.tolist()) if other >= 0]
    with torch.no_grad():
        source = model.capture([there], args.location)
    target = logit_difference(model, args.target, args.against)
    grid = patching(args.location, source, positions=positions, index_map=index_map)
    found = sweep(model, [here], grid, target)
    # A grid of one place: only the unchanged run is of interest, and the source may be the shorter text.
    itself = patching(args.location, source, positions=[0])
    other = sweep(model, [there], itself, target).baseline[0]
    bos_ids = ", True" if args.bos else ""
    python = "\n".join(
        [
            "from neuron_explainer.analysis.sweeps import patching, sweep",
            "from neuron_explainer.analysis.targets import logit_difference",
            "from neuron_explainer.models.interventions import align",
            *lines,
            f"here, there = model.prompt_ids([{args.text!r}, {args.source!r}]{bos_ids})",
            "index_map = align(here, there)",
            f"source = model.capture([there], {args.location!r})",
            f"grid = patching({args.location!r}, source, positions={positions}, index_map=index_map)",
            f"result = sweep(model, [here], grid, {_target(args)})",
        ]
    )
    return {
        "model": context.reference,
        "target": found.metric,
        "notes": _notes(args, model),
        "value": float(found.baseline[0]),
        "source_value": float(other),
        "tokens": [token_texts(model, here)[place] for place in positions],
        "positions": positions,
        "layers": list(found.dims["layer"]),
        "effect": found.mean.tolist(),
        "python": python,
    }


def show_patch(result: Result) -> None:
    """A row a layer, a column a token."""
    say(
        f"{result['target']}: {result['value']:+.3f}; on the source prompt {result['source_value']:+.3f}"
    )
    _show_notes(result)
    say("Change when one layer's activation at one token is the source prompt's:")
    head = ["layer", *(escaped(repr(token))[1:-1] for token in result["tokens"])]
    rows = [
        [str(layer), *(f"{value:+.3f}" for value in row)]
        for layer, row in zip(result["layers"], result["effect"], strict=True)
    ]
    say(text_table(head, rows, rule=True))
    _show_python(result)


# --- circuit ---


def run_circuit(args: argparse.Namespace) -> Result:
    """Score the connections between heads, MLPs, the embedding and the logits, and run the best alone."""
    from neuron_explainer.analysis.circuits import CircuitRunner, faithfulness_curve, top_edges
    from neuron_explainer.analysis.edges import edge_attribution
    from neuron_explainer.analysis.targets import logit_difference

    context, lines = _opened(args)
    model = context.get_or_create_model()
    target = logit_difference(model, args.target, args.against)
    prompts = [args.text], [args.corrupt]
    scores = edge_attribution(model, *prompts, target, ig_steps=args.ig_steps, bos=args.bos)
    runner = CircuitRunner(model, *prompts, target, bos=args.bos)
    curve = faithfulness_curve(runner, scores)
    n_edges = args.edges or max(1, len(scores.graph) // 20)
    circuit = top_edges(scores, n_edges).pruned()
    value = runner.mean(circuit)
    bos = ", bos=True" if args.bos else ""
    both = f"[{args.text!r}], [{args.corrupt!r}]"
    python = "\n".join(
        [
            "from neuron_explainer.analysis.circuits import CircuitRunner, faithfulness_curve, top_edges",
            "from neuron_explainer.analysis.edges import edge_attribution",
            "from neuron_explainer.analysis.targets import logit_difference",
            *lines,
            f"target = {_target(args)}",
            f"scores = edge_attribution(model, {both}, target, ig_steps={args.ig_steps}{bos})",
            f"runner = CircuitRunner(model, {both}, target{bos})",
            "curve = faithfulness_curve(runner, scores)",
            f"circuit = top_edges(scores, {n_edges}).pruned()",
            "value = runner.mean(circuit)",
        ]
    )
    return {
        "model": context.reference,
        "target": target.name,
        "notes": _notes(args, model),
        "value": curve.whole,
        "corrupt_value": curve.empty,
        "n_edges": len(scores.graph),
        "edges": [{"edge": edge, "score": score} for edge, score in scores.top(args.top)],
        "circuit": {
            "edges": circuit.edges,
            "nodes": circuit.nodes,
            "chosen": n_edges,
            "value": value,
            "faithfulness": (value - curve.empty) / (curve.whole - curve.empty),
        },
        "curve": {
            "fractions": curve.fractions,
            "n_edges": curve.n_edges,
            "faithfulness": curve.faithfulness.tolist(),
            "random": curve.random.tolist(),
        },
        "cpr": curve.cpr,
        "cmd": curve.cmd,
        "random_cpr": curve.random_cpr.tolist(),
        "random_cmd": curve.random_cmd.tolist(),
        "text": repr(curve),
        "python": python,
    }


def show_circuit(result: Result) -> None:
    """The connections with the largest scores, the circuit, and the curve."""
    circuit = result["circuit"]
    say(
        f"{result['target']}: {result['value']:+.3f}; on the corrupt prompt {result['corrupt_value']:+.3f} "
        f"({result['model']}, {result['n_edges']:,} connections)"
    )
    _show_notes(result)
    say("Estimated change if one connection alone carries the corrupt prompt:")
    rows = [[each["edge"], f"{each['score']:+.4f}"] for each in result["edges"]]
    say(text_table(["connection", "score"], rows, rule=True))
    say(
        f"\nOf the {circuit['chosen']} best, {len(circuit['edges'])} lie on a way from the tokens to the "
        f"logits, through {len(circuit['nodes'])} nodes. Alone they give {circuit['value']:+.3f}: "
        f"{percent(circuit['faithfulness'])} of the way from the corrupt prompt to the whole model.\n"
    )
    say(result["text"])
    _show_python(result)


# --- steer ---


def run_steer(args: argparse.Namespace) -> Result:
    """Sample a text with and without a latent's direction added to its location."""
    from neuron_explainer.models.interventions import steer

    context, lines = _opened(args)
    model = context.get_or_create_model()
    autoencoders, text = _autoencoders(args.autoencoder, context, args)
    layer: LayerIndex = args.layer
    if layer is None:
        if len(autoencoders.layer_indices) != 1:
            known = ", ".join(map(str, autoencoders.layer_indices))
            raise InputError(f"{args.autoencoder} has layers {known}; choose one with --layer.")
        (layer,) = autoencoders.layer_indices
    place = str(autoencoders.location.at(layer))
    hooks = steer(place, (autoencoders.get_autoencoder(layer), args.latent), args.strength)
    settings = {
        "num_tokens": args.num_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "bos": args.bos,
    }
    plain, steered = (
        model.sample(args.text, hooks=each, **settings)["strings"][0] for each in (None, hooks)
    )
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    python = "\n".join(
        [
            *_imports(text),
            "from neuron_explainer.models.interventions import steer",
            *lines,
            f"autoencoders = {text}",
            f"autoencoder = autoencoders.get_autoencoder({layer})",
            f"hooks = steer({place!r}, (autoencoder, {args.latent}), {args.strength})",
            f"steered = model.sample({args.text!r}, hooks=hooks, {options})['strings'][0]",
        ]
    )
    return {
        "model": context.reference,
        "location": place,
        "latent": args.latent,
        "strength": args.strength,
        "plain": plain,
        "steered": steered,
        "python": python,
    }


def show_steer(result: Result) -> None:
    """Both continuations."""
    say(f"without:  {result['plain']}")
    what = f"latent {result['latent']} of {result['location']}"
    say(f"with {result['strength']:g} x {what}:  {result['steered']}")
    _show_python(result)
