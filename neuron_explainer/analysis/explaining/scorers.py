"""Scorers: how well an explanation predicts where its unit is active.

A scorer makes *trials* of the test examples of a set, and a ``predict`` function says of each text whether
the unit is active in it. That function is a rule (:mod:`.predictors`) or asks a judge, so that both are
counted in the same way. It sees a :class:`Text`, which does not tell whether the unit is active.

    detection    whole texts
    fuzzing      texts with marked tokens: are the right tokens marked?
    simulation   a value for each token: the correlation with the activations, over the tokens of all texts
    embedding    how near the explanation is to each text in a space of vectors: the area under the curve

A reply that cannot be read, and a request that failed, are counted apart and are no answer: they are
neither "not active" nor left out in silence.

Shape legend: ``s`` tokens of a text, ``n`` texts, ``w`` width of an embedding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining import metrics
from neuron_explainer.analysis.explaining.examples import ExampleSet, LabelledExample
from neuron_explainer.analysis.explaining.explanation import (
    FREE,
    Answer,
    Cost,
    Counts,
    Failure,
    Floor,
    Prediction,
    Score,
    Source,
)
from neuron_explainer.errors import InputError

Doubles = npt.NDArray[np.float64]
FUZZING_THRESHOLD = 0.3
"""Tokens with more than this share of a text's largest activation are marked."""
MARKED_WRONG = 0.0
"""The share of the trials of fuzzing without the right marks that are active texts with wrong marks."""


