"""From text to dictionaries: harvest and train."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.cli.open import data_options, model_options, open_model
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.activations.data_config import DataConfig
    from neuron_explainer.dictionaries.config import TrainConfig
    from neuron_explainer.dictionaries.distributed import World
    from neuron_explainer.models.model_context import ModelContext


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_harvest(verbs)
    _register_train(verbs)


def _register_harvest(verbs: Any) -> None:
    harvest = add_verb(
        verbs,
        "harvest",
        "activations of a text, to disk",
        run_harvest,
        show_harvest,
        data_options,
        "neuron-explainer harvest books --location 1/resid.torso.delta_mlp --out activations",
    )
    harvest.usage = "%(prog)s TEXT --location PLACE [PLACE ...] --out STORE [options]"
    harvest.add_argument(
        "text", metavar="TEXT", help="file or folder: txt, csv, jsonl (.gz, .zst), parquet"
    )
    model_options(harvest)
    harvest.add_argument(
        "--location",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="such as 1/mlp.post_act; without a layer, all layers",
    )
    harvest.add_argument(
        "--out",
        required=True,
        metavar="STORE",
        help="folder to write: a new one, or that of an interrupted harvest",
    )
    harvest.add_argument(
        "--num-tokens",
        type=positive,
        metavar="N",
        help="stop with the batch that reaches this many tokens (default: read all)",
    )
    option(harvest, "--dtype", "on disk: float32, float16, bfloat16", "float32", "NAME")
    option(
        harvest,
        "--shard-rows",
        "rows of a file; a killed harvest loses the rows of the last file",
        1 << 18,
        "N",
        type=positive,
    )


def _register_train(verbs: Any) -> None:
    train = add_verb(
        verbs,
        "train",
        "a dictionary, from text or a store",
        run_train,
        show_train,
        train_options,
        "neuron-explainer train activations --steps 40 --batch-size 256 --n-latents 512 --k 16 "
        "--lr 3e-3 --out run",
    )
    train.usage = (
        "%(prog)s SOURCE --location PLACE (--num-tokens N | --steps N) --out RUN [options]"
    )
    train.add_argument(
        "source", nargs="?", metavar="SOURCE", help="text, as for harvest, or the folder of a store"
    )
    model_options(train, "what the store was harvested from, else tiny-tales")
    train.add_argument(
        "--out", metavar="RUN", help="folder of the run; an unfinished run in it is resumed"
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
        help="where to log too, besides log.jsonl",
    )
    option(
        train,
        "--divide",
        "what to divide among the processes that torchrun started: every batch, or the latents "
        "of a dictionary that is too large for one device",
        "data",
        choices=["data", "latents"],
    )
    option(
        train,
        "--dist-timeout",
        "how long to wait for a process that does not answer",
        600.0,
        "SECONDS",
    )


def train_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig` and :class:`TrainConfig`, except those that the verb declares."""
    from neuron_explainer.dictionaries.config import TrainConfig
    from neuron_explainer.settings.flags import add_flags

    data_options(verb)
    add_flags(verb, TrainConfig, leave_out=("device", "model_name"))


# --- harvest ---


def run_harvest(args: argparse.Namespace) -> Result:
    """Run the model on a text and write the activations to a folder of safetensors shards."""
    from neuron_explainer.activations.data_config import DataConfig, open_harvester, open_windows
    from neuron_explainer.activations.store import check_store_folder, harvest_to_store
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
        "model": context.reference,
        "text": args.text,
        "locations": {str(place): width for place, width in store.header.widths.items()},
        "rows": len(store),
        "bytes": sum(shard.size for shard in store.shards),
    }


def show_harvest(result: Result) -> None:
    """What the store holds, and the command to go on with."""
    say(
        f"{result['store']}: {result['rows']:,} activations of {result['model']}, "
        f"{result['bytes'] / 1e6:.1f} MB"
    )
    for location, width in result["locations"].items():
        say(f"  {location} [{width}]")
    rows = result["rows"]
    few = f"--batch-size {max(1, rows // 8)} " if rows < 8 * 4096 else ""
    say(
        f"Next: neuron-explainer train {result['store']} --location {next(iter(result['locations']))} "
        f"--num-tokens {rows} {few}--out RUN"
    )


# --- train ---


