"""From text to dictionaries: harvest and train."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, positive
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.dictionaries.distributed import World
    from neuron_explainer.models.model_context import ModelContext

"""In a store's folder: model, text and settings of the harvest, so that what was set apart is known."""


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_harvest(verbs)
    _register_train(verbs)


def _register_harvest(verbs: Any) -> None:
    harvest = add_verb(
        verbs, "harvest", "activations of a text, to disk", run_harvest, show_harvest, data_options
    )
    harvest.usage = "%(prog)s TEXT --location PLACE [PLACE ...] --out STORE [options]"
    harvest.add_argument(
        "text", metavar="TEXT", help="file or folder: txt, csv, jsonl (.gz, .zst), parquet"
    )
    any_model_options(harvest)
    harvest.add_argument(
        "--location",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="such as 1/mlp.post_act; no layer: all layers",
    )
    harvest.add_argument(
        "--out", required=True, metavar="STORE", help="folder to write, new or interrupted"
    )
    harvest.add_argument(
        "--num-tokens",
        type=positive,
        metavar="N",
        help="stop with the batch that reaches so many (default: all there are)",
    )
    harvest.add_argument(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="on disk: float32, float16, bfloat16 (default: float32)",
    )
    harvest.add_argument(
        "--shard-rows",
        type=positive,
        default=1 << 18,
        metavar="N",
        help="rows of a file; a harvest that is killed loses those of the last one (default: 262144)",
    )


def _register_train(verbs: Any) -> None:
    train = add_verb(
        verbs, "train", "a dictionary, from text or a store", run_train, show_train, train_options
    )
    train.usage = (
        "%(prog)s SOURCE --location PLACE (--num-tokens N | --steps N) --out RUN [options]"
    )
    train.add_argument(
        "source", nargs="?", metavar="SOURCE", help="text as of harvest, or the folder of a store"
    )
    any_model_options(train, "what the store was harvested from, else tiny-tales")
    train.add_argument(
        "--out", metavar="RUN", help="folder of the run; an unfinished one is gone on with"
    )
    train.add_argument(
        "--config", metavar="FILE", help=".toml or .json file with settings; flags win over it"
    )
    train.add_argument(
        "--params",
        metavar="FILE",
        help="params.json of the dictionary_learning script, instead of --config",
    )
    train.add_argument(
        "--log-to",
        nargs="+",
        default=[],
        choices=["tensorboard", "wandb"],
        help="next to log.jsonl",
    )
    train.add_argument(
        "--divide",
        default="data",
        choices=["data", "latents"],
        help="of what each process that torchrun started has a part: of every batch, or of the "
        "latents of a dictionary that is too large for one device (default: data)",
    )
    train.add_argument(
        "--dist-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after which a process that does not answer is given up (default: 600)",
    )


def any_model_options(verb: argparse.ArgumentParser, default: str = "tiny-tales") -> None:
    """Which model, of this library or of Hugging Face."""
    verb.add_argument(
        "--model",
        metavar="NAME",
        help="name, folder or URL; hf:NAME or hf:FOLDER for any causal model of Hugging Face "
        f"(default: {default})",
    )
    verb.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:0 (default: the best there is)"
    )


def open_model(name: str | None, device: str | None) -> "ModelContext":
    """The context that ``--model`` and ``--device`` mean."""
    from neuron_explainer.models.devices import check_device
    from neuron_explainer.models.model_context import StandardModelContext

    where = None if device is None else check_device(device)
    if name is not None and name.startswith("hf:"):
        from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

        return HuggingFaceModelContext(name.removeprefix("hf:"), where)
    return StandardModelContext(name or "tiny-tales", device=where)


