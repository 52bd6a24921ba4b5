"""Looking at stores of examples: inspect and page."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, can_be_shown, positive, say
from neuron_explainer.cli.open import find_autoencoders, fitted, model_options, open_model
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.tables import text_table

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from neuron_explainer.analysis.latent_record import Example, LatentRecord
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.analysis.unit_tokens import UnitTokens
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

STORE_HELP = "file NAME.store, folder of stores, or tiny-tales/ae-resid-delta-mlp/2 of the package"
_LISTED = ("density", "max", "mean")
_LONGEST_LABEL = 60  # characters, in lists


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_inspect(verbs)
    _register_page(verbs)


def _register_inspect(verbs: Any) -> None:
    inspect = add_verb(
        verbs,
        "inspect",
        "what a unit responds to, from a store",
        run_inspect,
        show_inspect,
        example="neuron-explainer inspect tiny-tales/ae-resid-delta-mlp/2 1234",
    )
    inspect.add_argument("store", metavar="STORE", help=STORE_HELP)
    inspect.add_argument("unit", metavar="UNIT", nargs="?", type=int, help="its number")
    inspect.add_argument(
        "--search", metavar="TEXT", help="list units whose labels hold these words"
    )
    inspect.add_argument(
        "--sort", metavar="FIGURE", help="list units by density, max, mean, count, skewness, …"
    )
    inspect.add_argument(
        "--ascending", action="store_true", help="the smallest first; units that are never active are "
        "left out",
    )  # fmt: skip
    inspect.add_argument(
        "--on", metavar="TEXT", help="which units are active on each token of this text"
    )
    inspect.add_argument(
        "--bos", action="store_true", help="put the start token before the text of --on"
    )
    inspect.add_argument(
        "--quantiles",
        type=positive,
        metavar="N",
        help="sort all contexts of UNIT by their largest value and show N parts of equal count; reads the "
        "store's text with the model again",
    )
    inspect.add_argument(
        "--label", metavar="TEXT", help="say what UNIT means; an empty text takes that back"
    )
    inspect.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help="lines of a list (default: 20), examples of each kind (5), of each quantile (2), units of a "
        "token (5)",
    )
    model_of_store_options(inspect)


def _register_page(verbs: Any) -> None:
    page = add_verb(
        verbs,
        "page",
        "a unit's page as one HTML file",
        run_page,
        show_page,
        example="neuron-explainer page tiny-tales/ae-resid-delta-mlp/2 1234 --out 1234.html",
    )
    page.add_argument("store", metavar="STORE", help=STORE_HELP)
    page.add_argument("unit", metavar="UNIT", type=int, help="its number")
    page.add_argument("--out", required=True, metavar="FILE", help="file to write, .html")
    model_of_store_options(page)


def model_of_store_options(verb: argparse.ArgumentParser) -> None:
    model_options(verb, "the one that the store names")
    verb.add_argument(
        "--autoencoder", metavar="AUTOENCODER", help="where it is now, if it was moved"
    )
    verb.add_argument(
        "--no-model",
        action="store_true",
        help="do not open the model: leave out the tokens that a unit promotes and reads",
    )


# --- inspect ---


def run_inspect(args: argparse.Namespace) -> Result:
    """Look at a store of examples: at a unit, at those with a label or a high figure, or at those that are
    active on a text. Without a unit and without an option, an overview."""
    from neuron_explainer.analysis.store import ExampleStore, open_stores
    from neuron_explainer.analysis.store_names import find_stores

    wanted = [name for name in ("search", "sort", "on") if getattr(args, name) is not None]
    _check_combination(args, wanted)
    path = find_stores(args.store)
    if path.is_dir() and args.unit is None and not wanted:
        stores = open_stores(path)
        if len(stores) > 1:
            args.show = show_stores
            return {"folder": args.store, "stores": [_overview(each) for each in stores.values()]}
    store = ExampleStore.open(path)
    if args.label is not None:
        store.workspace.set_label(args.unit, args.label)
    if args.on is not None:
        return _inspect_on(args, store)
    if args.quantiles is not None:
        return _inspect_quantiles(args, store)
    if args.unit is not None:
        return _inspect_unit(args, store)
    if args.search is not None:
        return _inspect_search(args, store)
    return _inspect_list(args, store)


def _check_combination(args: argparse.Namespace, wanted: list[str]) -> None:
    if len(wanted) > 1:
        raise InputError(f"give one of {', '.join(f'--{name}' for name in wanted)}.")
    if args.unit is not None and wanted and wanted != ["on"]:
        raise InputError(f"--{wanted[0]} lists units; leave UNIT out.")
    if args.label is not None and (args.unit is None or wanted):
        raise InputError("--label says what a unit means: give its number, and no other option.")
    if args.ascending and args.sort is None:
        raise InputError("--ascending needs --sort.")
    if args.quantiles is not None and (args.unit is None or wanted or args.label is not None):
        raise InputError("--quantiles are of one unit: give its number, and no other option.")
    if args.quantiles is not None and args.no_model:
        raise InputError("--quantiles run the model; leave --no-model out.")


def show_inspect(result: Result) -> None:
    """Each way of looking sets a printer of its own."""
    raise AssertionError(result)


def _in_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and nobody wants none (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout is not None and sys.stdout.isatty()


# --- one unit ---


def _inspect_unit(args: argparse.Namespace, store: "ExampleStore") -> Result:
    record = store[args.unit]
    found, why = _tokens_of(args, store)
    text = record.text(args.top or 5, colour=_in_colour())

    def show(result: Result) -> None:
        print(text)  # its tokens and labels are escaped; say would escape the colours too
        say()
        say(
            found.text()
            if found is not None
            else f"Next tokens and input tokens are left out: {why}"
        )
        say(f"\n{_of_what(store)}")

    args.show = show
    return _record_as_dict(record) | {"tokens": found and found.as_dict(), "no_tokens": why}


def _tokens_of(
    args: argparse.Namespace, store: "ExampleStore"
) -> "tuple[UnitTokens | None, str | None]":
    """What the model's weights say about the unit, or why the model was not asked."""
    if args.no_model:
        return None, "--no-model"
    from neuron_explainer.analysis.unit_tokens import unit_tokens

    try:
        context, autoencoder = opened(store, args.model, args.autoencoder, args.device)
    except NeuronExplainerError as error:
        return None, str(error)
    what = store.location if autoencoder is None else autoencoder
    place = None if autoencoder is None else store.location
    return unit_tokens(context, what, args.unit, location=place), None


