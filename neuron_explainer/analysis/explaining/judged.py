"""Explanations and scores by a judge, see :class:`~neuron_explainer.analysis.explaining.judge.Judge`.

Every explainer and scorer here is a :class:`Plan`: the prompts that it asks, and what it makes of the
replies. :func:`explain_with` and :func:`score_with` make of it what ``work.py`` takes for many units.

    detection, fuzzing    is the explanation true of a text, or of its marked tokens? Probabilities where the
                          judge gives log-probabilities, else yes or no
    simulation            the value of each token, or its expectation by the log-probabilities
    max-token             seed 003's check: which token has the largest value?
    intruder              which text does not belong to the unit? (the explanation is not shown)
    generation            texts in which the unit should be active, which its own model then reads
    embedding             see ``scorers.embedding``, with the vectors of an endpoint
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

import numpy as np

from neuron_explainer.analysis.explaining import metrics, scorers
from neuron_explainer.analysis.explaining.examples import ExampleSet, LabelledExample
from neuron_explainer.analysis.explaining.explanation import (
    FREE,
    Cost,
    Counts,
    Explanation,
    Failure,
    Floor,
    Prediction,
    Score,
)
from neuron_explainer.analysis.explaining.judge import Judge, Prompt, Reply
from neuron_explainer.analysis.explaining.prompts import (
    EXPLAINERS,
    HASHES,
    LETTERS,
    LEVELS,
    LONGEST_EXPLANATION,
    LONGEST_GENERATED,
    MARKED_ABOVE,
    Shown,
    explanation_prompt,
    generation_prompt,
    intruder_prompt,
    max_token_prompt,
    simulation_prompt,
    texts_prompt,
)
from neuron_explainer.analysis.explaining.replies import (
    booleans,
    choice,
    expected_values,
    field_text,
    numbers,
    probabilities,
    texts,
)
from neuron_explainer.errors import InputError, did_you_mean

T = TypeVar("T")
_INTRUDER_SEED, _DETECTION_LOGPROBS, _SIMULATION_LOGPROBS = 5, 5, 20


@dataclass(frozen=True)
class Plan(Generic[T]):
    """What is asked, and what is made of the replies."""

    prompts: Sequence[Prompt]
    result: Callable[[Sequence[Reply]], T]
    """Takes a reply for each prompt, in order."""

    def ask(self, judge: Judge) -> T:
        """What comes of it with this judge."""
        return self.result([*judge.ask(self.prompts)])


@dataclass(frozen=True)
class Asking:
    """How scorers ask."""

    texts_per_prompt: int = 5
    """Texts in a prompt of detection, fuzzing and max-token: more cost less, and are judged less well."""
    logprobs: bool = True
    """Whether log-probabilities are asked for. Endpoints that give none are asked without them."""

    def __post_init__(self) -> None:
        if not 1 <= self.texts_per_prompt <= 50:
            raise InputError(f"texts_per_prompt must be 1 to 50, found {self.texts_per_prompt}.")


# --- explanations ---


def explanation_plan(
    kind: str, examples: ExampleSet, judge: Judge, raised: Sequence[str] = ()
) -> Plan[Explanation | Failure]:
    """Ask what a unit is active for.

    Args:
        kind: one of :data:`~neuron_explainer.analysis.explaining.prompts.EXPLAINERS`.
        examples: the unit's texts; those of the test part are not shown.
        judge: who is asked.
        raised: for ``marked-logits``, the tokens that the unit makes most likely.
    """
    if kind not in EXPLAINERS:
        raise InputError(
            f"unknown prompt {kind!r}.{did_you_mean(kind, EXPLAINERS)} Known: {', '.join(EXPLAINERS)}."
        )

    def result(replies: Sequence[Reply]) -> Explanation | Failure:
        (reply,) = replies
        text = reply.failure or field_text(reply.value, "explanation", LONGEST_EXPLANATION)
        if isinstance(text, Failure):
            return text
        return Explanation(
            examples.subject,
            examples.unit,
            text,
            kind,
            judge.name,
            HASHES[kind],
            examples.seed,
            examples.ids("train"),
            cost=reply.cost,
        )

    return Plan([explanation_prompt(kind, examples, raised)], result)


# --- scores ---


def scorer_plan(
    name: str, explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    """A scorer's plan.

    Args:
        name: one of :data:`SCORERS`.
        explanation: what is scored.
        examples: the unit's texts; those of the test part are judged.
        judge: who is asked.
        asking: how.
    """
    if name not in SCORERS:
        raise InputError(
            f"no judge is asked for {name!r}.{did_you_mean(name, SCORERS)} Known: {', '.join(SCORERS)}."
        )
    return SCORERS[name](explanation, examples, judge, asking)


def _by(judge: Judge, kind: str, replies: Sequence[Reply]) -> scorers.JudgedBy:
    return scorers.JudgedBy(judge.name, HASHES[kind], _cost(replies))


def _cost(replies: Sequence[Reply]) -> Cost:
    return reduce(add, (reply.cost for reply in replies), FREE)


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _detection(
    explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    return _of_texts(
        "detection", explanation, examples, judge, asking, scorers.detection_trials(examples)
    )


def _fuzzing(
    explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    return _of_texts(
        "fuzzing", explanation, examples, judge, asking, scorers.fuzzing_trials(examples)
    )


def _of_texts(
    kind: str,
    explanation: Explanation,
    examples: ExampleSet,
    judge: Judge,
    asking: Asking,
    trials: Sequence[scorers.Trial],
) -> Plan[Score]:
    parts = _parts(trials, asking.texts_per_prompt)
    logprobs = _DETECTION_LOGPROBS if asking.logprobs else 0

    def result(replies: Sequence[Reply]) -> Score:
        found: list[Prediction] = []
        for part, reply in zip(parts, replies, strict=True):
            found += _answers(reply, len(part))
        by = _by(judge, kind, replies)
        return scorers.classified(kind, examples, trials, found, by)

    return Plan(
        [
            texts_prompt(kind, explanation.text, [_shown(each.text) for each in part], logprobs)
            for part in parts
        ],
        result,
    )


def _answers(reply: Reply, n: int) -> Sequence[Prediction]:
    """Yes or no for each text of a prompt, or how probable "yes" is, or why there is no answer."""
    said = reply.failure or booleans(reply.value, n)
    if isinstance(said, Failure):
        return [said] * n
    return probabilities(reply, n) or said


def _shown(text: scorers.Text) -> Shown:
    return Shown(text.pieces, text.marked)


def _simulation(
    explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    trials = scorers.detection_trials(examples)
    logprobs = _SIMULATION_LOGPROBS if asking.logprobs else 0

    def result(replies: Sequence[Reply]) -> Score:
        found: list[scorers.Values] = []
        for trial, reply in zip(trials, replies, strict=True):
            values = reply.failure or numbers(reply.value, len(trial.text.pieces), 0, LEVELS)
            if not isinstance(values, Failure):
                values = expected_values(reply, values, LEVELS)
            found.append(values)
        return scorers.simulated(examples, trials, found, _by(judge, "simulation", replies))

    prompts = [simulation_prompt(explanation.text, _shown(each.text), logprobs) for each in trials]
    return Plan(prompts, result)


def _max_token(
    explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    """The share of active texts whose most active token is named; of equal ones, any."""
    active = [each for each in examples.test if each.active]
    parts = _parts(active, asking.texts_per_prompt)

    def result(replies: Sequence[Reply]) -> Score:
        found: list[bool | Failure] = []
        for part, reply in zip(parts, replies, strict=True):
            longest = max(len(each.example.tokens) for each in part)
            said = reply.failure or numbers(reply.value, len(part), 1, longest)
            if isinstance(said, Failure):
                found += [said] * len(part)
            else:
                found += map(_is_peak, part, said)
        chance = float(np.mean([_chance_of_peak(each) for each in active])) if active else 0.0
        by = _by(judge, "max-token", replies)
        return _share("max-token", examples, found, chance, by)

    shown = [[Shown(each.example.pieces) for each in part] for part in parts]
    return Plan([max_token_prompt(explanation.text, part) for part in shown], result)


def _is_peak(each: LabelledExample, number: float) -> bool | Failure:
    values = each.example.activations
    if number != int(number) or number > len(values):
        return Failure("unparsable", f"expected a token from 1 to {len(values)}, found {number:g}")
    return bool(values[int(number) - 1] >= values.max())


def _chance_of_peak(each: LabelledExample) -> float:
    values = each.example.activations
    return float((values >= values.max()).mean())


def _intruder(
    explanation: Explanation, examples: ExampleSet, judge: Judge, asking: Asking
) -> Plan[Score]:
    """The share of groups of texts whose intruder is found; the explanation plays no part.

    Each group has four active texts, whose active tokens are marked, and an inactive one, in which as many
    random tokens are.
    """
    random = np.random.RandomState([examples.seed & 0xFFFFFFFF, _INTRUDER_SEED, examples.unit])
    active = [each for each in examples.test if each.active]
    inactive = [each for each in examples.test if not each.active]
    n_active = len(LETTERS) - 1
    groups, places = [], []
    for number, part in enumerate(_parts(active, n_active)):
        if len(part) < n_active or number >= len(inactive):
            break
        shown = [Shown(each.example.pieces, _active_tokens(each)) for each in part]
        size = max(1, round(float(np.mean([len(each.marked) for each in shown]))))
        other = inactive[number].example
        marks = sorted(random.permutation(len(other.tokens))[:size].tolist())
        place = int(random.randint(len(LETTERS)))
        shown.insert(place, Shown(other.pieces, marks))
        groups.append(shown)
        places.append(place)

    def result(replies: Sequence[Reply]) -> Score:
        found: list[bool | Failure] = []
        for reply, place in zip(replies, places, strict=True):
            said = reply.failure or choice(reply.value, "text", LETTERS)
            found.append(said if isinstance(said, Failure) else said == place)
        by = _by(judge, "intruder", replies)
        return _share("intruder", examples, found, 1 / len(LETTERS), by)

    return Plan([intruder_prompt(group) for group in groups], result)


def _active_tokens(each: LabelledExample) -> list[int]:
    values = each.example.activations
    found: list[int] = np.flatnonzero(values > MARKED_ABOVE * values.max()).tolist()
    return found


def _share(
    name: str,
    examples: ExampleSet,
    right: Sequence[bool | Failure],
    chance: float,
    by: scorers.JudgedBy,
) -> Score:
    """The share of questions that were answered right."""
    judged = [float(each) for each in right if not isinstance(each, Failure)]
    why = [each.kind for each in right if isinstance(each, Failure)]
    found = metrics.of_mean(judged, examples.seed)
    details: dict[str, Any] = {"questions": len(right), "right": int(sum(judged))}
    return Score(
        name,
        "accuracy",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        (Floor("chance", chance),),
        None if found is None else metrics.smallest_difference(2**0.5 * found.error),
        Counts(failed=why.count("failed"), unparsable=why.count("unparsable")),
        details=details,
        judge=by.model,
        prompt_hash=by.prompt_hash,
        seed=examples.seed,
        cost=by.cost,
    )


Scorer = Callable[[Explanation, ExampleSet, Judge, Asking], Plan[Score]]
SCORERS: dict[str, Scorer] = {
    "detection": _detection,
    "fuzzing": _fuzzing,
    "simulation": _simulation,
    "max-token": _max_token,
    "intruder": _intruder,
}
"""Scorers that ask a judge."""


# --- for many units ---


class NoReplyError(InputError):
    """There is no explanation, because of the judge's reply."""


