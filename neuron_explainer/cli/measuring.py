"""Measuring and improving dictionaries: evaluate, prune, finetune, report, sentences."""

import argparse
import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.cli.open import (
    Opened,
    by_location,
    data_options,
    find_autoencoders,
    is_made_by,
    model_options,
    open_model,
)
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from neuron_explainer.analysis.report import Reported
    from neuron_explainer.analysis.sentences import SentenceSummary
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.evaluation.figures import Evaluation


FIRST_LOOK = 40_000
"""Tokens that evaluate and report measure on: seconds with the embedded model, on two cores."""


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    _register_evaluate(verbs)
    _register_prune(verbs)
    _register_finetune(verbs)
    _register_report(verbs)
    _register_sentences(verbs)


def _register_evaluate(verbs: Any) -> None:
    evaluate = add_verb(
        verbs,
        "evaluate",
        "how good autoencoders are",
        run_evaluate,
        show_evaluate,
        data_options,
        "neuron-explainer evaluate ae-resid-delta-mlp --text book.txt",
    )
    subject_options(evaluate, "what was held out in training", several=True, n_tokens=FIRST_LOOK)
    option(evaluate, "--ce-every", "measure losses on every n-th batch only, on none if 0", 1, "N")
    evaluate.add_argument(
        "--compat",
        nargs="+",
        default=[],
        choices=["saelens_legacy", "dictionary_learning", "sparsify", "openai"],
        help="a peer's figures too, by its own definitions",
    )
    evaluate.add_argument(
        "--saebench",
        metavar="FOLDER",
        help="write the figures there too, as result files of SAEBench's core evaluation",
    )


def _register_prune(verbs: Any) -> None:
    prune = add_verb(
        verbs,
        "prune",
        "leave out latents that do nothing",
        run_prune,
        show_prune,
        data_options,
        "neuron-explainer prune run --location 2/resid.torso.delta_mlp --out pruned",
    )
    subject_options(prune, "what it was trained on", "--out FOLDER")
    prune.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    for name, default, kept in (
        ("--min-frequency", 1e-6, "keep latents that fire on this share of tokens"),
        ("--min-max-activation", 1.0, "keep latents that fire at least this strongly once"),
        ("--min-decoder-norm", 0.99, "keep latents whose decoder direction is at least this long"),
    ):
        option(prune, name, kept, default, "X")
    prune.add_argument("--renumber", action="store_true", help="give the kept latents new numbers")


def _register_finetune(verbs: Any) -> None:
    finetune = add_verb(
        verbs,
        "finetune",
        "the decoder, against shrinkage",
        run_finetune,
        show_finetune,
        data_options,
        "neuron-explainer finetune pruned --batch-size 256 --out finetuned",
    )
    subject_options(finetune, "what it was trained on", "--out FOLDER")
    finetune.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    option(finetune, "--lr", "learning rate", 1e-3, "X")
    option(finetune, "--batch-size", "tokens", 4096, "N", type=positive)


def _register_report(verbs: Any) -> None:
    report = add_verb(
        verbs,
        "report",
        "a run as one HTML page",
        run_report,
        show_report,
        data_options,
        "neuron-explainer report ae-resid-delta-mlp --text book.txt --out report.html",
    )
    subject_options(report, "what was held out in training", n_tokens=FIRST_LOOK)
    report.add_argument(
        "--out", metavar="FILE", help="file to write (default: report.html in the run's folder)"
    )


def subject_options(
    verb: argparse.ArgumentParser,
    text: str,
    needed: str = "",
    several: bool = False,
    n_tokens: int = 200_000,
) -> None:
    """Declare the autoencoders and the text to run them on; ``text`` describes the default."""
    shown = "AUTOENCODER [AUTOENCODER ...]" if several else "AUTOENCODER"
    verb.usage = " ".join(["%(prog)s", shown, *needed.split(), "[--text TEXT] [options]"])
    verb.add_argument(
        "autoencoder",
        metavar="AUTOENCODER",
        nargs="+" if several else None,
        help="a name, a run's folder, or an autoencoder's folder, file or URL"
        + (" (several: a table to compare them)" if several else ""),
    )
    _location_option(verb)
    verb.add_argument("--text", metavar="TEXT", help=f"text or folder of texts (default: {text})")
    model_options(verb, "the one that it was trained on, else tiny-tales")
    option(
        verb,
        "--num-tokens",
        "stop with the batch that reaches this many tokens",
        n_tokens,
        "N",
        type=positive,
    )


