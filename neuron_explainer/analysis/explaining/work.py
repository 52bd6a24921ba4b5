"""Explaining and scoring many units: with floors, resumable, one step after the other.

    for step in explain_units(store, units, "rules", reading=reading):
        print(step.number, step.total, step.unit, step.explanation)
    for step in score_units(store, units, reading=reading):
        print(step.unit, step.scores)

What is done is kept in the store's workspace: the same call again asks for nothing twice, and an
interrupted one loses only what is in flight. A unit that cannot be explained (never active, too few texts)
gives a step with the reason in its place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from neuron_explainer.analysis.explaining import hashing, scorers
from neuron_explainer.analysis.explaining.examples import (
    ExampleSet,
    Records,
    SetConfig,
    check_set_seed,
)
from neuron_explainer.analysis.explaining.explanation import Explanation, Score, digest
from neuron_explainer.analysis.explaining.methods import (
    Explain,
    Predictor,
    by_tokens,
    explainer,
    rule_of,
)
from neuron_explainer.analysis.explaining.spending import StoppedError
from neuron_explainer.errors import InputError, NeuronExplainerError, did_you_mean

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions
    from neuron_explainer.analysis.explaining.reading import Reading
    from neuron_explainer.analysis.store import ExampleStore

Scorer = Callable[[Explanation, ExampleSet], Score | None]
"""Scores an explanation on the test examples; None if it cannot, as a rule's scorer without a rule."""

RULE_SCORERS = ("detection", "fuzzing", "simulation", "embedding")
"""What needs neither a judge nor the model."""
COMPETITORS = 5
"""Other units, and random latents, whose mean is a floor."""
_VERSION = 1  # of the methods: a change that gives other results makes another request
_SAVE_EVERY = 1.0  # seconds
_NEAR = 64  # tokens: a test text that begins so near a text of an explanation may overlap it


@dataclass(frozen=True)
class Step:
    """What became of one unit."""

    unit: int
    number: int
    """How many units are done, with this one."""
    total: int
    explanation: Explanation | None = None
    scores: tuple[Score, ...] = ()
    error: str = ""
    """Why there is no explanation, or no score."""
    reused: bool = False
    """Whether nothing had to be done: it was in the workspace."""


# --- explaining ---


def explain_units(
    store: "ExampleStore",
    units: Sequence[int],
    method: str | Explain = "rules",
    *,
    seed: int = 0,
    config: SetConfig | None = None,
    reading: "Reading | None" = None,
    directions: "Directions | None" = None,
    identity: Mapping[str, Any] | None = None,
    save: bool = True,
    workers: int = 1,
    stop: Callable[[], None] | None = None,
) -> Iterator[Step]:
    """Explain units, in their order.

    Args:
        store: the store of the units.
        units: their numbers.
        method: one of :data:`~.methods.METHODS`, or a function that explains an example set.
        seed: of the example sets.
        config: how many examples.
        reading: where the units are active, if the text was read again.
        directions: for "logits".
        identity: what decides the result of a function (model, prompt, settings), as JSON values: an
            explanation that was made by an equal one is not made again.
        save: keep explanations in the store's workspace.
        workers: how many explanations are asked for at the same time. The result is the same.
        stop: called if the work ends before its end, so that functions that wait for a reply give up.
    """
    config = SetConfig() if config is None else config
    explain = explainer(method, directions) if isinstance(method, str) else method
    by = {"method": method} if isinstance(method, str) else {"method": "function"}
    request = request_of("explain", {**by, **(identity or {})}, seed, config, reading)

    def one(unit: int) -> Step:
        if save and (known := store.workspace.explanation_of(unit, request)) is not None:
            return Step(unit, 0, 0, known, reused=True)
        try:
            return Step(unit, 0, 0, explain(ExampleSet.of(store, unit, seed, config, reading)))
        except StoppedError:
            raise
        except NeuronExplainerError as error:
            return Step(unit, 0, 0, error=str(error))

    def keep(steps: list[Step]) -> None:
        store.workspace.save_explanations(
            (step.explanation, request) for step in steps if step.explanation is not None
        )

    yield from _steps(one, units, workers, keep if save else None, stop)


