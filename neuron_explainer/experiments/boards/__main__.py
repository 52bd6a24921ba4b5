"""The commands of the board experiments; see README.md beside this file."""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuron_explainer import files
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.experiments.boards import demo, training
from neuron_explainer.experiments.boards.dataset import PARTS, BoardDataset
from neuron_explainer.experiments.boards.essay import CHAPTERS, chosen_chapters, write_essay
from neuron_explainer.experiments.boards.lea import LEA
from neuron_explainer.experiments.boards.measures import (
    BOARDS_PER_KIND,
    accuracies,
    accuracy_by_kind,
)
from neuron_explainer.experiments.boards.model_files import save_model
from neuron_explainer.experiments.boards.objects import KINDS, BoardConfig
from neuron_explainer.experiments.boards.seed_layout import read_seed_layout, write_seed_layout
from neuron_explainer.experiments.boards.speed import time_step
from neuron_explainer.experiments.boards.study import USUAL_BOARDS, Study
from neuron_explainer.experiments.boards.training import BoardTrainingConfig
from neuron_explainer.settings.flags import add_flags, field_docs, from_flags
from neuron_explainer.tables import text_table


def run_train(args: argparse.Namespace) -> None:
    """Train a model, from its run's newest checkpoint if there is one."""
    boards = from_flags(argparse.Namespace(**vars(args) | {"seed": args.boards_seed}), BoardConfig)
    for number in range(args.batch):
        given = argparse.Namespace(**vars(args) | {"seed": args.train_seed + number})
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


def run_figures(args: argparse.Namespace) -> None:
    """Draw every figure of a run, and write the page that explains them."""
    chapters = chosen_chapters(args.only) if args.only else CHAPTERS
    page = write_essay(Study.of(*args.runs, boards=args.boards), args.out, chapters=chapters)
    print(f"wrote {page}")


def run_demo(args: argparse.Namespace) -> None:
    """Show a masked board, its reconstruction, a probe table and causal edits, with the package's models."""
    demo.run_demo(Study.of(*args.runs))


def run_evaluate(args: argparse.Namespace) -> None:
    """Print the accuracy of a run's model by kind of board and part of the data set."""
    stored = training.load_run(args.run)
    rows = []
    ways = {
        "from the board": False,
        **({"from words": True} if isinstance(stored.model, LEA) else {}),
    }
    for part in PARTS:
        for way, from_words in ways.items():
            found = accuracy_by_kind(
                *(stored.model, stored.dataset, part),
                n=args.boards,
                mask=args.mask,
                from_words=from_words,
            )
            for kind, a in found.items():
                figures = (a.hidden, a.objects, a.moved, a.cells, a.boards)
                cells = ("" if math.isnan(x) else f"{100 * x:.2f}" for x in figures)
                rows.append([part, kind, way, *cells, str(a.n_boards)])
    head = ["part", "kind", "drawn", "hidden %", "of objects %", "moved %", "all cells %"]
    print(
        "Shares of cells that are drawn right: hidden ones; hidden ones of objects; hidden ones of"
    )
    print(
        "roots where training never shows them; all. Then boards drawn wholly right, and their number."
    )
    print(text_table([*head, "boards %", "n"], rows, n_left=3, rule=True))


def run_export(args: argparse.Namespace) -> None:
    """Write a run's model, or that of its newest checkpoint, to a folder of its own."""
    there = args.out / "config.json"
    if there.is_file() and files.read_json(there).get("kind") == training.RUN_KIND:
        raise InputError(f"{args.out} is a run, not a model; choose another --out.")
    stored = training.load_run(args.run)
    dtype = getattr(torch, args.dtype)

    def write(folder: Path) -> None:
        record: dict[str, Any] = {}
        if own := stored.config.get("training"):
            record["training"] = {**own, "epochs_done": own.get("epochs_done", own["epochs"])}
        record["accuracies"] = accuracies(stored.model.to(dtype).float(), stored.dataset)
        save_model(
            *(stored.model, folder, stored.dataset, record), dtype=dtype, overwrite=args.overwrite
        )

    if args.overwrite:
        write(args.out)
    else:
        advice = "give --overwrite to replace it"
        with files.write_once(args.out, advice, lambda _: there.is_file()) as folder:
            write(folder)
    if log := training.thinned_log(args.run):
        with files.atomic_write(args.out / "log.jsonl") as temporary:
            temporary.write_text(log, "utf-8")
    print(f"wrote {args.out}")


