"""The endpoint's judge, row by row of what can go wrong on the wire."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.explanation import Cost, Failure
from neuron_explainer.analysis.explaining.http_client import KEY_VARIABLE, base_url, retry_after
from neuron_explainer.analysis.explaining.judge import (
    Message,
    Prompt,
    Reply,
)
from neuron_explainer.analysis.explaining.local_judges import PreviewJudge, ScriptedJudge
from neuron_explainer.analysis.explaining.spending import (
    BudgetError,
    Limits,
    Meter,
    Price,
    StoppedError,
)
from neuron_explainer.analysis.explaining.transcript import Transcript
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from tests.analysis.explaining.fake_endpoint import (
    Answer,
    FakeEndpoint,
    Script,
    Seen,
    completion,
    error,
    serving,
)

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
KEY = "sk-very-secret-1234"


def prompt(text: str = "What?", **more: Any) -> Prompt:
    settings: dict[str, Any] = {
        "schema": SCHEMA,
        "sample": {"answer": "x"},
        "max_tokens": 50,
    } | more
    return Prompt("test", (Message("user", text),), **settings)


def judge(server: FakeEndpoint, transcript: Transcript | None = None, **more: Any) -> EndpointJudge:
    limits, price = more.pop("limits", None), more.pop("price", None)
    settings: dict[str, Any] = {"backoff": 0.001} | more
    endpoint = Endpoint(server.url, "fake", **settings)
    return EndpointJudge(endpoint, transcript, limits=limits, price=price)


def echo(seen: Seen) -> str:
    """The prompt as the answer."""
    return json.dumps({"answer": seen.prompt})


def one(script: Script, asked: Prompt | None = None, **more: Any) -> tuple[Reply, FakeEndpoint]:
    """The reply to one prompt."""
    with serving(script) as server:
        (reply,) = judge(server, **more).ask([asked or prompt()])
    return reply, server


def in_turn(*answers: Answer | str) -> Script:
    """Answers one after the other; the last one for ever."""
    left = list(answers)
    return lambda seen: left.pop(0) if len(left) > 1 else left[0]


GOOD = '{"answer": "yes"}'
DOWN = [error(status, "not now") for status in (408, 409, 429, 500, 502, 503, 529)]


def test_what_is_sent() -> None:
    reply, server = one(lambda seen: GOOD, prompt(top_logprobs=5), temperature=0.5, seed=3)
    assert reply == Reply(GOOD, {"answer": "yes"}, cost=Cost(1, 100, 10))
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {
        "model": "fake",
        "messages": [{"role": "user", "content": "What?"}],
        "max_tokens": 50,
        "temperature": 0.5,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "test", "strict": True, "schema": SCHEMA},
        },
    }
    assert "Authorization" not in seen.headers


# --- order, concurrency, nothing twice ---


def test_replies_are_the_same_whatever_the_concurrency() -> None:
    def script(seen: Seen) -> Answer:
        number = int(seen.prompt)
        return Answer(completion(echo(seen)), delay=0.004 * (number % 3))

    found = {}
    asked = [prompt(str(i % 25)) for i in range(40)]
    for concurrency in (1, 3, 8):
        with serving(script) as server:
            found[concurrency] = [*judge(server, concurrency=concurrency).ask(asked)]
            assert server.under_way_most <= concurrency
            assert len(server.seen) == 25  # equal prompts are asked once
    assert [reply.value["answer"] for reply in found[1]] == [str(i % 25) for i in range(40)]
    assert found[1] == found[3] == found[8]


def test_several_threads_share_the_concurrency() -> None:
    with serving(lambda seen: Answer(completion(echo(seen)), delay=0.01)) as server:
        made = judge(server, concurrency=2)
        threads = [
            threading.Thread(target=lambda i=i: [*made.ask([prompt(f"{i} {j}") for j in range(4)])])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.seen) == 16
        assert server.under_way_most == 2


def test_a_failing_prompt_is_asked_once_in_a_call() -> None:
    for concurrency in (1, 4):
        with serving(in_turn(error(400, "no"), GOOD)) as server:
            first, second = judge(server, concurrency=concurrency).ask([prompt(), prompt()])
        assert first.failure == second.failure
        assert first.failure is not None


def test_prompts_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def prompts() -> Any:
        for i in range(100):
            taken.append(i)
            yield prompt(str(i))

    with serving(echo) as server:
        replies = judge(server, concurrency=2).ask(prompts())
        assert next(replies).value == {"answer": "0"}
        replies.close()
    assert len(taken) == 4


def test_a_second_run_makes_no_call(tmp_path: Path) -> None:
    asked = [prompt(str(i)) for i in range(10)]
    path = tmp_path / "endpoint.jsonl"
    with serving(echo) as server:
        first = [*judge(server, Transcript(path)).ask(asked)]
        again = [*judge(server, Transcript(path), concurrency=1).ask(asked)]
        assert again == first
        assert len(server.seen) == 10
        assert [judge(server, Transcript(path)).known(each) for each in asked] == first
        (other,) = judge(server, Transcript(path), seed=1).ask(asked[:1])
        assert other == first[0]
        assert len(server.seen) == 11  # another seed is another question


CHILD = """
import sys
from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.transcript import Transcript
from tests.analysis.explaining.test_client import prompt
judge = EndpointJudge(Endpoint(sys.argv[1], "fake", concurrency=2), Transcript(sys.argv[2]))
for reply in judge.ask([prompt(str(i)) for i in range(12)]):
    pass
