"""Looking at transformer factors: where and why they are strong, as tables, pages and records."""

import argparse
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.cli.open import find_autoencoders, fitted, open_model
from neuron_explainer.errors import InputError
from neuron_explainer.tables import text_table

if TYPE_CHECKING:
    from neuron_explainer.analysis.factors import FactorExample, FactorExamples, Importance
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext


def register(actions: Any) -> None:
    """Declare the verbs of ``factors`` that look at what ``collate`` wrote."""
    _register_importance(actions)
    _register_saliency(actions)
    _register_pages(actions)
    _register_records(actions)


# --- importance ---


def _examples_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("examples", metavar="EXAMPLES", help="the folder that collate wrote")


def _factor_options(verb: argparse.ArgumentParser, default: int) -> None:
    verb.add_argument("--factor", nargs="+", type=int, metavar="N", help="these factors")
    verb.add_argument(
        "--num-factors",
        type=positive,
        default=default,
        metavar="N",
        help=f"the N factors with the highest importance (default: {default})",
    )
    verb.add_argument(
        "--relative",
        action="store_true",
        help="divide scores by the length of the activations of their layer",
    )


def _num_sentences_option(verb: argparse.ArgumentParser) -> None:
    option(verb, "--num-sentences", "of each factor in a layer", 20, "N", positive)


def _register_importance(actions: Any) -> None:
    importance = add_verb(
        actions,
        "importance",
        "in which layers each factor is strong",
        run_importance,
        show_importance,
        example="neuron-explainer factors importance examples --csv importance.csv",
    )
    _examples_argument(importance)
    _factor_options(importance, 20)
    importance.add_argument(
        "--top", type=positive, metavar="N", help="mean of the top N scores (default: all)"
    )
    importance.add_argument("--csv", metavar="FILE", help="write the curves of all factors")
    importance.add_argument(
        "--plot", metavar="FILE", help="draw the curves of these factors: .svg, .png or .pdf"
    )


def run_importance(args: argparse.Namespace) -> Result:
    """The importance of factors in each layer, and their class: low, mid or high by the place of the peak."""
    from neuron_explainer import files
    from neuron_explainer.analysis.factors import FactorExamples, importance, plot_importance

    examples = FactorExamples.load(args.examples)
    found = importance(examples, args.top, relative=args.relative)
    factors = _chosen(args, examples, found)
    if args.csv is not None:
        with files.atomic_write(args.csv) as temporary:
            temporary.write_text(found.to_csv(), "utf-8")
    if args.plot is not None:
        plot_importance(args.plot, found, factors)
    levels = found.levels
    return {
        "examples": args.examples,
        "top": found.n,
        "relative": found.relative,
        "locations": [str(place) for place in found.locations],
        "rms": list(found.rms),
        "levels": {level: levels.count(level) for level in ("low", "mid", "high", "silent")},
        "factors": [
            {
                "factor": factor,
                "level": levels[factor],
                "peak": str(found.locations[found.peak[factor]]),
                "importance": found.values[factor].tolist(),
            }
            for factor in factors
        ],
        "written": [path for path in (args.csv, args.plot) if path is not None],
    }


def _chosen(args: argparse.Namespace, examples: "FactorExamples", found: "Importance") -> list[int]:
    """The factors of ``--factor``, else the strongest ones."""
    if args.factor is None:
        return found.strongest(args.num_factors)
    for factor in args.factor:
        examples.check_factor(factor)
    return list(dict.fromkeys(args.factor))


def show_importance(result: Result) -> None:
    """A table of curves, and the next command."""
    say("  ".join(f"{level} {count:,}" for level, count in result["levels"].items()))
    rows = [
        [str(row["factor"]), row["level"], *(f"{value:.3g}" for value in row["importance"])]
        for row in result["factors"]
    ]
    say(text_table(["factor", "level", *result["locations"]], rows, n_left=2))
    growth = result["rms"][-1] / result["rms"][0] if result["rms"][0] else 1.0
    if growth > 1.5 and not result["relative"]:
        say(
            f"Activations at {result['locations'][-1]} are {growth:.1f} times as long as at "
            f"{result['locations'][0]}, so most curves rise: --relative divides scores by the length."
        )
    for path in result["written"]:
        say(f"written: {path}")
    say(f"Next: neuron-explainer factors saliency {result['examples']}")


