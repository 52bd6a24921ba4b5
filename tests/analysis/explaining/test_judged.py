"""Explanations and scores by a judge, asked of a scripted endpoint: oracles, constants, coins, nonsense."""

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.examples import ExampleSet
from neuron_explainer.analysis.explaining.explanation import (
    Cost,
    Counts,
    Explanation,
    Score,
    as_dict,
    score_from,
)
from neuron_explainer.analysis.explaining.judge import Prompt, Reply, ReplyToken
from neuron_explainer.analysis.explaining.judged import (
    SCORERS,
    Asking,
    NoReplyError,
    explain_with,
    generation_plan,
    generation_score,
    score_with,
)
from neuron_explainer.analysis.explaining.local_judges import (
    PreviewJudge,
    ScriptedJudge,
    understood,
)
from neuron_explainer.analysis.explaining.prompts import EXPLAINERS, HASHES
from neuron_explainer.errors import InputError
from tests.analysis.explaining.fake_endpoint import (
    Answer,
    Script,
    completion,
    error,
    serving,
)
from tests.analysis.explaining.made import made_set

SET = made_set(20, 10, 10)
EXPLANATION = Explanation("made", 7, "the word “the”", "marked")
Say = Callable[[str], Any]
"""What is answered about the text of one question."""


def texts_in(asked: str) -> dict[str, str]:
    """The fenced texts of a prompt, by the last word of their titles."""
    found = re.findall(
        r"^(?:Text (\S+)|(Tokens)):\nBEGIN (\w+)\n(.*?)\nEND \3$", asked, re.M | re.S
    )
    return {number or tokens: text for number, tokens, _, text in found}


def tokens_in(text: str) -> list[str]:
    return [json.loads(line.partition("\t")[2]) for line in text.split("\n")]


def about_texts(say: Say) -> Callable[[str], str]:
    return lambda asked: json.dumps({number: say(text) for number, text in texts_in(asked).items()})


def oracle(asked: str) -> str:
    """All that is asked, answered right: the unit is active at " the"."""
    texts = texts_in(asked)
    if "letter of a text" in asked:
        return json.dumps({"text": next(k for k, text in texts.items() if "<<the>>" not in text)})
    if "number of a token" in asked:
        return about_texts(lambda text: 1 + tokens_in(text).index(" the"))(asked)
    if "Tokens" in texts:
        tokens = tokens_in(texts["Tokens"])
        return json.dumps({str(i): 10 * (t == " the") for i, t in enumerate(tokens, 1)})
    marked = any("<<" in text for text in texts.values())
    return about_texts(lambda text: ("<<the>>" if marked else " the") in text)(asked)


def script_of(say: Callable[[str], str]) -> Script:
    return lambda seen: say(seen.prompt)


def scored(name: str, script: Script, examples: ExampleSet = SET, **more: Any) -> Score:
    """The score with a judge behind the endpoint."""
    asking = Asking(**{k: more.pop(k) for k in ("texts_per_prompt", "logprobs") if k in more})
    settings: dict[str, Any] = {"backoff": 0.001} | more
    with serving(script) as server:
        judge = EndpointJudge(Endpoint(server.url, "fake", **settings))
        return score_with(judge, [name], asking)[name](EXPLANATION, examples)


@pytest.mark.parametrize("name", SCORERS)
def test_an_oracle_is_right_everywhere(name: str) -> None:
    score = scored(name, script_of(oracle))
    least = {"simulation": 0.8}.get(name, 1.0)  # it knows where, but not how much
    assert score.value is not None
    assert score.value >= least
    assert score.counts is not None
    assert score.counts.failed == score.counts.unparsable == 0
    assert (score.name, score.judge, score.prompt_hash) == (name, "fake", HASHES[name])
    calls = {"simulation": 40, "max-token": 4, "intruder": 5}.get(name, 8)
    assert score.cost == Cost(calls, 100 * calls, 10 * calls)
    assert score_from(json.loads(json.dumps(as_dict(score)))) == score
    if name in ("detection", "fuzzing"):
        assert score.details["F1"] == 1
        assert score.counts.judged == 40


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_the_same_whatever_the_concurrency(name: str) -> None:
    found = [scored(name, script_of(oracle), concurrency=n) for n in (1, 8)]
    assert found[0] == found[1]


def test_constants() -> None:
    yes = scored("detection", script_of(about_texts(lambda text: True)))
    no = scored("fuzzing", script_of(about_texts(lambda text: False)))
    assert yes.value == no.value == 0.5
    assert yes.details["recall"] == 1
    assert yes.details["F1"] == pytest.approx(2 / 3)
    zero = scored(
        "simulation", script_of(lambda asked: json.dumps({str(i): 0 for i in range(1, 9)}))
    )
    assert zero.value is None  # not NaN, not 0


