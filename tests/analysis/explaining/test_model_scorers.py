"""Scorers that run the model: losses text by text, texts that are read, steering with known directions."""

import numpy as np
import pytest
import torch

from neuron_explainer.activations.corpus import start_token
from neuron_explainer.analysis.explaining.examples import ExampleSet, SetConfig
from neuron_explainer.analysis.explaining.explanation import Explanation
from neuron_explainer.analysis.explaining.metrics import auc
from neuron_explainer.analysis.explaining.model_scorers import (
    GENERIC,
    PREFIX,
    Steering,
    UnitReader,
    generation,
    intervention,
    mean_losses,
    surprisal,
    usual_texts,
)
from neuron_explainer.analysis.explaining.reading import Reading
from neuron_explainer.errors import InputError
from neuron_explainer.models.weight_names import WeightLocationType
from tests.analysis.explaining.planted import LOCATION, Planted

CONFIG = SetConfig(train=6, test=8)
STREAM = "3/resid.torso.post_mlp"


@pytest.fixture(scope="module")
def examples(planted: Planted, planted_reading: Reading) -> ExampleSet:
    return ExampleSet.of(planted.store, 0, 0, CONFIG, planted_reading)


def one_loss(planted: Planted, prefix: str, text: list[int]) -> float:
    """Straight from the definition: one text, one token after the other, from the kept state."""
    context = planted.context
    model = context.get_or_create_model()
    first = [start_token(context), *context.encode(prefix)]
    with torch.no_grad():
        logits, state = model(torch.tensor([first]))
        losses = []
        for token in text:
            losses.append(-float(torch.log_softmax(logits[0, -1].double(), 0)[token]))
            logits, state = model(torch.tensor([[token]]), state)
    return float(np.mean(losses))


def test_losses_are_those_of_one_token_after_the_other(
    planted: Planted, examples: ExampleSet
) -> None:
    texts = [each.example.tokens.tolist() for each in examples.test[:4]]
    texts[1] = texts[1][:7]
    prefix = PREFIX.format("the word “king”")
    found = mean_losses(planted.context, prefix, texts)
    assert found == pytest.approx([one_loss(planted, prefix, text) for text in texts], abs=1e-4)
    for batch_size in (1, 3):
        some = mean_losses(planted.context, prefix, texts, batch_size)
        np.testing.assert_allclose(some, found, atol=1e-5)
    assert mean_losses(planted.context, prefix, []).shape == (0,)


def test_a_long_prefix_is_cut_and_a_long_text_refused(planted: Planted) -> None:
    context, text = planted.context, [5] * 20
    room = context.n_context - len(text) - 1
    long = " king" * 400
    cut = context.decode(context.encode(long)[:room])
    assert mean_losses(context, long, [text]) == pytest.approx(mean_losses(context, cut, [text]))
    with pytest.raises(InputError, match="no room before a text of"):
        mean_losses(context, "a", [[5] * context.n_context])


def test_surprisal_is_the_auc_of_the_loss_reduction(planted: Planted, examples: ExampleSet) -> None:
    explanation = Explanation(examples.subject, 0, "“ king”", "rules")
    score = surprisal(explanation, examples, planted.context, batch_size=5)
    texts = [each.example.tokens.tolist() for each in examples.test]
    gain = mean_losses(planted.context, PREFIX.format(GENERIC), texts) - mean_losses(
        planted.context, PREFIX.format("“ king”"), texts
    )
    active = np.array([each.active for each in examples.test])
    assert score.value == pytest.approx(auc(gain[active], gain[~active]))
    nothing = surprisal(Explanation("s", 0, GENERIC, "rules"), examples, planted.context)
    assert nothing.value == 0.5


# ---- generation ------------------------------------------------------------------------------------


def test_generated_texts_are_read_by_the_model(planted: Planted, examples: ExampleSet) -> None:
    reader = UnitReader(planted.context, planted.autoencoder, LOCATION)
    piece = planted.context.decode([planted.tokens[0]])
    assert reader.largest(0, [f"He said{piece} it", "He said", ""]).tolist()[1:] == [0, 0]
    usual = usual_texts(planted.store.tokens, 30)
    texts = [f"He said{piece} it"] * 3 + ["He said"]
    score = generation(texts, examples, reader, usual)
    assert score.value == 0.75
    expected = np.mean([piece in text for text in usual])
    assert score.floors[0].value == pytest.approx(expected, abs=0.1)
    assert score.floors[0].value < 0.75
    assert score.interval is not None
    assert score.interval[0] < 0.75 < score.interval[1]
    assert generation([], examples, reader, []).value is None
    strict = generation(texts, examples, reader, usual, threshold=2.0)
    assert strict.value == 0


def test_a_neuron_reads_texts_too(planted: Planted) -> None:
    reader = UnitReader(planted.context, None, "2/mlp.post_act")
    model = planted.context.get_or_create_model()
    x = model.capture(["He said"], "2/mlp.post_act", bos=True)["2/mlp.post_act"][0, 1:, 7]
    assert reader.largest(7, ["He said"]) == pytest.approx([float(x.detach().max())])


# ---- intervention ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steering(planted: Planted) -> Steering:
    unembedding = planted.context.get_weight(WeightLocationType.UNEMBEDDING)
    return Steering(
        planted.context,
        STREAM,
        lambda unit: unembedding[:, planted.tokens[unit]],
        planted.store.tokens,
    )


def naming(planted: Planted, unit: int, token: int) -> Explanation:
    return Explanation("s", unit, "t", "logits", payload={"raises": [token], "lowers": []})


def test_steering_changes_the_output_by_as_much_as_asked(
    planted: Planted, steering: Steering
) -> None:
    for unit in (0, 1):
        change, strength, kl = steering.change(unit)
        assert kl == pytest.approx(0.25, rel=0.05)
        assert strength > 0
        assert (change[:, planted.tokens[unit]] > 0).all()
        p, q = steering.plain.double(), (steering.plain + change).double()
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


def test_the_explanation_of_what_a_latent_does_wins_and_another_does_not(
    planted: Planted, examples: ExampleSet, steering: Steering
) -> None:
    all_of = [naming(planted, unit, token) for unit, token in enumerate(planted.tokens)]
    right = intervention(all_of[0], examples, steering, all_of)
    assert right is not None
    assert right.value is not None
    assert right.value > 0.95
    assert right.details["compared with"] == 5
    wrong = []
    for token in planted.tokens[1:]:
        score = intervention(naming(planted, 0, token), examples, steering, all_of)
        assert score is not None
        wrong.append(score.value or 0.0)
    assert np.mean(wrong) < 0.5
    assert intervention(Explanation("s", 0, "t", "rules"), examples, steering, all_of) is None
    assert intervention(all_of[0], examples, steering, all_of[:1]) is None
    with pytest.raises(InputError, match="do not have"):
        intervention(naming(planted, 0, 10**6), examples, steering, all_of)