def data_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig`."""
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.settings.flags import add_flags

    add_flags(verb, DataConfig)


def train_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig` and :class:`TrainConfig`, but for those the verb has itself."""
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.settings.flags import add_flags

    data_options(verb)
    add_flags(verb, TrainConfig, leave_out=("device", "model_name"))


# --- harvest ---


def run_harvest(args: argparse.Namespace) -> Result:
    """Run the model on a text and write the activations to a folder of safetensors shards."""
    from neuron_explainer.activations import (
        DataConfig,
        check_store_folder,
        harvest_to_store,
        open_harvester,
        open_windows,
    )
    from neuron_explainer.settings.flags import from_flags

    check_store_folder(args.out)
    context = open_model(args.model, args.device)
    config = from_flags(args, DataConfig)
    harvester = open_harvester(context, args.location, config)
    windows = open_windows(context, args.text, config)
    store = harvest_to_store(
        args.out,
        harvester,
        windows,
        dtype=args.dtype,
        shard_rows=args.shard_rows,
        num_tokens=args.num_tokens,
        progress=not args.json,
    )
    return {
        "store": args.out,
        "model": args.model or "tiny-tales",
        "text": args.text,
        "locations": {str(place): width for place, width in store.header.widths.items()},
        "rows": len(store),
        "bytes": sum(shard.size for shard in store.shards),
    }


def _origin(model: str, source: str, data: Any, described: Mapping[str, Any]) -> Result:
    """Where vectors come from: what ``evaluate`` needs to find what was set apart."""
    return {
        "model": model,
        "source": source if files.is_remote(source) else str(Path(source).resolve()),
        "source_fingerprint": described.get("source_fingerprint"),
        "data": dataclasses.asdict(data),
    }


def show_harvest(result: Result) -> None:
    """What is there, and what to do with it."""
    print(
        f"{result['store']}: {result['rows']:,} activations of {result['model']}, "
        f"{result['bytes'] / 1e6:.1f} MB"
    )
    for location, width in result["locations"].items():
        print(f"  {location} [{width}]")
    rows = result["rows"]
    few = f"--batch-size {max(1, rows // 8)} " if rows < 8 * 4096 else ""
    print(
        f"Next: neuron-explainer train {result['store']} --location {next(iter(result['locations']))} "
        f"--num-tokens {rows} {few}--out RUN"
    )


# --- train ---


def run_train(args: argparse.Namespace) -> Result:
    """Train a dictionary for each location meant; a run that was interrupted is gone on with. With
    several processes (torchrun --nproc-per-node N -m neuron_explainer train ...) each takes a part."""
    from neuron_explainer.dictionaries.distributed import open_world

    asked = _settings(args)
    device = asked.config.device
    with open_world(args.divide, timeout=args.dist_timeout, device=device) as world:
        result = _train(args, asked, world)
    if not world.is_rank_zero:  # the first one speaks for all
        args.json, args.show = False, lambda _: None
    return result


class TrainRequest(NamedTuple):
    """What flags and files ask for."""

    config: "TrainConfig"
    data: "DataConfig"
    model: str | None
    source: str
    out: str


def _train(args: argparse.Namespace, asked: TrainRequest, world: "World") -> Result:
    from functools import partial

    from neuron_explainer.activations import open_buffer
    from neuron_explainer.dictionaries import train, train_many
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.dictionaries.shared_source import SharedSource

    config, data, model, source, out = asked
    harvested = origin_of_store(source)
    model = model or harvested.get("model")
    context = open_model(model, config.device if world.device is None else str(world.device))
    config = dataclasses.replace(config, model_name=context.model_name)
    configs = _configs(context, config, source)
    options: dict[str, Any] = {"log_to": args.log_to, "progress": not args.json, "world": world}
    share = partial(SharedSource, world=world) if world.size > 1 else None
    places, pair = list(configs), None
    if config.transcoder:
        pair = places[0], config.output_location or ""
        places.append(pair[1])
    size = config.batch_size
    total = config.total_steps * size
    with open_buffer(
        context, source, places, data, size, pair=pair, num_tokens=total, share=share
    ) as batches:
        record = _origin(model or "tiny-tales", source, data, batches.source.describe())
        if harvested:
            record["harvest"] = harvested
        options["record"] = record
        try:
            if len(configs) == 1:
                train(next(iter(configs.values())), batches, out, **options)
            else:
                train_many(configs, batches, out, **options)
        except KeyboardInterrupt:
            print(
                f"\ninterrupted: the same command goes on from the last checkpoint in {out}",
                file=sys.stderr,
            )
            raise
        waited, forward = batches.waited_s, batches.forward_s
    finished = Run.open(out).finished
    return {
        "run": out,
        "locations": list(configs),
        "steps": finished["step"],
        "held_out": (harvested.get("data") or vars(data))["hold_out"] > 0,
        "seconds_in_model": round(forward, 1),
        "seconds_waiting": round(waited, 1),
        "metrics": finished["metrics"],
    }


def origin_of_store(source: str) -> Result:
    """What ``harvest`` noted in a store's folder; nothing of a text, or of another maker's store."""
    from neuron_explainer.activations import SOURCE_FILE, is_store

    note = Path(source) / SOURCE_FILE
    return files.read_json(note) if is_store(source) and note.exists() else {}


def _settings(args: argparse.Namespace) -> TrainRequest:
    """From flags, and from the file of ``--config`` or ``--params``; flags win."""
    from neuron_explainer.activations import DataConfig, is_store
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.dictionaries.params_json import read_params
    from neuron_explainer.settings import read_values, split_fields
    from neuron_explainer.settings.flags import from_flags

    if args.config is not None and args.params is not None:
        raise InputError("give --config or --params, not both.")
    values, where, source, out = {}, "flags", args.source, args.out
    if args.config is not None:
        values = _of_run(read_values(args.config), args.config)
        where = f"{args.config} with flags"
    if args.params is not None:
        params = read_params(args.params)
        values, where = params.values, f"{args.params} with flags"
        source, out = source or params.text, out or params.folder
    _check_given(source, out)
    if is_store(source):
        _check_no_text_settings(args)
    for_data, for_training = split_fields(values, (DataConfig, TrainConfig), where)
    data = from_flags(args, DataConfig, for_data, where)
    config = from_flags(args, TrainConfig, for_training, where)
    config = dataclasses.replace(config, device=args.device or config.device)
    if config.location is None and not is_store(source):
        raise InputError(
            "--location is missing: which activations to learn, such as 1/mlp.post_act."
        )
    return TrainRequest(config, data, args.model or config.model_name, source, out)


def _of_run(values: Result, file: str) -> Result:
    """Settings as a file holds them, or as the ``config.json`` of a run does."""
    if values.get("kind") != "dictionary_training":
        return values
    if len(values.get("dictionaries", {})) != 1:
        raise InputError(
            f"{file} is of a run of several dictionaries; --config takes one's settings."
        )
    (settings,) = values["dictionaries"].values()
    return {**values.get("record", {}).get("data", {}), **settings}


def _check_no_text_settings(args: argparse.Namespace) -> None:
    """An error for flags that say how text is cut, where there is none any more."""
    from neuron_explainer.activations import DataConfig

    of_buffer = ("buffer_tokens", "data_seed")
    names = [field.name for field in dataclasses.fields(DataConfig) if field.name not in of_buffer]
    if given := [f"--{name.replace('_', '-')}" for name in names if name in vars(args)]:
        raise InputError(
            f"{', '.join(given)}: the store holds activations, of text that was cut when they were "
            "harvested; give these to harvest."
        )


def _check_given(source: str | None, out: str | None) -> None:
    if source is None or out is None:
        raise InputError("train needs a text or store to learn from, and --out, a folder to write.")


def _configs(
    context: "ModelContext", config: "TrainConfig", source: str
) -> "dict[str, TrainConfig]":
    """A config for each single location that ``config.location`` means; for all that a store has if
    it is not given."""
    from neuron_explainer.activations import ActivationStore
    from neuron_explainer.models.locations import ActivationLocation

    if config.location is None:
        places = ActivationStore(source).locations
    else:
        places = ActivationLocation.parse(config.location).expand(context.n_layers)
    if config.transcoder and (len(places) > 1 or config.output_location is None):
        raise InputError("a transcoder needs one --location and one --output-location.")
    return {str(place): dataclasses.replace(config, location=str(place)) for place in places}


def show_train(result: Result) -> None:
    """How it went, and what to look at."""
    for name, found in result["metrics"].items():
        figures = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"{name}: {figures}")
    print(
        f"{result['run']}: {result['steps']:,} steps; {result['seconds_in_model']} s in the model, "
        f"{result['seconds_waiting']} s waiting for it"
    )
    run = result["run"] + ("" if result["held_out"] else " --text ANOTHER_TEXT")
    print(f"Next: neuron-explainer evaluate {run}; neuron-explainer report {run}")
