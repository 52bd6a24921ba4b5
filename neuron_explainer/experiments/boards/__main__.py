"""The commands of the board experiments; see README.md beside this file."""

import argparse
import logging
from pathlib import Path
from typing import Any

from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.experiments.boards import training
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.objects import BoardConfig
from neuron_explainer.experiments.boards.training import BoardTrainingConfig
from neuron_explainer.settings.flags import add_flags, from_flags

_THEIRS = ("epochs", "batch_size", "type", "model", "device")
"""Settings whose flags are those of the paper's program, or clash with them."""


def run_train(args: argparse.Namespace) -> None:
    """Train a model, from its run's newest checkpoint if there is one."""
    # --seed sets both seeds, and --boards-seed that of the boards alone.
    boards = from_flags(args, BoardConfig)
    for number in range(args.batch):
        given = argparse.Namespace(**vars(args))
        given.seed = args.train_seed + number
        config = from_flags(given, BoardTrainingConfig)
        folder = args.run or Path("runs") / f"boards-{config.model}-{config.type}"
        if args.batch > 1:
            folder = folder.with_name(f"{folder.name}-{number}")
        place = folder if args.save else None
        model = training.train(config, BoardDataset(boards), place, log_to=tuple(args.log_to))
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters"
            + (f" in {place}" if place else "")
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m neuron_explainer.experiments.boards")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run_command=run)
        return sub

    train = command("train", run_train)
    train.add_argument("--model", default="gpt", help="gpt or lea (default: %(default)s)")
    train.add_argument("--type", default="factor", help="factor or vanilla (default: %(default)s)")
    train.add_argument(
        *("--epoch", "--epochs"),
        dest="epochs",
        type=int,
        default=None,
        help="epochs (default: 2000 for gpt, 3000 for lea, which their curricula need)",
    )
    train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    train.add_argument(
        "--batch",
        type=int,
        default=1,
        help="train so many models, each from its own seed (default: 1)",
    )
    train.add_argument(
        "--save", type=int, choices=(0, 1), default=1, help="0: keep nothing on disk (default: 1)"
    )
    train.add_argument(
        "--run", type=Path, default=None, help="folder of the run (default: runs/boards-MODEL-TYPE)"
    )
    train.add_argument(
        "--seed", dest="train_seed", type=int, default=0, help="random seed (default: 0)"
    )
    train.add_argument("--log-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb")
    add_flags(train, BoardTrainingConfig, leave_out=("model", "type", "epochs", "device", "seed"))
    add_flags(train, BoardConfig, leave_out=("seed",))
    return main


def main(argv: list[str] | None = None) -> None:
    """Run one command; an error that the user can correct is printed in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(argv)
    try:
        if getattr(args, "batch", 1) < 1:
            raise InputError(f"--batch must be at least 1, found {args.batch}.")
        args.run_command(args)
    except NeuronExplainerError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
