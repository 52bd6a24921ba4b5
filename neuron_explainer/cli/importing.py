"""Stores of examples from other programs' files, and other programs' files from stores."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, say
from neuron_explainer.errors import InputError, NeuronExplainerError

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions
    from neuron_explainer.analysis.store import ExampleStore


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_import(verbs)
    _register_export(verbs)


def numbers(text: str) -> list[int]:
    """``0-3,7`` as 0, 1, 2, 3, 7, for argparse."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(10_000_000):
            raise argparse.ArgumentTypeError(
                f"expected numbers and ranges such as 0-3,7, found {text!r}"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _register_import(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "import-records",
        "make stores of collated activations of other programs",
        run_import,
        show_import,
        example="neuron-explainer import-records gpt2-small --layers 5 --units 0-99 --out gpt2-small-5",
    )
    verb.add_argument(
        "source",
        help="name of a published set; folder or URL of records ({layer}/{unit}.json), or one record; "
        "SAEDashboard's batch-N.json or a folder of them; folder of an export of Neuronpedia",
    )
    verb.add_argument("--out", required=True, metavar="FOLDER", help="for the stores")
    verb.add_argument("--layers", type=numbers, metavar="NUMBERS", help="such as 0-2,7")
    verb.add_argument("--units", type=numbers, metavar="NUMBERS", help="such as 0-99")
    verb.add_argument(
        "--location", metavar="PLACE", help="where the units are, such as mlp.post_act"
    )
    verb.add_argument(
        "--explanations",
        metavar="WHERE",
        help="folder or URL of explanations, which become labels; 'published': the set's own",
    )


def run_import(args: argparse.Namespace) -> Result:
    """Make stores of examples of activations that another program collated: one for each layer."""
    from neuron_explainer.analysis.interchange.collated_sets import import_records
    from neuron_explainer.analysis.store import ExampleStore

    if _is_dashboard(args.source):
        from neuron_explainer.analysis.interchange.dashboards import import_dashboards

        for flag in ("layers", "units", "explanations"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} is for records of OpenAI's; of these, all are taken.")
        paths = import_dashboards(args.source, args.out, location=args.location)
    else:
        paths = import_records(
            args.source,
            args.out,
            layers=args.layers,
            units=args.units,
            location=args.location,
            explanations=args.explanations,
        )
    found = []
    for path in paths:
        with ExampleStore(path) as store:
            found.append(
                {
                    "path": str(store.path),
                    "kind": store.kind,
                    "location": store.location,
                    "units": len(store),
                    "alive": len(store.alive),
                    "examples": store.meta["n_examples"],
                    "first": int(store.alive[0]) if len(store.alive) else 0,
                }
            )
    return {"source": args.source, "stores": found}


def _is_dashboard(source: str) -> bool:
    """Whether a source is a batch of SAEDashboard, a folder of batches, or an export of Neuronpedia."""
    name = source.rpartition("/")[2]
    if name.startswith("batch-") and name.endswith(".json"):
        return True
    path = Path(source)
    return (path / "features").is_dir() or any(path.glob("batch-*.json"))


def show_import(result: Result) -> None:
    """Print what each store holds, and how to look at it."""
    for store in result["stores"]:
        say(
            f"{store['path']}: {store['alive']} {store['kind']}s of {store['location']}, "
            f"{store['examples']} examples"
        )
    first = result["stores"][0]
    say(f"Look at one with: neuron-explainer inspect {first['path']} {first['first']}")


_WITH_LOGITS = ("saedashboard", "neuronpedia")
LEFT_OUT = {
    "neuron-records": "the groups weighted and bottom, strata but quantiles, histogram, labels and partners",
    "saedashboard": "the groups bottom, uniform, weighted and inactive, moments, labels and partners",
    "neuronpedia": "the groups bottom, uniform, weighted and inactive, moments and partners",
    "parquet": "",
}
"""By format, what of a store it has no place for."""


def _register_export(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export-records",
        "write a store of examples in another program's format",
        run_export,
        show_export,
        example="neuron-explainer export-records gpt2-small-5 --format neuronpedia --out for-neuronpedia",
    )
    verb.add_argument("store", help="file NAME.store, or the folder of one")
    verb.add_argument("--format", required=True, choices=list(LEFT_OUT), help="to write")
    verb.add_argument("--out", required=True, metavar="FOLDER", help="for the files")
    verb.add_argument("--units", type=numbers, metavar="NUMBERS", help="such as 0-99; default: all")
    verb.add_argument("--model", default="", metavar="NAME", help="Neuronpedia's name of the model")
    verb.add_argument(
        "--no-model",
        action="store_true",
        help="do not open the model: cards of saedashboard and neuronpedia have no tokens that units promote",
    )


def run_export(args: argparse.Namespace) -> Result:
    """Write the units of a store that have examples, in the format of another program."""
    from neuron_explainer.analysis.store import ExampleStore

    with ExampleStore.open(args.store) as store:
        units = store.alive.tolist() if args.units is None else args.units
        pages = [store[unit] for unit in units]
        directions, why = None, None
        if args.format in _WITH_LOGITS:
            directions, why = directions_of(store, args.no_model)
        paths = _export(args.format, pages, args.out, args.model, directions)
    return {
        "store": str(store.path),
        "format": args.format,
        "units": len(pages),
        "files": [str(path) for path in paths],
        "left_out": LEFT_OUT[args.format],
        "no_tokens": why,
    }


def directions_of(
    store: "ExampleStore", without_model: bool
) -> "tuple[Directions | None, str | None]":
    """What the store's units do to the logits, or why that is not known."""
    if without_model:
        return None, "--no-model"
    from neuron_explainer.analysis.directions import Directions
    from neuron_explainer.cli.inspecting import opened

    try:
        context, autoencoder = opened(store, None, None, None)
        if autoencoder is None:
            return Directions(context, store.location), None
        place = None if autoencoder.is_transcoder else store.location
        return Directions(context, autoencoder, location=place), None
    except NeuronExplainerError as error:
        return None, str(error)


def _export(
    form: str, pages: list[Any], folder: str, model: str, directions: "Directions | None"
) -> list[Path]:
    if form == "neuron-records":
        from neuron_explainer.analysis.interchange.collated_sets import write_records

        return write_records(pages, folder)
    if form == "parquet":
        from neuron_explainer.analysis.interchange.parquet import write_parquet

        return list(write_parquet(pages, folder))
    from neuron_explainer.analysis.interchange import dashboards

    if form == "neuronpedia":
        rows = dashboards.neuronpedia_rows(pages, model=model, directions=directions)
        return dashboards.write_neuronpedia(rows, folder)
    batch = dashboards.dashboard_batch(pages, model=model, directions=directions)
    size = dashboards.BATCH
    return [
        dashboards.write_dashboard(
            replace(batch, features=batch.features[begin : begin + size]),
            Path(folder, f"batch-{begin // size}.json"),
        )
        for begin in range(0, len(batch.features), size)
    ]


def show_export(result: Result) -> None:
    """Print where the files are, and what they have no place for."""
    say(f"{result['units']} units in {len(result['files'])} files, such as {result['files'][0]}")
    if result["left_out"]:
        say(f"left out, because the format has no place for it: {result['left_out']}")
    if result["no_tokens"] is not None:
        say(f"tokens that units promote are left out: {result['no_tokens']}")
