"""Files: convert an autoencoder, keep the cache of downloads in order."""

import argparse
import contextlib
import dataclasses
import functools
import typing
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, say
from neuron_explainer.cli.open import autoencoder_source
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.settings.flags import add_flag, own_docs


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_convert(verbs)
    _register_cache(verbs)


def _register_convert(verbs: Any) -> None:
    convert = add_verb(
        verbs,
        "convert",
        "rewrite an autoencoder in another format",
        run_convert,
        show_convert,
        declare=_declare_convert,
        example="neuron-explainer convert ae-resid-delta-mlp converted --layer 2 --format saelens",
    )
    convert.add_argument(
        "source", help="folder, file or URL of any known format, a name, or a run's folder"
    )
    convert.add_argument("--layer", type=int, metavar="N", help="which one of several")
    convert.add_argument("destination", help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="replace a folder that is there")


def _declare_convert(convert: argparse.ArgumentParser) -> None:
    """The flags that follow from the formats: which are written, and what can be stated of each."""
    from neuron_explainer.models.checkpoints.autoencoders import FORMATS, WRITTEN_FORMATS, Stated

    convert.add_argument(
        "--format", required=True, choices=["native", *WRITTEN_FORMATS], help="to write"
    )
    stated = convert.add_argument_group("what the source does not say")
    docs, hints = own_docs(Stated), typing.get_type_hints(Stated)
    for name, hint in hints.items():
        takers = ", ".join(form.name for form in FORMATS if name in form.states)
        add_flag(stated, name, hint, docs[name] + (f" ({takers})" if takers else ""), None)


def _register_cache(verbs: Any) -> None:
    about = "files that were downloaded"
    cache = verbs.add_parser("cache", help=about, description="Downloads.")
    cache.about, cache.example = about, "neuron-explainer cache list"
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_verb(actions, "list", "what is there", run_cache_list, show_cache)
    add_verb(actions, "verify", "check sizes and hashes", run_cache_verify, show_cache)
    remove = add_verb(actions, "remove", "delete files", run_cache_remove, show_cache)
    remove.add_argument("source", help="URL, or a pattern with * and ?")


def run_convert(args: argparse.Namespace) -> Result:
    """Rewrite an autoencoder in another format; what that format cannot express is an error."""
    from neuron_explainer.models.autoencoders.convert import convert
    from neuron_explainer.models.checkpoints.autoencoders import Stated

    given = vars(args)
    with contextlib.ExitStack() as stack:
        destination = args.destination
        if not args.overwrite:
            possible = functools.partial(_is_of_format, form=args.format)
            once = files.write_once(destination, "give --overwrite to replace it", possible)
            destination = stack.enter_context(once)
        source, known = autoencoder_source(args.source, args.layer)
        stated = typing.cast(
            Stated, known | {name: given[name] for name in Stated.__annotations__ if name in given}
        )
        convert(source, destination, args.format, overwrite=args.overwrite, **stated)
    return {"source": args.source, "destination": args.destination, "format": args.format}


def _is_of_format(folder: Path, form: str) -> bool:
    """Whether a folder holds an autoencoder of a format."""
    from neuron_explainer.models.checkpoints.autoencoders import format_of

    try:
        return format_of(folder) == form
    except NeuronExplainerError:
        return False


def show_convert(result: Result) -> None:
    """Print where the result is."""
    say(f"{result['source']} is now in {result['destination']}, as {result['format']}")


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
    """Print one line for each file."""
    total = sum(entry["size"] for entry in result["files"])
    say(f"{result['folder']}: {len(result['files'])} files, {total / 1e6:.1f} MB")
    for entry in result["files"]:
        say(f"  {entry['size']:>12,}  {entry['problem'] or 'ok'}  {entry['source']}")