def _location_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--location",
        metavar="PLACE",
        help="which one of several, such as 1/mlp.post_act; or where the inputs of one come from that "
        "does not say it",
    )


def _register_sentences(verbs: Any) -> None:
    sentences = add_verb(
        verbs,
        "sentences",
        "a table of sentences and their codes",
        run_sentences,
        show_sentences,
        example="neuron-explainer sentences sentences.csv --layer 2 --csv-out table.csv",
    )
    sentences.usage = "%(prog)s CSV [--autoencoder NAME] [--layer N] [options]"
    sentences.add_argument("csv", metavar="CSV", help="CSV file with a header")
    option(sentences, "--column", "which column the sentences are in", "sentence", "NAME")
    model_options(sentences, "the one that the autoencoder is for, else tiny-tales")
    option(
        sentences,
        "--autoencoder",
        "a name, a run's folder, or an autoencoder's folder, file or URL",
        "ae-resid-delta-mlp",
        "NAME",
    )
    _location_option(sentences)
    sentences.add_argument(
        "--layer", type=int, metavar="N", help="only this one (default: all that there are)"
    )
    sentences.add_argument("--bos", action="store_true", help="put the start token before each")
    option(
        sentences,
        "--code",
        "a sentence's latents: mean of its tokens' codes, or the code of their mean",
        "mean_of_codes",
        choices=["mean_of_codes", "code_of_mean"],
    )
    sentences.add_argument("--csv-out", metavar="FILE", help="write the table to this file too")


def _check_out(args: argparse.Namespace) -> None:
    """An error, before anything is computed, if ``--out`` cannot be written, or holds anything but what an
    earlier process with the same command may have left there."""
    path = Path(args.out)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_made_by(path, args)):
        raise InputError(f"{args.out} is there and not empty; choose another --out.")
    files.check_writable(path)


# --- evaluate ---


def run_evaluate(args: argparse.Namespace) -> Result:
    """Measure autoencoders on text that they were not trained on."""
    from neuron_explainer.evaluation.figures import evaluation_table

    compat = list(args.compat)
    if args.saebench is not None:
        files.check_writable(args.saebench)
        compat = list(dict.fromkeys([*compat, "saelens_legacy"]))
    opened = Opened(args, "held_out")
    found = _evaluate(opened, args.ce_every, compat, progress=not args.json)
    result: Result = {
        "autoencoder": opened.name,
        "text": opened.text,
        "part": opened.part,
        "measured_on": opened.measured_on(next(iter(found.values())).n_tokens),
        "evaluations": {name: evaluation.to_dict() for name, evaluation in found.items()},
    }
    if args.saebench is not None:
        result["saebench"] = _write_saebench(opened, found, Path(args.saebench))
    if not args.json:
        tables = [evaluation.table() for evaluation in found.values()]
        result["table"] = tables[0] if len(tables) == 1 else evaluation_table(found)
    return result


def _write_saebench(opened: Opened, found: "dict[str, Evaluation]", folder: Path) -> list[str]:
    """Write one file for each autoencoder, over one of the same name; returns their paths."""
    from neuron_explainer.evaluation.saebench_json import write_saebench

    files.make_folder(folder)
    autoencoders = by_location(opened.autoencoders)
    paths = []
    for name, evaluation in found.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '.', name).lstrip('.')}_eval_results.json"
        settings = {
            "text": opened.text,
            "part": opened.part,
            "model_name": opened.context.short_name,
            "exclude_special_tokens_from_reconstruction": not opened.config.keep_bos,
        }
        write_saebench(path, evaluation, autoencoders[name], name=name, settings=settings)
        paths.append(str(path))
    return paths


def _evaluate(
    opened: Opened, ce_every: int, compat: list[str], progress: bool
) -> "dict[str, Evaluation]":
    from neuron_explainer.evaluation.evaluate import evaluate_all

    return evaluate_all(
        opened.context,
        by_location(opened.autoencoders),
        opened.token_batches(),
        score_bos=opened.config.keep_bos,
        ce_every=ce_every,
        compat=compat,
        progress=progress,
    )