def run_speed(args: argparse.Namespace) -> None:
    """Time a training step beside its matrix products."""
    rows = []
    for name in training.MODELS:
        config = BoardTrainingConfig(name, batch_size=args.batch_size)
        found = time_step(config, BoardDataset(), args.repeats)
        minutes = found.step * config.n_epochs * -(-config.boards_per_epoch // args.batch_size) / 60
        figures = (1e3 * found.step, 1e3 * found.products, found.ratio, found.rate / 1e9, minutes)
        rows.append([name, *(f"{x:.1f}" for x in figures)])
    head = ["model", "step ms", "products ms", "ratio", "GFLOP/s", "minutes for the default run"]
    print(text_table(head, rows, rule=True))
    print(f"{torch.get_num_threads()} threads")


def run_boards(args: argparse.Namespace) -> None:
    """Make a data set of boards and save it; show a board of each kind."""
    dataset = BoardDataset(from_flags(args, BoardConfig))
    if args.seed_layout and args.out is None:
        raise InputError("--seed-layout says how to write a data set; say where with --out.")
    if args.seed_layout:
        # A killed command may have left some of the files; hidden ones are its temporary files.
        there = [path.name for path in args.out.iterdir()] if args.out.is_dir() else []
        if others := [name for name in there if not name.startswith((".", "dataset"))]:
            raise InputError(f"{args.out} holds {others[0]}, no data set; choose another --out.")
        whole = args.out / "dataset.json"  # the last file to be written
        if whole.exists() and read_seed_layout(whole).checksum != dataset.checksum:
            raise InputError(f"{args.out} holds another data set; choose another --out.")
        print(f"wrote {write_seed_layout(dataset, args.out)}")
    elif args.out is not None:
        with files.write_once(args.out, "choose another --out") as folder:
            dataset.save(folder)
        print(f"wrote {args.out}")
    print(dataset)
    rng = np.random.default_rng(dataset.config.seed)
    for kind in KINDS:
        print(f"\n{dataset.draw(kind, 'train', 1, rng)}")


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
    train.add_argument(
        "--boards-seed", type=int, default=0, help="random seed of the data set (default: 0)"
    )
    _add_board_flags(train, leave_out=("seed", "split"))
    _add_looking(command)
    speed = command("speed", run_speed)
    speed.add_argument("--batch-size", type=int, default=64, help="boards of a step (default: 64)")
    speed.add_argument("--repeats", type=int, default=10, help="steps to time (default: 10)")
    boards = command("boards", run_boards)
    boards.add_argument("--out", type=Path, default=None, help="folder (default: nothing is saved)")
    boards.add_argument(
        "--seed-layout",
        action="store_true",
        help="as the paper's program does: dataset.json and .npy",
    )
    _add_board_flags(boards, leave_out=("split",))
    return main


def _add_board_flags(sub: argparse.ArgumentParser, leave_out: tuple[str, ...]) -> None:
    """The settings of a data set of boards. ``--split`` has no choices: our own error knows the nearest."""
    sub.add_argument(
        "--split",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"{field_docs(BoardConfig)['split']} [balanced]",
    )
    add_flags(sub, BoardConfig, leave_out)


def _add_looking(command: Any) -> None:
    """The commands that look at trained models."""
    runs = "folder of a run or a model, one of each architecture at most (default: the package's models)"
    figures = command("figures", run_figures)
    figures.add_argument("runs", type=Path, nargs="*", metavar="RUN", help=runs)
    figures.add_argument(
        "--out", type=Path, required=True, help="folder for figures and index.html"
    )
    figures.add_argument(
        "--boards",
        type=int,
        default=USUAL_BOARDS,
        help="boards of each kind to measure on; fewer are quicker and less certain (default: %(default)s)",
    )
    figures.add_argument(
        "--only", nargs="+", default=[], metavar="FIGURE", help="draw these figures (default: all)"
    )
    demonstration = command("demo", run_demo)
    demonstration.add_argument("runs", type=Path, nargs="*", metavar="RUN", help=runs)
    evaluate = command("evaluate", run_evaluate)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a model")
    evaluate.add_argument(
        "--mask", type=float, default=0.2, help="share of hidden cells (default: 0.2)"
    )
    evaluate.add_argument(
        "--boards",
        type=int,
        default=BOARDS_PER_KIND,
        help="at most so many boards of each kind, each masked twice (default: %(default)s)",
    )
    export = command("export", run_export)
    export.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    export.add_argument("--out", type=Path, required=True, help="folder for the model")
    export.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    export.add_argument("--overwrite", action="store_true", help="replace a model that is there")


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
