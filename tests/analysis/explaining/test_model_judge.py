"""The embedded model as a judge: it understands nothing, and its log-probabilities are right."""

import pytest
import torch

from neuron_explainer.analysis.explaining.judge import Message, Prompt
from neuron_explainer.analysis.explaining.judged import Asking, score_with
from neuron_explainer.analysis.explaining.model_judge import ModelJudge
from neuron_explainer.models.open_model import open_model
from tests.analysis.explaining.test_judged import EXPLANATION, SET


@pytest.fixture(scope="module")
def judge() -> ModelJudge:
    return ModelJudge(open_model("tiny-tales", "cpu"), longest=6)


def test_the_log_probabilities_are_those_of_the_next_token(judge: ModelJudge) -> None:
    prompt = Prompt("x", (Message("user", "The king gave his daughter"),), top_logprobs=5)
    (reply,) = judge.ask([prompt])
    context, model = judge.context, judge.context.get_or_create_model()
    assert 0 < len(reply.tokens) <= 6
    assert reply.text == "".join(token.text for token in reply.tokens)
    ids = [4095, *context.encode(prompt.text + "\n")]
    assert (reply.cost.prompt_tokens, reply.cost.completion_tokens) == (len(ids), len(reply.tokens))
    for token in reply.tokens:  # one after the other, without a cache
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([ids]))[0][0, -1].float(), 0)
        best = int(found.argmax())
        assert token.text == context.decode([best])
        assert max(token.alternatives, key=token.alternatives.__getitem__) == token.text
        assert len(token.alternatives) == 5
        for text, value in token.alternatives.items():
            assert value == pytest.approx(float(found[context.encode_token_str(text)]), abs=1e-4)
        ids.append(best)


def test_what_it_says_is_no_answer(judge: ModelJudge) -> None:
    score = score_with(judge, ["detection"], Asking(1))["detection"](EXPLANATION, SET)
    assert score.value is None
    assert score.counts is not None
    assert score.counts.failed + score.counts.unparsable == 40  # and no text is counted as judged
    long = Prompt("x", (Message("user", "word " * 500),))
    (reply,) = judge.ask([long])
    assert reply.failure is not None
    assert "the prompt has" in reply.failure.reason
