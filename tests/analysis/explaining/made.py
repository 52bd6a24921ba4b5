"""Example sets made by hand, for scorers."""

import numpy as np

from neuron_explainer.analysis.explaining.examples import ExampleSet, LabelledExample
from neuron_explainer.analysis.explaining.explanation import Source
from neuron_explainer.analysis.latent_record import Example

WORDS = [b" the", b" cat", b" sat", b" on", b" a", b" mat", b".", b"\n", b" King", b"ing"]


def made_example(
    tokens: list[int], activations: list[float], start: int, position: int = 0
) -> Example:
    """A text of the words above."""
    values = np.array(activations, np.float32)
    peak = int(values.argmax())
    return Example(
        group="top",
        interval=0,
        rank=0,
        value=float(values[peak]),
        peak=peak,
        start=start,
        document=0,
        position=position,
        tokens=np.array(tokens, np.int64),
        activations=values,
        pairs=False,
        vocabulary=lambda ids: [WORDS[i] for i in np.asarray(ids)],
    )


def made_set(
    n_active: int,
    n_random: int,
    n_hard: int = 0,
    *,
    n_quantiles: int = 5,
    n_tokens: int = 8,
    seed: int = 0,
    trigger: int = 0,
) -> ExampleSet:
    """A unit that is active at the token ``trigger``, which no other text holds."""
    random = np.random.default_rng(seed)

    def part(first: int) -> tuple[LabelledExample, ...]:
        found = []
        kinds: list[Source] = ["active"] * n_active
        kinds += ["random"] * n_random
        kinds += ["hard"] * n_hard
        for number, kind in enumerate(kinds):
            tokens = random.integers(1, len(WORDS), n_tokens)
            tokens[tokens == trigger] = (trigger + 1) % len(WORDS)
            values = np.zeros(n_tokens)
            if kind == "active":
                place = int(random.integers(n_tokens))
                tokens[place], values[place] = trigger, 1 + 9 * random.random()
            quantile = number * n_quantiles // n_active if kind == "active" else -1
            start = first + number * n_tokens
            example = made_example(
                tokens.tolist(), values.tolist(), start, int(random.integers(90))
            )
            found.append(LabelledExample(example, kind, quantile, 3 if kind == "hard" else -1))
        return tuple(found[i] for i in random.permutation(len(found)))

    return ExampleSet(
        subject="made",
        unit=7,
        name="made-up",
        kind="latent",
        density=0.01,
        scale=10.0,
        seed=seed,
        n_quantiles=n_quantiles,
        train=part(0),
        test=part(100_000),
        available=2 * n_active,
        mislabelled=0.0,
    )
