"""Pages of units as files: export."""

import argparse
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, say
from neuron_explainer.cli.importing import directions_of, numbers
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    pass


def register(verbs: Any) -> None:
    """Declare the verb and its options."""
    export = add_verb(
        verbs,
        "export",
        "the browser's pages of units as files that need no server",
        run_export,
        show_export,
        example="neuron-explainer export tiny-tales/ae-resid-delta-mlp/2 0-99 --out site",
    )
    export.add_argument(
        "store",
        metavar="STORE",
        help="file NAME.store, folder of one store, or tiny-tales/ae-resid-delta-mlp/2 of the package",
    )
    export.add_argument(
        "units",
        metavar="UNITS",
        nargs="?",
        type=numbers,
        help="such as 0-99 or 3,17; default: all that were ever active",
    )
    export.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a new folder; or, for one unit, a file NAME.html that holds everything",
    )
    export.add_argument(
        "--no-model",
        action="store_true",
        help="do not open the model: leave out the tokens that units promote",
    )


def run_export(args: argparse.Namespace) -> Result:
    """Write the pages that the server shows of units, as files that open from a disk."""
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.viewer import export

    one_file = args.out.endswith((".html", ".htm"))
    if one_file and (args.units is None or len(args.units) != 1):
        raise InputError(
            f"--out {args.out} is one file, which holds one unit: give its number, or a folder for several."
        )
    with ExampleStore.open(args.store) as store:
        units = store.alive.tolist() if args.units is None else list(dict.fromkeys(args.units))
        directions, why = directions_of(store, args.no_model)
        with files.write_once(args.out, "choose another --out") as path:
            if one_file:
                logits = None if directions is None else directions.top_logits(units[0])
                export.write_page(store, units[0], path, logits=logits)
            else:
                promoted = None if directions is None else directions.top_logits_of(units)
                export.write_site(store, path, units, logits=promoted, progress=not args.json)
    return {"out": args.out, "units": len(units), "one_file": one_file, "no_tokens": why}


def show_export(result: Result) -> None:
    """Say what was written and how to look at it."""
    if result["one_file"]:
        say(f"{result['out']}: open it in a browser")
    else:
        say(f"{result['units']} pages; open {result['out']}/index.html in a browser")
    if result["no_tokens"] is not None:
        say(f"tokens that units promote are left out: {result['no_tokens']}")