LARGE = made_set(1000, 1000, n_tokens=6)


def judged_in_process(
    name: str, say: Callable[[str], str], examples: ExampleSet, **more: Any
) -> Score:
    judge = ScriptedJudge(lambda prompt: say(prompt.messages[-1].content))
    return score_with(judge, [name], Asking(**more))[name](EXPLANATION, examples)


@pytest.mark.parametrize(
    ("wrong", "expected", "within"), [(0.5, 0.5, 0.035), (0.1, 0.9, 0.03)], ids=["coin", "flips"]
)
def test_a_coin_and_an_oracle_that_errs(wrong: float, expected: float, within: float) -> None:
    random = np.random.default_rng(0)

    def say(text: str) -> bool:
        return (" the" in text) != bool(random.random() < wrong)

    score = judged_in_process("detection", about_texts(say), LARGE, texts_per_prompt=20)
    assert score.value == pytest.approx(expected, abs=within)


def test_what_cannot_be_read_is_counted_and_nothing_else() -> None:
    examples = made_set(50, 50)

    def bad(text: str) -> bool:
        return zlib.crc32(text.encode()) % 5 == 0

    def script(seen: Any) -> Answer | str:
        if len(seen.body["messages"]) > 2 or bad(texts_in(seen.prompt)["1"]):
            return "I would rather not say."  # nor when it is asked once more
        return oracle(seen.prompt)

    score = scored("detection", script, examples, texts_per_prompt=1)
    whole = scored("detection", script_of(oracle), examples)
    counts = score.counts
    assert counts is not None
    assert counts.unparsable == sum(bad(each.text) for each in examples.test) > 10
    assert counts.failed == 0
    assert counts.judged + counts.unparsable == 100
    assert score.value == 1.0
    assert score.interval is not None is not whole.interval
    assert score.interval[0] < whole.interval[0]  # fewer texts are less sure


def test_failures_are_apart_from_what_cannot_be_read() -> None:
    def script(seen: Any) -> Answer | str:
        first = texts_in(seen.prompt)["1"]
        if " the" in first:
            return Answer(completion("", "content_filter"))
        return '{"1": true}'  # the others are missing

    score = scored("detection", script)
    assert score.value is None
    assert score.counts is not None
    assert score.counts.failed + score.counts.unparsable == 40
    assert score.counts.failed > 0 < score.counts.unparsable
    assert {each.failure.partition(":")[0] for each in score.answers} == {"failed", "unparsable"}


@pytest.mark.parametrize(
    "say",
    [
        lambda asked: f"Sure! Here it is:\n```json\n{oracle(asked)}\n```\nHope that helps.",
        lambda asked: "<think>maybe {1: true}</think>" + oracle(asked),
        lambda asked: json.dumps([*json.loads(oracle(asked)).values()]),
        lambda asked: oracle(asked).replace("true", '"True"').replace("false", "0"),
        lambda asked: json.dumps({"answers": json.loads(oracle(asked))}),
        lambda asked: json.dumps(
            {str(int(k) - 1): v for k, v in json.loads(oracle(asked)).items()}
        ),
    ],
    ids=["text around", "thoughts", "list", "words", "nested", "from 0"],
)
def test_replies_that_say_it_in_another_form(say: Callable[[str], str]) -> None:
    assert scored("detection", script_of(say)).value == 1


def test_tokens_that_are_hard_to_write() -> None:
    """Escapes, quotes, control characters and halves of characters arrive as they are."""
    words = [
        b" the",
        b'"',
        b"\\",
        b"\n",
        b"\x1b[0m",
        "☃".encode()[:2],
        "☃".encode()[2:],
        b"{}",
        b"\xff",
    ]
    examples = made_set(6, 6)
    for each in (*examples.train, *examples.test):
        tokens = np.minimum(each.example.tokens, len(words) - 1)
        object.__setattr__(each.example, "tokens", tokens)
        object.__setattr__(
            each.example, "vocabulary", lambda ids: [words[i] for i in np.asarray(ids)]
        )
    for name in SCORERS:
        score = scored(name, script_of(oracle), examples)
        assert score.value is not None
        assert score.value >= 0.8, name


# --- log-probabilities ---