def show_evaluate(result: Result) -> None:
    """All figures of one autoencoder, or a table of the main figures of several."""
    say(f"{result['autoencoder']}: measured on {result['measured_on']}")
    say(result["table"])
    for path in result.get("saebench", ()):
        say(f"Written: {path}")
    if len(result["evaluations"]) > 1:
        say("All figures, and compat ones: --json")
    if " " not in result["autoencoder"]:
        say(f"Next: neuron-explainer report {result['autoencoder']}")


# --- prune, finetune ---


def run_prune(args: argparse.Namespace) -> Result:
    """Leave out latents that fire too seldom, never strongly, or have next to no decoder."""
    from neuron_explainer.dictionaries.prune import prune
    from neuron_explainer.progress import progress_bar

    _check_out(args)
    opened = Opened(args, "training")
    _, autoencoder = opened.only()
    batches = opened.activations(autoencoder)
    pruning = prune(
        autoencoder,
        progress_bar(batches, desc="pruning", unit="batch", disable=args.json),
        min_frequency=args.min_frequency,
        min_max_activation=args.min_max_activation,
        min_decoder_norm=args.min_decoder_norm,
        keep_indices=not args.renumber,
    )
    opened.save(pruning.autoencoder, args)
    counts = ("n_kept", "n_tokens", "too_rare", "too_weak", "too_short")
    return {
        "autoencoder": args.autoencoder,
        "out": args.out,
        "text": opened.text,
        "part": opened.part,
        "n_latents": autoencoder.n_latents,
        **{name: getattr(pruning, name) for name in counts},
    }


def show_prune(result: Result) -> None:
    """How many latents are left, and why the others went."""
    say(
        f"{result['out']}: {result['n_kept']:,} of {result['n_latents']:,} latents, judged on "
        f"{result['n_tokens']:,} tokens (too rare {result['too_rare']:,}, too weak "
        f"{result['too_weak']:,}, decoder too short {result['too_short']:,})"
    )
    _show_next(result)


def _show_next(result: Result) -> None:
    # Text that was given may have nothing set apart.
    text = f" --text {result['text']}" if result["part"] == "all" else ""
    say(f"Next: neuron-explainer evaluate {result['out']}{text}")


def run_finetune(args: argparse.Namespace) -> Result:
    """Train scale, decoder and bias on the reconstruction alone; the same latents fire as before."""
    from neuron_explainer.dictionaries.finetune import finetune_decoder

    _check_out(args)
    opened = Opened(args, "training")
    _, autoencoder = opened.only()
    batches = _rebatched(opened.activations(autoencoder), args.batch_size)
    finetuned = finetune_decoder(autoencoder, batches, lr=args.lr, progress=not args.json)
    opened.save(finetuned, args)
    return {
        "autoencoder": args.autoencoder,
        "out": args.out,
        "text": opened.text,
        "part": opened.part,
        **finetuned.metadata["finetuned"],
    }


