"""What dictionaries are worth, and making them leaner: evaluate, prune, finetune, report, sentences."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb, positive
from neuron_explainer.cli.learning import any_model_options, data_options, open_model
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_explainer.activations import DataConfig, TokenWindows
    from neuron_explainer.activations.data_config import Part
    from neuron_explainer.evaluation.figures import Evaluation
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    evaluate = add_verb(
        verbs, "evaluate", "how good autoencoders are", run_evaluate, show_evaluate, data_options
    )
    _subject(evaluate, "what was set apart in training")
    evaluate.add_argument(
        "--ce-every",
        type=int,
        default=1,
        metavar="N",
        help="losses on every n-th batch only, on none if 0 (default: 1)",
    )
    evaluate.add_argument(
        "--compat",
        nargs="+",
        default=[],
        choices=["saelens_legacy", "dictionary_learning", "sparsify", "openai"],
        help="a peer's figures too, by its own definitions",
    )
    prune = add_verb(
        verbs, "prune", "leave out latents that do nothing", run_prune, show_prune, data_options
    )
    _subject(prune, "what it was trained on", "--out FOLDER")
    prune.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    for name, default, kept in (
        ("--min-frequency", 1e-6, "keep latents that fire on this share of tokens"),
        ("--min-max-activation", 1.0, "keep latents that fire this strongly once"),
        ("--min-decoder-norm", 0.99, "keep latents with this long a decoder row"),
    ):
        prune.add_argument(
            name, type=float, default=default, metavar="X", help=f"{kept} (default: {default:g})"
        )
    prune.add_argument("--renumber", action="store_true", help="move the latents kept together")
    finetune = add_verb(
        verbs,
        "finetune",
        "the decoder, against shrinkage",
        run_finetune,
        show_finetune,
        data_options,
    )
    _subject(finetune, "what it was trained on", "--out FOLDER")
    finetune.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    finetune.add_argument(
        "--lr", type=float, default=1e-3, metavar="X", help="learning rate (default: 0.001)"
    )
    finetune.add_argument(
        "--batch-size", type=positive, default=4096, metavar="N", help="tokens (default: 4096)"
    )
    report = add_verb(
        verbs, "report", "a run as one HTML page", run_report, show_report, data_options
    )
    _subject(report, "what was set apart in training")
    report.add_argument(
        "--out", metavar="FILE", help="file to write (default: report.html in the run's folder)"
    )
    _register_sentences(verbs)


def _subject(verb: argparse.ArgumentParser, text: str, needed: str = "") -> None:
    """The autoencoders, and the text for them; its default is ``text``."""
    verb.usage = " ".join(["%(prog)s AUTOENCODER", needed, "[--text TEXT] [options]"])
    verb.add_argument(
        "autoencoder",
        metavar="AUTOENCODER",
        help="a run's folder, or an autoencoder's folder, file or URL",
    )
    _location_option(verb)
    verb.add_argument("--text", metavar="TEXT", help=f"text or folder of texts (default: {text})")
    any_model_options(verb, "the one that it was trained on, else tiny-tales")
    verb.add_argument(
        "--num-tokens",
        type=positive,
        default=200_000,
        metavar="N",
        help="stop with the batch that reaches so many (default: 200000)",
    )


def _location_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--location",
        metavar="PLACE",
        help="where its inputs come from, such as 1/mlp.post_act, if the autoencoder does not say",
    )


def _register_sentences(verbs: Any) -> None:
    sentences = add_verb(
        verbs, "sentences", "a table of sentences and their codes", run_sentences, show_sentences
    )
    sentences.usage = "%(prog)s CSV [--autoencoder NAME] [--layer N] [options]"
    sentences.add_argument("csv", metavar="CSV", help="CSV file with a header")
    sentences.add_argument(
        "--column",
        default="sentence",
        metavar="NAME",
        help="which column the sentences are in (default: sentence)",
    )
    any_model_options(sentences)
    sentences.add_argument(
        "--autoencoder",
        default="ae-resid-delta-mlp",
        metavar="NAME",
        help="name, run's folder, folder, file or URL (default: ae-resid-delta-mlp)",
    )
    _location_option(sentences)
    sentences.add_argument(
        "--layer", type=int, metavar="N", help="only this one (default: all that there are)"
    )
    sentences.add_argument("--bos", action="store_true", help="put the start token before each")
    sentences.add_argument(
        "--code",
        choices=["mean_of_codes", "code_of_mean"],
        default="mean_of_codes",
        help="a sentence's latents: mean of its tokens' codes, or the code of their mean "
        "(default: mean_of_codes)",
    )
    sentences.add_argument("--csv-out", metavar="FILE", help="write the table to this file too")


# --- what is measured, on what ---


class _Opened:
    """Autoencoders by name, their model, and text to measure on."""

    def __init__(self, args: argparse.Namespace, part: "Part") -> None:
        from neuron_explainer.activations import DataConfig
        from neuron_explainer.settings.flags import from_flags

        self.autoencoders, self.record = open_autoencoders(args.autoencoder, args.location)
        self.num_tokens = args.num_tokens
        origin = self.record.get("harvest") or self.record
        self.trained_on = origin.get("source_fingerprint")
        for name, value in origin.get("data", {}).items():  # unless flags say otherwise
            if name not in vars(args):
                setattr(args, name, value)
        self.config = from_flags(args, DataConfig)
        self.part: Part = part if args.text is None else "all"
        if self.part == "held_out":
            _check_split(origin.get("data", {}), self.config)
        text = args.text or origin.get("source")
        if text is None:
            raise InputError(
                f"{args.autoencoder} does not say what text it was trained on; give --text, a file "
                "or folder of text."
            )
        self.text: str = text
        recorded_name = {ae.model_name for ae in self.autoencoders.values()} - {None}
        name = args.model or origin.get("model") or next(iter(recorded_name), None)
        self.context: ModelContext = open_model(name, args.device)

    def windows(self) -> "TokenWindows":
        from neuron_explainer.activations import is_store, open_windows

        if is_store(self.text):
            raise InputError(
                f"{self.text} is a store of activations that does not say what text they are of; "
                "give --text, a file or folder of text."
            )
        windows = open_windows(self.context, self.text, self.config, part=self.part)
        if self.part == "held_out" and self.trained_on not in (
            None,
            windows.corpus.source_fingerprint,
        ):
            raise InputError(
                f"{self.text} is not what it was in training, so that what was held out then cannot be "
                "told: give --text, one that was not trained on."
            )
        return windows

    def token_batches(self) -> list[Any]:
        """Batches until ``num_tokens`` are reached."""
        batches, n_tokens = [], 0
        for batch in self.windows():
            batches.append(batch)
            n_tokens += batch.tokens.numel()
            if n_tokens >= self.num_tokens:
                break
        return batches

    def activations(self, autoencoder: "Autoencoder") -> "Iterator[Tensor | tuple[Tensor, Tensor]]":
        """Of the autoencoder's place, or pairs with its output's."""
        from neuron_explainer.activations import open_harvester

        if autoencoder.location is None:
            raise InputError("the autoencoder does not say where its inputs come from.")
        places = [autoencoder.location]
        if autoencoder.is_transcoder:
            if autoencoder.output_location is None:
                raise InputError("the transcoder does not say what its output stands for.")
            places.append(autoencoder.output_location)
        harvester = open_harvester(self.context, places, self.config)
        for batch in map(harvester, self.token_batches()):
            found = tuple(batch.activations[place] for place in places)
            yield found[0] if len(found) == 1 else (found[0], found[1])

    def save(self, autoencoder: "Autoencoder", out: str) -> None:
        """Save what came of the one there was, with what is known of its training."""
        if self.record:
            autoencoder.metadata["record"] = self.record
        autoencoder.save(out)

    def only(self) -> "Autoencoder":
        """The one autoencoder there is."""
        if len(self.autoencoders) > 1:
            raise InputError(
                "several autoencoders are there; name the folder of one of them: "
                + ", ".join(self.autoencoders)
            )
        return next(iter(self.autoencoders.values()))


def open_autoencoders(
    path: str, location: str | None = None
) -> "tuple[dict[str, Autoencoder], Result]":
    """By name: those of a run's folder with what the run recorded, or the one at a path, which is for
    ``location`` if that is given."""
    from neuron_explainer.dictionaries.runs import Run
    from neuron_explainer.models.autoencoder import Autoencoder

    run = None if files.is_remote(path) else Run.find(path)
    if run is None:
        autoencoder = Autoencoder.load(path, location=location)
        return {path: autoencoder}, _record_of(path, autoencoder)
    found = {str(folder): Autoencoder.load(folder) for folder in run.results.values()}
    return found, run.record


def _record_of(path: str, autoencoder: "Autoencoder") -> Result:
    """What is known of an autoencoder's training: by itself, or by the run whose folder it is in."""
    if "record" in autoencoder.metadata:
        return dict(autoencoder.metadata["record"])
    if files.is_remote(path):
        return {}
    from neuron_explainer.dictionaries.runs import Run

    run = Run.containing(path)
    return {} if run is None else run.record


