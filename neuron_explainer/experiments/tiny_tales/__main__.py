"""The commands that make the embedded model ``tiny-tales``; see README.md beside this file."""

import argparse
import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.activations import TokenWindows
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.evaluation import evaluate_all, evaluation_table
from neuron_explainer.experiments.tiny_tales import (
    autoencoder_training,
    evaluation,
    model_training,
    reach,
    stores,
)
from neuron_explainer.experiments.tiny_tales.data import (
    HELD_OUT_BOOKS,
    ModelBatches,
    data_record,
    read_corpus,
    token_corpus,
)
from neuron_explainer.experiments.tiny_tales.evaluation import WINDOWS_PER_BATCH
from neuron_explainer.experiments.tiny_tales.model_training import ModelTrainer, ModelTrainingConfig
from neuron_explainer.experiments.tiny_tales.tokenizer import (
    TOKENIZER_FILE,
    load_tokenizer,
    save_tokenizer,
    tokenizer_spec,
    train_tokenizer,
)
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.locations import ActivationLocation, parse_locations
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer, TransformerConfig

MODEL_NAME = "tiny-tales"
AUTOENCODERS, STORES = "autoencoders", "stores"


def model_config(n_vocab: int) -> TransformerConfig:
    """GPT-2's architecture at a size that two CPU cores can train: 2.6 million parameters."""
    return TransformerConfig(
        enc=MODEL_NAME, ctx_window=256, d_model=192, n_layers=4, n_heads=6, n_vocab=n_vocab
    )


def run_tokenizer(args: argparse.Namespace) -> None:
    """Learn the vocabulary from the training books."""
    corpus = read_corpus(args.corpus)
    save_tokenizer(train_tokenizer(corpus.training.values()), args.run / TOKENIZER_FILE)


def run_train(args: argparse.Namespace) -> None:
    """Train the model, from the run's newest checkpoint if there is one, and save it in float16."""
    config = ModelTrainingConfig(steps=args.steps, decay_steps=args.decay_steps, seed=args.seed)
    enc = load_tokenizer(args.run / TOKENIZER_FILE)
    model = Transformer(
        args.model_config(enc.n_vocab),
        seed=config.seed,
        tokenizer=tokenizer_spec(args.run / TOKENIZER_FILE),
    )
    ctx, size = model.cfg.ctx_window, config.batch_size
    corpus = token_corpus(read_corpus(args.corpus).training, enc)
    batches = ModelBatches(corpus, ctx, size, config.seed, enc.eot_token)
    tokens = config.steps * size * ctx
    model.metadata = {
        "training": {
            **data_record(),
            **asdict(config),
            "optimiser": "Muon for hidden matrices, AdamW for the rest; bfloat16 autocast",
            "tokens": tokens,
            "epochs": round(tokens / corpus.n_tokens, 2),
        }
    }
    trainer = ModelTrainer(model, config, args.run / MODEL_NAME)
    model_training.train(trainer, batches, args.run / "training.model")