def _rebatched(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """The same rows in batches of one size; rows left over at the end are dropped."""
    import torch

    held: list[Any] = []
    n_batches = 0
    for batch in batches:
        held.append(batch if isinstance(batch, tuple) else (batch,))
        sides = [torch.cat(side) for side in zip(*held, strict=True)]
        n_whole = len(sides[0]) // size
        n_batches += n_whole
        for index in range(n_whole):
            some = tuple(side[index * size : (index + 1) * size] for side in sides)
            yield some[0] if len(some) == 1 else some
        held = [tuple(side[n_whole * size :] for side in sides)]
    if not n_batches:
        raise InputError(
            f"{len(held[0][0]) if held else 0} tokens are less than one batch of {size}: give more "
            "text and --num-tokens, or a smaller --batch-size."
        )


def show_finetune(result: Result) -> None:
    """The new autoencoder's folder."""
    say(f"{result['out']}: fine-tuned on {result['n_tokens']:,} tokens")
    _show_next(result)


# --- report ---


def run_report(args: argparse.Namespace) -> Result:
    """Write one self-contained page: a verdict, figures, curves, what the latents look like."""
    from neuron_explainer.analysis.plots import check_matplotlib
    from neuron_explainer.analysis.report import write_report
    from neuron_explainer.dictionaries.runs import Run

    folder = Path(args.autoencoder)
    if not (args.out or folder.is_dir()):
        raise InputError(
            f"{args.autoencoder} is not a folder that could hold the report; give --out, a file."
        )
    out = Path(args.out) if args.out else folder / "report.html"
    files.check_writable(out)
    opened = Opened(args, "held_out")
    check_matplotlib()  # before anything is measured
    run = None if files.is_remote(args.autoencoder) else Run.find(folder)
    evaluations = _evaluate(opened, 1, [], progress=not args.json)
    measured_on = opened.measured_on(next(iter(evaluations.values())).n_tokens)
    write_report(
        out,
        _reported(opened, run, evaluations),
        title=f"Report: {folder.name}",
        measured_on=measured_on,
        log=run.log if run is not None and run.log.exists() else (),
        context=opened.context,
        settings=opened.record,
    )
    listed = list(opened.autoencoders)
    return {"report": str(out), "measured_on": measured_on, "autoencoders": listed}


def _reported(
    opened: Opened, run: "Run | None", evaluations: "dict[str, Evaluation]"
) -> "dict[str, Reported]":
    """What a report shows of each autoencoder, under the name that the run's log has for it."""
    from neuron_explainer.analysis.report import Reported
    from neuron_explainer.analysis.verdict import target_l0
    from neuron_explainer.dictionaries.config import TrainConfig
    from neuron_explainer.settings.formats import from_dict

    trained_as = {} if run is None else {str(path): name for name, path in run.results.items()}
    settings = {} if run is None else run.dictionaries
    found = {}
    for (path, autoencoder), (label, evaluation) in zip(
        opened.autoencoders.items(), evaluations.items(), strict=True
    ):
        name = trained_as.get(path, label)
        config = settings.get(name, {})
        if config:
            config = from_dict(TrainConfig, config).resolved(autoencoder.n_inputs)
        shown = name if len(trained_as) > 1 else label
        found[shown] = Reported(autoencoder, evaluation, target_l0(config), config)
    return found


def show_report(result: Result) -> None:
    """Where it is, and what was measured."""
    say(f"{result['report']}: open it in a browser")
    say(f"Measured on {result['measured_on']}")
    first = result["autoencoders"][0]
    if Path(first).exists():  # a name of the registry has its layer behind it
        say(f"Next: neuron-explainer prune {first} --out FOLDER")


# --- sentences ---


def run_sentences(args: argparse.Namespace) -> Result:
    """Per sentence: mean, variance, maximum and its position, of activations and of latents."""
    from neuron_explainer.analysis import sentences

    if args.csv_out:
        files.check_writable(args.csv_out)
    texts = sentences.read_sentences(args.csv, args.column)
    with contextlib.ExitStack() as stack:
        out = None
        if args.csv_out:
            possible = functools.partial(sentences.is_table_of, texts=texts)
            once = files.write_once(args.csv_out, "choose another --csv-out", possible)
            out = stack.enter_context(once)
        table = _sentences_table(args, texts)
        if out is not None:
            with files.atomic_write(out) as path:
                path.write_text(sentences.to_csv(table, args.code), "utf-8")
    result: Result = {"csv": args.csv, "sentences": [dataclasses.asdict(each) for each in table]}
    shown = {"table": sentences.to_table(table, args.code), "written": args.csv_out}
    return result if args.json else {**result, **shown}


def _sentences_table(args: argparse.Namespace, texts: list[str]) -> "list[SentenceSummary]":
    from neuron_explainer.analysis import sentences

    found = find_autoencoders(args.autoencoder, args.model, args.location)
    found = found if args.layer is None else found.at(None, args.layer)
    loaded = found.load()
    context = open_model(args.model or found.model_of(loaded), args.device)
    autoencoders = by_location(loaded)
    return sentences.summarize_sentences(context, texts, autoencoders, bos=args.bos)


def show_sentences(result: Result) -> None:
    """The table."""
    say(result["table"])
    if result["written"]:
        say(f"{result['written']}: the table as CSV")
    options = [] if result["written"] else ["--csv-out FILE"]
    options = ["--code code_of_mean", *options, "--json"]
    say(f"Next: {', '.join(options)}; neuron-explainer latents 'a sentence'")
