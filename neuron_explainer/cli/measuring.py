"""What dictionaries are worth, and making them leaner: evaluate, prune, finetune, report, sentences."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.cli.common import Result, add_verb
from neuron_explainer.cli.learning import any_model_options, data_options, open_model
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_explainer.activations import TokenWindows
    from neuron_explainer.activations.data_config import Part
    from neuron_explainer.dictionaries.evaluation import Evaluation
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    evaluate = add_verb(
        verbs, "evaluate", "how good autoencoders are", run_evaluate, show_evaluate, data_options
    )
    _subject(evaluate)
    evaluate.add_argument("--ce-every", type=int, default=1, help="losses on every n-th batch only")
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
    _subject(prune)
    prune.add_argument("--out", required=True, help="folder to write")
    prune.add_argument("--min-frequency", type=float, default=1e-6, help="(default: 1e-6)")
    prune.add_argument("--min-max-activation", type=float, default=1.0, help="(default: 1)")
    prune.add_argument("--min-decoder-norm", type=float, default=0.99, help="(default: 0.99)")
    prune.add_argument("--renumber", action="store_true", help="move the latents kept together")
    finetune = add_verb(
        verbs,
        "finetune",
        "the decoder, against shrinkage",
        run_finetune,
        show_finetune,
        data_options,
    )
    _subject(finetune)
    finetune.add_argument("--out", required=True, help="folder to write")
    finetune.add_argument("--lr", type=float, default=1e-5, help="(default: 1e-5)")
    finetune.add_argument("--batch-size", type=int, default=4096, help="(default: 4096)")
    report = add_verb(
        verbs, "report", "a run as one HTML page", run_report, show_report, data_options
    )
    _subject(report)
    report.add_argument("--out", help="file to write (default: report.html in the run's folder)")
    _register_sentences(verbs)


def _subject(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("autoencoder", help="a run's folder, or an autoencoder's folder, file or URL")
    verb.add_argument("--text", help="to measure on (default: what the run set apart)")
    any_model_options(verb)
    verb.add_argument("--num-tokens", type=int, default=200_000, help="at most (default: 200000)")


def _register_sentences(verbs: Any) -> None:
    sentences = add_verb(
        verbs, "sentences", "a table of sentences and their codes", run_sentences, show_sentences
    )
    sentences.add_argument("csv", help="CSV file with a header")
    sentences.add_argument("--column", default="sentence", help="(default: sentence)")
    any_model_options(sentences)
    sentences.add_argument(
        "--autoencoder",
        default="ae-resid-delta-mlp",
        help="name, run's folder, folder, file or URL (default: ae-resid-delta-mlp)",
    )
    sentences.add_argument("--layer", type=int, help="(default: all that there are)")
    sentences.add_argument("--bos", action="store_true", help="put the start token before each")
    sentences.add_argument(
        "--code",
        choices=["mean_of_codes", "code_of_mean"],
        default="mean_of_codes",
        help="a sentence's latents: mean of its tokens' codes, or the code of their mean",
    )
    sentences.add_argument("--csv-out", help="write the table to this file too")


# --- what is measured, on what ---


class _Opened:
    """Autoencoders by name, their model, and text to measure on."""

    def __init__(self, args: argparse.Namespace) -> None:
        from neuron_explainer.activations import DataConfig
        from neuron_explainer.dictionaries.flags import from_flags

        self.autoencoders, self.record = open_autoencoders(args.autoencoder)
        self.num_tokens = args.num_tokens
        if self.num_tokens < 2:
            raise InputError(f"--num-tokens must be at least 2, found {self.num_tokens}.")
        recorded = self.record.get("data", {})
        for name, value in recorded.items():  # what the run did, unless flags say otherwise
            if name not in vars(args):
                setattr(args, name, value)
        self.config = from_flags(args, DataConfig)
        self.part: Part = "held_out" if args.text is None else "all"
        text = args.text or self.record.get("source")
        if text is None:
            raise InputError("--text is missing: a file or folder of text to measure on.")
        self.text: str = text
        recorded_name = {ae.model_name for ae in self.autoencoders.values()} - {None}
        name = args.model or self.record.get("model") or next(iter(recorded_name), None)
        self.context: ModelContext = open_model(name, args.device)

    def windows(self) -> "TokenWindows":
        from neuron_explainer.activations import is_store, open_windows

        if is_store(self.text):
            raise InputError(
                f"{self.text} is a store of activations, which has no text to run the model on; give "
                "--text."
            )
        return open_windows(self.context, self.text, self.config, part=self.part)

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

    def only(self) -> "Autoencoder":
        """The one autoencoder there is."""
        if len(self.autoencoders) > 1:
            raise InputError(
                "several autoencoders are there; name the folder of one of them: "
                + ", ".join(self.autoencoders)
            )
        return next(iter(self.autoencoders.values()))


def open_autoencoders(path: str) -> "tuple[dict[str, Autoencoder], Result]":
    """By name: those of a run's folder with what the run recorded, or the one at a path."""
    from neuron_explainer.models.autoencoder import Autoencoder

    config = Path(path) / "config.json"
    if files.is_remote(path) or not config.exists():
        return {path: Autoencoder.load(path)}, {}
    stored = files.read_json(config)
    if stored.get("kind") != "dictionary_training":
        return {path: Autoencoder.load(path)}, {}
    if not (Path(path) / "finished.json").exists():
        raise InputError(f"{path} is a run that has not finished; give its train command again.")
    folders = [Path(path) / "autoencoder", *sorted((Path(path) / "autoencoders").glob("*"))]
    found = {str(f): Autoencoder.load(f) for f in folders if f.exists()}
    return found, stored.get("record", {})