def run_train(args: argparse.Namespace) -> Result:
    """Train a dictionary for each location; the same command resumes an interrupted run. With
    several processes (torchrun --nproc-per-node N -m neuron_explainer train ...) each does a part."""
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

    from neuron_explainer.activations.data_config import open_buffer
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.dictionaries.shared_source import SharedSource

    config, data, model, source, out = asked
    harvested = _record_of_store(source)
    model = model or harvested.get("model")
    context = open_model(model, config.device if world.device is None else str(world.device))
    config = dataclasses.replace(config, model_name=context.short_name)
    configs = _configs(context, config, source)
    places, pair = list(configs), None
    if config.transcoder:
        pair = places[0], config.output_location or ""
        places.append(pair[1])
    size = config.batch_size
    with open_buffer(
        context,
        source,
        places,
        data,
        size,
        pair=pair,
        num_tokens=config.total_steps * size,
        share=partial(SharedSource, world=world) if world.size > 1 else None,
    ) as batches:
        _learn(args, configs, batches, out, world)
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


def _learn(
    args: argparse.Namespace,
    configs: "dict[str, TrainConfig]",
    batches: Any,
    out: str,
    world: "World",
) -> None:
    """Train. After Ctrl-C, say how to resume."""
    from neuron_explainer.dictionaries.train import train, train_many

    options: dict[str, Any] = {"log_to": args.log_to, "progress": not args.json, "world": world}
    try:
        if len(configs) == 1:
            train(next(iter(configs.values())), batches, out, **options)
        else:
            train_many(configs, batches, out, **options)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {_how_to_go_on(out)}", file=sys.stderr)
        raise


def _how_to_go_on(out: str) -> str:
    from neuron_explainer.dictionaries.runs import Run

    run = Run.find(out)
    if run is not None and run.checkpoints:
        return f"the same command goes on from the last checkpoint in {out}"
    return f"{out} holds no checkpoint yet, so the same command starts over"


def _record_of_store(source: str) -> Result:
    """The record of a store's harvest; empty for a text, and for a store without a record."""
    from neuron_explainer.activations.data_config import is_store
    from neuron_explainer.activations.store import ActivationStore

    return ActivationStore(source, verify=False).record if is_store(source) else {}


def _settings(args: argparse.Namespace) -> TrainRequest:
    """The settings from flags and from the file of ``--config`` or ``--params``; flags win."""
    from neuron_explainer.activations.data_config import DataConfig, is_store
    from neuron_explainer.dictionaries.config import TrainConfig
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
    """The settings in a file, which may be the ``config.json`` of a run."""
    from neuron_explainer.files import origins

    if values.get("kind") != "dictionary_training":
        return values
    if len(values.get("dictionaries", {})) != 1:
        raise InputError(
            f"{file} is of a run of several dictionaries; --config takes one's settings."
        )
    (settings,) = values["dictionaries"].values()
    record = origins.from_folder(values.get("record", {}), Path(file).parent)
    model = record.get("model") or settings.get("model_name")
    return {**record.get("data", {}), **settings, "model_name": model}


def _check_no_text_settings(args: argparse.Namespace) -> None:
    """Refuse flags about text when training from a store, which holds no text."""
    from neuron_explainer.activations.data_config import DataConfig

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
    """One config for each location that ``config.location`` means, or that the store has if it is None."""
    from neuron_explainer.activations.store import ActivationStore
    from neuron_explainer.models.locations import ActivationLocation

    if config.location is None:
        places = ActivationStore(source).locations
    else:
        places = ActivationLocation.parse(config.location).expand(context.n_layers)
    if config.transcoder and (len(places) > 1 or config.output_location is None):
        raise InputError("a transcoder needs one --location and one --output-location.")
    return {str(place): dataclasses.replace(config, location=str(place)) for place in places}


def show_train(result: Result) -> None:
    """The last metrics, and the commands to go on with."""
    for name, found in result["metrics"].items():
        figures = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        say(f"{name}: {figures}")
    say(
        f"{result['run']}: {result['steps']:,} steps; {result['seconds_in_model']} s in the model, "
        f"{result['seconds_waiting']} s waiting for it"
    )
    run = result["run"] + ("" if result["held_out"] else " --text ANOTHER_TEXT")
    say(f"Next: neuron-explainer evaluate {run}; neuron-explainer report {run}")
