"""Records and explanations as OpenAI's own classes write them: what our reader must read.

    python -m venv peer && peer/bin/pip install -r benchmarks/peers/neuron-explainer.txt
    cd /tmp && peer/bin/python REPOSITORY/benchmarks/peers/make_records.py

writes ``tests/fixtures/peers/neuron-records/{layer}/{unit}.json`` and ``explanations/{layer}/{unit}.jsonl``.
``make_records.py FOLDER`` reads every record and explanation below a folder instead, such as those that
this library wrote, and prints what it found.
"""

import math
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "peers" / "neuron-records"
TOKENS = [" the", " king", "\n", "s", " é", "�", "<|endoftext|>", '"', "\\", " 王"]
activations: Any = import_module("neuron_explainer.activations.activations")
explanations: Any = import_module("neuron_explainer.explanations.explanations")
classes: Any = import_module("neuron_explainer.fast_dataclasses")


def example(rng: random.Random, active: bool = True, n: int = 6) -> Any:
    values = [rng.gauss(0, 1) if active and rng.random() < 0.6 else 0.0 for _ in range(n)]
    if not active:
        values = [-abs(value) for value in values]
    return activations.ActivationRecord([rng.choice(TOKENS) for _ in range(n)], values)


def record(layer: int, unit: int, rng: random.Random) -> Any:
    top = sorted((example(rng) for _ in range(4)), key=lambda each: -max(each.activations))
    empty = unit == 2  # as for a unit that was never seen to be active
    return activations.NeuronRecord(
        neuron_id=activations.NeuronId(layer, unit),
        random_sample=[example(rng, active=number % 2 == 0) for number in range(3)],
        random_sample_by_quantile=[[example(rng)], [example(rng), example(rng)]],
        quantile_boundaries=[0.5, 0.99],
        mean=math.nan if empty else rng.gauss(0, 0.1),
        variance=math.nan if empty else 1 + rng.random(),
        skewness=math.nan if empty else rng.random(),
        kurtosis=math.nan if empty else 3 + rng.random(),
        most_positive_activation_records=top,
    )


def results(layer: int, unit: int, rng: random.Random) -> Any:
    def scored(text: str, score: float) -> Any:
        given = example(rng)
        simulation = explanations.SequenceSimulation(
            tokens=given.tokens,
            expected_activations=[1.0] * len(given.tokens),
            activation_scale=explanations.ActivationScale.SIMULATED_NORMALIZED_ACTIVATIONS,
            distribution_values=[[0.0, 1.0]] * len(given.tokens),
            distribution_probabilities=[[0.25, 0.75]] * len(given.tokens),
        )
        sequence = explanations.ScoredSequenceSimulation(simulation, given.activations, math.nan)
        return explanations.ScoredExplanation(
            text, explanations.ScoredSimulation([sequence], score, 0.1, 0.2)
        )

    return explanations.NeuronSimulationResults(
        activations.NeuronId(layer, unit),
        [scored("royal titles", 0.25), scored("words for kings", 0.5)],
    )


def write() -> None:
    rng = random.Random(0)
    for layer in (0, 1):
        for unit in range(3):
            path = FIXTURES / str(layer) / f"{unit}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(classes.dumps(record(layer, unit, rng)))
        path = FIXTURES / "explanations" / str(layer) / "1.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(classes.dumps(results(layer, 1, rng)) + b"\n")


def read(folder: Path) -> None:
    for path in sorted(folder.rglob("*.json*")):
        found = classes.loads(path.read_bytes(), backwards_compatible=False)
        print(f"{path.relative_to(folder)}: {type(found).__name__} {found.neuron_id}")


if __name__ == "__main__":
    read(Path(sys.argv[1])) if len(sys.argv) > 1 else write()
