"""Explanations and scores in the files of other programs: Neuronpedia's export, OpenAI's JSON lines, delphi's
folders. Each is read and written; what a format has no place for is said below.

Neuronpedia: rows of its table of explanations. What it has no column for (the hash of the prompt, the seed,
    the tokens that it took, the whole of each score) is in further fields, which its readers leave alone.
OpenAI: ``NeuronSimulationResults``, a line for each unit. Only scores of simulation have a place. The texts
    of a simulation are there if they are given.
delphi: ``explanations/MODULE_latentN.txt``, a JSON text, and ``scores/SCORER/MODULE_latentN.txt``, a list of
    texts. Method, judge and cost have no place; a reply that failed and one that could not be read are both
    null there, and are read as ones that could not be read.

Text from a file is kept as text, whatever it says.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from neuron_explainer import files
from neuron_explainer.analysis.explaining import metrics
from neuron_explainer.analysis.explaining.examples import ExampleSet
from neuron_explainer.analysis.explaining.explanation import (
    Answer,
    Cost,
    Explanation,
    Score,
    Source,
    as_dict,
    score_from,
)
from neuron_explainer.analysis.explaining.replies import one_line
from neuron_explainer.analysis.explaining.scorers import Values, counted
from neuron_explainer.analysis.interchange.dashboards import BATCH, ExplanationRow
from neuron_explainer.analysis.interchange.neuron_records import (
    NeuronId,
    NeuronSimulationResults,
    ScoredExplanation,
    ScoredSequenceSimulation,
    ScoredSimulation,
    SequenceSimulation,
    read_explanations,
)
from neuron_explainer.analysis.interchange.objects import (
    Names,
    dumps,
    plain,
    read_json_value,
    read_lines,
    read_object,
    write_lines,
)
from neuron_explainer.analysis.latent_record import Example
from neuron_explainer.errors import CheckpointError, InputError, SourceError

if TYPE_CHECKING:
    from neuron_explainer.analysis.store import ExampleStore

_WINDOW = 32  # tokens of a random text, see ``SetConfig``
Scored = tuple[Explanation, Sequence[Score]]
"""An explanation and its scores."""
_LEADS = ("detection", "fuzzing", "simulation", "embedding")
_DELPHI_SCORERS = {"detection": "detection", "fuzzing": "fuzz"}
_LATENT = re.compile(r"(?P<module>.+)_latent(?P<unit>\d{1,9})\.txt")


# --- Neuronpedia ---


@dataclass
class _NeuronpediaScore:
    """A row of Neuronpedia's scores of explanations."""

    NAMES: ClassVar = Names(more="more")
    value: float
    explanationScoreTypeName: str
    explanationScoreModelName: str | None
    jsonDetails: str | None
    more: dict[str, Any]


def neuronpedia_explanations(
    found: Iterable[Scored], model: str, source: str
) -> list[ExplanationRow]:
    """Rows of Neuronpedia's table of explanations.

    Args:
        found: explanations with their scores.
        model: Neuronpedia's name of the model, such as ``"gpt2-small"``.
        source: its name of the dictionary, such as ``"6-res-jb"``.
    """
    rows = []
    for explanation, scores in found:
        lead = next((s for name in _LEADS for s in scores if s.name == name), None)
        rows.append(
            ExplanationRow(
                model,
                source,
                str(explanation.unit),
                explanation.text,
                explanation.method,
                explanation.model or None,
                None if lead is None else lead.value,
                more={
                    "promptHash": explanation.prompt_hash,
                    "seed": explanation.seed,
                    "examples": list(explanation.examples),
                    "payload": explanation.payload,
                    "promptTokens": explanation.cost.prompt_tokens,
                    "completionTokens": explanation.cost.completion_tokens,
                    "scores": [
                        {
                            "value": score.value,
                            "explanationScoreTypeName": score.name,
                            "explanationScoreModelName": score.judge or None,
                            "jsonDetails": json.dumps(as_dict(score), ensure_ascii=False),
                        }
                        for score in scores
                    ],
                },
            )
        )
    return rows


