"""From text to dictionaries: harvest and train."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.models.model_context import ModelContext


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    harvest = add_verb(
        verbs, "harvest", "activations of a text, to disk", run_harvest, show_harvest, data_options
    )
    harvest.add_argument("text", help="file or folder: txt, csv, jsonl (.gz, .zst), parquet")
    any_model_options(harvest)
    harvest.add_argument(
        "--location", nargs="+", required=True, help="such as 1/mlp.post_act; no layer: all layers"
    )
    harvest.add_argument("--out", required=True, help="folder of the store, new or interrupted")
    harvest.add_argument(
        "--num-tokens", type=int, help="stop after so many (default: all there are)"
    )
    harvest.add_argument("--dtype", default="float32", help="on disk: float32, float16, bfloat16")

    train = add_verb(
        verbs, "train", "a dictionary, from text or a store", run_train, show_train, train_options
    )
    train.add_argument("source", nargs="?", help="text as of harvest, or the folder of a store")
    any_model_options(train)
    train.add_argument("--out", help="folder of the run; an unfinished one is gone on with")
    train.add_argument("--config", help=".toml or .json file with settings; flags go before it")
    train.add_argument("--params", help="params.json of the dictionary_learning script, instead")
    train.add_argument(
        "--log-to",
        nargs="+",
        default=[],
        choices=["tensorboard", "wandb"],
        help="next to log.jsonl",
    )


def any_model_options(verb: argparse.ArgumentParser) -> None:
    """Which model, of this library or of Hugging Face."""
    verb.add_argument(
        "--model",
        help="name, folder or URL; hf:NAME or hf:FOLDER for any causal model of Hugging Face "
        "(default: tiny-tales)",
    )
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")


def open_model(name: str | None, device: str | None) -> "ModelContext":
    """The context that ``--model`` and ``--device`` mean."""
    from neuron_explainer.models.model_context import StandardModelContext
    from neuron_explainer.models.sampling import check_device

    where = None if device is None else check_device(device)
    if name is not None and name.startswith("hf:"):
        from neuron_explainer.models.huggingface_context import HuggingFaceModelContext

        return HuggingFaceModelContext(name.removeprefix("hf:"), where)
    return StandardModelContext(name or "tiny-tales", device=where)


def data_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig`."""
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.dictionaries.flags import add_flags

    add_flags(verb, DataConfig)


def train_options(verb: argparse.ArgumentParser) -> None:
    """Flags of :class:`DataConfig` and :class:`TrainConfig`, but for those the verb has itself."""
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.dictionaries.flags import add_flags

    data_options(verb)
    add_flags(verb, TrainConfig, leave_out=("device", "model_name"))


# --- harvest ---


def run_harvest(args: argparse.Namespace) -> Result:
    """Run the model on a text and write the activations to a folder of safetensors shards."""
    from neuron_explainer.activations import (
        DataConfig,
        harvest_to_store,
        open_harvester,
        open_windows,
    )
    from neuron_explainer.dictionaries.flags import from_flags

    context = open_model(args.model, args.device)
    config = from_flags(args, DataConfig)
    harvester = open_harvester(context, args.location, config)
    windows = open_windows(context, args.text, config)
    store = harvest_to_store(
        args.out,
        harvester,
        windows,
        dtype=args.dtype,
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


def show_harvest(result: Result) -> None:
    """What is there, and what to do with it."""
    print(
        f"{result['store']}: {result['rows']:,} activations of {result['model']}, "
        f"{result['bytes'] / 1e6:.1f} MB"
    )
    for location, width in result["locations"].items():
        print(f"  {location} [{width}]")
    location = next(iter(result["locations"]))
    print(
        f"Next: neuron-explainer train {result['store']} --model {result['model']} "
        f"--location {location} --num-tokens {result['rows']} --out RUN"
    )


# --- train ---


def run_train(args: argparse.Namespace) -> Result:
    """Train a dictionary for each location meant; a run that was interrupted is gone on with."""
    from neuron_explainer.activations import open_buffer
    from neuron_explainer.dictionaries import train, train_many

    config, data, source, out = _settings(args)
    model = args.model or config.model_name
    context = open_model(model, args.device)
    config = dataclasses.replace(config, model_name=context.model_name, device=args.device)
    configs = _configs(context, config)
    record = {
        "model": model or "tiny-tales",
        "source": source if files.is_remote(source) else str(Path(source).resolve()),
        "data": dataclasses.asdict(data),
    }
    options = {"log_to": args.log_to, "progress": not args.json, "record": record}
    places, pair = list(configs), None
    if config.transcoder:
        pair = places[0], config.output_location or ""
        places.append(pair[1])
    with open_buffer(context, source, places, data, config.batch_size, pair=pair) as batches:
        if len(configs) == 1:
            train(next(iter(configs.values())), batches, out, **options)
        else:
            by_location: Any = batches  # mappings, since there are several
            train_many(configs, by_location, out, **options)
        waited, forward = batches.waited_s, batches.forward_s
    finished = files.read_json(Path(out) / "finished.json")
    return {
        "run": out,
        "locations": list(configs),
        "steps": finished["step"],
        "seconds_in_model": round(forward, 1),
        "seconds_waiting": round(waited, 1),
        "metrics": finished["metrics"],
    }


def _settings(args: argparse.Namespace) -> "tuple[TrainConfig, Any, str, str]":
    """What to train, on what data, from which source, to which folder."""
    from neuron_explainer.activations import DataConfig
    from neuron_explainer.dictionaries import TrainConfig
    from neuron_explainer.dictionaries.flags import from_flags
    from neuron_explainer.dictionaries.params_json import read_params

    data = from_flags(args, DataConfig)
    source, out = args.source, args.out
    if args.params is None:
        config = from_flags(args, TrainConfig, args.config)
    else:
        if args.config is not None:
            raise InputError("give --config or --params, not both.")
        params = read_params(args.params)
        config = params.config
        data = dataclasses.replace(
            data,
            context_length=params.data["context_length"],
            windows_per_forward=params.data["llm_batch_size"],
        )
        source = source or params.data["dataset_name"]
        out = out or params.data["save_dir"]
        args.device = args.device or config.device
    if source is None or out is None:
        raise InputError("train needs a text or store to learn from, and --out, a folder to write.")
    if config.location is None:
        raise InputError(
            "--location is missing: which activations to learn, such as 1/mlp.post_act."
        )
    return config, data, source, out


def _configs(context: "ModelContext", config: "TrainConfig") -> "dict[str, TrainConfig]":
    """A config for each single location that ``config.location`` means."""
    from neuron_explainer.models.locations import ActivationLocation

    assert config.location is not None
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
    print(
        f"Next: neuron-explainer evaluate {result['run']}; neuron-explainer report {result['run']}"
    )
