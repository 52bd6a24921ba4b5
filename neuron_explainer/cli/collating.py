"""Collate: one pass over a text that finds examples and figures of every unit."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, continued_by_the_same_command, say
from neuron_explainer.cli.open import (
    Named,
    by_location,
    find_autoencoders,
    fitted,
    model_options,
    open_model,
)
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.activations import TokenWindows
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

_OF_LEARNING = (
    "hold_out",
    "keep_bos",
    "max_norm_multiple",
    "buffer_tokens",
    "model_autocast",
    "data_seed",
)
"""Settings that a pass over every token has no use for; ``keep_bos`` is one of CollateConfig too."""


def register(verbs: Any) -> None:
    """Declare the verb and its options."""
    collate = add_verb(
        verbs,
        "collate",
        "examples and figures of all units, to disk",
        run_collate,
        show_collate,
        _declare,
        "neuron-explainer collate books --autoencoder ae-resid-delta-mlp --layer 2 --out stores",
    )
    collate.usage = (
        "%(prog)s TEXT ... [--autoencoder NAME ...] [--location PLACE ...] --out STORES [options]"
    )
    collate.add_argument(
        "text",
        nargs="+",
        metavar="TEXT",
        help="file or folder, as for harvest; several are read one after the other",
    )
    model_options(collate, "the one that the autoencoders are for, else tiny-tales")
    collate.add_argument(
        "--autoencoder",
        nargs="+",
        default=[],
        metavar="AUTOENCODER",
        help="look at their latents: names, runs' folders, folders, files or URLs",
    )
    collate.add_argument(
        "--layer", nargs="+", type=int, metavar="N", help="only the autoencoders of these layers"
    )
    collate.add_argument(
        "--location",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="look at units of the model: mlp.post_act (neurons), resid.… (channels), attn.qk_probs or "
        "attn.write_norm (heads; the second for models of this library); 2/mlp.post_act for one layer",
    )
    collate.add_argument(
        "--out",
        required=True,
        metavar="STORES",
        help="folder to write: a new one, that of an interrupted collation, or one of the same text",
    )
    collate.add_argument(
        "--dist-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a process that does not answer (default: 600)",
    )


def _declare(verb: argparse.ArgumentParser) -> None:
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.analysis.collation.config import CollateConfig
    from neuron_explainer.settings.flags import add_flags

    add_flags(verb, DataConfig, leave_out=_OF_LEARNING)
    add_flags(verb, CollateConfig)


def run_collate(args: argparse.Namespace) -> Result:
    """Read a text once, and write the strongest and some random examples of every unit, with figures, to
    stores; the same command resumes an interrupted pass. With several processes (torchrun
    --nproc-per-node N -m neuron_explainer collate ...) each does a part."""
    from neuron_explainer.dictionaries.distributed import open_world

    with open_world(timeout=args.dist_timeout, device=args.device) as world:
        if world.device is not None:
            args.device = str(world.device)
        result = _collate(args)
    if not world.is_rank_zero:  # the first one speaks for all
        args.json, args.show = False, lambda _: None
    return result


def _collate(args: argparse.Namespace) -> Result:
    from neuron_explainer.analysis.collation.collate import collate
    from neuron_explainer.analysis.collation.config import CollateConfig
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.settings.flags import from_flags

    config = from_flags(args, CollateConfig)
    context, autoencoders, origins = _what(args)
    what = [autoencoders] * bool(autoencoders) + args.location
    windows = _windows(args, context)
    with continued_by_the_same_command(args.out):
        stores = collate(
            context, what, windows, args.out, config, origins=origins, progress=not args.json
        )
    opened = {path: ExampleStore(path) for path in stores.values()}
    return {
        "folder": args.out,
        "model": context.reference,
        "text": ", ".join(args.text),
        "n_documents": len(windows.corpus),
        "n_tokens": windows.corpus.n_tokens,
        "stores": [
            {
                "store": str(path),
                "name": store.name,
                "kind": store.kind,
                "n_units": len(store),
                "n_dead": len(store.dead),
                "bytes": path.stat().st_size,
            }
            for path, store in opened.items()
        ],
    }


def _what(
    args: argparse.Namespace,
) -> "tuple[ModelContext, dict[str, Autoencoder], dict[str, dict[str, str]]]":
    """The model, the autoencoders by name, and how the command line opens each of them again."""
    from neuron_explainer.files import origins

    if not (args.autoencoder or args.location):
        raise InputError("give --autoencoder, --location or both: which units to look at.")
    entries: list[tuple[str, Named]] = []
    models = [args.model]
    loaded: dict[str, Autoencoder] = {}
    for name in args.autoencoder:
        found = find_autoencoders(name, args.model)
        of_layers = [found] if args.layer is None else [found.at(None, n) for n in args.layer]
        for some in of_layers:
            entries += [(name, entry) for entry in some.entries]
            loaded |= (new := some.load())
            models.append(some.model_of(new))
    context = open_model(next((each for each in models if each is not None), None), args.device)
    model = context.get_or_create_model()
    for _, entry in entries:
        if entry.location is None:
            raise InputError(
                f"{entry.path} does not say where in the model it belongs; write a copy that does: "
                "neuron-explainer convert SRC DST --format native --location PLACE."
            )
    labels = dict(zip(loaded, by_location(loaded), strict=True))
    noted = {labels[entry.path]: {"autoencoder": _name(name, entry)} for name, entry in entries}
    noted[""] = {"model": origins.full_path(context.reference)}
    return context, {labels[path]: fitted(each, model) for path, each in loaded.items()}, noted


def _name(given: str, entry: Named) -> str:
    """How an autoencoder is opened again: its absolute path or URL, or its name with the layer."""
    from neuron_explainer import files
    from neuron_explainer.files import origins

    if files.is_remote(given) or Path(given).exists():
        return origins.full_path(entry.path)
    layer = None if entry.location is None else entry.location.layer
    return given if layer is None else f"{given}/{layer}"


def _windows(args: argparse.Namespace, context: "ModelContext") -> "TokenWindows":
    """All texts, in the order in which they are given."""
    from neuron_explainer.activations import (
        DataConfig,
        TokenCorpus,
        TokenWindows,
        open_corpus,
        start_token,
    )
    from neuron_explainer.settings.flags import from_flags

    data = from_flags(args, DataConfig, {"hold_out": 0.0}, "flags")
    corpora: list[TokenCorpus] = []
    for text in args.text:
        read = sum(each.n_tokens for each in corpora)
        if data.corpus_tokens is not None and read >= data.corpus_tokens:
            break
        left = None if data.corpus_tokens is None else data.corpus_tokens - read
        corpora.append(open_corpus(context, text, replace(data, corpus_tokens=left)))
    corpus = TokenCorpus.joined(corpora)
    if not data.pack:  # else what is longer than a window would be left out
        corpus = corpus.cut(data.context_length - data.bos)
    return TokenWindows(
        corpus,
        data.context_length,
        data.windows_per_forward,
        concat=data.pack,
        bos=start_token(context) if data.bos else None,
        seed=None,
    )


def show_collate(result: Result) -> None:
    """What was written, and the next command."""
    say(
        f"{result['folder']}: {result['n_documents']:,} documents, {result['n_tokens']:,} tokens of "
        f"{result['text']}"
    )
    for store in result["stores"]:
        say(
            f"  {store['name']}: {store['n_units']:,} {store['kind']}s, {store['n_dead']:,} of them never "
            f"active; {store['bytes'] / 1e6:.1f} MB"
        )
    say(f"Next: neuron-explainer inspect {result['stores'][0]['store']}")