def write_neuronpedia_explanations(
    found: Iterable[Scored], folder: str | Path, *, model: str, source: str
) -> list[Path]:
    """Write ``explanations/batch-N.jsonl.gz``, see :func:`neuronpedia_explanations`."""
    lines = [dumps(row) + "\n" for row in neuronpedia_explanations(found, model, source)]
    return [
        write_lines(
            Path(folder, "explanations", f"batch-{number}.jsonl.gz"), lines[at : at + BATCH]
        )
        for number, at in enumerate(range(0, len(lines), BATCH))
    ]


def read_neuronpedia_explanations(
    where: str | Path, subject: str = "", n_units: int | None = None
) -> list[tuple[Explanation, tuple[Score, ...]]]:
    """The explanations of an export of Neuronpedia, and those of their scores that this package wrote.

    Args:
        where: a file of JSON lines (``.gz`` or not), or the folder that holds ``explanations/``.
        subject: what the units belong to, see ``ExampleStore.subject``.
        n_units: rows of other units are an error.
    """
    found = []
    for path in _neuronpedia_files(where):
        for value, place in read_lines(path):
            row = read_object(ExplanationRow, value, place)
            unit = _unit(row.index, place, n_units)
            found.append((_explanation_of(row, subject, unit), _scores_of(row)))
    return found


def _neuronpedia_files(where: str | Path) -> list[str | Path]:
    if files.is_remote(where) or not (folder := files.local_path(where)).is_dir():
        return [where]
    if (folder / "explanations").is_dir():
        folder = folder / "explanations"
    paths: list[str | Path] = [*sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])]
    if not paths:
        raise SourceError(
            f"{where} holds no explanations of Neuronpedia (explanations/*.jsonl.gz)."
        )
    return paths


def _explanation_of(row: ExplanationRow, subject: str, unit: int) -> Explanation:
    more = row.more
    examples = more.get("examples")
    whole = isinstance(examples, list) and all(type(each) is int for each in examples)
    payload = more.get("payload")
    return Explanation(
        subject,
        unit,
        row.description,
        row.typeName or "neuronpedia",
        row.explanationModelName or "",
        str(more.get("promptHash") or ""),
        _count(more.get("seed")),
        tuple(examples) if isinstance(examples, list) and whole else (),
        payload if isinstance(payload, dict) else {},
        Cost(0, _count(more.get("promptTokens")), _count(more.get("completionTokens"))),
    )


def _scores_of(row: ExplanationRow) -> tuple[Score, ...]:
    """Scores that this package wrote, whole; of others the name, the judge and the value."""
    rows = row.more.get("scores")
    found = []
    for each in rows if isinstance(rows, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("explanationScoreTypeName"), str):
            continue
        try:
            found.append(score_from(json.loads(each["jsonDetails"])))
            continue
        except (KeyError, TypeError, ValueError, RecursionError):  # our errors are ValueErrors too
            value = each.get("value")
            judge = each.get("explanationScoreModelName")
            found.append(
                Score(
                    each["explanationScoreTypeName"],
                    "as Neuronpedia says",
                    float(value) if isinstance(value, int | float) else None,
                    judge=judge if isinstance(judge, str) else "",
                )
            )
    return tuple(found)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**63 else 0


def _unit(text: str, where: str, n_units: int | None) -> int:
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else -1
    if number < 0 or (n_units is not None and number >= n_units):
        most = "" if n_units is None else f" from 0 to {n_units - 1}"
        raise CheckpointError(f"{where}: expected the number of a unit{most}, found {text!r}.")
    return number


# --- OpenAI ---


