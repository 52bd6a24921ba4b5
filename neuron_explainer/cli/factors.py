"""Transformer factors: from a text to learned factors and their examples."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli import looking_at_factors
from neuron_explainer.cli.common import (
    Result,
    add_verb,
    continued_by_the_same_command,
    positive,
    say,
)
from neuron_explainer.cli.open import find_autoencoders, fitted, model_options, open_model
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.activations.documents import Documents
    from neuron_explainer.analysis.factors import (
        FactorDictionary,
        FactorExamples,
        Sentences,
    )
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.locations import ActivationLocation
    from neuron_explainer.models.model_context import ModelContext

ABOUT = "transformer factors: learn, collate, pages"
ARTICLE_TITLE = r"(?m)^ = (?!=)[^\n]*(?<!=) = *$"
"""A line of WikiText that is the title of an article: `` = Title = ``, with one sign on each side."""
ARTICLE_CHARACTERS = 2000
SENTENCE_LENGTH = 64
PUBLISHED_LATENTS, PUBLISHED_WIDTH = 2000, 768
MANY_ACTIVE = 50
"""More active factors than this on a token are hard to read."""
_DECIDED = ("hold_out", "pack", "keep_bos", "buffer_tokens", "context_length")
_OF_LEARNING = ("max_norm_multiple", "model_autocast", "data_seed")
"""Settings that a pass over every token, in the order of the text, has no use for."""
_DATA_HELP = "text, as for harvest, or the folder that prepare wrote"


def register(verbs: Any) -> None:
    """Declare ``factors`` and its verbs."""
    factors = verbs.add_parser(
        "factors",
        help=ABOUT,
        description="Transformer factors (Yun et al. 2021): sparse coding of activations, and where and "
        "why each factor is strong. In order: prepare, learn, collate, importance, saliency, pages.",
    )
    factors.about = ABOUT
    factors.example = (
        "neuron-explainer factors learn books --location resid.torso.post_mlp --n-latents 500 "
        "--penalty 3 --out run"
    )
    actions = factors.add_subparsers(dest="action", required=True, metavar="VERB")
    _register_prepare(actions)
    _register_learn(actions)
    _register_collate(actions)
    looking_at_factors.register(actions)


# --- prepare ---


def _register_prepare(actions: Any) -> None:
    prepare = add_verb(
        actions,
        "prepare",
        "a text as tokens on disk",
        run_prepare,
        show_prepare,
        example="neuron-explainer factors prepare books --out tokens",
    )
    prepare.add_argument("text", metavar="TEXT", help="file or folder, as for harvest")
    model_options(prepare)
    prepare.add_argument("--out", required=True, metavar="TOKENS", help="folder to write")
    prepare.add_argument("--column", default="text", help="field of the text, in files of rows")
    prepare.add_argument(
        "--split", metavar="REGEX", help="cut .txt files into documents at its matches"
    )
    prepare.add_argument(
        "--articles",
        action="store_true",
        help="WikiText: a document is an article, and those of up to 2000 characters are left out",
    )
    prepare.add_argument(
        "--min-chars", type=int, metavar="N", help="leave out documents of up to N characters"
    )
    prepare.add_argument(
        "--num-documents", type=positive, metavar="N", help="take N documents at random"
    )
    prepare.add_argument(
        "--shuffle-seed", type=int, default=99, metavar="N", help="order of documents (default: 99)"
    )


def run_prepare(args: argparse.Namespace) -> Result:
    """Write the tokens of a text to a folder, its documents in random order."""
    from neuron_explainer.activations import write_token_file

    context = open_model(args.model, args.device)
    documents = _documents(args)
    corpus = write_token_file(args.out, documents, context, progress=not args.json)
    return {
        "tokens": args.out,
        "model": context.reference,
        "n_documents": len(corpus),
        "n_tokens": corpus.n_tokens,
        "n_latents": round(
            context.n_residual_stream_channels * PUBLISHED_LATENTS / PUBLISHED_WIDTH
        ),
    }


def _documents(args: argparse.Namespace) -> "Documents":
    """The documents that are long enough, in random order."""
    from neuron_explainer.activations.corpus import permutation
    from neuron_explainer.activations.documents import Documents, read_documents

    if args.articles and args.split is not None:
        raise InputError("give --articles or --split, not both.")
    split = ARTICLE_TITLE if args.articles else args.split
    least = args.min_chars if args.min_chars is not None else args.articles * ARTICLE_CHARACTERS
    read = read_documents(args.text, args.column, split=split)
    texts = [text for text in read if len(text) > least]
    if not texts:
        raise InputError(f"{args.text} has no document of more than {least} characters.")
    order = permutation(len(texts), args.shuffle_seed)[: args.num_documents]
    return Documents(read.name, lambda: (texts[number] for number in order), read.origin)


def show_prepare(result: Result) -> None:
    """What was written, and the next command."""
    say(f"{result['tokens']}: {result['n_documents']:,} documents, {result['n_tokens']:,} tokens")
    say(
        f"Next: neuron-explainer factors learn {result['tokens']} --location resid.torso.post_mlp "
        f"--n-latents {result['n_latents']} --penalty 0.3{_model_flag(result)} --out RUN"
    )


def _model_flag(result: Result) -> str:
    from neuron_explainer.cli.open import DEFAULT_MODEL

    return "" if result["model"] == DEFAULT_MODEL else f" --model {result['model']}"


# --- learn ---


def _register_learn(actions: Any) -> None:
    learn = add_verb(
        actions,
        "learn",
        "dictionaries, by sparse coding",
        run_learn,
        show_learn,
        _declare_learn,
        "neuron-explainer factors learn tokens --location resid.torso.post_mlp --n-latents 500 "
        "--penalty 3 --out run",
    )
    learn.add_argument("text", metavar="TEXT", help=_DATA_HELP)
    model_options(learn)
    learn.add_argument(
        "--location",
        required=True,
        nargs="+",
        metavar="PLACE",
        help="such as resid.torso.post_mlp for all layers, which share one dictionary",
    )
    learn.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="some layers (default: all)"
    )
    learn.add_argument(
        "--out",
        required=True,
        metavar="RUN",
        help="folder of the run; an unfinished one is resumed",
    )
    learn.add_argument(
        "--no-token-weights",
        action="store_true",
        help="all tokens count the same (default: a token that occurs n times has the weight 1/√n)",
    )


def _declare_learn(verb: argparse.ArgumentParser) -> None:
    from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig
    from neuron_explainer.settings.flags import add_flags

    _data_options(verb)
    add_flags(verb, SparseCodingConfig)


def _declare_collate(verb: argparse.ArgumentParser) -> None:
    _data_options(verb, _OF_LEARNING)


def _data_options(verb: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.settings.flags import add_flags

    verb.add_argument(
        "--sentence-length",
        type=positive,
        metavar="N",
        help=f"cut documents into pieces of up to N tokens (default: {SENTENCE_LENGTH})",
    )
    add_flags(verb, DataConfig, leave_out=_DECIDED + leave_out)


def run_learn(args: argparse.Namespace) -> Result:
    """Learn one dictionary for all layers, or one for each; the same command resumes an interrupted run."""
    from neuron_explainer.activations import LiveSource, open_harvester
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.dictionaries.sparse_coding import (
        SparseCodingConfig,
        count_tokens,
        train_sparse_coding,
    )
    from neuron_explainer.settings.flags import from_flags

    config = from_flags(args, SparseCodingConfig)
    data = _data_config(args, {})
    context = open_model(args.model, args.device)
    places = _places(args.location, args.layers, context)
    sentences = _sentences(context, args.text, data)
    sentences.check(context)
    windows = sentences.windows(data.windows_per_forward, data.data_seed)
    counts = None if args.no_token_weights else count_tokens(windows, context.n_vocab)
    with continued_by_the_same_command(args.out):
        train_sparse_coding(
            config,
            LiveSource(open_harvester(context, places, data), windows),
            args.out,
            token_counts=counts,
            model_name=context.model_name,
            record={
                "model": context.reference,
                "source": _absolute(args.text),
                "source_fingerprint": sentences.corpus.source_fingerprint,
                "data": dataclasses.asdict(data),
            },
            progress=not args.json,
        )
    finished = Run.open(args.out).finished
    return {
        "run": args.out,
        "model": context.reference,
        "steps": finished["step"],
        "metrics": finished["metrics"],
    }


def _places(
    locations: list[str], layers: list[int] | None, context: "ModelContext"
) -> "list[ActivationLocation]":
    """The locations in single layers that ``--location`` and ``--layers`` mean."""
    from neuron_explainer.models.locations import parse_locations

    found = []
    for place in parse_locations(locations):
        if layers is None or place.layer is not None or not place.site.per_layer:
            found += place.expand(context.n_layers)
        else:
            found += [each for n in layers for each in place.at(n).expand(context.n_layers)]
    return found


def _data_config(args: argparse.Namespace, recorded: Result) -> "DataConfig":
    """How the text becomes sentences: the flags, on top of what the run recorded."""
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.settings.flags import from_flags

    decided = {"hold_out": 0.0, "pack": False}
    config = from_flags(args, DataConfig, {**recorded, **decided}, "the record of the run")
    length = args.sentence_length or SENTENCE_LENGTH
    if args.sentence_length is None and recorded.get("pack") is False:
        length = recorded["context_length"] - recorded["bos"]
    return dataclasses.replace(config, context_length=length + config.bos)


def _sentences(context: "ModelContext", text: str, data: "DataConfig") -> "Sentences":
    from neuron_explainer.activations import open_corpus, start_token
    from neuron_explainer.analysis.factors import Sentences

    corpus = open_corpus(context, text, data)
    bos = start_token(context) if data.bos else None
    return Sentences.cut(corpus, data.context_length - data.bos, bos)


def show_learn(result: Result) -> None:
    """The last metrics, and the next command."""
    for name, found in result["metrics"].items():
        figures = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        say(f"{name}: {figures}")
    run = result["run"]
    say(f"{run}: {result['steps']:,} steps")
    l0 = max(found["l0"] for found in result["metrics"].values())
    if l0 > MANY_ACTIVE:
        say(
            f"{l0:.0f} factors are active on a token: a larger --penalty makes them fewer. Its scale is "
            "that of the activations, and the published 0.3 is for BERT."
        )
    say(f"Next: neuron-explainer factors collate {run} --out EXAMPLES")


# --- collate ---


def _register_collate(actions: Any) -> None:
    collate = add_verb(
        actions,
        "collate",
        "the strongest tokens of each factor",
        run_collate,
        show_collate,
        _declare_collate,
        "neuron-explainer factors collate run --out examples",
    )
    collate.add_argument(
        "autoencoder", metavar="RUN", help="folder of a run, or any autoencoder by name or path"
    )
    model_options(collate, "the one that the dictionary is for")
    collate.add_argument(
        "--text", help=f"{_DATA_HELP} (default: the text that the run learned from)"
    )
    collate.add_argument("--location", metavar="PLACE", help="which dictionary of several")
    collate.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="where to look for its factors (default: the layers that it learned from)",
    )
    collate.add_argument("--out", required=True, metavar="EXAMPLES", help="folder to write")
    collate.add_argument(
        "--n-examples",
        type=positive,
        default=500,
        metavar="N",
        help="of each factor (default: 500)",
    )
    collate.add_argument(
        "--shard-size",
        type=positive,
        default=1000,
        metavar="N",
        help="sentences between two merges, after each of which the work is noted (default: 1000)",
    )


def run_collate(args: argparse.Namespace) -> Result:
    """Find the strongest tokens of each factor in each layer; the same command resumes an interrupted
    pass."""
    from neuron_explainer.analysis.factors import collect_examples

    found = find_autoencoders(args.autoencoder, args.model, args.location)
    loaded = found.load()
    context = open_model(args.model or found.model_of(loaded), args.device)
    text = args.text or found.record.get("source")
    if text is None:
        raise InputError(
            f"{found.name} does not say what text it learned from; give --text, a file or folder."
        )
    data = _data_config(args, dict(found.record.get("data", {})))
    dictionaries = {
        entry.label: _dictionary(loaded[entry.path], entry, args.layers, context)
        for entry in found.entries
    }
    with continued_by_the_same_command(args.out):
        examples = collect_examples(
            context,
            dictionaries,
            _sentences(context, text, data),
            args.out,
            n_examples=args.n_examples,
            shard_size=args.shard_size,
            batch_size=data.windows_per_forward,
            settings={"autoencoder": _absolute(args.autoencoder), "text": _absolute(text)},
            progress=not args.json,
        )
    return {"dictionaries": [_summary(args.out, len(examples), *pair) for pair in examples.items()]}


def _absolute(path: str) -> str:
    return os.path.realpath(path) if Path(path).exists() else path


def _dictionary(
    autoencoder: "Autoencoder", entry: Any, layers: list[int] | None, context: "ModelContext"
) -> "FactorDictionary":
    """An autoencoder at the layers that were asked for, else at those that it learned from."""
    from neuron_explainer.analysis.factors import FactorDictionary
    from neuron_explainer.models.locations import parse_locations

    place = entry.location
    if place is None:
        raise InputError(f"{entry.path} does not say where it belongs; give --location.")
    if layers is not None and place.site.per_layer:
        places = _places([place.path], layers, context)
    elif place.site.per_layer and place.layer is None:
        learned = parse_locations(autoencoder.metadata.get("locations", []))
        places = [each for each in learned if each.path == place.path]
        places = places or place.expand(context.n_layers)
    else:
        places = place.expand(context.n_layers)
    model = context.get_or_create_model()
    return FactorDictionary(fitted(autoencoder, model), places, entry.path)


def _summary(out: str, n: int, name: str, found: "FactorExamples") -> Result:
    from neuron_explainer.analysis.factors.collect import file_name

    return {
        "examples": out if n == 1 else str(Path(out) / file_name(name)),
        "locations": [str(place) for place in found.locations],
        "n_factors": found.n_factors,
        "n_tokens": found.n_tokens,
        "entries": {str(place): len(each.factor) for place, each in found.entries.items()},
    }


def show_collate(result: Result) -> None:
    """What was found, and the next command."""
    for found in result["dictionaries"]:
        say(
            f"{found['examples']}: {found['n_factors']:,} factors in {found['n_tokens']:,} tokens, "
            f"{sum(found['entries'].values()):,} examples at {', '.join(found['locations'])}"
        )
    say(f"Next: neuron-explainer factors importance {result['dictionaries'][0]['examples']}")