# --- scoring ---


def score_units(
    store: "ExampleStore",
    units: Sequence[int],
    scorers: Sequence[str] | Mapping[str, Scorer] = RULE_SCORERS,
    *,
    method: str | None = None,
    explanations: Mapping[int, Explanation] | None = None,
    seed: int = 0,
    config: SetConfig | None = None,
    reading: "Reading | None" = None,
    identity: Mapping[str, Any] | None = None,
    save: bool = True,
    workers: int = 1,
    stop: Callable[[], None] | None = None,
    competitors: int | None = None,
    explain: Explain | None = None,
) -> Iterator[Step]:
    """Score the explanations of units on texts that they were not made from, beside their floors.

    The floors are the token set of the same train examples, the explanations of ``competitors`` other
    units, and (with a reading) ``competitors`` latents of the random autoencoder that are as dense as the
    unit, explained by the same method. Functions, which may ask a judge, get the first floor only, unless
    ``competitors`` says otherwise: each further one costs as much as the score.

    Args:
        store: the store of the units.
        units: their numbers.
        scorers: names of :data:`RULE_SCORERS`, or functions by name.
        method: score the explanations of this method; None: the latest one of each unit.
        explanations: what to score, by unit; None: what is in the workspace.
        seed: of the example sets; an explanation's own texts are never among those it is scored on.
        config: how many examples.
        reading: where the units are active, if the text was read again.
        identity: what decides the result of the functions, as JSON values.
        save: keep scores in the store's workspace.
        workers: how many units are scored at the same time. The result is the same.
        stop: see :func:`explain_units`.
        competitors: see above; None: 5, and 0 for functions.
        explain: explains random latents, where the method is none of those without a model.
    """
    if competitors is None:
        competitors = 0 if isinstance(scorers, Mapping) else COMPETITORS
    config = SetConfig() if config is None else config
    chosen = _chosen(scorers)
    known = dict(explanations) if explanations is not None else _latest(store, units, method)
    floors = _Floors(store, chosen, known, seed, config, reading, competitors, explain)
    by = {"scorers": "rules" if not isinstance(scorers, Mapping) else "functions"}
    # The floors depend on the other explanations.
    others = digest(
        sorted(explanation.key for explanation in known.values()) if competitors else []
    )
    more = {**by, **(identity or {}), "competitors": competitors, "others": others}
    scoring = _Scoring(store, floors, request_of("score", more, seed, config, reading), save)
    yield from _steps(scoring.step, units, workers, scoring.keep if save else None, stop)


@dataclass(frozen=True)
class _Scoring:
    """What :func:`score_units` does with each unit."""

    store: "ExampleStore"
    floors: "_Floors"
    request: str
    save: bool

    def step(self, unit: int) -> Step:
        """The scores of a unit's explanation, made now or before."""
        explanation = self.floors.explanations.get(unit)
        if explanation is None:
            why = f"there is no explanation of {self.store.kind} {unit}; explain it first."
            return Step(unit, 0, 0, error=why)
        found: list[Score] = []
        new = False
        examples: ExampleSet | None = None
        try:
            for name in self.floors.scorers:
                score = self._known(explanation, name)
                if score is None or _may_be_better(score):
                    examples = examples or _without_seen(self.floors.examples(unit), explanation)
                    score = self.floors.scored(name, explanation, examples)
                    new = new or score is not None
                if score is not None:
                    found.append(score)
        except StoppedError:
            raise
        except NeuronExplainerError as error:
            return Step(unit, 0, 0, explanation, tuple(found), str(error))
        why = "" if found else f"{explanation.method} explanations have nothing for these scorers."
        return Step(unit, 0, 0, explanation, tuple(found), why, reused=not new)

    def keep(self, steps: list[Step]) -> None:
        """Write what is new to the workspace."""
        self.store.workspace.save_explanation_scores(
            (step.explanation, score, digest([self.request, score.name]))
            for step in steps
            if step.explanation is not None and not step.reused
            for score in step.scores
        )

    def _known(self, explanation: Explanation, name: str) -> Score | None:
        if not self.save:
            return None
        request = digest([self.request, name])
        return self.store.workspace.explanation_score_of(explanation, request)