def simulated_texts(
    examples: ExampleSet, values: Sequence[Values]
) -> list[ScoredSequenceSimulation]:
    """The texts of a simulation, with the values that were predicted; texts without a reply are left out.

    Args:
        examples: the set; its test texts were simulated.
        values: what was said about each of them, as ``scorers.simulation`` takes it.
    """
    found = []
    for each, given in zip(examples.test, values, strict=True):
        true = each.example.activations.astype(np.float64)
        if given is None or not hasattr(given, "__len__") or len(given) != len(true):
            continue
        predicted = np.asarray(given, np.float64)
        r = metrics.pearson(true, predicted)
        found.append(
            ScoredSequenceSimulation(
                SequenceSimulation(
                    [piece.decode(errors="replace") for piece in each.example.pieces],
                    predicted.tolist(),
                    "simulated_normalized_activations",
                    [[value] for value in predicted.tolist()],
                    [[1.0] for _ in predicted],
                ),
                true.tolist(),
                math.nan if r is None else r,
            )
        )
    return found


def simulation_results(
    layer: int,
    unit: int,
    found: Iterable[Scored],
    texts: Mapping[str, Sequence[ScoredSequenceSimulation]] | None = None,
) -> NeuronSimulationResults:
    """OpenAI's record of the explanations of one unit.

    Args:
        layer: the unit's layer.
        unit: its number.
        found: explanations of this unit, with their scores.
        texts: for explanations, by their keys, the texts of :func:`simulated_texts`.
    """
    scored = []
    for explanation, scores in found:
        if explanation.unit != unit:
            raise InputError(
                f"expected explanations of unit {unit}, found one of {explanation.unit}."
            )
        score = next((each for each in scores if each.name == "simulation"), None)
        details = {} if score is None else score.details
        scored.append(
            ScoredExplanation(
                explanation.text,
                ScoredSimulation(
                    [*(texts or {}).get(explanation.key, ())],
                    None if score is None else score.value,
                    details.get("uncentred R²"),
                    details.get("1 - absolute error"),
                ),
            )
        )
    return NeuronSimulationResults(NeuronId(unit, layer), scored)


def write_simulation_results(
    results: Iterable[NeuronSimulationResults],
    folder: str | Path,
    *,
    library: Literal["transformer-debugger", "automated-interpretability"] = "transformer-debugger",
) -> list[Path]:
    """Write ``{layer}/{unit}.jsonl``.

    Args:
        results: one for each unit.
        folder: for the files.
        library: which of OpenAI's two reads them; they differ in the name of one field.
    """
    paths = []
    for each in results:
        value = plain(each)
        if library == "automated-interpretability":
            for explanation in value["scored_explanations"]:
                for text in explanation["scored_simulation"]["scored_sequence_simulations"]:
                    text["simulation"] = text.pop("sequence_simulation")
        unit = each.neuron_id
        path = Path(folder, str(unit.layer_index), f"{unit.neuron_index}.jsonl")
        line = json.dumps(value, allow_nan=False, separators=(",", ":"))
        paths.append(write_lines(path, [f"{line}\n"]))
    return paths


def read_simulation_results(
    where: str | Path, subject: str = ""
) -> list[tuple[Explanation, tuple[Score, ...]]]:
    """The explanations and scores of a file of OpenAI's, or of a folder of them (one layer's)."""
    paths: list[str | Path] = [where]
    if not files.is_remote(where) and (folder := files.local_path(where)).is_dir():
        paths = [*sorted(folder.glob("*.jsonl"), key=lambda path: (len(path.name), path.name))]
        if not paths:
            raise SourceError(f"{where} holds no explanations of OpenAI's ({{unit}}.jsonl).")
    found: list[tuple[Explanation, tuple[Score, ...]]] = []
    for path in paths:
        for results in read_explanations(path):
            heads = not isinstance(results, NeuronSimulationResults)
            name, metric = ("attention", "AUC") if heads else ("simulation", "Pearson r")
            for each in results.scored_explanations:
                score = each.score if each.score is not None and math.isfinite(each.score) else None
                found.append(
                    (
                        Explanation(
                            subject, results.neuron_id.neuron_index, each.explanation, "openai"
                        ),
                        (Score(name, metric, score),),
                    )
                )
    return found