def opened(
    store: "ExampleStore", model: str | None, autoencoder: str | None, device: str | None
) -> "tuple[ModelContext, Autoencoder | None]":
    """The model and, for latents, the autoencoder of a store; an error unless they are the same ones.

    ``model`` and ``autoencoder`` are names for where they are now; None: where the store says.
    """
    provenance = store.provenance
    model = model or provenance.get("model")
    if model is None:
        raise InputError(f"{store.path} does not say of which model it is; give --model.")
    name = autoencoder or provenance.get("autoencoder")
    if store.kind == "latent" and name is None:
        raise InputError(f"{store.path} does not say where its dictionary is; give --autoencoder.")
    context = open_model(str(model), device)
    store.check_model(context)
    if store.kind != "latent":
        return context, None
    made = fitted(_autoencoder(str(name), str(model), store), context.get_or_create_model())
    store.check_autoencoder(made)
    return context, made


def _autoencoder(name: str, model: str, store: "ExampleStore") -> "Autoencoder":
    """The one autoencoder that a path, or a name with its layer, stands for."""
    base, _, layer = name.rpartition("/")
    if files.is_remote(name) or Path(name).exists() or not (base and layer.isdecimal()):
        found = find_autoencoders(name, model)
        if len(found.entries) > 1:
            found = found.at(store.location, None)
    else:
        found = find_autoencoders(base, model).at(None, int(layer))
    return found.only().load()