def rule_scorer(name: str) -> Scorer:
    """The scorer of this name that lets an explanation's rule predict; embedding uses hashed words."""
    if name not in RULE_SCORERS:
        raise InputError(
            f"unknown scorer {name!r}.{did_you_mean(name, RULE_SCORERS)} Known: {', '.join(RULE_SCORERS)}."
        )
    return partial(_by_rule, name)


def _by_rule(name: str, explanation: Explanation, examples: ExampleSet) -> Score | None:
    if name == "embedding":
        return scorers.embedding(explanation.text, examples, hashing.embed)
    rule = rule_of(explanation)
    if rule is None:
        return None
    predict = Predictor(rule)
    if name == "detection":
        return scorers.detection(examples, predict.texts)
    if name == "fuzzing":
        return scorers.fuzzing(examples, predict.marks)
    return scorers.simulation(examples, predict.values)


def _may_be_better(score: Score) -> bool:
    """Whether requests failed that may not fail again; the replies that came are not asked for anew."""
    return score.counts is not None and score.counts.failed > 0


def _chosen(scorers: Sequence[str] | Mapping[str, Scorer]) -> dict[str, Scorer]:
    if isinstance(scorers, Mapping):
        return dict(scorers)
    return {name: rule_scorer(name) for name in scorers}


def _latest(
    store: "ExampleStore", units: Sequence[int], method: str | None
) -> dict[int, Explanation]:
    found = {}
    for unit in units:
        if explained := store.explanations(unit, method):
            found[unit] = explained[0].explanation
    return found


def _without_seen(examples: ExampleSet, explanation: Explanation) -> ExampleSet:
    """The set without test texts that the explanation may have been made from (with another seed)."""
    seen = np.array(explanation.examples, np.int64)
    if explanation.examples == examples.ids("train") or not len(seen):
        return examples
    # Of what was seen only the beginnings are known: it may be as long as any text of this store.
    longest = max((len(e.example.tokens) for e in (*examples.train, *examples.test)), default=0)
    near = max(_NEAR, longest)

    def is_new(start: int, length: int) -> bool:
        return not ((seen > start - near) & (seen < start + max(length, _NEAR))).any()

    test = tuple(e for e in examples.test if is_new(e.id, len(e.example.tokens)))
    return replace(examples, test=test)


