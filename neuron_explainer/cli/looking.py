"""Looking into a model: sample, latents, ablate, models."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, can_be_shown, option, positive, say
from neuron_explainer.cli.open import find_autoencoders, fitted, model_options, open_model
from neuron_explainer.errors import InputError
from neuron_explainer.tables import escaped, percent, text_table

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.hooks import TransformerHooks
    from neuron_explainer.models.locations import ActivationLocation
    from neuron_explainer.models.model_context import ModelContext

DEFAULT_AUTOENCODER = "ae-resid-delta-mlp"
AUTOENCODER_HELP = "name, run's folder, folder, file or URL"


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_sample(verbs)
    _register_latents(verbs)
    _register_ablate(verbs)
    add_verb(
        verbs,
        "models",
        "every model and autoencoder with a name",
        run_models,
        show_models,
        example="neuron-explainer models",
    )


def _register_sample(verbs: Any) -> None:
    sample = add_verb(
        verbs,
        "sample",
        "continue a text",
        run_sample,
        show_sample,
        example="neuron-explainer sample 'Once upon a time' --num-tokens 30 --seed 0",
    )
    sample.add_argument("text", nargs="+", help="one prompt or several")
    model_options(sample)
    _bos_option(sample)
    option(sample, "--num-tokens", "", 40)
    option(sample, "--temperature", "0: the likeliest token", 0.8)
    sample.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only"
    )
    sample.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the nucleus of this probability only"
    )
    sample.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    sample.add_argument("--stop", help="end at this token, such as '<|endoftext|>'")


def _register_latents(verbs: Any) -> None:
    latents = add_verb(
        verbs,
        "latents",
        "the strongest latents on each token",
        run_latents,
        show_latents,
        example="neuron-explainer latents 'The king gave his daughter a golden' --layer 2 --top 5",
    )
    latents.add_argument("text", help="the text to run the model on")
    model_options(latents, "the one that the autoencoder is for, else tiny-tales")
    _bos_option(latents)
    option(latents, "--autoencoder", AUTOENCODER_HELP, DEFAULT_AUTOENCODER)
    latents.add_argument("--location", metavar="PLACE", help="which one, where there are several")
    latents.add_argument("--layer", type=int, help="(default: the last that has an autoencoder)")
    option(latents, "--top", "latents a token", 10, type=positive)


def _register_ablate(verbs: Any) -> None:
    ablate = add_verb(
        verbs,
        "ablate",
        "the next token with and without an ablation",
        run_ablate,
        show_ablate,
        example="neuron-explainer ablate 'The king gave his daughter a golden' "
        "--location 2/attn.v_out --unit 3",
    )
    ablate.add_argument("text", help="the text whose next token the model predicts")
    model_options(ablate, "the one that the autoencoder is for, else tiny-tales")
    _bos_option(ablate)
    what = ablate.add_mutually_exclusive_group(required=True)
    what.add_argument("--location", help="the activation to set, such as 1/mlp.post_act")
    what.add_argument("--autoencoder", help=f"set its latents: {AUTOENCODER_HELP}")
    ablate.add_argument("--layer", type=int, help="which layer (default: every one)")
    ablate.add_argument(
        "--unit",
        help="neuron, channel or latent; where there are heads, a head, or 3.17 for channel 17 of "
        "head 3 (default: all)",
    )
    option(ablate, "--value", "the value it gets", 0.0)
    option(ablate, "--top", "tokens to show", 10, type=positive)


def _bos_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--bos", action="store_true", help="put the start token before the text")


# --- sample ---


def run_sample(args: argparse.Namespace) -> Result:
    """Continue prompts."""
    context = open_model(args.model, args.device)
    out = context.get_or_create_model().sample(
        args.text,
        args.num_tokens,
        args.temperature,
        args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=args.stop,
        bos=args.bos,
    )
    return {
        "model": context.reference,
        "samples": [
            {"prompt": prompt, "tokens": tokens, "text": text}
            for prompt, tokens, text in zip(args.text, out["tokens"], out["strings"], strict=True)
        ],
    }


def show_sample(result: Result) -> None:
    """One paragraph for each prompt and its continuation."""
    say("\n\n".join(f"{sample['prompt']}{sample['text']}" for sample in result["samples"]))


# --- latents ---


def run_latents(args: argparse.Namespace) -> Result:
    """The strongest latents on each token."""
    import torch

    from neuron_explainer.evaluation.verify import verify_autoencoder

    found = find_autoencoders(args.autoencoder, args.model, args.location)
    location, autoencoder = _one_place(
        found.at(None, args.layer) if args.layer is not None else found
    )
    context = open_model(args.model or found.model_of({"": autoencoder}), args.device)
    location.expand(context.n_layers)  # a layer outside the model is an error
    model = context.get_or_create_model()
    autoencoder = fitted(autoencoder, model)
    with torch.no_grad():
        activations = model.capture([args.text], location, bos=args.bos)
        x = activations[location][0].flatten(
            1
        )  # the heads' vectors, where there are heads, in a row
        _check_width(autoencoder, location, x.shape[-1])
        latents = autoencoder.encode(x)
    measured = verify_autoencoder(autoencoder, location, context, bos=args.bos)
    if measured.problem is not None:
        print(f"warning: on the built-in text, {escaped(measured.problem)}", file=sys.stderr)
    return {
        "model": context.reference,
        "autoencoder": args.autoencoder,
        "location": str(location),
        "fvu": round(measured.fvu, 4),
        "l0": round(measured.l0, 2),
        "tokens": [
            {
                "token": context.decode_token(token),
                "id": token,
                "latents": _strongest(row, args.top),
            }
            for token, row in zip(activations.tokens[0].tolist(), latents, strict=True)
        ],
    }


def _one_place(found: Any) -> "tuple[ActivationLocation, Autoencoder]":
    """The autoencoder to look at: the only one, or of several at one place the one in the last layer."""
    if found.entries[0].location is None:
        raise InputError(
            f"{found.name} does not say where in the model it belongs; give --location, such as "
            "3/mlp.post_act."
        )
    if len({entry.location.path for entry in found.entries}) == 1:
        last = max(entry.location.layer or 0 for entry in found.entries)
        at_last = [e for e in found.entries if (e.location.layer or 0) == last]
        found = found._replace(entries=at_last)
    entry = found.only()
    if entry.location.layer is None and entry.location.site.per_layer:
        raise InputError(
            f"{found.name} is for {entry.location} of every layer; say which one: --layer N."
        )
    return entry.location, entry.load()


def _check_width(autoencoder: "Autoencoder", location: "ActivationLocation", width: int) -> None:
    if autoencoder.n_inputs != width:
        raise InputError(
            f"the autoencoder takes inputs of width {autoencoder.n_inputs}; this model has width "
            f"{width} at {location}."
        )


def _strongest(row: "Tensor", top: int) -> list[dict[str, float]]:
    """The up to ``top`` latents that fire most, strongest first."""
    values, indices = row.topk(min(top, row.shape[0]))
    return [
        {"latent": index, "activation": round(value, 6)}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value > 0
    ]


def show_latents(result: Result) -> None:
    """A line for each token, with a bar as long as its strongest latent."""
    say(f"{result['location']} of {result['model']}, {result['autoencoder']}: latent activation")
    lost = percent(result["fvu"], 1)
    say(f"(on the built-in text {result['l0']} latents fire, {lost} of the variance is lost)")
    block = "█" if can_be_shown("█") else "#"
    most = max((la["activation"] for t in result["tokens"] for la in t["latents"]), default=0.0)
    for token in result["tokens"]:
        strongest = token["latents"][0]["activation"] if token["latents"] else 0.0
        listed = "  ".join(f"{la['latent']} {la['activation']:.2f}" for la in token["latents"])
        say(f"{token['token']!r:>14} {block * round(10 * strongest / (most or 1.0)):<10} {listed}")


# --- ablate ---


def run_ablate(args: argparse.Namespace) -> Result:
    """Next-token probabilities with and without an ablation."""
    import torch

    if args.autoencoder is None:
        context = open_model(args.model, args.device)
        hooks, what = _activation_hooks(args, context)
    else:
        context, hooks, what = _latent_hooks(args)
    model = context.get_or_create_model()
    with torch.no_grad():
        plain = model.capture([args.text], "logits", bos=args.bos)
        changed = model.capture(plain.tokens, "logits", hooks=hooks)
        log_before, log_after = (
            found["logits"][0, -1].float().log_softmax(-1) for found in (plain, changed)
        )
    before, after = log_before.exp(), log_after.exp()
    # The tokens that matter to the comparison: likely before, or likely after.
    shown = torch.maximum(before, after).topk(min(args.top, len(before))).indices.tolist()
    return {
        "model": context.reference,
        "ablated": what,
        "kl_divergence": round(float((before * (log_before - log_after)).sum()), 6),
        "next_tokens": [
            {
                "token": context.decode_token(token),
                "before": round(float(before[token]), 6),
                "after": round(float(after[token]), 6),
            }
            for token in shown
        ],
    }


def _activation_hooks(
    args: argparse.Namespace, context: "ModelContext"
) -> "tuple[TransformerHooks, str]":
    """Hooks that set a unit of ``--location``, or all of it, and a description."""
    from neuron_explainer.models.interventions import set_to
    from neuron_explainer.models.locations import ActivationLocation

    location = ActivationLocation.parse(args.location)
    if args.layer is not None:
        if location.layer not in (None, args.layer):
            raise InputError(f"--location says layer {location.layer}, --layer {args.layer}.")
        location = location.at(args.layer)
    location.expand(context.n_layers)  # a layer outside the model is an error
    name = "everything" if args.unit is None else location.site.unit(args.unit).name
    unit = int(args.unit) if args.unit is not None and args.unit.isdecimal() else args.unit
    return set_to(location, args.value, unit), f"{name} of {location} = {args.value}"


def _latent_hooks(args: argparse.Namespace) -> "tuple[ModelContext, TransformerHooks, str]":
    """The model, hooks that set a latent of ``--autoencoder``, or all, and a description."""
    from neuron_explainer.models.hooks import AutoencoderHooks, TransformerHooks

    if args.unit is not None and not args.unit.isdecimal():
        raise InputError(f"--unit: expected the number of a latent, found {args.unit!r}.")
    latent = None if args.unit is None else int(args.unit)

    def ablate(latents: "Tensor") -> "Tensor":
        if latent is None:
            return latents.fill_(args.value)
        if latent >= latents.shape[-1]:
            raise InputError(f"--unit must lie in 0 to {latents.shape[-1] - 1}, found {latent}.")
        latents[..., latent] = args.value
        return latents

    found = find_autoencoders(args.autoencoder, args.model)
    if args.layer is not None:
        found = found.at(None, args.layer)
    loaded = found.load()
    context = open_model(args.model or found.model_of(loaded), args.device)
    model, hooks = context.get_or_create_model(), TransformerHooks()
    for entry, autoencoder in zip(found.entries, loaded.values(), strict=True):
        location = entry.location
        if location is None:
            raise InputError(f"{found.name} does not say where in the model it belongs.")
        if autoencoder.is_transcoder:
            raise InputError(
                f"{found.name} is a transcoder: its output stands for another activation than its "
                "input, so it cannot take its input's place."
            )
        location.expand(context.n_layers)
        inside = AutoencoderHooks.from_autoencoder(fitted(autoencoder, model), add_error=True)
        inside.latents.append_fwd(ablate)
        hooks.append_at(location, inside)
    where = "every layer" if args.layer is None else f"layer {args.layer}"
    name = "all of them" if latent is None else f"latent {latent}"
    return context, hooks, f"latents of {args.autoencoder} in {where}, {name} = {args.value}"


def show_ablate(result: Result) -> None:
    """A table of probabilities."""
    say(f"{result['model']}, {result['ablated']}: probability of the next token")
    rows = [
        [
            repr(row["token"]),
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['after'] - row['before']:+.4f}",
        ]
        for row in result["next_tokens"]
    ]
    say(text_table(["token", "before", "after", "change"], rows, n_left=0))
    say(f"KL divergence from before to after: {result['kl_divergence']:.4f} nats")


# --- models ---


def run_models(args: argparse.Namespace) -> Result:
    """Every name that can be loaded."""
    from neuron_explainer.models.model_registry import (
        get_standard_model_spec,
        list_autoencoder_names,
        list_model_names,
    )

    return {
        "models": [
            {
                "name": name,
                "source": get_standard_model_spec(name).model_path,
                "autoencoders": list_autoencoder_names(name),
            }
            for name in list_model_names()
        ]
    }


def show_models(result: Result) -> None:
    """A paragraph for each model."""
    for model in result["models"]:
        say(f"{model['name']}  ({model['source']})")
        for name in model["autoencoders"]:
            say(f"    {name}")
