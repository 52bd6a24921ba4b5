"""The commands that make the embedded model ``tiny-tales``; see README.md beside this file."""

import argparse
import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.experiments.tiny_tales import (
    autoencoder_training,
    evaluation,
    model_training,
    reach,
)
from neuron_explainer.experiments.tiny_tales.data import (
    HELD_OUT_BOOKS,
    TrainingWindows,
    read_corpus,
    token_stream,
)
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
AUTOENCODERS = "autoencoders"


def model_config(n_vocab: int) -> TransformerConfig:
    """2.6 million parameters: GPT-2's architecture at a size that two CPU cores can train."""
    return TransformerConfig(
        enc=MODEL_NAME, ctx_window=256, d_model=192, n_layers=4, n_heads=6, n_vocab=n_vocab
    )


def run_tokenizer(args: argparse.Namespace) -> None:
    """Learn the vocabulary from the training books."""
    corpus = read_corpus(args.corpus)
    save_tokenizer(train_tokenizer(corpus.training.values()), args.run / TOKENIZER_FILE)


def run_train(args: argparse.Namespace) -> None:
    """Train the model, from the run's checkpoint where there is one, and store it in float16."""
    config = ModelTrainingConfig(steps=args.steps, decay_steps=args.decay_steps, seed=args.seed)
    enc = load_tokenizer(args.run / TOKENIZER_FILE)
    model = Transformer(
        model_config(enc.n_vocab),
        seed=config.seed,
        tokenizer=tokenizer_spec(args.run / TOKENIZER_FILE),
    )
    windows = TrainingWindows(
        token_stream(read_corpus(args.corpus).training, enc),
        model.cfg.ctx_window,
        config.batch_size,
        config.seed,
        enc.eot_token,
        config.bos_share,
    )
    model_training.train(ModelTrainer(model, config), windows, args.run)
    tokens = config.steps * config.batch_size * model.cfg.ctx_window
    model.metadata = {
        "training": {
            **_data_record(),
            **asdict(config),
            "optimiser": "Muon for hidden matrices, AdamW for the rest; bfloat16 autocast",
            "tokens": tokens,
            "epochs": round(tokens / len(windows.stream), 2),
        }
    }
    model.half().save(args.run / MODEL_NAME)