@dataclass(frozen=True, eq=False)
class Text:
    """What a rule or a judge sees of an example."""

    example: LabelledExample
    """Where the text comes from; only for scorers."""
    marked: tuple[int, ...] = ()
    """The places of the marked tokens, rising."""

    @property
    def id(self) -> int:
        """The id of the example."""
        return self.example.id

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """``[s]`` ids."""
        return self.example.example.tokens

    @property
    def position(self) -> int:
        """The place of the first token in its document."""
        return self.example.example.position

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each token writes."""
        return self.example.example.pieces

    @property
    def text(self) -> str:
        """The text as it stands in the corpus."""
        return b"".join(self.pieces).decode(errors="replace")


@dataclass(frozen=True, eq=False)
class Trial:
    """A question to ``predict``, and the right answer."""

    text: Text
    source: Source
    quantile: int

    @property
    def active(self) -> bool:
        """The right answer."""
        return self.source == "active"


Predict = Callable[[Sequence[Text]], Sequence[Prediction]]
"""Says of each text whether the unit is active in it (with marks: whether the marks are right)."""
Values = Sequence[float] | npt.NDArray[Any] | Failure | None
"""One value for each token of a text; None is a reply that cannot be read."""
Simulate = Callable[[Sequence[Text]], Sequence[Values]]
"""Says of each text how active the unit is at each token, ``[s]``, on any scale."""
Embed = Callable[[Sequence[str]], npt.NDArray[Any]]
"""The vectors of some texts, ``[n, w]``."""


@dataclass(frozen=True)
class JudgedBy:
    """Who judged, for the record of a score; the default is a rule."""

    model: str = ""
    prompt_hash: str = ""
    cost: Cost = FREE


RULE = JudgedBy()


# --- trials ---


def detection_trials(examples: ExampleSet) -> list[Trial]:
    """The test examples as they are."""
    return [Trial(Text(each), each.source, each.quantile) for each in examples.test]


def fuzzing_trials(
    examples: ExampleSet, *, threshold: float = FUZZING_THRESHOLD, wrong: float = MARKED_WRONG
) -> list[Trial]:
    """The test examples with marked tokens.

    In an active text the tokens above a share ``threshold`` of its largest activation are marked. In an
    inactive one as many random tokens are, as there are marks in active texts on average. The same set
    gives the same marks.

    Args:
        examples: the set.
        threshold: see above.
        wrong: the share of the inactive texts whose places active texts take, with as many marks as they
            should have, at tokens where the unit is not active.
    """
    # The second number keeps these draws apart from those of the example set.
    random = np.random.RandomState([examples.seed & 0xFFFFFFFF, 1, examples.unit])
    active = [each for each in examples.test if each.active]
    right = {each.id: _above(each, threshold) for each in active}
    size = math.ceil(np.mean([len(each) for each in right.values()])) if right else 1
    inactive = [each for each in examples.test if not each.active]
    n_wrong = min(round(wrong * len(inactive)), len(active) // 2)
    swapped = {each.id for each in active[len(active) - n_wrong :]}
    left_out = {each.id for each in inactive[len(inactive) - n_wrong :]}
    found = []
    for each in examples.test:
        n_tokens = len(each.example.tokens)
        if each.id in left_out:
            continue
        if each.id in swapped:
            silent = np.flatnonzero(each.example.activations <= 0)
            if not len(silent):
                continue
            marks = random.permutation(silent)[: len(right[each.id])]
            found.append(Trial(_marked(each, marks), "marked wrong", -1))
        elif each.active:
            found.append(Trial(_marked(each, right[each.id]), "active", each.quantile))
        else:
            found.append(Trial(_marked(each, random.permutation(n_tokens)[:size]), each.source, -1))
    return found


def _above(each: LabelledExample, threshold: float) -> npt.NDArray[np.int64]:
    activations = each.example.activations
    return np.flatnonzero(activations > threshold * activations.max(initial=0.0))


def _marked(each: LabelledExample, marks: npt.NDArray[Any]) -> Text:
    return Text(each, tuple(sorted(marks.tolist())))


# --- scores from answers ---


def detection(examples: ExampleSet, predict: Predict, judge: JudgedBy = RULE) -> Score:
    """In which texts is the unit active?"""
    trials = detection_trials(examples)
    return classified("detection", examples, trials, predict(_texts(trials)), judge)


def fuzzing(
    examples: ExampleSet,
    predict: Predict,
    judge: JudgedBy = RULE,
    *,
    threshold: float = FUZZING_THRESHOLD,
    wrong: float = MARKED_WRONG,
) -> Score:
    """In which texts are the tokens marked where the unit is active? See :func:`fuzzing_trials`."""
    trials = fuzzing_trials(examples, threshold=threshold, wrong=wrong)
    return classified("fuzzing", examples, trials, predict(_texts(trials)), judge)


def classified(
    name: str,
    examples: ExampleSet,
    trials: Sequence[Trial],
    predictions: Sequence[Prediction],
    judge: JudgedBy = RULE,
) -> Score:
    """The balanced accuracy of predictions, and what else they tell.

    Args:
        name: the scorer.
        examples: the set of the trials.
        trials: the questions.
        predictions: one for each trial, in order.
        judge: who predicted.
    """
    _check_length(name, trials, predictions)
    answers = tuple(map(_answer, trials, predictions))
    counts = counted(answers)
    right = {
        source: [
            float(each.predicted == each.active)
            for each in answers
            if each.source == source and each.predicted is not None
        ]
        for source in ("active", "random", "hard", "marked wrong")
    }
    active, inactive = right["active"], right["random"] + right["hard"] + right["marked wrong"]
    found = metrics.of_balanced_accuracy(active, inactive, examples.seed)
    details: dict[str, Any] = dict(metrics.classification(counts))
    details["AUC"] = _auc(answers)
    for source in ("random", "hard", "marked wrong"):
        against = metrics.of_balanced_accuracy(active, right[source], examples.seed)
        if right[source] and against is not None:
            details[f"balanced accuracy, {source}"] = against.value
    return Score(
        name,
        "balanced accuracy",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        (Floor("chance", 0.5),),
        # Two scores on the same texts that have nothing else in common.
        None if found is None else metrics.smallest_difference(math.sqrt(2) * found.error),
        counts,
        _by_quantile(answers, examples.n_quantiles),
        details | _of_set(examples),
        judge.model,
        judge.prompt_hash,
        examples.seed,
        answers,
        judge.cost,
    )


def counted(answers: Sequence[Answer]) -> Counts:
    """How many texts were judged how."""
    judged = [each for each in answers if each.predicted is not None]
    unread = [each for each in answers if each.predicted is None]
    failed = sum(each.failure.startswith("failed") for each in unread)
    return Counts(
        tp=sum(each.active and each.predicted is True for each in judged),
        fp=sum(not each.active and each.predicted is True for each in judged),
        tn=sum(not each.active and each.predicted is False for each in judged),
        fn=sum(each.active and each.predicted is False for each in judged),
        failed=failed,
        unparsable=len(unread) - failed,
    )


def against(score: Score, other: Score, name: str) -> Score:
    """A score with a competitor on the same texts as a floor, and how the two differ.

    The smallest difference that can be told apart becomes that between these two, whose answers are alike
    where they judge by the same tokens.
    """
    floor = () if other.value is None else (Floor(name, other.value),)
    if score.metric != "balanced accuracy":
        return _with(score, floor, {})
    theirs = {(each.id, each.source): each for each in other.answers}
    pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for mine in score.answers:
        their = theirs.get((mine.id, mine.source))
        if mine.predicted is None or their is None or their.predicted is None:
            continue
        both = float(mine.predicted == mine.active), float(their.predicted == mine.active)
        pairs[mine.active].append(both)
    if not pairs[True] or not pairs[False]:
        return _with(score, floor, {})
    active, inactive = (tuple(zip(*pairs[which], strict=True)) for which in (True, False))
    found = metrics.of_difference((active[0], active[1]), (inactive[0], inactive[1]), score.seed)
    if found is None:
        return _with(score, floor, {})
    difference = {f"difference from {name}": [found.value, found.low, found.high]}
    return _with(score, floor, difference, metrics.smallest_difference(found.error))


def _with(
    score: Score, floors: tuple[Floor, ...], details: dict[str, Any], smallest: float | None = None
) -> Score:
    return replace(
        score,
        floors=score.floors + floors,
        details=score.details | details,
        smallest_difference=score.smallest_difference if smallest is None else smallest,
    )


def with_competitors(score: Score, name: str, values: Sequence[float | None]) -> Score:
    """A score with the mean of several competitors as a floor; those without a value are left out."""
    some = [value for value in values if value is not None]
    if not some:
        return score
    spread = float(np.std(some, ddof=1)) if len(some) > 1 else None
    return _with(score, (Floor(name, float(np.mean(some)), len(some), spread),), {})


# --- simulation ---


def simulation(examples: ExampleSet, simulate: Simulate, judge: JudgedBy = RULE) -> Score:
    """How well values for each token follow the activations: Pearson's r over the tokens of all texts."""
    trials = detection_trials(examples)
    return simulated(examples, trials, simulate(_texts(trials)), judge)