def _by_location(autoencoders: "dict[str, Autoencoder]") -> "dict[str, Autoencoder]":
    return {str(ae.location or name): ae for name, ae in autoencoders.items()}


# --- evaluate ---


def run_evaluate(args: argparse.Namespace) -> Result:
    """Measure autoencoders on text that they were not trained on."""
    opened = _Opened(args)
    found = _evaluate(opened, args.ce_every, args.compat, progress=not args.json)
    return {
        "autoencoder": args.autoencoder,
        "text": opened.text,
        "part": opened.part,
        "evaluations": {name: evaluation.to_dict() for name, evaluation in found.items()},
    }


def _evaluate(
    opened: _Opened, ce_every: int, compat: list[str], progress: bool
) -> "dict[str, Evaluation]":
    from neuron_explainer.dictionaries.evaluate import evaluate_all

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
    """A column an autoencoder."""
    for name, evaluation in result["evaluations"].items():
        print(f"{name} on {result['text']} ({result['part'].replace('_', ' ')})")
        _print_figures(evaluation)
    print(f"Next: neuron-explainer report {result['autoencoder']}")


def _print_figures(figures: Result, indent: str = "  ") -> None:
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{indent}{name:<32} {value:.6g}")
        elif isinstance(value, dict) and name != "density":
            print(f"{indent}{name}")
            _print_figures(value, indent + "  ")


# --- prune, finetune ---


def run_prune(args: argparse.Namespace) -> Result:
    """Leave out latents that fire too seldom, never strongly, or have next to no decoder."""
    from neuron_explainer.dictionaries.prune import prune

    opened = _Opened(args)
    autoencoder = opened.only()
    pruning = prune(
        autoencoder,
        opened.activations(autoencoder),
        min_frequency=args.min_frequency,
        min_max_activation=args.min_max_activation,
        min_decoder_norm=args.min_decoder_norm,
        keep_indices=not args.renumber,
    )
    pruning.autoencoder.save(args.out)
    counts = ("n_kept", "n_tokens", "too_rare", "too_weak", "too_short")
    return {
        "autoencoder": args.autoencoder,
        "out": args.out,
        "text": opened.text,
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
    print(f"Next: neuron-explainer evaluate {result['out']} --text {result['text']}")


def run_finetune(args: argparse.Namespace) -> Result:
    """Train scale, decoder and bias on the reconstruction alone; which latents fire stays."""
    from neuron_explainer.dictionaries.finetune import finetune_decoder

    opened = _Opened(args)
    autoencoder = opened.only()
    batches = _rebatched(opened.activations(autoencoder), args.batch_size)
    finetuned = finetune_decoder(autoencoder, batches, lr=args.lr, progress=not args.json)
    finetuned.save(args.out)
    return {
        "autoencoder": args.autoencoder,
        "out": args.out,
        "text": opened.text,
        **finetuned.metadata["finetuned"],
    }


def _rebatched(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """The same rows in batches of one size; what is left over at the end is not used."""
    import torch

    held: list[Any] = []
    for batch in batches:
        held.append(batch if isinstance(batch, tuple) else (batch,))
        sides = [torch.cat(side) for side in zip(*held, strict=True)]
        n_whole = len(sides[0]) // size
        for index in range(n_whole):
            some = tuple(side[index * size : (index + 1) * size] for side in sides)
            yield some[0] if len(some) == 1 else some
        held = [tuple(side[n_whole * size :] for side in sides)]


def show_finetune(result: Result) -> None:
    """Where it is."""
    print(f"{result['out']}: fine-tuned on {result['n_tokens']:,} tokens")
    print(f"Next: neuron-explainer evaluate {result['out']} --text {result['text']}")


# --- report ---


def run_report(args: argparse.Namespace) -> Result:
    """Write one self-contained page: curves, figures, what the latents look like."""
    from neuron_explainer.dictionaries.report import write_report

    opened = _Opened(args)
    folder = Path(args.autoencoder)
    out = Path(args.out) if args.out else folder / "report.html"
    log = folder / "log.jsonl"
    write_report(
        out,
        title=folder.name,
        log=log if log.exists() else (),
        autoencoders=_by_location(opened.autoencoders),
        evaluations=_evaluate(opened, 1, [], progress=not args.json),
        settings=opened.record,
    )
    return {"report": str(out)}


def show_report(result: Result) -> None:
    """Where it is."""
    print(f"{result['report']}: open it in a browser")


# --- sentences ---


def run_sentences(args: argparse.Namespace) -> Result:
    """Per sentence: mean, variance, maximum and its position, of activations and of latents."""
    from neuron_explainer.dictionaries import sentences

    context = open_model(args.model, args.device)
    autoencoders = _named_autoencoders(args, context)
    texts = sentences.read_sentences(args.csv, args.column)
    found = sentences.summarize_sentences(context, texts, autoencoders, bos=args.bos)
    if args.csv_out:
        with files.atomic_write(args.csv_out) as path:
            path.write_text(sentences.to_csv(found, args.code), "utf-8")
    return {
        "code": args.code,
        "rows": sentences.rows_of(found, args.code),
        "table": sentences.to_table(found, args.code),
    }


def _named_autoencoders(
    args: argparse.Namespace, context: "ModelContext"
) -> "dict[str, Autoencoder]":
    """Those that ``--autoencoder`` and ``--layer`` mean."""
    from neuron_explainer.models.model_registry import make_autoencoder_context

    path = args.autoencoder
    if files.is_remote(path) or Path(path).exists():
        found = _by_location(open_autoencoders(path)[0])
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