# --- saliency ---


def _register_saliency(actions: Any) -> None:
    saliency = add_verb(
        actions,
        "saliency",
        "which words make a factor strong",
        run_saliency,
        show_saliency,
        _declare_saliency,
        "neuron-explainer factors saliency examples --num-factors 5 --num-sentences 5",
    )
    _examples_argument(saliency)
    _factor_options(saliency, 10)
    saliency.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:0 (default: the best there is)"
    )
    saliency.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="in these layers (default: each factor's peak)",
    )
    _num_sentences_option(saliency)
    saliency.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="copies at once (default: 64)"
    )
    saliency.add_argument(
        "--autoencoder", metavar="RUN", help="where the dictionary is now, if it was moved"
    )


def _declare_saliency(verb: argparse.ArgumentParser) -> None:
    from neuron_explainer.analysis.factors import SaliencyConfig
    from neuron_explainer.settings.flags import add_flags

    add_flags(verb, SaliencyConfig)


def run_saliency(args: argparse.Namespace) -> Result:
    """Find the words that make factors strong, by replacing others at random (LIME); what is there already
    is not computed again."""
    from neuron_explainer.analysis.factors import (
        FactorExamples,
        SaliencyConfig,
        SaliencyFile,
        importance,
        saliency_of,
    )
    from neuron_explainer.analysis.factors.saliency import key_of, replacement_token
    from neuron_explainer.progress import progress_bar
    from neuron_explainer.settings.flags import from_flags

    config = from_flags(args, SaliencyConfig)
    examples = FactorExamples.load(args.examples)
    context = open_model(examples.settings["model"], args.device)
    autoencoder = _recorded_autoencoder(args, examples, context)
    measured = importance(examples, relative=args.relative)
    factors = _chosen(args, examples, measured)
    wanted = _wanted(args, examples, measured, factors)
    file, token = SaliencyFile(args.examples), replacement_token(context, config.replacement)
    there = {key_of(each) for each in file.begin(config, token)}
    todo = [each for each in wanted if (each.factor, each.location, each.position) not in there]
    bar = todo if args.json else progress_bar(todo, desc="saliency", unit=" sentences")
    for example in bar:
        bos, size = examples.settings["bos"], args.batch_size
        found = saliency_of(context, autoencoder, example, config, bos=bos, batch_size=size)
        file.add([found])
    return {
        "examples": args.examples,
        "file": str(file.path),
        "factors": factors,
        "computed": len(todo),
        "already_there": len(wanted) - len(todo),
        "replacement": context.decode_token(token),
    }


def _recorded_autoencoder(
    args: argparse.Namespace, examples: "FactorExamples", context: "ModelContext"
) -> "Autoencoder":
    """The dictionary that the examples are of; an error if it is another one now."""
    from neuron_explainer.analysis.factors.collect import hash_of

    settings = examples.settings
    name = args.autoencoder or settings.get("autoencoder")
    if name is None:
        raise InputError(
            f"{args.examples} does not say where its dictionary is; give --autoencoder."
        )
    found, known = find_autoencoders(name, settings["model"]), settings["dictionary"]
    for entry in found.entries:
        if len(found.entries) > 1 and entry.label != known["name"]:
            continue
        autoencoder = fitted(entry.load(), context.get_or_create_model())
        if hash_of(autoencoder) == known["hash"]:
            return autoencoder
    raise InputError(
        f"{name} is not the dictionary that {args.examples} was collated with: collate anew, or give "
        "--autoencoder, where that dictionary is now."
    )