def explain_with(
    judge: Judge, kind: str, raised: Callable[[int], Sequence[str]] = lambda unit: ()
) -> Callable[[ExampleSet], Explanation]:
    """The function that explains a unit by asking a judge.

    Args:
        judge: who is asked.
        kind: one of :data:`~neuron_explainer.analysis.explaining.prompts.EXPLAINERS`.
        raised: for ``marked-logits``, the tokens that a unit makes most likely.
    """

    def explain(examples: ExampleSet) -> Explanation:
        tokens = raised(examples.unit) if kind == "marked-logits" else ()
        found = explanation_plan(kind, examples, judge, tokens).ask(judge)
        if isinstance(found, Failure):
            raise NoReplyError(f"{found.kind}: {found.reason}")
        return found

    return explain


def score_with(
    judge: Judge, names: Sequence[str], asking: Asking | None = None
) -> Mapping[str, Callable[[Explanation, ExampleSet], Score]]:
    """The functions that score an explanation by asking a judge, by name.

    Args:
        judge: who is asked.
        names: of :data:`SCORERS`.
        asking: how.
    """
    how = Asking() if asking is None else asking

    def scorer(name: str) -> Callable[[Explanation, ExampleSet], Score]:
        def score(explanation: Explanation, examples: ExampleSet) -> Score:
            return scorer_plan(name, explanation, examples, judge, how).ask(judge)

        return score

    return {name: scorer(name) for name in names}