# --- delphi ---


def write_delphi(
    found: Iterable[tuple[Explanation, Sequence[Score], Mapping[int, Example] | None]],
    folder: str | Path,
    hookpoint: str,
) -> list[Path]:
    """Write ``explanations/`` and ``scores/`` as delphi does, for its ``log_results``.

    Args:
        found: explanations with their scores (with answers), and the texts that were judged, by id, see
            :func:`set_texts` and :func:`stored_texts`; None: no scores.
        folder: delphi's folder of results.
        hookpoint: delphi's name of the place, such as ``"layers.2.mlp"``.
    """
    if "/" in hookpoint or not hookpoint:
        raise InputError(
            f"expected delphi's name of a place, such as layers.2.mlp, found {hookpoint!r}."
        )
    paths = []
    for explanation, scores, texts in found:
        name = f"{hookpoint}_latent{explanation.unit}.txt"
        text = json.dumps(explanation.text, ensure_ascii=False)
        paths.append(write_lines(files.join(Path(folder), "explanations", name), [text]))
        for score in scores if texts is not None else ():
            if score.name in _DELPHI_SCORERS and texts is not None:
                rows = _delphi_texts(score, texts)
                text = json.dumps(rows, ensure_ascii=False, allow_nan=False)
                place = files.join(Path(folder), "scores", _DELPHI_SCORERS[score.name], name)
                paths.append(write_lines(place, [text]))
    return paths


def set_texts(examples: ExampleSet) -> dict[int, Example]:
    """The test texts of a set by id."""
    return {each.id: each.example for each in examples.test}


def stored_texts(
    store: "ExampleStore", unit: int, scores: Sequence[Score]
) -> dict[int, Example] | None:
    """The judged texts of a unit by id, from its store. None where the store does not keep an active one:
    its activations are not known any more. Of inactive texts that it does not keep, 32 tokens are taken."""
    texts = {example.start: example for example in store[unit].all_examples}
    for answer in (each for score in scores for each in score.answers):
        if answer.id in texts:
            continue
        if answer.active:
            return None
        starts = store.tokens.corpus.starts
        end = int(starts[np.searchsorted(starts, answer.id, side="right")])
        length = min(_WINDOW, end - answer.id)
        (tokens,), (document,) = store.tokens.windows(np.array([answer.id]), np.array([length]))
        texts[answer.id] = Example(
            group="inactive",
            interval=0,
            rank=0,
            value=0.0,
            peak=0,
            start=answer.id,
            document=int(document),
            position=0,
            tokens=tokens,
            activations=np.zeros(len(tokens), np.float32),
            pairs=False,
            vocabulary=store.tokens.pieces,
        )
    return texts


def _delphi_texts(score: Score, texts: Mapping[int, Example]) -> list[dict[str, Any]]:
    missing = [each.id for each in score.answers if each.id not in texts]
    if missing:
        raise InputError(
            f"{score.name} judges {len(missing)} texts that were not given: give those of the set that was "
            "scored."
        )
    found = []
    for answer in score.answers:
        example = texts[answer.id]
        values = example.activations if answer.active else np.zeros(len(example.tokens))
        found.append(
            {
                "str_tokens": [piece.decode(errors="replace") for piece in example.pieces],
                "activations": values.astype(float).tolist(),
                "distance": answer.quantile + 1 if answer.active else -1,
                "activating": answer.active,
                "prediction": answer.predicted,
                "probability": answer.probability,
                "correct": None if answer.predicted is None else answer.predicted == answer.active,
            }
        )
    return found