def _wanted(
    args: argparse.Namespace, examples: "FactorExamples", found: "Importance", factors: list[int]
) -> "list[FactorExample]":
    """The examples to explain: the strongest sentences of each factor, at its peak or in ``--layers``."""
    wanted = []
    for factor in factors:
        places = [examples.locations[found.peak[factor]]]
        if args.layers is not None:
            places = [place for place in examples.locations if place.layer in args.layers]
        if not places:
            raise InputError(
                f"--layers: there are examples at {', '.join(map(str, examples.locations))}."
            )
        for place in places:
            wanted += examples.examples(factor, place, args.num_sentences, each_sentence_once=True)
    return wanted


def show_saliency(result: Result) -> None:
    """How many were computed, and the next command."""
    say(
        f"{result['file']}: {result['computed']:,} sentences of {len(result['factors'])} factors, "
        f"{result['already_there']:,} were there; removed tokens were replaced by "
        f"{result['replacement']!r}"
    )
    say(f"Next: neuron-explainer factors pages {result['examples']} --out PAGES")


# --- pages and records ---


def _register_pages(actions: Any) -> None:
    pages = add_verb(
        actions,
        "pages",
        "an HTML page for each factor",
        run_pages,
        show_pages,
        example="neuron-explainer factors pages examples --out pages",
    )
    _examples_argument(pages)
    _factor_options(pages, 100)
    pages.add_argument("--out", required=True, metavar="PAGES", help="folder to write to")
    _num_sentences_option(pages)


def run_pages(args: argparse.Namespace) -> Result:
    """Write a page for each factor, and an index of them."""
    from neuron_explainer.analysis.factors import (
        FactorExamples,
        SaliencyFile,
        importance,
        write_pages,
    )

    examples = FactorExamples.load(args.examples)
    context = open_model(examples.settings["model"], "cpu")
    found = importance(examples, relative=args.relative)
    saliencies = SaliencyFile(args.examples).read()
    factors = _chosen(args, examples, found)
    if args.factor is None:  # and those that saliency was found for
        factors = list(dict.fromkeys([*factors, *(each.factor for each in saliencies)]))
    written = write_pages(
        args.out, context, examples, found, factors, saliencies, n_sentences=args.num_sentences
    )
    return {
        "pages": args.out,
        "index": str(written[0]),
        "factors": factors,
        "bytes": sum(path.stat().st_size for path in written),
    }


def show_pages(result: Result) -> None:
    """Where the pages are."""
    say(
        f"{result['pages']}: {len(result['factors']):,} pages and their index, "
        f"{result['bytes'] / 1e6:.1f} MB"
    )
    say(f"Next: open {result['index']} in a browser")


def _register_records(actions: Any) -> None:
    records = add_verb(
        actions,
        "records",
        "the examples as JSON lines",
        run_records,
        show_records,
        example="neuron-explainer factors records examples --layer 2 --out examples.jsonl",
    )
    _examples_argument(records)
    records.add_argument("--layer", type=int, metavar="N", help="which one of several")
    records.add_argument(
        "--top", type=positive, metavar="N", help="examples of each factor (default: all)"
    )
    records.add_argument("--out", required=True, metavar="FILE", help="file to write, .jsonl")


def run_records(args: argparse.Namespace) -> Result:
    """Write the examples of all factors in one layer, a line each: word, index, sent_index, score, sent."""
    from neuron_explainer.analysis.factors import FactorExamples, write_records

    examples = FactorExamples.load(args.examples)
    places = [place for place in examples.locations if args.layer in (None, place.layer)]
    if len(places) != 1:
        raise InputError(f"--layer: choose one of {', '.join(map(str, examples.locations))}.")
    context = open_model(examples.settings["model"], "cpu")
    records = {
        factor: examples.records(factor, places[0], context, args.top)
        for factor in range(examples.n_factors)
    }
    write_records(args.out, records)
    return {"file": args.out, "n_records": sum(map(len, records.values()))}


def show_records(result: Result) -> None:
    """What was written."""
    say(f"{result['file']}: {result['n_records']:,} examples")
