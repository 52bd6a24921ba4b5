"""Looking into a model: sample, latents, ablate, models."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import (
    Result,
    add_verb,
    autoencoder_context,
    load_model,
    model_context,
    model_options,
    positive,
)
from neuron_explainer.errors import InputError
from neuron_explainer.tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_explainer.models.hooks import TransformerHooks
    from neuron_explainer.models.transformer import Transformer


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_sample(verbs)
    _register_latents(verbs)
    _register_ablate(verbs)
    add_verb(verbs, "models", "every model and autoencoder with a name", run_models, show_models)


def _register_sample(verbs: Any) -> None:
    sample = add_verb(verbs, "sample", "continue a text", run_sample, show_sample)
    sample.add_argument("text", nargs="+", help="one prompt or several")
    model_options(sample)
    sample.add_argument("--num-tokens", type=int, default=40, help="(default: 40)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)"
    )
    sample.add_argument("--top-k", type=int, help="draw from the likeliest so many only")
    sample.add_argument(
        "--top-p", type=float, help="draw from the nucleus of this probability only"
    )
    sample.add_argument("--seed", type=int, help="draw the same again")
    sample.add_argument("--stop", help="end at this token, such as '<|endoftext|>'")


def _register_latents(verbs: Any) -> None:
    latents = add_verb(
        verbs, "latents", "the strongest latents on each token", run_latents, show_latents
    )
    latents.add_argument("text", help="to run the model on")
    model_options(latents)
    latents.add_argument(
        "--autoencoder",
        default="ae-resid-delta-mlp",
        help="name, folder, file or URL (default: ae-resid-delta-mlp)",
    )
    latents.add_argument("--layer", type=int, help="(default: the last that has an autoencoder)")
    latents.add_argument("--top", type=positive, default=10, help="latents a token (default: 10)")


def _register_ablate(verbs: Any) -> None:
    ablate = add_verb(
        verbs, "ablate", "the next token with and without an ablation", run_ablate, show_ablate
    )
    ablate.add_argument("text", help="whose next token is predicted")
    model_options(ablate)
    what = ablate.add_mutually_exclusive_group(required=True)
    what.add_argument("--location", help="what to ablate, such as 1/mlp.post_act")
    what.add_argument("--autoencoder", help="whose latents to ablate, such as ae-resid-delta-mlp")
    ablate.add_argument("--layer", type=int, help="which layer (default: every one)")
    ablate.add_argument("--unit", type=int, help="neuron, channel or latent (default: all)")
    ablate.add_argument("--value", type=float, default=0.0, help="to set it to (default: 0)")
    ablate.add_argument("--top", type=positive, default=10, help="tokens to show (default: 10)")


def run_sample(args: argparse.Namespace) -> Result:
    """Continue prompts."""
    model = load_model(args)
    out = model.sample(
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
        "model": args.model,
        "samples": [
            {"prompt": prompt, "tokens": tokens, "text": text}
            for prompt, tokens, text in zip(args.text, out["tokens"], out["strings"], strict=True)
        ],
    }


def show_sample(result: Result) -> None:
    """A prompt and its continuation a paragraph."""
    print("\n\n".join(f"{sample['prompt']}{sample['text']}" for sample in result["samples"]))


def run_latents(args: argparse.Namespace) -> Result:
    """The strongest latents on each token."""
    import torch

    opened = model_context(args)
    model = load_model(args, opened)
    context = autoencoder_context(args, model.device)
    layer = max(context.layer_indices, key=lambda layer: -1 if layer is None else layer)
    layer = layer if args.layer is None else args.layer
    autoencoder = context.get_autoencoder(layer)
    location = context.location.at(layer)
    with torch.no_grad():
        found = model.capture([args.text], location, bos=args.bos)
        latents = autoencoder.encode(found[location][0])
    measured = context.verify(opened, layers=[layer], bos=args.bos)[layer]
    if measured.problem is not None:
        print(f"warning: on the built-in text, {measured.problem}", file=sys.stderr)
    return {
        "model": args.model,
        "autoencoder": args.autoencoder,
        "location": str(location),
        "fvu": round(measured.fvu, 4),
        "l0": round(measured.l0, 2),
        "tokens": [
            {"token": model.enc.decode([token]), "id": token, "latents": _strongest(row, args.top)}
            for token, row in zip(found.tokens[0].tolist(), latents, strict=True)
        ],
    }


def _strongest(row: "Tensor", top: int) -> list[dict[str, float]]:
    """The up to ``top`` latents that fire most, strongest first."""
    values, indices = row.topk(min(top, row.shape[0]))
    return [
        {"latent": index, "activation": round(value, 6)}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value > 0
    ]


def show_latents(result: Result) -> None:
    """A line a token, with a bar as long as its strongest latent."""
    print(f"{result['location']} of {result['model']}, {result['autoencoder']}: latent activation")
    print(
        f"(on the built-in text {result['l0']} latents fire, {result['fvu']:.1%} of the variance is lost)"
    )
    most = max((la["activation"] for t in result["tokens"] for la in t["latents"]), default=1.0)
    for token in result["tokens"]:
        strongest = token["latents"][0]["activation"] if token["latents"] else 0.0
        listed = "  ".join(f"{la['latent']} {la['activation']:.2f}" for la in token["latents"])
        print(f"{token['token']!r:>14} {'█' * round(10 * strongest / most):<10} {listed}")


def run_ablate(args: argparse.Namespace) -> Result:
    """Next-token probabilities with and without an ablation."""
    import torch

    model = load_model(args)
    hooks, what = _ablation(args, model)
    ids = model.prompt_ids(args.text, args.bos)
    tokens = torch.tensor(ids, device=model.device)
    with torch.no_grad():
        log_before = model(tokens)[0][0, -1].float().log_softmax(-1)
        log_after = model(tokens, hooks=hooks)[0][0, -1].float().log_softmax(-1)
    before, after = log_before.exp(), log_after.exp()
    # The tokens that matter to the comparison: likely before, or likely after.
    shown = torch.maximum(before, after).topk(min(args.top, model.n_vocab)).indices.tolist()
    return {
        "model": args.model,
        "ablated": what,
        "kl_divergence": round(float((before * (log_before - log_after)).sum()), 6),
        "next_tokens": [
            {
                "token": model.enc.decode([token]),
                "before": round(float(before[token]), 6),
                "after": round(float(after[token]), 6),
            }
            for token in shown
        ],
    }


def _ablation(args: argparse.Namespace, model: "Transformer") -> tuple["TransformerHooks", str]:
    """Hooks that set what the flags name to ``--value``, and its description."""
    from neuron_explainer.models.hooks import TransformerHooks
    from neuron_explainer.models.locations import ActivationLocation

    def ablate(x: "Tensor") -> "Tensor":
        if args.unit is not None and not 0 <= args.unit < x.shape[-1]:
            raise InputError(f"--unit must lie in 0 to {x.shape[-1] - 1} here, found {args.unit}.")
        x[..., slice(None) if args.unit is None else args.unit] = args.value
        return x

    unit = "everything" if args.unit is None else f"unit {args.unit}"
    if args.autoencoder is None:
        location = ActivationLocation.parse(args.location)
        if args.layer is not None:
            if location.layer not in (None, args.layer):
                raise InputError(f"--location says layer {location.layer}, --layer {args.layer}.")
            location = location.at(args.layer)
        location.expand(model.cfg.n_layers)  # a layer outside the model is an error, not a no-op
        hooks = TransformerHooks().append_at(location, ablate)
        return hooks, f"{unit} of {location} = {args.value}"
    context = autoencoder_context(args, model.device)
    layers = None if args.layer is None else [args.layer]
    where = "every layer" if args.layer is None else f"layer {args.layer}"
    hooks = context.hooks(on_latents=ablate, layers=layers)
    return hooks, f"latents of {args.autoencoder} in {where}, {unit} = {args.value}"


def show_ablate(result: Result) -> None:
    """A table of probabilities."""
    when = ("before", "after")
    print(f"{result['model']}, {result['ablated']}: probability of the next token")
    rows = [
        [repr(t["token"]), *(f"{t[k]:.4f}" for k in when), f"{t['after'] - t['before']:+.4f}"]
        for t in result["next_tokens"]
    ]
    print(text_table(["token", *when, "change"], rows))
    print(f"KL divergence from before to after: {result['kl_divergence']:.4f} nats")


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
    """A paragraph a model."""
    for model in result["models"]:
        print(f"{model['name']}  ({model['source']})")
        for name in model["autoencoders"]:
            print(f"    {name}")
