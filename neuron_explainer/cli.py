"""The command line: one short function a verb. Heavy imports wait until a verb needs them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import __version__, demo, files
from neuron_explainer.errors import InputError, NeuronExplainerError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from neuron_explainer.models.autoencoder_context import AutoencoderContext
    from neuron_explainer.models.hooks import TransformerHooks
    from neuron_explainer.models.model_context import StandardModelContext
    from neuron_explainer.models.transformer import Transformer

Result = dict[str, Any]
"""What a verb found, as plain values: printed as JSON with ``--json``, else by the verb's printer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all is well, 1 if a check found something wrong, 2 (and one line on stderr) if the command
        could not be carried out.
    """
    args = _parser().parse_args(argv)
    try:
        result = args.run(args)
        if args.json:
            print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            args.show(result)
    except NeuronExplainerError as error:
        print(f"neuron-explainer {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
    except KeyboardInterrupt:
        return 130
    else:
        return 0 if result.get("ok", True) else 1
    return 0


# --- verbs ---


def run_demo(args: argparse.Namespace) -> Result:
    """Run the tour."""
    return {"steps": demo.run(echo=not args.json)}


def show_demo(result: Result) -> None:
    """After the tour: how long it took, where to go."""
    print(
        f"\nAll of this ran here, offline, in {sum(s['seconds'] for s in result['steps']):.1f} s. "
        "Next: neuron-explainer latents 'your text', neuron-explainer ablate 'your text', "
        "neuron-explainer models, and the README."
    )


def run_sample(args: argparse.Namespace) -> Result:
    """Continue prompts."""
    model = _load_model(args)
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

    model_context = _model_context(args)
    model = _load_model(args, model_context)
    context = _autoencoder_context(args, model.device)
    layer = max(context.layer_indices, key=lambda layer: -1 if layer is None else layer)
    layer = layer if args.layer is None else args.layer
    autoencoder = context.get_autoencoder(layer)
    location = context.location.at(layer)
    with torch.no_grad():
        found = model.capture([args.text], location, bos=args.bos)
        latents = autoencoder.encode(found[location][0])
    measured = context.verify(model_context, layers=[layer], bos=args.bos)[layer]
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


def _autoencoder_context(args: argparse.Namespace, device: "torch.device") -> "AutoencoderContext":
    """The autoencoders that ``--autoencoder`` names: of the registry, or a folder, file or URL."""
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
    from neuron_explainer.models.model_registry import make_autoencoder_context

    path = args.autoencoder
    if not (files.is_remote(path) or Path(path).exists()):
        return make_autoencoder_context(args.model, path, device=device)
    location = Autoencoder.load(path).location
    if location is None:
        raise InputError(
            f"{path} does not say where in the model it belongs; load it in Python: "
            "AutoencoderContext(AutoencoderConfig(location, {layer: path}), device)."
        )
    layer = args.layer if location.layer is None else location.layer
    return AutoencoderContext(AutoencoderConfig(location.at(None), {layer: path}), device)


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

    model = _load_model(args)
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
    context = _autoencoder_context(args, model.device)
    layers = None if args.layer is None else [args.layer]
    where = "every layer" if args.layer is None else f"layer {args.layer}"
    hooks = context.hooks(on_latents=ablate, layers=layers)
    return hooks, f"latents of {args.autoencoder} in {where}, {unit} = {args.value}"


def show_ablate(result: Result) -> None:
    """A table of probabilities."""
    print(f"{result['model']}, {result['ablated']}: probability of the next token")
    print(f"{'token':>14}  before   after  change")
    for row in result["next_tokens"]:
        change = row["after"] - row["before"]
        print(f"{row['token']!r:>14}  {row['before']:.4f}  {row['after']:.4f}  {change:+.4f}")
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


def run_convert(args: argparse.Namespace) -> Result:
    """Rewrite an autoencoder in another format; what that format cannot express is an error."""
    from neuron_explainer.models.convert import convert

    stated = {
        name: value
        for name in ("input_normalization", "location", "norm_factor", "k", "threshold")
        if (value := getattr(args, name)) is not None
    }
    convert(args.source, args.destination, args.format, overwrite=args.overwrite, **stated)
    return {"source": args.source, "destination": args.destination, "format": args.format}


def show_convert(result: Result) -> None:
    """Where it is now."""
    print(f"{result['source']} is now in {result['destination']}, as {result['format']}")


def run_cache_list(args: argparse.Namespace) -> Result:
    """What has been downloaded."""
    return {"folder": str(files.cache_dir()), "files": [_plain(e) for e in files.list_cache()]}


def run_cache_verify(args: argparse.Namespace) -> Result:
    """Read every file and compare it with the size and SHA-256 recorded when it came."""
    found = [_plain(entry) for entry in files.verify_cache()]
    return {
        "folder": str(files.cache_dir()),
        "files": found,
        "ok": not any(e["problem"] for e in found),
    }


def run_cache_remove(args: argparse.Namespace) -> Result:
    """Delete downloaded files."""
    removed = files.remove_from_cache(args.source)
    return {"folder": str(files.cache_dir()), "files": [_plain(e) for e in removed]}


def _plain(entry: files.CacheEntry) -> Result:
    return {**dataclasses.asdict(entry), "path": str(entry.path)}


def show_cache(result: Result) -> None:
    """A line a file."""
    total = sum(entry["size"] for entry in result["files"])
    print(f"{result['folder']}: {len(result['files'])} files, {total / 1e6:.1f} MB")
    for entry in result["files"]:
        print(f"  {entry['size']:>12,}  {entry['problem'] or 'ok'}  {entry['source']}")


# --- parsing ---


def _model_context(args: argparse.Namespace) -> "StandardModelContext":
    from neuron_explainer.models.model_context import StandardModelContext
    from neuron_explainer.models.sampling import check_device

    device = None if args.device is None else check_device(args.device)
    return StandardModelContext(args.model, device=device)


def _load_model(
    args: argparse.Namespace, context: "StandardModelContext | None" = None
) -> "Transformer":

    context = context or _model_context(args)
    return context.get_or_create_model()


def _positive(text: str) -> int:
    """A whole number >= 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, found {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron-explainer",
        description="Look inside GPT-2-family language models: sample, encode, ablate.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add(verbs, "demo", "a tour in seconds, offline, with the calls it makes", run_demo, show_demo)

    sample = _add(verbs, "sample", "continue a text", run_sample, show_sample)
    sample.add_argument("text", nargs="+", help="one prompt or several")
    _model_options(sample)
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

    latents = _add(
        verbs, "latents", "the strongest latents on each token", run_latents, show_latents
    )
    latents.add_argument("text", help="to run the model on")
    _model_options(latents)
    latents.add_argument(
        "--autoencoder",
        default="ae-resid-delta-mlp",
        help="name, folder, file or URL (default: ae-resid-delta-mlp)",
    )
    latents.add_argument("--layer", type=int, help="(default: the last that has an autoencoder)")
    latents.add_argument("--top", type=_positive, default=10, help="latents a token (default: 10)")

    ablate = _add(
        verbs, "ablate", "the next token with and without an ablation", run_ablate, show_ablate
    )
    ablate.add_argument("text", help="whose next token is predicted")
    _model_options(ablate)
    what = ablate.add_mutually_exclusive_group(required=True)
    what.add_argument("--location", help="what to ablate, such as 1/mlp.post_act")
    what.add_argument("--autoencoder", help="whose latents to ablate, such as ae-resid-delta-mlp")
    ablate.add_argument("--layer", type=int, help="which layer (default: every one)")
    ablate.add_argument("--unit", type=int, help="neuron, channel or latent (default: all)")
    ablate.add_argument("--value", type=float, default=0.0, help="to set it to (default: 0)")
    ablate.add_argument("--top", type=_positive, default=10, help="tokens to show (default: 10)")

    _add(verbs, "models", "every model and autoencoder with a name", run_models, show_models)

    convert = _add(
        verbs, "convert", "rewrite an autoencoder in another format", run_convert, show_convert
    )
    convert.add_argument("source", help="folder, file or URL of any known format")
    convert.add_argument("destination", help="folder to write")
    convert.add_argument(
        "--format",
        required=True,
        choices=["native", "saelens", "dictionary_learning", "sparsify"],
        help="to write",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    convert.add_argument("--location", help="where it belongs, such as 8/resid.torso.delta_mlp")
    convert.add_argument(
        "--input-normalization",
        choices=["none", "center", "layer_norm", "rms"],
        help="where the source does not say it",
    )
    convert.add_argument("--norm-factor", type=float, help="likewise (SAELens, Gemma Scope)")
    convert.add_argument("--k", type=int, help="likewise (dictionary_learning)")
    convert.add_argument("--threshold", type=float, help="likewise (dictionary_learning)")

    cache = verbs.add_parser("cache", help="files that were downloaded", description="Downloads.")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add(actions, "list", "what is there", run_cache_list, show_cache)
    _add(actions, "verify", "check sizes and hashes", run_cache_verify, show_cache)
    remove = _add(actions, "remove", "delete files", run_cache_remove, show_cache)
    remove.add_argument("source", help="URL, or a pattern with * and ?")
    return parser


def _add(
    verbs: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], Result],
    show: Callable[[Result], None],
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=f"{run.__doc__}")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.set_defaults(run=run, show=show)
    return verb


def _model_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", default="tiny-tales", help="name, folder or URL (default: tiny-tales)"
    )
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    verb.add_argument("--bos", action="store_true", help="prepend the start token")