def simulated(
    examples: ExampleSet,
    trials: Sequence[Trial],
    values: Sequence[Values],
    judge: JudgedBy = RULE,
) -> Score:
    """The correlation of predicted values with activations, and the other measures of simulations.

    The mean of the correlations within texts is another figure, and is given as a detail: it does not ask
    whether values of different texts fit each other. The uncentred R² is 1 - mean (a - p)² / mean a².
    """
    _check_length("simulation", trials, values)
    pairs: list[tuple[Doubles, Doubles]] = []
    quantiles: list[int] = []
    answers = []
    for trial, given in zip(trials, values, strict=True):
        true = trial.text.example.example.activations.astype(np.float64)
        predicted, why = _values(given, len(true))
        answers.append(Answer(trial.text.id, trial.source, trial.quantile, None, failure=why))
        if predicted is not None:
            pairs.append((np.maximum(true, 0.0), predicted))
            quantiles.append(trial.quantile)
    failed = sum(each.failure.startswith("failed") for each in answers)
    unread = sum(bool(each.failure) for each in answers)
    found = metrics.of_pearson(pairs, examples.seed)
    return Score(
        "simulation",
        "Pearson r",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        (Floor("chance", 0.0),),
        None if found is None else metrics.smallest_difference(math.sqrt(2) * found.error),
        Counts(failed=failed, unparsable=unread - failed),
        tuple(
            _r([pair for pair, at in zip(pairs, quantiles, strict=True) if at in (quantile, -1)])
            for quantile in range(examples.n_quantiles)
        ),
        _errors(pairs) | _of_set(examples),
        judge.model,
        judge.prompt_hash,
        examples.seed,
        tuple(each for each in answers if each.failure),
        judge.cost,
    )


def _values(given: Values, n: int) -> tuple[Doubles | None, str]:
    """The values of a text, or why there are none."""
    if isinstance(given, Failure):
        return None, f"{given.kind}: {given.reason}"
    if given is None:
        return None, "unparsable"
    found = np.asarray(given, np.float64)
    if found.shape != (n,) or not np.isfinite(found).all():
        return None, f"unparsable: expected {n} finite values, found {len(given)}"
    return found, ""


def _r(pairs: Sequence[tuple[Doubles, Doubles]]) -> float | None:
    if not pairs:
        return None
    return metrics.pearson(*(np.concatenate(side) for side in zip(*pairs, strict=True)))


