"""What a few latents tell about tokens: probe."""

import argparse
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.cli.measuring import subject_options
from neuron_explainer.cli.open import DEFAULT_MODEL, Opened, by_location, data_options

FIRST_LOOK = 20_000
"""Tokens that are probed: some ten seconds for each autoencoder of the embedded model, on one core."""


def register(verbs: Any) -> None:
    """Declare the verb and its options."""
    probe = add_verb(
        verbs,
        "probe",
        "what a few latents tell: k-sparse probing, absorption",
        run_probe,
        show_probe,
        data_options,
        "neuron-explainer probe ae-resid-delta-mlp --location 2/resid.torso.delta_mlp",
    )
    subject_options(
        probe,
        "what was held out in training; for an autoencoder that comes with tiny-tales, text that the model "
        "wrote itself",
        several=True,
        n_tokens=FIRST_LOOK,
    )
    probe.add_argument(
        "--k",
        nargs="+",
        type=positive,
        default=[1, 2, 5],
        metavar="N",
        help="numbers of latents that a probe may use (default: 1 2 5)",
    )
    option(probe, "--splits", "random splits of the documents", 3, "N", type=positive)
    option(
        probe,
        "--method",
        "how probes are fitted; logistic needs scikit-learn",
        "closed_form",
        choices=["closed_form", "logistic"],
    )


def run_probe(args: argparse.Namespace) -> Result:
    """Tell labels of tokens from a few latents, and measure how far latents of first letters are absorbed.

    The labels are rules over the text: begins a word, punctuation, in a quotation, what comes next. Each
    figure stands beside that of a random autoencoder of the same shape.
    """
    from neuron_explainer.evaluation.probe import probe

    written = _own_text(args)
    if written is not None:
        args.text = str(written)
    opened = Opened(args, "held_out")
    batches = opened.token_batches()
    found = {
        name: probe(
            opened.context,
            autoencoder,
            batches,
            location=None if autoencoder.location is not None else name,
            ks=args.k,
            seeds=range(args.splits),
            method=args.method,
        )
        for name, autoencoder in by_location(opened.autoencoders).items()
    }
    result: Result = {
        "autoencoder": opened.name,
        "text": f"text that {DEFAULT_MODEL} wrote itself" if written else opened.text,
        "part": opened.part,
        "probed": {name: each.to_dict() for name, each in found.items()},
    }
    if not args.json:
        result["tables"] = [each.table() for each in found.values()]
    return result


def _own_text(args: argparse.Namespace) -> Path | None:
    """The text that comes with the embedded model, if all autoencoders do and no other was given."""
    from neuron_explainer.analysis.store_names import ASSETS, STORES_FOLDER
    from neuron_explainer.analysis.token_store import TOKENS_FOLDER
    from neuron_explainer.models.model_registry import list_autoencoder_names

    known = list_autoencoder_names(DEFAULT_MODEL)
    built_in = all(
        name in known and not files.is_remote(name) and not Path(name).exists()
        for name in args.autoencoder
    )
    if not built_in or args.text is not None or args.model not in (None, DEFAULT_MODEL):
        return None
    return ASSETS / DEFAULT_MODEL / STORES_FOLDER / TOKENS_FOLDER


def show_probe(result: Result) -> None:
    """The tables of each autoencoder."""
    say(f"{result['autoencoder']}: on {result['text']}")
    for table in result["tables"]:
        say()
        say(table)