def _record_as_dict(record: "LatentRecord") -> Result:
    """A record as plain values."""
    from dataclasses import asdict

    from neuron_explainer.analysis.explaining.explanation import as_dict
    from neuron_explainer.analysis.records import HISTOGRAM_EDGES

    return {
        "name": record.name,
        "kind": record.kind,
        "location": record.location,
        "unit": record.unit,
        "labels": [label._asdict() for label in record.labels],
        "explanations": [as_dict(each) for each in record.explanations],
        "statistics": asdict(record.statistics),
        "histogram": {"edges": list(HISTOGRAM_EDGES), "counts": record.histogram.tolist()},
        "examples": [*map(_example_as_dict, record.all_examples)],
        "partners": [asdict(partner) for partner in record.partners],
        "provenance": dict(record.provenance),
    }


def _example_as_dict(example: "Example") -> Result:
    return {
        "group": example.group,
        "interval": example.interval,
        "rank": example.rank,
        "value": example.value,
        "document": example.document,
        "position": example.position,
        "peak": example.peak,
        "ids": example.tokens.tolist(),
        "tokens": example.strings,
        "activations": example.activations.tolist(),
    }


def _of_what(store: "ExampleStore") -> str:
    """Which model and text the store is of."""
    model = store.provenance.get("model")
    of = f" of {model}" if model else ""
    return f"{store.location}{of}, {store.n_tokens:,} tokens of {store.tokens.corpus.name}"


# --- quantiles ---


def _inspect_quantiles(args: argparse.Namespace, store: "ExampleStore") -> Result:
    from neuron_explainer.analysis.collation.quantiles import quantiles_of_store

    record = store[args.unit]  # an error if there is no such unit
    context, autoencoder = opened(store, args.model, args.autoencoder, args.device)
    found = quantiles_of_store(
        store,
        context,
        [args.unit],
        args.quantiles,
        args.top or 2,
        autoencoder=autoencoder,
        progress=not args.json,
    )
    examples = store.examples_of(found.examples)
    parts: list[dict[str, Any]] = [
        {
            "contexts": int(found.count[0, number]),
            "smallest": float(found.smallest[0, number]),
            "largest": float(found.largest[0, number]),
            "examples": [_example_as_dict(each) for each in examples if each.interval == number],
        }
        for number in range(args.quantiles)
    ]

    def show(result: Result) -> None:
        from neuron_explainer.analysis.highlights import number

        say(f"{record.title}: {int(found.count.sum()):,} contexts where it is active")
        for count, part in enumerate(parts, 1):
            limits = f"{number(part['smallest'])} to {number(part['largest'])}"
            say(f"\nquantile {count}: {part['contexts']:,} contexts, {limits}")
            for example in examples:
                if example.interval == count - 1:
                    say(f"  {example!r}")
        say(f"\n{_of_what(store)}")

    args.show = show
    return {"name": store.name, "unit": args.unit, "quantiles": parts}


# --- lists of units ---


def _inspect_search(args: argparse.Namespace, store: "ExampleStore") -> Result:
    found = store.search(args.search, args.top or 20)

    def show(result: Result) -> None:
        rows = [[str(each.unit), _short(each.text), each.source] for each in found]
        if rows:
            say(text_table([store.kind, "label", "by"], rows, n_left=3))
        else:
            say(
                f"no label of {store.name} holds {args.search!r}; inspect STORE UNIT --label writes one"
            )

    args.show = show
    return {"name": store.name, "found": [each._asdict() for each in found]}