def _check_out(folder: str) -> None:
    """An error, before anything is computed, if something is in the folder, or nothing can be."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{folder} is there and not empty; choose another --out.")
    files.check_writable(path)


def _check_split(recorded: Result, config: "DataConfig") -> None:
    """An error if flags would have other documents called held out than were in training."""
    for name in ("hold_out", "data_seed", "split", "column", "corpus_tokens"):
        if name in recorded and recorded[name] != getattr(config, name):
            raise InputError(
                f"--{name.replace('_', '-')} is part of what was held out in training ({recorded[name]!r}, "
                f"not {getattr(config, name)!r}): leave it out, or give --text."
            )


def _by_location(autoencoders: "dict[str, Autoencoder]") -> "dict[str, Autoencoder]":
    """Named by their places; where several are for one place, by their folders."""
    places = [str(ae.location) for ae in autoencoders.values() if ae.location is not None]
    return {
        place if places.count(place := str(ae.location)) == 1 else Path(name).name: ae
        for name, ae in autoencoders.items()
    }


# --- evaluate ---


def run_evaluate(args: argparse.Namespace) -> Result:
    """Measure autoencoders on text that they were not trained on."""
    from neuron_explainer.evaluation.figures import evaluation_table

    opened = _Opened(args, "held_out")
    found = _evaluate(opened, args.ce_every, args.compat, progress=not args.json)
    result: Result = {
        "autoencoder": args.autoencoder,
        "text": opened.text,
        "part": opened.part,
        "evaluations": {name: evaluation.to_dict() for name, evaluation in found.items()},
    }
    if not args.json:
        tables = [evaluation.table() for evaluation in found.values()]
        result["table"] = tables[0] if len(tables) == 1 else evaluation_table(found)
    return result


def _evaluate(
    opened: _Opened, ce_every: int, compat: list[str], progress: bool
) -> "dict[str, Evaluation]":
    from neuron_explainer.evaluation.evaluate import evaluate_all

    return evaluate_all(
        opened.context,
        _by_location(opened.autoencoders),
        opened.token_batches(),
        score_bos=opened.config.keep_bos,
        ce_every=ce_every,
        compat=compat,
        progress=progress,
    )


def show_evaluate(result: Result) -> None:
    """All figures of one autoencoder, the most looked-at ones of several."""
    print(f"{result['autoencoder']} on {result['text']} ({result['part'].replace('_', ' ')})")
    print(result["table"])
    if len(result["evaluations"]) > 1:
        print("All figures, and compat ones: --json")
    print(f"Next: neuron-explainer report {result['autoencoder']}")


# --- prune, finetune ---


def run_prune(args: argparse.Namespace) -> Result:
    """Leave out latents that fire too seldom, never strongly, or have next to no decoder."""
    from neuron_explainer.dictionaries.prune import prune

    _check_out(args.out)
    opened = _Opened(args, "training")
    autoencoder = opened.only()
    pruning = prune(
        autoencoder,
        opened.activations(autoencoder),
        min_frequency=args.min_frequency,
        min_max_activation=args.min_max_activation,
        min_decoder_norm=args.min_decoder_norm,
        keep_indices=not args.renumber,
    )
    opened.save(pruning.autoencoder, args.out)
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
    """What is left, and why."""
    print(
        f"{result['out']}: {result['n_kept']:,} of {result['n_latents']:,} latents, judged on "
        f"{result['n_tokens']:,} tokens (too rare {result['too_rare']:,}, too weak "
        f"{result['too_weak']:,}, decoder too short {result['too_short']:,})"
    )
    _show_next(result)


def _show_next(result: Result) -> None:
    # Text that was given may have nothing set apart.
    text = f" --text {result['text']}" if result["part"] == "all" else ""
    print(f"Next: neuron-explainer evaluate {result['out']}{text}")


def run_finetune(args: argparse.Namespace) -> Result:
    """Train scale, decoder and bias on the reconstruction alone; which latents fire stays."""
    from neuron_explainer.dictionaries.finetune import finetune_decoder

    _check_out(args.out)
    opened = _Opened(args, "training")
    autoencoder = opened.only()
    batches = _rebatched(opened.activations(autoencoder), args.batch_size)
    finetuned = finetune_decoder(autoencoder, batches, lr=args.lr, progress=not args.json)
    opened.save(finetuned, args.out)
    return {
        "autoencoder": args.autoencoder,
        "out": args.out,
        "text": opened.text,
        "part": opened.part,
        **finetuned.metadata["finetuned"],
    }


def _rebatched(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """The same rows in batches of one size; what is left over at the end is not used."""
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
    """Where it is."""
    print(f"{result['out']}: fine-tuned on {result['n_tokens']:,} tokens")
    _show_next(result)


# --- report ---


def run_report(args: argparse.Namespace) -> Result:
    """Write one self-contained page: curves, figures, what the latents look like."""
    from neuron_explainer.analysis.report import write_report
    from neuron_explainer.dictionaries.runs import Run

    opened = _Opened(args, "held_out")
    folder = Path(args.autoencoder)
    if not (args.out or folder.is_dir()):
        raise InputError(f"{args.autoencoder} is no folder to put a report in; give --out, a file.")
    out = Path(args.out) if args.out else folder / "report.html"
    files.check_writable(out)
    log = folder / "log.jsonl"
    write_report(
        out,
        title=folder.name,
        log=log if log.exists() else (),
        autoencoders=_by_location(opened.autoencoders),
        evaluations=_evaluate(opened, 1, [], progress=not args.json),
        settings={**opened.record, **Run(folder).dictionaries},
    )
    return {"report": str(out), "autoencoders": list(opened.autoencoders)}


def show_report(result: Result) -> None:
    """Where it is."""
    print(f"{result['report']}: open it in a browser")
    print(f"Next: neuron-explainer prune {result['autoencoders'][0]} --out FOLDER")


# --- sentences ---


def run_sentences(args: argparse.Namespace) -> Result:
    """Per sentence: mean, variance, maximum and its position, of activations and of latents."""
    from neuron_explainer.analysis import sentences

    if args.csv_out:
        if Path(args.csv_out).exists():
            raise InputError(f"{args.csv_out} is there; choose another --csv-out.")
        files.check_writable(args.csv_out)
    context = open_model(args.model, args.device)
    autoencoders = _named_autoencoders(args, context)
    texts = sentences.read_sentences(args.csv, args.column)
    found = sentences.summarize_sentences(context, texts, autoencoders, bos=args.bos)
    if args.csv_out:
        with files.atomic_write(args.csv_out) as path:
            path.write_text(sentences.to_csv(found, args.code), "utf-8")
    result: Result = {"csv": args.csv, "sentences": [dataclasses.asdict(each) for each in found]}
    return result if args.json else {**result, "table": sentences.to_table(found, args.code)}


def _named_autoencoders(
    args: argparse.Namespace, context: "ModelContext"
) -> "dict[str, Autoencoder]":
    """Those that ``--autoencoder`` and ``--layer`` mean."""
    from neuron_explainer.models.model_registry import make_autoencoder_context

    path = args.autoencoder
    if files.is_remote(path) or Path(path).exists():
        found = _by_location(open_autoencoders(path, args.location)[0])
    else:
        known = make_autoencoder_context(args.model or "tiny-tales", path, context.device)
        found = {
            str(known.location.at(layer)): known.get_autoencoder(layer)
            for layer in known.layer_indices
        }
    if args.layer is None:
        return found
    chosen = {n: ae for n, ae in found.items() if ae.location and ae.location.layer == args.layer}
    if not chosen:
        raise InputError(f"{path} has nothing for layer {args.layer}; it has {', '.join(found)}.")
    return chosen


def show_sentences(result: Result) -> None:
    """The table."""
    print(result["table"])
    print(
        "Next: --code code_of_mean, --csv-out FILE, --json; neuron-explainer latents 'a sentence'"
    )