"""


def test_a_killed_process_loses_only_what_is_under_way(tmp_path: Path) -> None:
    path, blocked = tmp_path / "endpoint.jsonl", threading.Event()

    def script(seen: Seen) -> Answer | str:
        if int(seen.prompt) >= 6 and not blocked.is_set():
            blocked.wait(20)
        return echo(seen)

    with serving(script) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(path)])
        while server.under_way < 2 or len(server.seen) < 8:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        blocked.set()
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, '{"key":"half a li']))  # killed while it wrote
        done = [json.loads(line)["reply"]["value"]["answer"] for line in lines]
        assert sorted(done, key=int) == [str(i) for i in range(6)]
        before = len(server.seen)
        replies = [*judge(server, Transcript(path)).ask([prompt(str(i)) for i in range(12)])]
        asked_again = [seen.prompt for seen in server.seen[before:]]
        assert sorted(asked_again, key=int) == [str(i) for i in range(6, 12)]
        assert [reply.value["answer"] for reply in replies] == [str(i) for i in range(12)]
        before = len(server.seen)
        assert [*judge(server, Transcript(path)).ask([prompt("11")])] == replies[11:]
        assert len(server.seen) == before


# --- tries ---


@pytest.mark.parametrize("answer", DOWN, ids=lambda answer: str(answer.status))
def test_what_may_not_fail_again_is_tried_again(answer: Answer) -> None:
    reply, server = one(in_turn(answer, answer, GOOD))
    assert reply.value == {"answer": "yes"}
    assert len(server.seen) == 3
    assert reply.cost.requests == 1  # only an answer costs


def test_at_most_six_times() -> None:
    reply, server = one(in_turn(error(500, "broken")))
    assert reply.failure is not None
    assert reply.failure.kind == "failed"
    assert reply.failure.reason.endswith("/v1/chat/completions answered 500: broken (7 tries)")
    assert len(server.seen) == 7


def test_what_failed_is_asked_again_by_the_next_command(tmp_path: Path) -> None:
    with serving(in_turn(error(500, "broken"), GOOD)) as server:
        transcript = Transcript(tmp_path / "x.jsonl")
        (reply,) = judge(server, transcript, retries=0).ask([prompt()])
        assert reply.failure is not None
        (reply,) = judge(server, transcript, retries=0).ask([prompt()])
        assert reply.failure is None


def test_the_server_says_how_long_to_wait() -> None:
    with serving(in_turn(error(429, "slower", Retry_After="0.2"), GOOD)) as server:
        begin = time.monotonic()
        replies = [*judge(server).ask([prompt(str(i)) for i in range(20)])]
        assert time.monotonic() - begin >= 0.2
    assert all(reply.failure is None for reply in replies)  # none is lost


def test_waits_as_seconds_and_as_dates() -> None:
    assert retry_after({"Retry-After": "1.5"}) == 1.5
    date = retry_after({"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    assert 27 < date <= 30
    for nothing in ("", "soon", "nan", "inf", "-3", formatdate(0, usegmt=True)):
        assert retry_after({"Retry-After": nothing}) == 0


def test_too_long_a_wait_stops_the_work() -> None:
    with (
        serving(in_turn(error(429, "quota", Retry_After="3600"))) as server,
        pytest.raises(StoppedError, match="asks to wait 3600 seconds"),
    ):
        [*judge(server).ask([prompt()])]
    assert len(server.seen) == 1


def test_a_slow_server_is_given_up() -> None:
    reply, _ = one(lambda seen: Answer(completion(GOOD), delay=0.2), timeout=0.05)
    assert reply.failure is not None
    assert "did not answer in time (3 tries)" in reply.failure.reason


def test_a_broken_connection_is_tried_again() -> None:
    reply, server = one(in_turn(Answer(completion(GOOD), cut_after=10), GOOD))
    assert reply.value == {"answer": "yes"}
    assert len(server.seen) == 2


def test_no_server_is_said_with_its_address() -> None:
    with serving(echo) as server:
        url = server.url
    # One try: with a second one, the test would last five seconds.
    made, begin = EndpointJudge(Endpoint(url, "fake", backoff=10.0)), time.monotonic()
    with pytest.raises(StoppedError, match=rf"no answer at {url}/chat/completions.*Is the server"):
        [*made.ask([prompt()])]
    assert time.monotonic() - begin < 4


def test_a_server_that_answered_may_be_on_its_way_up_again() -> None:
    closing = Answer(completion(GOOD), headers={"Connection": "close"})
    with serving(lambda seen: closing) as server:
        made = judge(server, retries=2, backoff=0.05)
        [*made.ask([prompt("1")])]
    begin = time.monotonic()
    with pytest.raises(StoppedError, match="no answer at"):
        [*made.ask([prompt("2")])]
    assert time.monotonic() - begin > 0.07  # two waits


def test_what_is_no_chat_completion_is_tried_again() -> None:
    busy = Answer({"error": {"message": "busy", "code": 503}})  # as OpenRouter says it, with 200
    reply, _ = one(in_turn(Answer(b"<html>"), busy, GOOD))
    assert reply.value == {"answer": "yes"}


def test_an_endpoint_that_never_replies_stops_the_work() -> None:
    with (
        serving(in_turn(error(400, "bad"))) as server,
        pytest.raises(StoppedError, match=r"10 prompts in a row got no reply.* bad"),
    ):
        [*judge(server, concurrency=1).ask([prompt(str(i)) for i in range(50)])]
    assert len(server.seen) == 10


# --- refusals ---


def test_a_wrong_key_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serving(in_turn(error(401, f"Incorrect API key provided: {KEY}"))) as server:
        with pytest.raises(StoppedError, match=rf"answered 401.*\[key\].*{KEY_VARIABLE}") as caught:
            [*judge(server, concurrency=2).ask([prompt(str(i)) for i in range(50)])]
        assert KEY not in str(caught.value)
        assert len(server.seen) <= 4
        assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_the_variable_is_named() -> None:
    with (
        serving(in_turn(error(403, "who?"))) as server,
        pytest.raises(StoppedError, match=f"{KEY_VARIABLE} is not set"),
    ):
        [*judge(server).ask([prompt()])]


def test_an_unknown_model_lists_those_there_are() -> None:
    def script(seen: Seen) -> Answer:
        if seen.path == "/v1/models":
            return Answer({"data": [{"id": "fake-7b"}, {"id": "other"}]})
        return error(404, "The model `fake` does not exist")

    with (
        serving(script) as server,
        pytest.raises(StoppedError, match=r"does not exist Did you mean 'fake-7b'.*fake-7b, other"),
    ):
        [*judge(server).ask([prompt()])]


# --- what a server does not understand ---


def without(*words: str) -> Script:
    """A server that knows no such field, as vLLM and others say it."""

    def script(seen: Seen) -> Answer | str:
        text = json.dumps(seen.body)
        for word in words:
            if f'"{word}"' in text:
                return error(400, f"Invalid parameter: {word} is not supported with this model.")
        return GOOD

    return script


@pytest.mark.parametrize(
    ("unknown", "tries"),
    [
        (("json_schema",), 2),
        (("response_format",), 3),
        (("logprobs",), 2),
        (("seed", "temperature"), 3),
        (("response_format", "logprobs", "temperature"), 5),
    ],
)
def test_a_simpler_request_is_remembered(unknown: tuple[str, ...], tries: int) -> None:
    with serving(without(*unknown)) as server:
        made = judge(server, concurrency=1)
        replies = [*made.ask([prompt(str(i), top_logprobs=5) for i in range(3)])]
    assert [reply.value for reply in replies] == [{"answer": "yes"}] * 3
    assert len(server.seen) == tries + 2
    last = server.seen[-1].body
    form = last.get("response_format", {}).get("type")
    assert form == {"json_schema": "json_object", "response_format": None}.get(
        unknown[0], "json_schema"
    )
    assert not set(unknown) & last.keys()


def test_a_newer_name_of_the_length() -> None:
    def script(seen: Seen) -> Answer | str:
        if "max_tokens" in seen.body:
            return error(400, "'max_tokens' is not supported, use 'max_completion_tokens'.")
        return GOOD

    reply, server = one(script)
    assert reply.value == {"answer": "yes"}
    assert server.seen[-1].body["max_completion_tokens"] == 50


def test_any_other_bad_request_fails_alone() -> None:
    def script(seen: Seen) -> Answer | str:
        return error(400, "maximum context length is 8") if len(seen.prompt) > 8 else GOOD

    with serving(script) as server:
        good, bad, last = judge(server).ask([prompt("a"), prompt("a" * 9), prompt("b")])
    assert good.failure is None is last.failure
    assert bad.failure == Failure(
        "failed", f"{server.url}/chat/completions answered 400: maximum context length is 8"
    )


# --- replies that are none ---


def test_a_reply_that_is_cut_off_gets_twice_the_room_once() -> None:
    cut = Answer(completion('{"answer": "ye', "length"))
    reply, server = one(in_turn(cut, GOOD))
    assert reply.value == {"answer": "yes"}
    assert reply.cost.requests == 2
    assert [seen.body["max_tokens"] for seen in server.seen] == [50, 100]
    reply, server = one(in_turn(cut))
    assert reply.failure is not None
    assert "cut off" in reply.failure.reason
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(GOOD, "content_filter"), "content filter"),
        (completion(None, refusal="I will\nnot."), "the model refused: I will not."),
        (completion(None), "no content"),
        (completion("  "), "no content"),
        (completion(None, reasoning_content=GOOD), "only the model's reasoning"),
        (completion("", reasoning=GOOD), "only the model's reasoning"),
        ({"choices": []}, "no content"),
        ({"choices": [{"message": {"content": 3}}]}, "no content"),
        ({}, "no content"),
    ],
)
def test_a_reply_without_content_is_a_failure(answer: Any, reason: str) -> None:
    reply, server = one(lambda seen: Answer(answer))
    assert reply.failure is not None
    assert reply.failure.kind == "failed"
    assert reason in reply.failure.reason
    assert len(server.seen) == 1


def test_the_reasoning_counts_where_it_was_asked_for() -> None:
    answer = Answer(completion(None, reasoning_content=GOOD))
    reply, _ = one(lambda seen: answer, use_reasoning=True)
    assert reply.value == {"answer": "yes"}


def test_a_reasoning_model_has_room_to_think() -> None:
    asked = in_turn(Answer(completion(None, "length", reasoning="hm")), GOOD)
    reply, server = one(asked, thinking_tokens=1000)
    assert reply.value == {"answer": "yes"}
    assert [seen.body["max_tokens"] for seen in server.seen] == [1050, 1100]
    with serving(echo) as server, pytest.raises(BudgetError):
        [*judge(server, thinking_tokens=1000, limits=Limits(tokens=1000)).ask([prompt()])]


def test_what_is_no_json_is_asked_for_once_more() -> None:
    reply, server = one(in_turn("Sure! The answer is yes.", GOOD))
    assert reply.value == {"answer": "yes"}
    assert reply.cost == Cost(2, 200, 20)
    roles = [message["role"] for message in server.seen[1].body["messages"]]
    assert roles == ["user", "assistant", "user"]
    reply, server = one(in_turn("no", "no"))
    assert reply.failure is not None
    assert reply.failure.kind == "unparsable"
    assert len(server.seen) == 2


def test_what_says_a_key_twice_is_not_asked_again() -> None:
    reply, server = one(lambda seen: '{"answer": "yes", "answer": "no"}')
    assert reply.failure == Failure("unparsable", "the key 'answer' is there twice")
    assert len(server.seen) == 1


def test_log_probabilities() -> None:
    top = [{"token": "yes", "logprob": -0.1}, {"token": "no", "logprob": -2}, {"token": None}, 3]
    logprobs = [{"token": "yes", "logprob": -0.1, "top_logprobs": top}, "?"]
    reply, _ = one(lambda seen: Answer(completion("yes", logprobs=logprobs)), prompt(schema=None))
    assert reply.text == "yes"
    assert reply.tokens[0].alternatives == {"yes": -0.1, "no": -2.0}


# --- what may leave the machine ---


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://LOCALHOST:8000/", "http://localhost:8000/v1"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1"),
        ("https://a.example/api/v1/chat/completions", "https://a.example/api/v1"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://a.example/v1", "plain http .* this machine only"),
        ("http://localhost.a.example/v1", "this machine only"),
        ("http://127.0.0.1@a.example/v1", "user or password"),
        ("http://192.168.1.2:8000/v1", "this machine only"),
        ("https://a.example/v1?key=secret", "no query"),
        ("ftp://a.example", "expected an http"),
        ("a.example/v1", "expected an http"),
        ("https:///v1", "without a host"),
    ],
)
def test_refused_addresses(url: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        Endpoint(url, "model")
    assert "secret" not in str(caught.value)


def redirecting(status: int, place: Callable[[FakeEndpoint], str]) -> Any:
    """An endpoint that redirects to a place."""
    holder: list[FakeEndpoint] = []

    def script(seen: Seen) -> Answer | str:
        if seen.path == "/v1/chat/completions":
            return Answer({}, status, {"Location": place(holder[0])})
        return GOOD

    return script, holder


def test_a_redirect_to_another_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serving(echo) as other:
        script, holder = redirecting(307, lambda here: f"{other.url}/chat/completions")
        with serving(script) as server:
            holder.append(server)
            with pytest.raises(StoppedError, match=f"redirects to {other.url}.*Nothing was sent"):
                [*judge(server).ask([prompt()])]
        assert other.seen == []


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_lose_the_body_is_refused(status: int) -> None:
    script, holder = redirecting(status, lambda here: "/v2/there")
    with serving(script) as server:
        holder.append(server)
        with pytest.raises(StoppedError, match=r"redirects to .*/v2/there"):
            [*judge(server).ask([prompt()])]


def test_a_redirect_within_the_address_is_followed_without_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    script, holder = redirecting(308, lambda here: "/v1/there")
    with serving(script) as server:
        holder.append(server)
        (reply,) = judge(server).ask([prompt()])
    assert reply.value == {"answer": "yes"}
    assert ["Authorization" in seen.headers for seen in server.seen] == [True, False]
    script, holder = redirecting(307, lambda here: "/v1/chat/completions")
    with serving(script) as server:
        holder.append(server)
        with pytest.raises(StoppedError, match="more than 3 times"):
            [*judge(server).ask([prompt()])]


def test_this_machine_is_asked_past_proxies_and_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    reply, server = one(lambda seen: GOOD)
    assert reply.value == {"answer": "yes"}
    assert "Authorization" not in server.seen[0].headers


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "a b\nc")
    with pytest.raises(InputError, match="OTHER does not hold a key") as caught:
        EndpointJudge(Endpoint("https://a.example", "m", key_variable="OTHER"))
    assert "a b" not in str(caught.value)


def test_the_transcript_holds_no_key_and_is_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"  {KEY}\n")
    path = tmp_path / "made" / "endpoint.jsonl"
    spoken = Answer(completion(json.dumps({"answer": f"your key is {KEY}"}), key=KEY))
    with serving(lambda seen: spoken) as server:
        (reply,) = judge(server, Transcript(path)).ask([prompt(f"my key is {KEY}")])
        assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert reply.value == {"answer": "your key is [key]"}
    assert KEY not in path.read_text()
    assert "Authorization" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# --- the transcript ---


def test_damaged_lines_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "endpoint.jsonl"
    asked = [prompt(str(i)) for i in range(3)]
    with serving(echo) as server:
        first = [*judge(server, Transcript(path)).ask(asked)]
        lines = path.read_bytes().splitlines(keepends=True)
        broken = lines[1][:80] + b"}\n"
        path.write_bytes(lines[0] + broken + b"\xff\xfe\n\n" + lines[2][:-20])
        assert [*judge(server, Transcript(path)).ask(asked)] == first
        assert len(server.seen) == 5
        assert [*judge(server, Transcript(path)).ask(asked)] == first
        assert len(server.seen) == 5
        text = path.read_text(errors="replace").replace('"tokens":[]', '"tokens":[3]')
        path.write_text(text)
        with pytest.raises(CheckpointError, match="expected a reply as this package writes it"):
            [*judge(server, Transcript(path)).ask(asked)]


def test_another_line_is_not_taken_for_the_one_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for letter in "ab":
        Transcript(path).append(letter * 64, {"x": letter})
    read = Transcript(path)
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(second + first)
    assert read.get("a" * 64) is None


def test_two_processes_append_to_one_transcript(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    one, other = Transcript(path), Transcript(path)
    one.append("a" * 64, {"x": 1})
    other.append("b" * 64, {"x": 2})
    one.append("c" * 64, {"x": 3})
    read = Transcript(path)
    assert [read.get(letter * 64)["x"] for letter in "abc"] == [1, 2, 3]  # type: ignore[index]  # it is there
    assert one.get("d" * 64) is None


def test_a_transcript_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(echo) as server, pytest.raises(SourceError, match="file"):
        [*judge(server, Transcript(tmp_path / "file" / "x.jsonl")).ask([prompt()])]
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(SourceError, match="pipe"):
            Transcript(tmp_path / "pipe")


# --- what it costs ---


@pytest.mark.parametrize(
    ("limits", "done"),
    [
        (Limits(requests=7), 7),
        (Limits(tokens=7 * 110 + 70), 7),
        (Limits(price=7 * 0.0012 + 0.0012), 7),
        (Limits(requests=0), 0),
    ],
    ids=["requests", "tokens", "price", "nothing"],
)
def test_a_budget_ends_the_work_and_keeps_what_is_done(limits: Limits, done: int) -> None:
    with serving(echo) as server:
        transcript = Transcript()
        price = Price(prompt=10.0, completion=20.0)
        made = judge(server, transcript, limits=limits, price=price, concurrency=1)
        replies = made.ask([prompt(str(i)) for i in range(20)])
        assert [next(replies).value["answer"] for _ in range(done)] == [str(i) for i in range(done)]
        with pytest.raises(BudgetError, match=r"the budget of .* does not allow another request"):
            next(replies)
        assert len(server.seen) == len(transcript) == made.spent.requests == done
        assert made.spent.price == pytest.approx(0.0012 * done)
        [*judge(server, transcript).ask([prompt(str(i)) for i in range(20)])]
        assert len(server.seen) == 20


def test_the_budget_of_requests_holds_with_threads_and_counts_repairs() -> None:
    with serving(lambda seen: "no JSON") as server:
        made = judge(server, limits=Limits(requests=9), concurrency=8)
        with pytest.raises(BudgetError):
            [*made.ask([prompt(str(i)) for i in range(20)])]
        assert len(server.seen) <= 9
        assert made.spent.requests == len(server.seen)


def test_rates_are_kept_by_spacing() -> None:
    now, waited = [0.0], []

    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(timeout)
            now[0] += timeout
            return False

    meter = Meter(Limits(requests_per_minute=30), Price(), lambda: now[0])
    for _ in range(4):
        meter.wait(1000, Waiting())
    assert waited == [2.0, 2.0, 2.0]
    waited.clear()
    meter = Meter(Limits(tokens_per_minute=6000), Price(), lambda: now[0])
    for tokens in (100, 1000, 50, 1):
        meter.wait(tokens, Waiting())
    assert waited == pytest.approx([1.0, 10.0, 0.5])
    waited.clear()
    meter.pause(7.0)
    meter.wait(1, Waiting())
    assert waited == [7.0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Limits(requests=-1),
        lambda: Limits(price=float("nan")),
        lambda: Limits(tokens_per_minute=0),
        lambda: Price(prompt=-1),
        lambda: Endpoint("https://a.example", ""),
        lambda: Endpoint("https://a.example", "m", concurrency=0),
        lambda: Endpoint("https://a.example", "m", timeout=0),
        lambda: Endpoint("https://a.example", "m", timeout=float("inf")),
        lambda: Endpoint("https://a.example", "m", temperature=float("nan")),
        lambda: Endpoint("https://a.example", "m", temperature=-1.0),
        lambda: Endpoint("https://a.example", "m", thinking_tokens=-1),
    ],
)
def test_settings_that_make_no_sense(wrong: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="found"):
        wrong()


def test_a_preview_sends_nothing_and_knows_what_is_known() -> None:
    with serving(echo) as server:
        made = judge(server)
        [*made.ask([prompt("0")])]
        preview = PreviewJudge("fake", made.known)
        replies = [*preview.ask([prompt(str(i)) for i in (0, 1, 2, 2)])]
        assert len(server.seen) == 1
    assert [reply.value["answer"] for reply in replies] == ["0", "x", "x", "x"]
    found = preview.preview
    assert (found.calls, found.known) == (3, 1)
    assert found.most_completion_tokens == 150
    assert 20 < found.prompt_tokens < 300
    assert found.cost(Price(1e6, 0)) == found.prompt_tokens
    assert found.most(Price(0, 1e6)) == 150


def test_ctrl_c_keeps_the_replies_to_what_was_sent() -> None:
    with serving(lambda seen: Answer(completion(echo(seen)), delay=0.05)) as server:
        transcript = Transcript()
        replies = judge(server, transcript, concurrency=4).ask(prompt(str(i)) for i in range(50))
        next(replies)
        with pytest.raises(KeyboardInterrupt):
            replies.throw(KeyboardInterrupt())
        assert len(transcript) == len(server.seen) <= 8


def test_other_threads_can_be_stopped() -> None:
    arrived = threading.Event()

    def script(seen: Seen) -> Answer:
        arrived.set()
        return Answer(completion(echo(seen)), delay=0.02)

    with serving(script) as server:
        made, ended = judge(server, concurrency=2), []

        def work() -> None:
            try:
                for _ in made.ask(prompt(str(i)) for i in range(500)):
                    pass
            except StoppedError as error:
                ended.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        arrived.wait(5)
        made.stop()
        thread.join(5)
        assert not thread.is_alive()
        assert len(server.seen) <= 4
        assert ended == ["the work was stopped; what was answered is kept."]
        assert next(made.ask([prompt("new")])).value == {"answer": "new"}  # the next call works


# --- embeddings ---


def test_embeddings() -> None:
    def script(seen: Seen) -> Answer:
        rows = [{"index": i, "embedding": [len(t), 1.0]} for i, t in enumerate(seen.body["input"])]
        return Answer({"data": rows[::-1]})

    with serving(script) as server:
        made = judge(server)
        found = made.embed(["a", "bbb", "a", "cc"], at_once=2)
        assert found.tolist() == [[1, 1], [3, 1], [1, 1], [2, 1]]
        assert sorted(len(seen.body["input"]) for seen in server.seen) == [1, 2]
        made.embed(["cc", "a"])
        assert len(server.seen) == 2
    bad = {"data": [{"embedding": ["x"]}]}
    with (
        serving(lambda seen: Answer(bad)) as server,
        pytest.raises(StoppedError, match="expected 1 embeddings"),
    ):
        judge(server).embed(["a"])


def test_a_judge_can_be_a_function() -> None:
    made = ScriptedJudge(lambda asked: '{"answer": "x"}' if asked.schema else "free")
    first, second = made.ask([prompt(), prompt(schema=None)])
    assert first.value == {"answer": "x"}
    assert second == Reply("free")
    (bad,) = ScriptedJudge(lambda asked: "free").ask([prompt()])
    assert bad.failure == Failure("unparsable", "no JSON in 'free'")


# --- hostile answers ---


@pytest.mark.parametrize(
    "more",
    [
        {"usage": {"prompt_tokens": 10**400, "completion_tokens": 1}},
        {"usage": {"prompt_tokens": True, "completion_tokens": 10**30}},
        {"logprobs": [{"token": "x", "logprob": 10**400}]},
        {"logprobs": [{"token": "x", "logprob": float("nan"), "top_logprobs": 5}]},
        {"logprobs": [{"token": "x", "logprob": 0, "top_logprobs": {"a": 1}}]},
    ],
)
def test_nonsense_beside_a_reply_counts_as_not_there(more: dict[str, Any]) -> None:
    usage = {"usage": more.pop("usage")} if "usage" in more else {}
    reply, _ = one(lambda seen: Answer({**completion(GOOD, **more), **usage}))
    assert reply.value == {"answer": "yes"}
    assert reply.cost.prompt_tokens < 1000
    values = [value for token in reply.tokens for value in token.alternatives.values()]
    assert values in ([], [0.0])


def test_the_models_may_be_anything_too() -> None:
    def script(seen: Seen) -> Answer:
        return error(404, "no such model") if "chat" in seen.path else Answer({"data": 5})

    with pytest.raises(StoppedError, match="no such model"):
        one(script)


def test_a_redirect_may_name_what_is_no_url_and_have_an_endless_body() -> None:
    with pytest.raises(StoppedError, match="redirects to what is not a URL"):
        one(lambda seen: Answer({}, 307, {"Location": "http://[bad"}))
    # Cut off: who waits for the rest reports a broken connection.
    there = Answer(b"x" * 1000, 307, {"Location": "https://other.test/"}, cut_after=10)
    with pytest.raises(StoppedError, match="Nothing was sent there"):
        one(lambda seen: there)


@pytest.mark.parametrize("code", [True, -1, 10**30])
def test_an_error_with_a_code_that_is_no_status_is_tried_again(code: int) -> None:
    wrong = Answer({"error": {"message": "m", "code": code}})
    reply, _ = one(in_turn(wrong, GOOD))
    assert reply.value == {"answer": "yes"}


def test_a_body_that_does_not_unpack_is_tried_again() -> None:
    wrong = Answer(b"xxxx", headers={"Content-Encoding": "gzip"})
    reply, _ = one(in_turn(wrong, GOOD))
    assert reply.value == {"answer": "yes"}


def test_an_answer_that_drips_is_given_up() -> None:
    begin = time.monotonic()
    reply, _ = one(lambda seen: Answer(b" " * 500, pause=0.02), timeout=0.1, retries=0)
    assert time.monotonic() - begin < 5  # of 10
    assert reply.failure is not None
    assert "did not end its answer in time" in reply.failure.reason


def test_a_budget_for_the_price_needs_prices() -> None:
    with pytest.raises(InputError, match=r"budget of 5\.0 for the price needs the prices"):
        Meter(Limits(price=5.0), Price())


def test_a_wait_longer_than_a_clock_can_count() -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return True

    meter = Meter(Limits(tokens_per_minute=1e-300), Price())
    meter.wait(10, Stop())
    meter.wait(10, Stop())
    assert waits == [threading.TIMEOUT_MAX]
