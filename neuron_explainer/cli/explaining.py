"""Explaining units, and what explanations are worth: explain and score."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_explainer.cli.common import Result, add_verb, option, positive, say
from neuron_explainer.cli.inspecting import STORE_HELP, model_of_store_options, opened
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.tables import text_table

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions
    from neuron_explainer.analysis.explaining.examples import SetConfig
    from neuron_explainer.analysis.explaining.explanation import Explanation, Score
    from neuron_explainer.analysis.explaining.methods import Explain
    from neuron_explainer.analysis.explaining.reading import Reading
    from neuron_explainer.analysis.explaining.work import Scorer, Step
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.cli.asking import Asked
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

SAMPLE = 200
METHODS = ("rules", "tokens", "logits")
PROMPTS = ("marked", "marked-logits", "contrastive", "token-pairs")
SCORERS = ("detection", "fuzzing", "simulation", "embedding")
JUDGED = ("max-token", "intruder", "generation")
"""Scorers that only a language model can answer."""
OWN_MODEL = ("surprisal", "intervention")
"""Scorers that run the model of the latents. Generation does too, on texts that a language model wrote."""
_LONGEST = 60  # characters of an explanation in a table


def register(verbs: Any) -> None:
    """Declare the verbs and their options."""
    explain = add_verb(
        verbs,
        "explain",
        "what latents respond to, and how good that is",
        run_explain,
        show_explain,
        _declare_judge,
        example="neuron-explainer explain tiny-tales/ae-resid-delta-mlp/2 --sample 50",
    )
    _common_options(explain)
    explain.add_argument(
        "--method",
        choices=[*METHODS, *PROMPTS],
        help="rules: tokens, n-grams, parts of words, places; tokens: the most active tokens; logits: what "
        "the latent promotes (default: rules). With --endpoint, what the language model is shown: marked: "
        "texts with active tokens marked; marked-logits: and what the latent promotes; contrastive: and "
        "texts that are alike where it is silent; token-pairs: tokens with their values (default: marked)",
    )
    explain.add_argument("--no-score", action="store_true", help="explain only")
    score = add_verb(
        verbs,
        "score",
        "what explanations are worth, beside floors",
        run_score,
        show_explain,
        _declare_judge,
        example="neuron-explainer score tiny-tales/ae-resid-delta-mlp/2",
    )
    _common_options(score)
    score.add_argument(
        "--method", metavar="NAME", help="explanations of this method (default: the latest ones)"
    )


def _declare_judge(verb: argparse.ArgumentParser) -> None:
    from neuron_explainer.cli.asking import judge_options

    judge_options(verb)


def _common_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("store", metavar="STORE", help=STORE_HELP)
    verb.add_argument("--latents", nargs="+", type=int, metavar="N", help="these units")
    verb.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help=f"so many random ones of those that are active (default: {SAMPLE}; for score, all that are "
        "explained)",
    )
    verb.add_argument(
        "--scorers",
        nargs="+",
        choices=[*SCORERS, *OWN_MODEL, *JUDGED],
        metavar="NAME",
        help=f"some of {', '.join(SCORERS)} (default: these), and of {' and '.join(OWN_MODEL)} (default for "
        "logits), which run the model; with --endpoint a language model answers the first three, and also "
        f"{' and '.join(JUDGED)} (default: detection, fuzzing, embedding)",
    )
    option(verb, "--seed", "seed of the choice of texts and units", 0, "N")
    option(verb, "--train", "active texts to explain from", 40, "N", positive)
    option(verb, "--test", "active texts to score on", 50, "N", positive)
    option(
        verb, "--most-tokens", "tokens that are read again with the model", 500_000, "N", positive
    )
    option(verb, "--top", "lines of the table", 20, "N", positive)
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )
    model_of_store_options(verb)


# --- explain ---


def run_explain(args: argparse.Namespace) -> Result:
    """Explain latents, score the explanations on texts that they were not made from, and print each score
    beside what trivial and random competitors get. Without --endpoint no language model is asked, and
    nothing leaves this machine. The store's text is read again with the model, to know where a latent is
    not active; --no-model uses what the store keeps. What is done is kept in the workspace: the same
    command continues."""
    from neuron_explainer.analysis.explaining.work import explain_units

    store, config, units = _chosen(args)
    asked = _asked(args, store)
    args.method = args.method or ("rules" if asked is None else "marked")
    if args.dry_run and asked is None:
        args.show = show_plan
        return _plan(args, store, units)
    logits = args.method in ("logits", "marked-logits")
    parts = _model_parts(args, store, units, logits, asked)
    reading, directions = parts.reading, parts.directions
    by_model = asked is not None and args.method in PROMPTS
    explain = asked.explain(args.method, directions) if asked is not None and by_model else None
    explained = explain_units(
        store,
        units,
        explain or args.method,
        seed=args.seed,
        config=config,
        reading=reading,
        directions=directions,
        identity=asked.explaining(args.method) if asked is not None and by_model else None,
        save=not args.dry_run,
        workers=1 if asked is None else asked.workers,
        stop=None if asked is None else asked.stop,
    )
    steps = _watched(explained, args, "explaining", len(units))
    found = {s.unit: s.explanation for s in steps if s.explanation is not None}
    if found and not args.no_score:
        scored = _scored(args, store, list(found), config, parts, asked, found, explain)
        by_unit = {step.unit: step for step in scored}
        steps = [by_unit.get(step.unit, step) for step in steps]
    return _result(args, store, steps, parts, asked)


def run_score(args: argparse.Namespace) -> Result:
    """Score explanations that are in the store's workspace, on texts that they were not made from, and
    print each score beside what trivial and random competitors get."""
    store, config, units = _chosen(args, explained=True)
    asked = _asked(args, store)
    if args.dry_run and asked is None:
        args.show = show_plan
        return _plan(args, store, units)
    parts = _model_parts(args, store, units, False, asked)
    known = {}
    for unit in units:
        if explained := store.explanations(unit, args.method):
            known[unit] = explained[0].explanation
    steps = _scored(args, store, units, config, parts, asked, known, None)
    return _result(args, store, steps, parts, asked)


def _scored(
    args: argparse.Namespace,
    store: "ExampleStore",
    units: Sequence[int],
    config: "SetConfig",
    parts: "_ModelParts",
    asked: "Asked | None",
    explanations: "Mapping[int, Explanation]",
    explain: "Explain | None",
) -> "list[Step]":
    from neuron_explainer.analysis.explaining.work import COMPETITORS, rule_scorer, score_units

    names = _scorers_of(args, asked)
    own = [name for name in names if name in (*OWN_MODEL, "generation")]
    plain = [name for name in names if name not in own]
    scorers = (
        {name: rule_scorer(name) for name in plain}
        if asked is None
        else asked.scorers(plain, rule_scorer)
    )
    if own:
        found = {**scorers, **_own_model_scorers(args, store, own, parts, asked, explanations)}
        scorers = {name: found[name] for name in names}
    scored = score_units(
        store,
        units,
        scorers,
        method=args.method,
        explanations=explanations,
        seed=args.seed,
        config=config,
        reading=parts.reading,
        identity=None if asked is None else asked.scoring(names),
        save=not args.dry_run,
        workers=1 if asked is None else asked.workers,
        stop=None if asked is None else asked.stop,
        competitors=COMPETITORS if asked is None else asked.options.competitors,
        explain=explain,
    )
    return _watched(scored, args, "scoring", len(units))


def _asked(args: argparse.Namespace, store: "ExampleStore") -> "Asked | None":
    """The endpoint that is asked; None if none is, and then nothing may need one."""
    from neuron_explainer.cli.asking import asked_of

    asked = asked_of(args, store)
    needs = [args.method] if args.method in PROMPTS and args.verb == "explain" else []
    needs += [name for name in args.scorers or () if name in JUDGED]
    if asked is None and needs:
        raise InputError(
            f"{' and '.join(needs)}: a language model is asked; give --endpoint URL and --judge NAME."
        )
    return asked


def _chosen(
    args: argparse.Namespace, explained: bool = False
) -> "tuple[ExampleStore, SetConfig, list[int]]":
    """The store, the settings of example sets, and the units."""
    from neuron_explainer.activations.corpus import permutation
    from neuron_explainer.analysis.explaining.examples import SetConfig, check_set_seed
    from neuron_explainer.analysis.store import ExampleStore

    store = ExampleStore.open(args.store)
    check_set_seed(args.seed)  # here, before the model reads anything
    config = SetConfig(train=args.train, test=args.test)
    if args.latents is not None:
        if args.sample is not None:
            raise InputError("give --latents or --sample.")
        for unit in args.latents:
            _ = store[unit]  # an error if there is no such unit
        return store, config, list(dict.fromkeys(args.latents))
    some = store.alive.tolist()
    if not some:
        raise InputError(
            f"{store.path}: no {store.kind} was ever active; there is nothing to explain."
        )
    if explained:
        some = store.workspace.explained_units(args.method)
        if not some:
            raise InputError(
                f"{store.path} has no explanations{f' by {args.method}' if args.method else ''} yet; "
                "neuron-explainer explain makes some."
            )
    number = args.sample or (len(some) if explained else SAMPLE)
    chosen = permutation(len(some), args.seed)[:number].tolist()
    return store, config, sorted(some[i] for i in chosen)


class _ModelParts(NamedTuple):
    """What the model is needed for; all None where it was not asked."""

    why: str
    """Why it was not asked."""
    context: "ModelContext | None" = None
    autoencoder: "Autoencoder | None" = None
    reading: "Reading | None" = None
    directions: "Directions | None" = None


def _model_parts(
    args: argparse.Namespace,
    store: "ExampleStore",
    units: Sequence[int],
    logits: bool,
    asked: "Asked | None",
) -> _ModelParts:
    if args.no_model:
        if logits:
            raise InputError(f"--method {args.method} reads the model; leave --no-model out.")
        return _ModelParts("--no-model")
    if asked is not None and not args.dry_run:
        asked.endpoint.check()  # the model takes a while to read, all in vain without a server
    try:
        context, autoencoder = opened(store, args.model, args.autoencoder, args.device)
    except NeuronExplainerError as error:
        if logits:
            raise
        return _ModelParts(str(error))
    from neuron_explainer.analysis.explaining.reading import read_again

    reading = read_again(
        store,
        units,
        context,
        autoencoder,
        seed=args.seed,
        most_tokens=args.most_tokens,
        progress=not args.json,
    )
    directions = _directions(store, context, autoencoder) if logits else None
    return _ModelParts("", context, autoencoder, reading, directions)


def _directions(
    store: "ExampleStore", context: "ModelContext", autoencoder: "Autoencoder | None"
) -> "Directions":
    from neuron_explainer.analysis.directions import Directions

    if autoencoder is None:
        return Directions(context, store.location)
    target = None if autoencoder.is_transcoder else store.location
    return Directions(context, autoencoder, location=target)


def _own_model_scorers(
    args: argparse.Namespace,
    store: "ExampleStore",
    names: Sequence[str],
    parts: _ModelParts,
    asked: "Asked | None",
    explanations: "Mapping[int, Explanation]",
) -> "dict[str, Scorer]":
    from neuron_explainer.analysis.explaining.model_scorers import model_scorers

    if parts.context is None:
        raise InputError(
            f"{' and '.join(names)}: the model is needed, and was not asked ({parts.why})."
        )
    found = list(explanations.values())
    scorers = model_scorers(names, store, parts.context, parts.autoencoder, found, args.seed)
    if asked is not None and "generation" in names:
        scorers["generation"] = asked.generation(store, parts.context, parts.autoencoder)
    return scorers


def _scorers_of(args: argparse.Namespace, asked: "Asked | None") -> list[str]:
    if args.scorers is not None:
        return list(dict.fromkeys(args.scorers))
    if args.method == "logits" and args.verb == "explain":
        return ["intervention", "embedding"]
    # A model is asked about each text of a simulation by itself: that is for those who want it.
    return [name for name in SCORERS if asked is None or name != "simulation"]


def _watched(steps: "Iterator[Step]", args: argparse.Namespace, what: str, n: int) -> "list[Step]":
    """All steps, with a bar while they are made."""
    from neuron_explainer.progress import progress_bar

    found = []
    try:
        for step in progress_bar(steps, total=n, desc=what, disable=args.json):
            found.append(step)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {len(found)} of {n} are kept in the workspace; the same command continues",
            file=sys.stderr,
        )
        raise
    return found


# --- what is printed ---


def _plan(args: argparse.Namespace, store: "ExampleStore", units: Sequence[int]) -> Result:
    known = sum(bool(store.explanations(unit, args.method)) for unit in units)
    read = 0 if args.no_model else min(args.most_tokens, len(store.tokens.corpus.tokens))
    return {
        "store": str(store.path),
        "n_units": len(units),
        "n_explained": known,
        "texts_to_explain_from": 2 * args.train,
        "texts_to_score_on": 2 * args.test,
        "tokens_to_read_with_the_model": read,
        "workspace": str(store.workspace.path),
        "requests": 0,
    }


def show_plan(result: Result) -> None:
    """What would be done."""
    known = f"{result['n_explained']:,} of them explained already"
    say(f"{result['n_units']:,} units of {result['store']}, {known}")
    say(f"{result['texts_to_explain_from']} texts to explain each from, at most")
    say(f"{result['texts_to_score_on']} texts to score each explanation on, at most")
    say(f"{result['tokens_to_read_with_the_model']:,} tokens to read again with the model")
    say(f"results go to {result['workspace']}")
    say(f"{result['requests']} requests: nothing leaves this machine")


def _result(
    args: argparse.Namespace,
    store: "ExampleStore",
    steps: "Sequence[Step]",
    parts: _ModelParts,
    asked: "Asked | None" = None,
) -> Result:
    from neuron_explainer.analysis.explaining.explanation import as_dict

    if asked is not None and args.dry_run:
        args.show = show_asking

    units = []
    for step in steps:
        explanation = None if step.explanation is None else as_dict(step.explanation)
        scores = [_without_answers(as_dict(score)) for score in step.scores]
        row = {"unit": step.unit, "explanation": explanation, "scores": scores}
        units.append(row | ({"error": step.error} if step.error else {}))
    return {
        "store": str(store.path),
        "name": store.name,
        "kind": store.kind,
        "given": args.store,
        "method": args.method,
        "n_units": len(steps),
        "n_explained": sum(step.explanation is not None for step in steps),
        "n_reused": sum(step.reused for step in steps),
        "tokens_read": 0 if parts.reading is None else parts.reading.n_tokens,
        "no_model": parts.why or None,
        "workspace": str(store.workspace.path),
        "summary": _summary([score for step in steps for score in step.scores]),
        "units": units,
        "top": args.top,
        "asked": None if asked is None else asked.result(),
    }


def _without_answers(score: Result) -> Result:
    return {name: value for name, value in score.items() if name != "answers"}


def _summary(scores: "Sequence[Score]") -> list[Result]:
    """For each scorer the medians over the units, and how many beat every floor."""
    import numpy as np

    found = []
    for name in dict.fromkeys(score.name for score in scores):
        some = [score for score in scores if score.name == name and score.value is not None]
        if not some:
            continue
        floors: dict[str, list[float]] = {}
        for score in some:
            for floor in score.floors:
                floors.setdefault(floor.name, []).append(floor.value)
        beat = [
            (score.value or 0.0) - score.floor.value > (score.smallest_difference or 0.0)
            for score in some
            if score.floor is not None
        ]
        found.append(
            {
                "name": name,
                "metric": some[0].metric,
                "n": len(some),
                "median": float(np.median([score.value for score in some])),
                "floors": {floor: float(np.median(values)) for floor, values in floors.items()},
                "smallest_difference": float(
                    np.median([score.smallest_difference or 0.0 for score in some])
                ),
                "above_all_floors": sum(beat),
            }
        )
    return found


def show_explain(result: Result) -> None:
    """The explanations, best first, and the medians of each scorer beside its floors."""
    _show_units(result)
    for line in _summary_lines(result["summary"]):
        say(line)
    failed = [each for each in result["units"] if each.get("error")]
    if failed:
        say(f"\n{len(failed)} without a result, such as: {failed[0]['error']}")
    if result["no_model"]:
        say(
            f"\nThe model was not asked ({result['no_model']}): random texts are taken to be inactive, and "
            "there is no random autoencoder."
        )
    if result["asked"] is not None:
        _show_asked(result)
    done = [each for each in result["units"] if each["explanation"]]
    if done:
        say(f"\nkept in {result['workspace']}")
        say(f"Next: neuron-explainer inspect {result['given']} {max(done, key=_lead)['unit']}")


def show_asking(result: Result) -> None:
    """What would be asked of the endpoint."""
    say(f"{result['n_units']:,} units of {result['store']}")
    _show_asked(result)


def _show_asked(result: Result) -> None:
    from neuron_explainer.cli.asking import show_asked

    show_asked(result["asked"])


def _show_units(result: Result) -> None:
    from neuron_explainer.analysis.highlights import visible

    explained = [each for each in result["units"] if each["explanation"]]
    order = sorted(explained, key=lambda each: -_lead(each))[: result["top"]]
    if not order:
        return
    rows = []
    for each in order:
        score = each["scores"][0] if each["scores"] else None
        text = visible(each["explanation"]["text"])
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        rows.append([str(each["unit"]), text, *_cells(score)])
    first = next((each["scores"][0]["name"] for each in order if each["scores"]), "score")
    head = [result["kind"], "explanation", first, "95 %", "highest floor", "", "tells apart"]
    wide = max(len(row[5]) for row in rows)
    rows = [[*row[:5], row[5].ljust(wide), row[6]] for row in rows]
    say(text_table(head, rows, n_left=2))
    if len(order) < len(explained):
        say(
            f"… the {len(order)} furthest above their floors, of {len(explained)}; --top shows more"
        )


def _lead(each: Result) -> float:
    """How far the first score is above its highest floor."""
    if not each["scores"] or each["scores"][0]["value"] is None:
        return -1.0
    score = each["scores"][0]
    return float(score["value"] - max((f["value"] for f in score["floors"]), default=0.0))


def _cells(score: Result | None) -> list[str]:
    if score is None or score["value"] is None:
        return ["–", "", "", "", ""]
    low, high = score["interval"]
    floor = max(score["floors"], key=lambda each: each["value"])
    return [
        f"{score['value']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{floor['value']:.2f}",
        floor["name"],
        f"{score['smallest_difference']:.2f}",
    ]


def _summary_lines(summary: list[Result]) -> list[str]:
    if not summary:
        return []
    names = list(dict.fromkeys(name for each in summary for name in each["floors"]))
    head = ["medians", "of", "value", *names, "tells apart", "above all floors"]
    rows = [
        [
            each["name"],
            each["metric"],
            f"{each['median']:.2f}",
            *(f"{each['floors'][n]:.2f}" if n in each["floors"] else "" for n in names),
            f"{each['smallest_difference']:.2f}",
            f"{each['above_all_floors']} of {each['n']}",
        ]
        for each in summary
    ]
    return ["", text_table(head, rows, n_left=2)]