def read_delphi(
    folder: str | Path, subject: str = "", hookpoint: str | None = None
) -> dict[str, list[tuple[Explanation, tuple[Score, ...]]]]:
    """delphi's explanations and scores, by hook point; units rise.

    Args:
        folder: delphi's folder of results, which holds ``explanations/``.
        subject: what the units belong to.
        hookpoint: only this one.
    """
    place = files.local_path(folder)
    found: dict[str, list[tuple[Explanation, tuple[Score, ...]]]] = {}
    paths = [(match, path) for path in place.glob("explanations/*.txt") if (match := _named(path))]
    if not paths:
        raise SourceError(f"{folder} holds no results of delphi (explanations/*_latent*.txt).")
    for match, path in sorted(paths, key=lambda pair: (pair[0]["module"], int(pair[0]["unit"]))):
        if hookpoint is not None and match["module"] != hookpoint:
            continue
        text, where = read_json_value(path)
        if not isinstance(text, str):
            raise CheckpointError(f"{where}: expected a JSON text, found {type(text).__name__}.")
        explanation = Explanation(subject, int(match["unit"]), text, "delphi")
        scores = tuple(
            _delphi_score(ours, place / "scores" / theirs / path.name)
            for ours, theirs in _DELPHI_SCORERS.items()
            if (place / "scores" / theirs / path.name).exists()
        )
        found.setdefault(match["module"], []).append((explanation, scores))
    return found


def _named(path: Path) -> re.Match[str] | None:
    return _LATENT.fullmatch(path.name)


@dataclass
class _DelphiText:
    """What delphi keeps of one text."""

    NAMES: ClassVar = Names(more="more")
    distance: float
    activating: bool
    prediction: bool | None
    more: dict[str, Any]
    probability: float | None = None


def _delphi_score(name: str, path: Path) -> Score:
    """The score that delphi's answers make by our definitions."""
    rows, where = read_json_value(path)
    if not isinstance(rows, list):
        raise CheckpointError(f"{where}: expected a list of texts, found {type(rows).__name__}.")
    answers = []
    for number, row in enumerate(rows):
        text = read_object(_DelphiText, row, f"{where}, text {number}")
        if not math.isfinite(text.distance):
            raise CheckpointError(f"{where}, text {number}: expected a quantile, found no number.")
        source: Source = "active" if text.activating else "random"
        quantile = max(int(text.distance) - 1, 0) if text.activating else -1
        probability = text.probability if text.prediction is not None else None
        failure = "" if text.prediction is not None else "unparsable"
        answers.append(Answer(number, source, quantile, text.prediction, probability, failure))
    return _of_answers(name, answers)


def _of_answers(name: str, answers: Sequence[Answer]) -> Score:
    counts = counted(answers)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for each in answers:
        if each.predicted is not None:
            sides[each.active].append(float(each.predicted == each.active))
    found = metrics.of_balanced_accuracy(sides[True], sides[False])
    return Score(
        name,
        "balanced accuracy",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        counts=counts,
        details=dict(metrics.classification(counts)),
        answers=tuple(answers),
    )


# --- all of them ---


FORMATS = ("neuronpedia", "openai", "delphi")


def read_foreign(
    where: str | Path, format: str, subject: str, n_units: int
) -> list[tuple[Explanation, tuple[Score, ...]]]:
    """Explanations of the units of one dictionary, in any of :data:`FORMATS`.

    Args:
        where: file or folder.
        format: of the files.
        subject: what the units belong to.
        n_units: how many there are; explanations of others are an error.
    """
    if format == "neuronpedia":
        found = read_neuronpedia_explanations(where, subject, n_units)
    elif format == "openai":
        found = read_simulation_results(where, subject)
    else:
        places = read_delphi(where, subject)
        if len(places) > 1:
            raise InputError(
                f"{where} has explanations of {len(places)} places ({', '.join(places)}): import the files "
                "of one of them."
            )
        found = [each for some in places.values() for each in some]
    for explanation, _ in found:
        _unit(str(explanation.unit), str(where), n_units)
    return [(replace(each, text=one_line(each.text)[:2000]), scores) for each, scores in found]