def run_autoencoders(args: argparse.Namespace) -> None:
    """Train autoencoders on the stored model, and store them in float16."""
    context = StandardModelContext(str(args.run / MODEL_NAME), device=torch.device("cpu"))
    enc = context.get_encoding()
    windows = TrainingWindows(
        token_stream(read_corpus(args.corpus).training, enc),
        context.n_context,
        autoencoder_training.WINDOWS_PER_FORWARD,
        args.seed,
        enc.eot_token,
    )
    configs = {
        str(place): autoencoder_training.train_config(
            place, autoencoder_training.size_of(place), args.steps, args.decay_steps, args.seed
        )
        for place in autoencoder_training.places(context, args.locations)
    }
    name = "+".join(sorted(args.locations)).replace("/", "-")
    found = autoencoder_training.train(context, windows, configs, args.run / f"training.{name}")
    found = autoencoder_training.without_rare(context, windows, found, n_batches=100)
    autoencoder_training.record_statistics(context, windows, found, n_batches=25)
    for name, autoencoder in found.items():
        training = autoencoder_training.training_record(configs[name], HELD_OUT_BOOKS)
        autoencoder.metadata = {"training": training}
        place = ActivationLocation.parse(name)
        folder = args.run / MODEL_NAME / AUTOENCODERS / place.path / str(place.layer)
        autoencoder.save(folder, torch.float16, overwrite=True)


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure a stored model and its autoencoders, and write the figures into their configs."""
    books = read_corpus(args.corpus).held_out
    model = Transformer.load(args.model, device="cpu", dtype=torch.float32)
    if not args.autoencoders_only:
        model_figures = evaluation.measure_model(model, books, model.enc)
        print(
            f"bits per byte {model_figures.bits_per_byte:.4f} "
            f"({model_figures.bits_per_byte_side_by_side:.4f} in windows side by side)"
        )
        evaluation.record(args.model, held_out=_figures_record(model_figures))
    if args.model_only:
        return
    wanted = {
        place
        for location in parse_locations(args.locations)
        for place in location.expand(model.cfg.n_layers)
    }
    stored = {
        location: found
        for location, found in evaluation.load_autoencoders(args.model / AUTOENCODERS).items()
        if location in wanted
    }
    ctx = model.cfg.ctx_window
    figures = evaluation.measure_autoencoders(
        model,
        {location: autoencoder for location, (_, autoencoder) in stored.items()},
        evaluation.held_out_windows(books, model.enc, ctx, ctx),
    )
    for location, (folder, _) in stored.items():
        evaluation.record(folder, held_out=_figures_record(figures[location]))
    print(evaluation.table(figures))


def run_reach(args: argparse.Namespace) -> None:
    """How much of the stored autoencoders' error is their encoders', on a sample of held-out text."""
    model = Transformer.load(args.model, device="cpu", dtype=torch.float32)
    enc, ctx = model.enc, model.cfg.ctx_window
    windows = evaluation.held_out_windows(read_corpus(args.corpus).held_out, enc, ctx, ctx)
    step = max(1, len(windows) // args.windows)
    tokens = torch.stack(
        [torch.from_numpy(w.tokens[:-1]) for w in windows[::step] if len(w.tokens) == ctx + 1]
    )
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


def _data_record() -> dict[str, Any]:
    return {
        "data": "35 public-domain books in English",
        "held_out_books": list(HELD_OUT_BOOKS),
        "date": datetime.date.today().isoformat(),
    }


def _figures_record(
    figures: evaluation.ModelFigures | evaluation.AutoencoderFigures,
) -> dict[str, Any]:
    return {
        **evaluation.rounded(figures),
        "books": list(HELD_OUT_BOOKS),
        "date": datetime.date.today().isoformat(),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m neuron_explainer.experiments.tiny_tales")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.add_argument(
            "--corpus", type=Path, required=True, help="folder of .txt files, one book each"
        )
        sub.set_defaults(run_command=run)
        return sub

    def training_command(
        name: str, run: Any, steps: int, decay_steps: int, seed: int
    ) -> argparse.ArgumentParser:
        sub = command(name, run)
        _add_run(sub)
        sub.add_argument("--steps", type=int, default=steps, help="in all (default: %(default)s)")
        sub.add_argument(
            "--decay-steps",
            type=int,
            default=decay_steps,
            help="last steps, over which the learning rate falls to zero (default: %(default)s)",
        )
        sub.add_argument("--seed", type=int, default=seed, help="(default: %(default)s)")
        return sub

    _add_run(command("tokenizer", run_tokenizer))
    training_command("train", run_train, steps=3800, decay_steps=1000, seed=0)
    autoencoders = training_command(
        "autoencoders", run_autoencoders, steps=8000, decay_steps=3200, seed=1
    )
    _add_locations(autoencoders)
    evaluate = command("evaluate", run_evaluate)
    evaluate.add_argument("--model", type=Path, required=True, help="folder of the stored model")
    _add_locations(evaluate)
    of_codes = command("reach", run_reach)
    of_codes.add_argument("--model", type=Path, required=True, help="folder of the stored model")
    of_codes.add_argument(
        "--windows", type=int, default=16, help="to measure on (default: %(default)s)"
    )
    part = evaluate.add_mutually_exclusive_group()
    part.add_argument("--model-only", action="store_true", help="leave the autoencoders out")
    part.add_argument("--autoencoders-only", action="store_true", help="leave the model out")
    return main


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--run", type=Path, required=True, help="folder for checkpoints and results of this run"
    )


def _add_locations(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--locations",
        nargs="+",
        default=autoencoder_training.PATHS,
        help="some only, such as mlp.post_act or 0/mlp.post_act: locations may have trainings of "
        "their own, and share the work out among processes (default: all)",
    )


def main(argv: list[str] | None = None) -> None:
    """Run one command; what a user can mend is said in one line."""
    args = parser().parse_args(argv)
    try:
        args.run_command(args)
    except NeuronExplainerError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