class _Floors:
    """Scores with their floors."""

    def __init__(
        self,
        store: Records,
        scorers: Mapping[str, Scorer],
        explanations: Mapping[int, Explanation],
        seed: int,
        config: SetConfig,
        reading: "Reading | None",
        competitors: int,
        explain: Explain | None,
    ) -> None:
        self.store, self.scorers, self.explanations = store, scorers, explanations
        self.seed, self.config, self.reading = seed, config, reading
        self.competitors, self.explain = competitors, explain
        self._random = cache(self._random_score)
        self._random_explained = cache(self._explain_random)

    def examples(self, unit: int) -> ExampleSet:
        """The texts of a unit."""
        return ExampleSet.of(self.store, unit, self.seed, self.config, self.reading)

    def scored(self, name: str, explanation: Explanation, examples: ExampleSet) -> Score | None:
        """The score of an explanation beside what its competitors get."""
        scorer = self.scorers[name]
        score = scorer(explanation, examples)
        if score is None:
            return None
        score = replace(score, name=name)
        if name in RULE_SCORERS:  # the token set needs no judge, whoever judges the explanation
            baseline = rule_scorer(name)
        else:
            baseline = scorer if self.competitors else rule_scorer("detection")
        token_set = baseline(by_tokens(examples), examples)
        if token_set is not None and token_set.metric == score.metric:
            score = scorers.against(score, token_set, "token set")
        # The intruder is looked for without an explanation: another one would get the same.
        others = [] if name == "intruder" else self._others(explanation)
        scored = [scorer(each, examples) for each in others]
        score = scorers.with_competitors(
            score, f"other {examples.kind}", [each.value for each in scored if each is not None]
        )
        if self.reading is None:
            return score
        near = self.reading.random.nearest(examples.density, self.competitors)
        values = [self._random(name, explanation.method, unit) for unit in near]
        return scorers.with_competitors(score, "random autoencoder", values)

    def _others(self, explanation: Explanation) -> list[Explanation]:
        """Explanations of other units: the same ones each time."""
        units = sorted(unit for unit in self.explanations if unit != explanation.unit)
        order = np.random.RandomState([self.seed & 0xFFFFFFFF, 4, explanation.unit])
        chosen = order.permutation(len(units))[: self.competitors].tolist()
        return [replace(self.explanations[units[i]], unit=explanation.unit) for i in chosen]

    def _random_score(self, name: str, method: str, unit: int) -> float | None:
        """What the same method and scorer get on a latent of the random autoencoder."""
        explained = self._random_explained(method, unit)
        score = None if explained is None else self.scorers[name](*explained)
        return None if score is None else score.value

    def _explain_random(self, method: str, unit: int) -> tuple[Explanation, ExampleSet] | None:
        assert self.reading is not None
        explain = explainer(method) if method in ("rules", "tokens") else self.explain
        if explain is None:
            return None
        records = self.reading.random
        try:
            examples = ExampleSet.of(records, unit, self.seed, self.config, records)
            return explain(examples), examples
        except StoppedError:
            raise
        except NeuronExplainerError:  # too few texts
            return None


# --- parts ---


def request_of(
    what: str,
    identity: Mapping[str, Any],
    seed: int,
    config: SetConfig,
    reading: "Reading | None",
) -> str:
    """A hash of everything that decides a result but the unit; an InputError for a seed that no set takes."""
    check_set_seed(seed)
    read = None if reading is None else [reading.n_tokens, reading.window]
    return digest([what, _VERSION, dict(identity), seed, asdict(config), read])


def _steps(
    one: Callable[[int], Step],
    units: Sequence[int],
    workers: int,
    keep: Callable[[list[Step]], None] | None,
    stop: Callable[[], None] | None,
) -> Iterator[Step]:
    """The steps in the order of the units; what is finished is saved about once a second, and at the end
    whatever the end is."""
    waiting: list[Step] = []
    saved = monotonic()
    try:
        for number, step in enumerate(_in_order(one, units, workers, stop), 1):
            waiting.append(step)
            if keep is not None and monotonic() - saved > _SAVE_EVERY:
                done, waiting = waiting, []
                keep(done)
                saved = monotonic()
            yield replace(step, number=number, total=len(units))
    finally:
        if keep is not None:
            keep(waiting)


def _in_order(
    one: Callable[[int], Step],
    units: Sequence[int],
    workers: int,
    stop: Callable[[], None] | None,
) -> Iterator[Step]:
    """``one`` of each unit, ``workers`` at a time, in order."""
    if workers <= 1:
        yield from map(one, units)
        return
    with ThreadPoolExecutor(workers) as pool:
        running: list[Future[Step]] = []
        todo = iter(units)
        try:
            for unit in todo:
                running.append(pool.submit(one, unit))
                if len(running) >= 2 * workers:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        except BaseException:
            for each in running:
                each.cancel()
            if stop is not None:
                stop()
            raise