# --- texts for our model ---


@dataclass(frozen=True)
class Generated:
    """Texts in which a unit should be active."""

    texts: tuple[str, ...]
    """None if the judge wrote none."""
    failure: Failure | None
    by: scorers.JudgedBy


def generation_score(
    generated: Generated, examples: ExampleSet, active: Callable[[Sequence[str]], Score]
) -> Score:
    """The score of generated texts, or one without a value that says why there are none.

    Args:
        generated: the texts, or the failure.
        examples: those of the unit, for the record.
        active: scores texts with the unit's own model, as ``model_scorers.generation`` does.
    """
    if generated.failure is None:
        return active(generated.texts)
    failed = generated.failure.kind == "failed"
    return Score(
        "generation",
        "share of texts",
        None,
        counts=Counts(failed=int(failed), unparsable=int(not failed)),
        details={"failure": generated.failure.reason},
        judge=generated.by.model,
        prompt_hash=generated.by.prompt_hash,
        seed=examples.seed,
        cost=generated.by.cost,
    )


def generation_plan(explanation: Explanation, judge: Judge, n: int = 5) -> Plan[Generated]:
    """Ask for ``n`` texts in which the unit is active if the explanation is true."""

    def result(replies: Sequence[Reply]) -> Generated:
        (reply,) = replies
        found = reply.failure or texts(reply.value, "texts", n, LONGEST_GENERATED)
        by = _by(judge, "generation", replies)
        if isinstance(found, Failure):
            return Generated((), found, by)
        return Generated(tuple(found), None, by)

    return Plan([generation_prompt(explanation.text, n)], result)