def _inspect_list(args: argparse.Namespace, store: "ExampleStore") -> Result:
    by = args.sort or "max"
    limit = args.top or (10 if args.sort is None else 20)
    units = store.sort(by, descending=not args.ascending, limit=limit, among=store.alive)
    figures = list(dict.fromkeys((by, *_LISTED)))
    listed = _listed(store, units, figures)
    overview = _overview(store)

    def show(result: Result) -> None:
        if args.sort is None:
            show_stores({"stores": [overview]})
            say(f"\n{_of_what(store)}\n\nWith the largest values:")
        _show_units(listed, store.kind, figures)
        if listed:
            say(f"Next: neuron-explainer inspect {args.store} {listed[0]['unit']}")

    args.show = show
    return {**overview, "sorted_by": by, "units": listed}


def _listed(
    store: "ExampleStore", units: "np.ndarray[Any, Any]", figures: list[str]
) -> list[Result]:
    """For each unit its figures, the token with its largest value, and its label."""
    columns = {name: store.column(name) for name in figures}
    found = []
    for unit in units.tolist():
        record = store[unit]
        first = record.all_examples[0] if record.all_examples else None
        row = {name: column[unit].item() for name, column in columns.items()}
        token = None if first is None else first.strings[first.query]
        found.append({"unit": unit, **row, "token": token, "label": record.label})
    return found


def _show_units(listed: list[Result], kind: str, figures: list[str]) -> None:
    from neuron_explainer.analysis.highlights import number, percentage

    def cell(name: str, value: float) -> str:
        return percentage(value) if name == "density" else number(value)

    rows = [
        [
            str(row["unit"]),
            *(cell(name, row[name]) for name in figures),
            f"'{row['token']}'" if row["token"] is not None else "",
            _short(row["label"]),
        ]
        for row in listed
    ]
    # Only first columns can be aligned left: the two of text are padded here.
    wide = max((len(row[-2]) for row in rows), default=0)
    rows = [[*row[:-2], f"{row[-2]:<{wide}}  {row[-1]}".rstrip()] for row in rows]
    longest = max((len(row[-1]) for row in rows), default=0)
    rows = [[*row[:-1], row[-1].ljust(longest)] for row in rows]
    title = f"{'at':<{wide}}  label"
    say(text_table([kind, *figures, title.ljust(longest)], rows))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LABEL else f"{line[: _LONGEST_LABEL - 1]}…"


def _overview(store: "ExampleStore") -> Result:
    return {
        "name": store.name,
        "store": str(store.path),
        "kind": store.kind,
        "location": store.location,
        "n_units": len(store),
        "n_dead": len(store.dead),
        "n_dense": len(store.dense()),
        "n_tokens": store.n_tokens,
        "provenance": store.provenance,
    }


def show_stores(result: Result) -> None:
    """A line for each store."""
    rows = [
        [
            each["name"],
            f"{each['kind']}s",
            f"{each['n_units']:,}",
            f"{each['n_dead']:,}",
            f"{each['n_dense']:,}",
            f"{each['n_tokens']:,}",
        ]
        for each in result["stores"]
    ]
    say(text_table(["store", "of", "units", "never active", "dense", "tokens"], rows, n_left=2))
    if "folder" in result:
        first = Path(result["stores"][0]["store"]).name
        name = f"{result['folder']}/{first.removesuffix('.store')}"
        say(f"Next: neuron-explainer inspect {name}")


# --- a text ---


def _inspect_on(args: argparse.Namespace, store: "ExampleStore") -> Result:
    if args.no_model:
        raise InputError("--on runs the model; leave --no-model out.")
    if store.kind == "head":
        raise InputError(
            "--on shows units with one value for each token; heads have one for each pair."
        )
    context, autoencoder = opened(store, args.model, args.autoencoder, args.device)
    if args.unit is not None:
        _ = store[args.unit]  # an error if there is no such unit
    values, ids = _values(args, store, context, autoencoder)
    labels: dict[int, str] = {}
    tokens = []
    for token, row in zip(ids, values, strict=True):
        active = _strongest(row, args.top or 5, store.signed)
        if args.unit is not None:
            active = [(args.unit, float(row[args.unit]))]
        for unit, _ in active:
            if unit not in labels:
                labels[unit] = next((label.text for label in store.labels(unit)), "")
        units = [{"unit": u, "activation": round(v, 6), "label": labels[u]} for u, v in active]
        tokens.append({"token": context.decode_token(token), "id": token, "units": units})
    args.show = show_on
    return {
        "name": store.name,
        "location": store.location,
        "kind": store.kind,
        "unit": args.unit,
        "tokens": tokens,
    }