def with_logprobs(
    prompt: Prompt, say: Callable[[str], Sequence[tuple[str, dict[str, float]]]]
) -> Reply:
    """A reply whose tokens have alternatives."""
    parts = say(prompt.messages[-1].content)
    text = "".join(part for part, _ in parts)
    tokens = tuple(
        ReplyToken(part, {key: math.log(p) if p > 0 else -9999.0 for key, p in some.items()})
        for part, some in parts
    )
    return understood(prompt, text, tokens=tokens)


def noting(asked: list[Prompt], say: Callable[[str], str]) -> ScriptedJudge:
    """A judge that keeps what it is asked."""

    def answer(prompt: Prompt) -> str:
        asked.append(prompt)
        return say(prompt.messages[-1].content)

    return ScriptedJudge(answer)


def test_probabilities_give_the_area_under_the_curve() -> None:
    def say(asked: str) -> list[tuple[str, dict[str, float]]]:
        found: list[tuple[str, dict[str, float]]] = [("{", {})]
        for number, text in texts_in(asked).items():
            yes = 0.8 if " the" in text else 0.6  # always "true", but less surely
            some = {" true": yes / 2, "true": yes / 2, "false": 1 - yes, "maybe": 0.5}
            found += [(f'"{number}":', {}), (" true", some), (",", {})]
        return [*found[:-1], ("}", {})]

    def answer(prompt: Prompt) -> Reply:
        assert prompt.top_logprobs == 5
        return with_logprobs(prompt, say)

    score = score_with(ScriptedJudge(answer), ["detection"])["detection"](EXPLANATION, SET)
    assert score.value == 0.5
    assert score.details["AUC"] == 1
    assert {round(each.probability or 0, 6) for each in score.answers} == {0.8, 0.6}


def test_simulation_takes_the_expected_value() -> None:
    def say(asked: str) -> list[tuple[str, dict[str, float]]]:
        found: list[tuple[str, dict[str, float]]] = [("{", {})]
        for number, token in enumerate(tokens_in(texts_in(asked)["Tokens"]), 1):
            high = 0.5 if token == " the" else 0.1
            some = {"0": 1 - high, " 10": high, "9.5": 0.3, "11": 0.3, "x": 0.0}
            found += [(f'"{number}":', {}), (" 0", some), (",", {})]
        return [*found[:-1], ("}", {})]

    judge = ScriptedJudge(lambda prompt: with_logprobs(prompt, say))
    score = score_with(judge, ["simulation"])["simulation"](EXPLANATION, SET)
    assert score.value is not None
    assert score.value > 0.8  # though every value that is written is 0


def test_without_log_probabilities_the_values_count() -> None:
    def refusing(seen: Any) -> Answer | str:
        if "logprobs" in seen.body:
            return error(400, "logprobs are not supported")
        return oracle(seen.prompt)

    score = scored("simulation", refusing)
    assert score.value is not None
    assert score.value > 0.8
    asked: list[Prompt] = []
    judge = noting(asked, oracle)
    score_with(judge, ["detection"], Asking(logprobs=False))["detection"](EXPLANATION, SET)
    assert {each.top_logprobs for each in asked} == {0}


# --- simulation: algebra ---


def test_true_levels_correlate_with_themselves() -> None:
    """An oracle that answers with the whole numbers of the activations; a shuffled one does not."""
    examples = made_set(150, 150, n_tokens=8)
    levels = {
        tuple(each.example.strings): np.floor(each.example.activations).astype(int).tolist()
        for each in examples.test
    }
    random = np.random.default_rng(0)

    def say(asked: str, shuffled: bool = False) -> str:
        tokens = tokens_in(texts_in(asked)["Tokens"])
        strings = tuple("↵" if token == "\n" else token for token in tokens)
        values = levels[strings]
        if shuffled:
            values = random.permutation(values).tolist()
        return json.dumps({str(i): value for i, value in enumerate(values, 1)})

    true = judged_in_process("simulation", say, examples)
    assert true.value is not None
    assert true.value > 0.98
    mixed = judged_in_process("simulation", lambda asked: say(asked, True), examples)
    assert mixed.value is not None
    assert mixed.value < true.value - 0.5


# --- single questions ---


def test_max_token_beside_chance() -> None:
    score = judged_in_process("max-token", oracle, SET)
    assert score.value == 1
    assert score.floor is not None
    assert score.floor.value == pytest.approx(1 / 8)
    first = judged_in_process("max-token", about_texts(lambda text: 1), SET)
    share = np.mean([each.example.peak == 0 for each in SET.test if each.active])
    assert first.value == pytest.approx(share)
    beyond = judged_in_process("max-token", about_texts(lambda text: 9), SET)
    assert beyond.value is None
    assert beyond.counts is not None
    assert beyond.counts.unparsable == 20