def run_autoencoders(args: argparse.Namespace) -> None:
    """Train autoencoders on the stored model, and save them in float16."""
    context = StandardModelContext(str(args.run / MODEL_NAME), device=torch.device("cpu"))
    books = token_corpus(read_corpus(args.corpus).training, context.get_encoding())
    configs = {
        str(place): autoencoder_training.train_config(
            place,
            autoencoder_training.size_of(place),
            args.steps,
            args.decay_steps,
            args.seed,
            args.batch_size,
        )
        for place in autoencoder_training.places(context, args.locations)
    }
    source = autoencoder_training.activations_of_books(context, books, list(configs), args.seed)
    name = "+".join(sorted(args.locations)).replace("/", "-")
    found = autoencoder_training.train(
        source, configs, args.run / f"training.{name}", 256 * args.batch_size
    )
    found = autoencoder_training.without_rare(source, found, n_chunks=100)
    autoencoder_training.record_statistics(source, found, n_chunks=25)
    for name, autoencoder in found.items():
        training = autoencoder_training.training_record(configs[name])
        autoencoder.metadata = {"training": training}
        place = ActivationLocation.parse(name)
        folder = args.run / MODEL_NAME / AUTOENCODERS / place.path / str(place.layer)
        autoencoder.save(folder, torch.float16, overwrite=True)


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure a stored model and its autoencoders, and write the figures into their configs."""
    books = read_corpus(args.corpus).held_out
    context, model = _opened(args.model)
    if not args.autoencoders_only:
        figures = evaluation.measure_model(model, books, model.enc)
        print(
            f"bits per byte {figures.bits_per_byte:.4f} "
            f"({figures.bits_per_byte_side_by_side:.4f} in windows side by side)"
        )
        _record_figures(args.model, asdict(figures))
    if args.model_only:
        return
    wanted = {
        place
        for location in parse_locations(args.locations)
        for place in location.expand(model.cfg.n_layers)
    }
    stored = {
        str(location): found
        for location, found in evaluation.load_autoencoders(args.model / AUTOENCODERS).items()
        if location in wanted
    }
    found = evaluate_all(
        context,
        {name: autoencoder for name, (_, autoencoder) in stored.items()},
        _held_out_windows(books, model),
        ce_every=4,
    )
    for name, (folder, _) in stored.items():
        _record_figures(folder, evaluation.held_out_figures(found[name]))
    print(evaluation_table(found))


def run_reach(args: argparse.Namespace) -> None:
    """Measure how much of the stored autoencoders' error is their encoders', on some held-out text."""
    _, model = _opened(args.model)
    windows = _held_out_windows(read_corpus(args.corpus).held_out, model)
    rows = torch.cat([batch.tokens for batch in windows if batch.pad is None])
    tokens = rows[:: max(1, windows.n_windows // args.windows)]
    found = {}
    for location, (_, autoencoder) in evaluation.load_autoencoders(
        args.model / AUTOENCODERS
    ).items():
        x = model.capture(tokens, location)[location].detach().flatten(0, 1)
        activation = autoencoder.float().activation
        assert isinstance(activation, TopK)
        found[str(location)] = reach.reach(autoencoder, x, activation.k)
    print(f"FVU on {tokens.numel()} held-out tokens, by where the codes come from")
    print(reach.table(found))


def run_store(args: argparse.Namespace) -> None:
    """Let a stored model write text, and collate examples of its latents and neurons over this text; the
    same command continues."""
    context, model = _opened(args.model)
    length = min(args.length, model.cfg.ctx_window - 1)
    corpus = stores.written_corpus(context, args.documents, length, args.seed, progress=True)
    found = stores.make_stores(
        context, args.model / AUTOENCODERS, corpus, args.model / STORES, progress=True
    )
    for name, path in found.items():
        print(f"{name}: {path.stat().st_size / 1e6:.2f} MB")
    tokens = sum(path.stat().st_size for path in (args.model / STORES / "tokens").iterdir())
    total = tokens + sum(path.stat().st_size for path in found.values())
    print(f"{corpus.n_tokens:,} tokens; {total / 1e6:.2f} MB in all")


def _opened(folder: Path) -> tuple[StandardModelContext, Transformer]:
    """The stored model, in float32."""
    context = StandardModelContext(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    return context, context.get_or_create_model()


def _held_out_windows(books: Mapping[str, str], model: Transformer) -> TokenWindows:
    """The held-out books in windows side by side, in their order."""
    corpus = token_corpus(books, model.enc)
    return TokenWindows(corpus, model.cfg.ctx_window, WINDOWS_PER_BATCH, seed=None)


def _record_figures(folder: Path, figures: Mapping[str, float]) -> None:
    books, date = list(HELD_OUT_BOOKS), datetime.date.today().isoformat()
    held_out = {**evaluation.rounded(figures), "books": books, "date": date}
    evaluation.record(folder, held_out=held_out)


_DEFAULT = " (default: %(default)s)"
_OPTIONS: dict[str, dict[str, Any]] = {
    "--corpus": {"type": Path, "help": "folder of .txt files, one book each"},
    "--run": {"type": Path, "help": "folder for the checkpoints and results of this run"},
    "--model": {"type": Path, "help": "folder of the stored model"},
    "--steps": {"type": int, "help": "steps in all" + _DEFAULT},
    "--decay-steps": {
        "type": int,
        "help": "the learning rate falls to zero over the last so many steps" + _DEFAULT,
    },
    "--seed": {"type": int, "help": "random seed" + _DEFAULT},
    "--batch-size": {"type": int, "help": "activations per step" + _DEFAULT},
    "--windows": {"type": int, "help": "windows to measure on" + _DEFAULT},
    "--documents": {"type": int, "help": "texts to write" + _DEFAULT},
    "--length": {"type": int, "help": "tokens of a text" + _DEFAULT},
    "--locations": {
        "nargs": "+",
        "help": "only these, such as mlp.post_act or 0/mlp.post_act; each process can train some of them "
        "(default: all)",
    },
}
_PATHS, _BATCH = autoencoder_training.PATHS, autoencoder_training.BATCH


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m neuron_explainer.experiments.tiny_tales")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, *needed: str, **defaults: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for flag in needed:
            sub.add_argument(flag, required=True, **_OPTIONS[flag])
        for option, value in defaults.items():
            flag = f"--{option.replace('_', '-')}"
            sub.add_argument(flag, default=value, **_OPTIONS[flag])
        sub.set_defaults(run_command=run)
        return sub

    command("tokenizer", run_tokenizer, "--corpus", "--run")
    command("train", run_train, "--corpus", "--run", steps=3800, decay_steps=1000, seed=0)
    training = {"steps": 8000, "decay_steps": 3200, "seed": 1, "batch_size": _BATCH}
    command("autoencoders", run_autoencoders, "--corpus", "--run", **training, locations=_PATHS)
    evaluate = command("evaluate", run_evaluate, "--corpus", "--model", locations=_PATHS)
    part = evaluate.add_mutually_exclusive_group()
    part.add_argument("--model-only", action="store_true", help="leave the autoencoders out")
    part.add_argument("--autoencoders-only", action="store_true", help="leave the model out")
    command("reach", run_reach, "--corpus", "--model", windows=16)
    command("store", run_store, "--model", documents=1024, length=127, seed=0)
    return main


def main(
    argv: list[str] | None = None,
    model_config: Callable[[int], TransformerConfig] = model_config,
) -> None:
    """Run one command; an error that the user can correct is printed in one line.

    ``model_config`` gives the model's sizes from the size of its vocabulary.
    """
    args = parser().parse_args(argv, argparse.Namespace(model_config=model_config))
    try:
        args.run_command(args)
    except NeuronExplainerError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