def _values(
    args: argparse.Namespace,
    store: "ExampleStore",
    context: "ModelContext",
    autoencoder: "Autoencoder | None",
) -> "tuple[Tensor, list[int]]":
    """The activation of every unit for each token, and the tokens."""
    import torch

    with torch.no_grad():
        found = context.get_or_create_model().capture([args.on], store.location, bos=args.bos)
        x = found[store.location][0].flatten(1)  # heads' vectors are side by side
        values = x if autoencoder is None else autoencoder.encode(x)
    return values.float().cpu(), found.tokens[0].tolist()


def _strongest(row: "Tensor", top: int, signed: bool) -> list[tuple[int, float]]:
    """The up to ``top`` units that are most active, strongest first."""
    size = row.abs() if signed else row
    _, indices = size.topk(min(top, len(row)))
    return [(unit, float(row[unit])) for unit in indices.tolist() if size[unit] > 0]


def show_on(result: Result) -> None:
    """A line for each token, with a bar as long as its strongest unit; of one unit, the text."""
    from neuron_explainer.analysis.highlights import number

    strongest = [
        max((abs(u["activation"]) for u in t["units"]), default=0.0) for t in result["tokens"]
    ]
    most = max(strongest, default=0.0) or 1.0
    if result["unit"] is not None:
        _show_one_on(result, most)
    block = "█" if can_be_shown("█") else "#"
    say(f"{result['kind']}s of {result['name']}")
    for token, size in zip(result["tokens"], strongest, strict=True):
        listed = "  ".join(
            f"{u['unit']} {number(u['activation'])}"
            + (f" “{_short(u['label'])}”" if u["label"] else "")
            for u in token["units"]
        )
        say(f"{token['token']!r:>14} {block * round(10 * size / most):<10} {listed}".rstrip())


def _show_one_on(result: Result, most: float) -> None:
    """The text with the tokens highlighted where the unit is active."""
    import numpy as np

    from neuron_explainer.analysis import highlights

    strings = [highlights.token_string(token["token"].encode()) for token in result["tokens"]]
    values = np.array([t["units"][0]["activation"] for t in result["tokens"]], np.float32)
    peak = int(np.abs(values).argmax()) if values.any() else None
    runs = highlights.runs(strings, values, most, peak, 0, len(strings))
    print(highlights.text_line(runs, colour=_in_colour()))


# --- page ---


def run_page(args: argparse.Namespace) -> Result:
    """Write the page of a unit to one HTML file of at most 60 kB, which needs no network and no script."""
    from neuron_explainer.analysis.store import ExampleStore

    store = ExampleStore.open(args.store)
    record = store[args.unit]
    found, why = _tokens_of(args, store)
    page = record.html([] if found is None else found.sections())
    with files.atomic_write(args.out) as temporary:
        temporary.write_text(page, "utf-8")
    missing = {"all": why} if found is None else found.missing
    return {"page": args.out, "bytes": len(page.encode()), "missing": missing}


def show_page(result: Result) -> None:
    """Where the page is."""
    say(f"{result['page']}: {result['bytes'] / 1000:.1f} kB")
    for what, why in result["missing"].items():
        say(f"{'Next tokens and input tokens' if what == 'all' else what} are left out: {why}")
    say(f"Next: open {result['page']} in a browser")
