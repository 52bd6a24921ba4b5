"""Explanations from other programs' files into the workspace, and from there into such files."""

import argparse
from typing import TYPE_CHECKING, Any

from neuron_explainer.cli.common import Result, add_verb, say
from neuron_explainer.cli.inspecting import STORE_HELP
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.analysis.explaining.explanation import Explanation, Score
    from neuron_explainer.analysis.store import ExampleStore

FORMATS = ("neuronpedia", "openai", "delphi")


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    bring = add_verb(
        verbs,
        "import-explanations",
        "take explanations of other programs into the workspace",
        run_import,
        show_import,
        example="neuron-explainer import-explanations stores/2.mlp.post_act export --format neuronpedia",
    )
    bring.add_argument("store", metavar="STORE", help=STORE_HELP)
    bring.add_argument(
        "source",
        help="neuronpedia: file of rows (.jsonl, .jsonl.gz) or folder of an export; openai: {unit}.jsonl or "
        "the folder of a layer; delphi: folder of results",
    )
    bring.add_argument("--format", required=True, choices=FORMATS, help="of the source")
    give = add_verb(
        verbs,
        "export-explanations",
        "write explanations and scores for other programs",
        run_export,
        show_export,
        example="neuron-explainer export-explanations stores/2.mlp.post_act --format delphi --out results",
    )
    give.add_argument("store", metavar="STORE", help=STORE_HELP)
    give.add_argument("--format", required=True, choices=FORMATS, help="to write")
    give.add_argument("--out", required=True, metavar="FOLDER", help="for the files")
    give.add_argument(
        "--method", metavar="NAME", help="explanations of this method (default: the latest)"
    )
    give.add_argument(
        "--name", metavar="NAME", help="of the dictionary there (default: the store's)"
    )
    give.add_argument("--model-name", metavar="NAME", help="Neuronpedia's name of the model")


def run_import(args: argparse.Namespace) -> Result:
    """Take explanations of other programs, with their scores, into the store's workspace. Their texts become
    labels, so that they can be searched for."""
    from neuron_explainer.analysis.explaining.interchange import read_foreign
    from neuron_explainer.analysis.store import ExampleStore

    with ExampleStore.open(args.store) as store:
        found = read_foreign(args.source, args.format, store.subject, len(store))
        request = f"imported from {args.format}"
        store.workspace.save_explanations((explanation, request) for explanation, _ in found)
        scores = [(explanation, score, request) for explanation, some in found for score in some]
        store.workspace.save_explanation_scores(scores)
        return {
            "source": args.source,
            "store": str(store.path),
            "explanations": len(found),
            "scores": len(scores),
            "first": found[0][0].unit if found else None,
            "workspace": str(store.workspace.path),
            "given": args.store,
        }


def show_import(result: Result) -> None:
    """How many explanations came, and how to look at one."""
    say(
        f"{result['explanations']:,} explanations and {result['scores']:,} scores of {result['source']} are "
        f"in {result['workspace']}"
    )
    if result["first"] is not None:
        say(f"Look at one with: neuron-explainer inspect {result['given']} {result['first']}")


def run_export(args: argparse.Namespace) -> Result:
    """Write the explanations in the store's workspace, the latest of each unit, with their scores. For
    delphi, the scores of a unit are written only if the store keeps all texts that were judged."""
    from neuron_explainer.analysis.store import ExampleStore

    with ExampleStore.open(args.store) as store:
        found: list[tuple[Explanation, tuple[Score, ...]]] = []
        for unit in store.workspace.explained_units(args.method):
            latest = store.workspace.explained(unit, args.method)[0].explanation
            found.append((latest, store.workspace.with_answers(latest)))
        if not found:
            raise InputError(
                f"{store.path} has no explanations yet; neuron-explainer explain makes some."
            )
        paths, without = _written(args, store, found)
        return {
            "store": str(store.path),
            "format": args.format,
            "explanations": len(found),
            "without_scores": without,
            "files": [str(path) for path in paths],
        }


def _written(
    args: argparse.Namespace,
    store: "ExampleStore",
    found: "list[tuple[Explanation, tuple[Score, ...]]]",
) -> tuple[list[Any], int]:
    """The files, and for how many units scores could not be written."""
    from neuron_explainer.analysis.explaining import interchange

    name = args.name or store.name.replace("/", "-")
    layer = store.location.partition("/")[0]
    if args.format == "neuronpedia":
        model = args.model_name or str(store.provenance.get("model", ""))
        paths = interchange.write_neuronpedia_explanations(
            found, args.out, model=model, source=name
        )
        return paths, 0
    if args.format == "openai":
        number = int(layer) if layer.isdecimal() else 0
        results = [
            interchange.simulation_results(number, explanation.unit, [(explanation, scores)])
            for explanation, scores in found
        ]
        return interchange.write_simulation_results(results, args.out), 0
    rows = [
        (explanation, scores, interchange.stored_texts(store, explanation.unit, scores))
        for explanation, scores in found
    ]
    without = sum(bool(scores) and texts is None for _, scores, texts in rows)
    return interchange.write_delphi(rows, args.out, name), without


def show_export(result: Result) -> None:
    """How many explanations were written, and what is missing."""
    say(
        f"{result['explanations']:,} explanations of {result['store']} in {len(result['files']):,} files"
    )
    if result["without_scores"]:
        say(
            f"{result['without_scores']:,} of them without scores: the store does not keep all texts that "
            "were judged. Scores made with --no-model use the store's own texts."
        )
    if result["files"]:
        say(f"first: {result['files'][0]}")