def test_the_intruder_is_in_any_place_and_chance_is_a_fifth() -> None:
    examples = made_set(200, 200)
    asked: list[Prompt] = []
    judge = noting(asked, lambda text: '{"text": "b"}')
    score = score_with(judge, ["intruder"])["intruder"](EXPLANATION, examples)
    assert score.value == pytest.approx(0.2, abs=0.15)
    assert score.floors[0].value == 0.2
    assert len(asked) == 50
    assert EXPLANATION.text not in asked[0].text
    unknown = judged_in_process("intruder", lambda asked: '{"text": "F"}', examples)
    assert unknown.counts is not None
    assert unknown.counts.unparsable == 50


def _constant(text: str, prompt: Prompt) -> str:
    return text


def test_generated_texts() -> None:
    judge = ScriptedJudge(lambda p: '{"texts": {"1": "the cat", "2": "the mat\\nsat"}}')
    found = generation_plan(EXPLANATION, judge, 2).ask(judge)
    assert found.texts == ("the cat", "the mat\nsat")
    assert found.by.prompt_hash == HASHES["generation"]
    for bad in ('{"texts": {"1": "the cat"}}', '{"texts": {"1": "", "2": "x"}}', '{"other": 1}'):
        judge = ScriptedJudge(partial(_constant, bad))
        result = generation_plan(EXPLANATION, judge, 2).ask(judge)
        assert result.texts == ()
        assert result.failure is not None
        assert result.failure.kind == "unparsable"
        score = generation_score(result, SET, lambda texts: pytest.fail("there are no texts"))
        assert score.value is None
        assert score.counts == Counts(unparsable=1)


# --- explanations ---


@pytest.mark.parametrize("kind", EXPLAINERS)
def test_explanations(kind: str) -> None:
    asked: list[Prompt] = []

    def answer(prompt: Prompt) -> Reply:
        asked.append(prompt)
        return understood(
            prompt, '{"explanation": " the\\n word \\u001b[2J “the” "}', cost=Cost(1, 5, 2)
        )

    found = explain_with(ScriptedJudge(answer, "fake"), kind, lambda unit: [" a", f" {unit}"])(SET)
    assert found == Explanation(
        "made",
        7,
        "the word [2J “the”",
        kind,
        "fake",
        HASHES[kind],
        0,
        SET.ids("train"),
        cost=Cost(1, 5, 2),
    )
    (prompt,) = asked
    shown = prompt.messages[-1].content
    assert ('" the"\t' in shown) if kind == "token-pairs" else ("<<the>>" in shown)
    assert ('" 7"' in shown) == (kind == "marked-logits")
    assert ("Silent text 1" in shown) == (kind == "contrastive")
    held_out = [each.text for each in SET.test]
    assert not any(text in shown for text in held_out)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing", "unparsable: no JSON"),
        ('{"explanation": 3}', "unparsable: expected an object with the text 'explanation'"),
        ('{"explanation": " "}', "unparsable: explanation is empty"),
        (json.dumps({"explanation": "x" * 601}), "unparsable: explanation has 601 characters"),
    ],
)
def test_without_an_explanation_there_is_the_reason(text: str, reason: str) -> None:
    with pytest.raises(NoReplyError, match=reason):
        explain_with(ScriptedJudge(lambda p: text), "marked")(SET)


def test_unknown_names() -> None:
    judge = ScriptedJudge(lambda p: "")
    with pytest.raises(InputError, match=r"unknown prompt 'markd'. Did you mean 'marked'"):
        explain_with(judge, "markd")(SET)
    with pytest.raises(
        InputError, match=r"no judge is asked for 'detect'. Did you mean 'detection'"
    ):
        score_with(judge, ["detect"])["detect"](EXPLANATION, SET)
    with pytest.raises(InputError, match="texts_per_prompt must be 1 to 50"):
        Asking(texts_per_prompt=0)


@pytest.mark.parametrize("name", [*SCORERS, *EXPLAINERS])
def test_previews_count_what_would_be_sent(name: str) -> None:
    preview = PreviewJudge("fake")
    if name in SCORERS:
        score_with(preview, [name])[name](EXPLANATION, SET)
    else:
        assert explain_with(preview, name)(SET).text
    calls = {"simulation": 40, "max-token": 4, "intruder": 5, "detection": 8, "fuzzing": 8}
    assert preview.preview.calls == calls.get(name, 1)
    assert 50 < preview.preview.prompt_tokens / preview.preview.calls < 2000
    assert preview.preview.completion_tokens <= preview.preview.most_completion_tokens