def _errors(pairs: Sequence[tuple[Doubles, Doubles]]) -> dict[str, Any]:
    if not pairs:
        return {}
    true, predicted = (np.concatenate(side) for side in zip(*pairs, strict=True))
    within = metrics.pearson_within(pairs)
    within = within[~np.isnan(within)]
    square = metrics.ratio(float(np.mean((true - predicted) ** 2)), float(np.mean(true**2)))
    absolute = metrics.ratio(float(np.abs(true - predicted).mean()), float(np.abs(true).mean()))
    return {
        "mean r within texts": float(within.mean()) if len(within) else None,
        "uncentred R²": None if square is None else 1 - square,
        "1 - absolute error": None if absolute is None else 1 - absolute,
    }


# --- embedding ---


def embedding(
    explanation: str, examples: ExampleSet, embed: Embed, judge: JudgedBy = RULE
) -> Score:
    """Are texts where the unit is active nearer to the explanation? The area under the curve of cosines."""
    trials = detection_trials(examples)
    vectors = np.asarray(embed([explanation, *(each.text.text for each in trials)]), np.float64)
    if len(vectors) != len(trials) + 1 or not np.isfinite(vectors).all():
        raise InputError(
            f"embed: expected {len(trials) + 1} vectors of finite numbers, found {len(vectors)}."
        )
    norms = np.linalg.norm(vectors, axis=1)
    cosines = (vectors[1:] @ vectors[0]) / np.maximum(norms[1:] * norms[0], 1e-30)
    return ranked("embedding", examples, trials, cosines.tolist(), judge)


def ranked(
    name: str,
    examples: ExampleSet,
    trials: Sequence[Trial],
    values: Sequence[float],
    judge: JudgedBy = RULE,
) -> Score:
    """The area under the curve of one value for each trial, larger for active texts."""
    _check_length(name, trials, values)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for trial, value in zip(trials, values, strict=True):
        sides[trial.active].append(value)
    found = metrics.of_auc(sides[True], sides[False], examples.seed)
    return Score(
        name,
        "AUC",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        (Floor("chance", 0.5),),
        None if found is None else metrics.smallest_difference(math.sqrt(2) * found.error),
        None,
        tuple(
            metrics.auc(
                [v for t, v in zip(trials, values, strict=True) if t.quantile == quantile],
                sides[False],
            )
            for quantile in range(examples.n_quantiles)
        ),
        _of_set(examples),
        judge.model,
        judge.prompt_hash,
        examples.seed,
        (),
        judge.cost,
    )


# --- parts ---


def _texts(trials: Sequence[Trial]) -> list[Text]:
    return [trial.text for trial in trials]


def _check_length(name: str, trials: Sequence[Trial], given: Sequence[object]) -> None:
    if len(given) != len(trials):
        raise InputError(f"{name}: expected {len(trials)} predictions, found {len(given)}.")


def _answer(trial: Trial, given: Prediction) -> Answer:
    predicted: bool | None = None
    probability: float | None = None
    failure = ""
    if isinstance(given, Failure):
        failure = f"{given.kind}: {given.reason}"
    elif isinstance(given, bool | np.bool_):
        predicted = bool(given)
    elif given is not None and math.isfinite(given) and 0 <= given <= 1:
        predicted, probability = given > 0.5, float(given)
    elif given is None:
        failure = "unparsable"
    else:
        failure = f"unparsable: {given} is no probability"
    return Answer(trial.text.id, trial.source, trial.quantile, predicted, probability, failure)


def _auc(answers: Sequence[Answer]) -> float | None:
    """The area under the curve of the probabilities; None unless every answer has one."""
    judged = [each for each in answers if each.predicted is not None]
    if any(each.probability is None for each in judged):
        return None
    return metrics.auc(
        [each.probability or 0.0 for each in judged if each.active],
        [each.probability or 0.0 for each in judged if not each.active],
    )


def _by_quantile(answers: Sequence[Answer], n_quantiles: int) -> tuple[float | None, ...]:
    found: list[float | None] = []
    for quantile in range(n_quantiles):
        some = [e.predicted for e in answers if e.quantile == quantile and e.predicted is not None]
        found.append(metrics.ratio(sum(some), len(some)))
    return tuple(found)


def _of_set(examples: ExampleSet) -> dict[str, Any]:
    """What the texts were, for the record."""
    return {
        "active texts": sum(each.active for each in examples.test),
        "inactive texts": sum(not each.active for each in examples.test),
        "expected mislabelled": examples.mislabelled,
    }
