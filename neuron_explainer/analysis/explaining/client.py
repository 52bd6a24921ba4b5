"""A judge behind an endpoint: ``/v1/chat/completions`` as OpenAI, vLLM, llama.cpp, Ollama and more serve it.

    judge = EndpointJudge(Endpoint("http://127.0.0.1:8000/v1", "the-model"))
    for reply in judge.ask(prompts): ...

Nothing leaves the machine unless a URL is given here; ``http_client.py`` says what may and what may not.

It is written with ``requests``, which the package needs anyway. The ``openai`` package would bring more than
ten distributions, and httpx has no retries; either way the rules below would have to be written: a pause
that all threads keep and Ctrl-C ends, a budget that is set aside before a request is sent, a request that a
server does not understand asked again in simpler words. urllib3's ``Retry`` waits where nothing can
interrupt it, and each thread for itself.

The same prompts give the same replies, whatever the concurrency: order and content of requests do not
depend on it, and equal prompts are asked once.
"""

import base64
import contextlib
import dataclasses
import datetime
import logging
import random
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.chat import Chat, embeddings_of
from neuron_explainer.analysis.explaining.explanation import Cost, Failure, digest
from neuron_explainer.analysis.explaining.http_client import (
    KEY_VARIABLE,
    FailedError,
    HttpClient,
    NotUnderstoodError,
    RetryError,
    UnreachableError,
    base_url,
)
from neuron_explainer.analysis.explaining.judge import (
    Message,
    Prompt,
    Reply,
    ReplyToken,
    estimated_prompt_tokens,
    estimated_tokens,
    prompt_key,
)
from neuron_explainer.analysis.explaining.replies import JsonError, json_in
from neuron_explainer.analysis.explaining.spending import (
    BudgetError,
    Limits,
    Meter,
    Price,
    StoppedError,
)
from neuron_explainer.analysis.explaining.transcript import Transcript
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.settings import check_types

Floats = npt.NDArray[np.float32]
logger = logging.getLogger("neuron_explainer.explaining")

_LONGEST_TIMEOUT = 86_400
_JSON_AGAIN = (
    "That was not the JSON object that was asked for. Reply again with that JSON object only, without any "
    "other text."
)


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how it is asked."""

    url: str
    """Such as ``http://127.0.0.1:8000/v1``; without a path, ``/v1`` is added."""
    model: str
    """The model's name at the endpoint."""
    key_variable: str = KEY_VARIABLE
    """The environment variable that holds the key; none is sent if it is not set."""
    temperature: float = 0.0
    seed: int = 0
    """Sent to servers that know it. Another seed is another question, so it is asked anew."""
    concurrency: int = 8
    """Requests that are under way at a time."""
    timeout: float = 120.0
    """Seconds without an answer after which a request is given up."""
    use_reasoning: bool = False
    """Where a reply has no content, take what the server calls the model's reasoning. Without it that is
    a failure: a text in which the model weighs both answers must not be read as one of them."""
    thinking_tokens: int = 0
    """Tokens that a reasoning model may think, in addition to its reply."""
    retries: int = 6
    """How often a request is repeated that the server could not answer now."""
    backoff: float = 0.5
    """Seconds before the first repetition; they double with each further one, up to 30. A random part, up
    to half, is left out, so that threads do not all come back at once."""
    longest_wait: float = 300.0
    """Seconds; where a server asks to wait longer, the work is stopped."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.model:
            raise InputError("expected the name of the endpoint's model, found an empty text.")
        if self.concurrency < 1 or self.retries < 0 or not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise InputError(
                "expected a concurrency of at least 1, at least 0 retries and a timeout above 0 and at most "
                f"{_LONGEST_TIMEOUT:,} seconds, found {self.concurrency}, {self.retries} and {self.timeout}."
            )
        if not 0 <= self.temperature <= 100:  # NaN is not JSON
            raise InputError(f"temperature must be 0 to 100, found {self.temperature}.")
        if self.thinking_tokens < 0:
            raise InputError(f"thinking_tokens must be at least 0, found {self.thinking_tokens}.")
        base_url(self.url)


@dataclass(frozen=True)
class _Dialect:
    """What an endpoint has been found to understand. It only ever becomes simpler."""

    form: int = 2
    """2: JSON by a schema; 1: some JSON object; 0: text."""
    logprobs: bool = True
    length: str = "max_tokens"
    temperature: bool = True
    seed: bool = True

    def simpler(self, message: str, sent: Mapping[str, Any]) -> "_Dialect | None":
        """Without what the server complains about; None if the complaint is about something else."""
        said = message.casefold()
        if "max_completion_tokens" in said and "max_tokens" in sent:
            return dataclasses.replace(self, length="max_completion_tokens")
        if "logprobs" in said and "logprobs" in sent:
            return dataclasses.replace(self, logprobs=False)
        form = ("response_format", "json", "schema", "structured", "guided", "grammar")
        if any(word in said for word in form) and "response_format" in sent:
            by_schema = sent["response_format"]["type"] == "json_schema"
            return dataclasses.replace(self, form=min(self.form, 1 if by_schema else 0))
        if "temperature" in said and "temperature" in sent:
            return dataclasses.replace(self, temperature=False)
        if "seed" in said and "seed" in sent:
            return dataclasses.replace(self, seed=False)
        return None


class _Pending(NamedTuple):
    """A reply that is waited for, and what was set aside for it."""

    future: Future[Reply]
    most: Cost


class _Stop(threading.Event):
    """Set when no further request is to be sent, and why."""

    reason: BaseException | None = None

    def because(self, error: BaseException) -> None:
        """Stop; the first reason is kept."""
        self.reason = self.reason or error
        self.set()

    def check(self) -> None:
        """Raise the reason, if there is one."""
        if self.is_set():
            raise self.reason if isinstance(self.reason, StoppedError) else StoppedError("stopped.")


@dataclass
class _Work:
    """The requests that are made for one prompt."""

    stop: _Stop
    spent: Cost = field(default_factory=Cost)
    exchanges: list[dict[str, Any]] = field(default_factory=list)


class EndpointJudge:
    """A model behind an endpoint.

    Args:
        endpoint: where it is, and how it is asked.
        transcript: the file of what is asked and answered; what it holds is not asked again. None: replies
            are kept in memory.
        limits: what may be spent.
        price: of a million tokens.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        transcript: Transcript | None = None,
        *,
        limits: Limits | None = None,
        price: Price | None = None,
    ) -> None:
        self.endpoint, self.name = endpoint, endpoint.model
        self.transcript = Transcript() if transcript is None else transcript
        self.meter = Meter(limits or Limits(), price or Price())
        self._http = HttpClient(
            endpoint.url, endpoint.key_variable, endpoint.timeout, endpoint.concurrency
        )
        self._dialect = _Dialect()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(endpoint.concurrency)
        self._running: set[_Stop] = set()
        self._answered = False  # whether this endpoint ever answered
        self._in_vain = 0  # prompts in a row that got no reply

    @property
    def url(self) -> str:
        """The endpoint's address, as it is asked."""
        return self._http.base

    @property
    def spent(self) -> Cost:
        """What the requests have cost until now."""
        return self.meter.spent

    def check(self) -> None:
        """A StoppedError if no server answers, unless there are replies from before, which may be enough."""
        if not len(self.transcript):
            try:
                self._http.check()
            except UnreachableError as error:
                raise StoppedError(str(error)) from None

    def stop(self) -> None:
        """Send nothing more in the calls of :meth:`ask` and :meth:`embed` that run now, in any thread.

        They end with a StoppedError when the replies to what was sent have come.
        """
        for stop in [*self._running]:
            stop.because(StoppedError("the work was stopped; what was answered is kept."))

    @contextlib.contextmanager
    def _call(self) -> Iterator[_Stop]:
        """A call that can be stopped."""
        stop = _Stop()
        self._running.add(stop)
        try:
            yield stop
        finally:
            self._running.discard(stop)

    # --- many prompts ---

    def key(self, prompt: Prompt) -> str:
        """The hash of what is asked: the prompt, the model, its address and its settings."""
        end = self.endpoint
        return prompt_key(
            prompt,
            url=self._http.base,
            model=end.model,
            temperature=end.temperature,
            seed=end.seed,
            use_reasoning=end.use_reasoning,
            thinking_tokens=end.thinking_tokens,
        )

    def known(self, prompt: Prompt) -> Reply | None:
        """The reply, if it is known, so that nothing would be sent."""
        record = self.transcript.get(self.key(prompt))
        return None if record is None else self._reply_from(record)

    def ask(self, prompts: Iterable[Prompt]) -> Generator[Reply, None, None]:
        """The replies, in the order of the prompts; what is not known is asked.

        Raises:
            StoppedError: after the replies that came: the endpoint cannot be used, or the budget is spent.
        """
        waiting: deque[_Pending] = deque()
        under_way: dict[str, _Pending] = {}
        over: BudgetError | None = None
        with self._call() as stop, ThreadPoolExecutor(self.endpoint.concurrency, "judge") as pool:
            try:
                for prompt in prompts:
                    try:
                        waiting.append(self._submit(pool, prompt, stop, under_way))
                    except BudgetError as error:
                        over = error
                        break
                    # Twice as many as are asked at a time, so that a slow one holds nobody up.
                    while len(waiting) >= 2 * self.endpoint.concurrency:
                        yield waiting.popleft().future.result()
                while waiting:
                    yield waiting.popleft().future.result()
            except BaseException as error:
                stop.because(error)
                for pending in under_way.values():
                    if pending.future.cancel():
                        self.meter.settle(pending.most, Cost())
                raise
        if over is not None:
            raise over

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        prompt: Prompt,
        stop: _Stop,
        under_way: dict[str, "_Pending"],
    ) -> "_Pending":
        key = self.key(prompt)
        if (reply := self.known(prompt)) is not None:
            ready: Future[Reply] = Future()
            ready.set_result(reply)
            return _Pending(ready, Cost())
        if key in under_way:  # or failed: it is not asked again in the same call
            return under_way[key]
        for done in [each for each in under_way if each in self.transcript]:
            del under_way[done]
        most = self._most(prompt, prompt.max_tokens)
        self.meter.reserve(most)  # here, in the order of the prompts, not in that of the threads
        pending = _Pending(pool.submit(self._answer, prompt, key, most, stop), most)
        under_way[key] = pending
        return pending

    def _most(self, prompt: Prompt, max_tokens: int) -> Cost:
        longest = max_tokens + self.endpoint.thinking_tokens
        return self.meter.cost(estimated_prompt_tokens(prompt), longest)

    # --- one prompt ---

    def _answer(self, prompt: Prompt, key: str, most: Cost, stop: _Stop) -> Reply:
        work = _Work(stop)
        try:
            reply = self._reply(prompt, most, work)
        except FailedError as error:
            reply = Reply(
                failure=Failure("failed", self._http.scrubbed(str(error))), cost=work.spent
            )
            self._note_in_vain(str(error), stop)
            return reply
        except BaseException as error:
            stop.because(error)
            raise
        self._in_vain = 0
        reply = dataclasses.replace(reply, cost=work.spent)
        self.transcript.append(key, self._record(prompt, reply, work))
        return reply

    def _note_in_vain(self, reason: str, stop: _Stop) -> None:
        with self._lock:
            self._in_vain += 1
            enough = max(10, 2 * self.endpoint.concurrency)
            if self._in_vain >= enough:
                error = StoppedError(
                    f"{self._http.base}: {enough} prompts in a row got no reply. The last one: {reason}"
                )
                stop.because(error)
                raise error

    def _reply(self, prompt: Prompt, most: Cost, work: _Work) -> Reply:
        """Ask, with more room if the reply was cut off, and once again if it is not JSON."""
        longest, reserved = prompt.max_tokens, most
        found = self._chat(prompt.messages, prompt, longest, reserved, work)
        if found.cut_off:
            longest *= 2
            found = self._again(prompt.messages, prompt, longest, work)
        if found.failure is not None or prompt.schema is None:
            return found.reply()
        try:
            return found.reply(json_in(found.text))
        except JsonError as error:
            if not error.may_help_to_ask_again:
                return found.reply(failure=Failure("unparsable", str(error)))
        repair = (*prompt.messages, Message("assistant", found.text), Message("user", _JSON_AGAIN))
        found = self._again(repair, prompt, longest, work)
        if found.failure is not None:
            return found.reply()
        try:
            return found.reply(json_in(found.text))
        except JsonError as error:
            return found.reply(failure=Failure("unparsable", str(error)))

    def _again(
        self, messages: tuple[Message, ...], prompt: Prompt, longest: int, work: _Work
    ) -> Chat:
        most = self._most(dataclasses.replace(prompt, messages=messages), longest)
        try:
            self.meter.reserve(most)
        except BudgetError as error:
            raise FailedError(str(error)) from None
        return self._chat(messages, prompt, longest, most, work)

    def _chat(
        self,
        messages: tuple[Message, ...],
        prompt: Prompt,
        longest: int,
        reserved: Cost,
        work: _Work,
    ) -> Chat:
        """One answer, asked for in the words that the endpoint knows."""
        actual = Cost()
        try:
            while True:
                dialect = self._dialect
                body = self._body(messages, prompt, longest, dialect)
                try:
                    answer = self._send("chat/completions", body, reserved, work)
                    break
                except NotUnderstoodError as error:
                    simpler = dialect.simpler(error.message, body)
                    if simpler is None and error.status == 404:
                        raise StoppedError(
                            f"{error}{self._http.models_hint(self.endpoint.model)}"
                        ) from None
                    if simpler is None:
                        raise FailedError(str(error)) from None
                    logger.info("%s; asking without that", error)
                    with self._lock:
                        self._dialect = _simplest(self._dialect, simpler)
            found = Chat.of(answer, self.endpoint.use_reasoning)
            tokens = found.usage or (
                reserved.prompt_tokens,
                estimated_tokens(found.text),
            )
            actual = self.meter.cost(*tokens)
        finally:
            self.meter.settle(reserved, actual)
        work.spent += actual
        work.exchanges.append({"sent": body, "received": answer})
        return found

    def _body(
        self, messages: Sequence[Message], prompt: Prompt, longest: int, dialect: _Dialect
    ) -> dict[str, Any]:
        end = self.endpoint
        body: dict[str, Any] = {
            "model": end.model,
            "messages": [message._asdict() for message in messages],
            dialect.length: longest + end.thinking_tokens,
        }
        if dialect.temperature:
            body["temperature"] = end.temperature
        if dialect.seed:
            body["seed"] = end.seed
        if prompt.top_logprobs and dialect.logprobs:
            body |= {"logprobs": True, "top_logprobs": prompt.top_logprobs}
        if prompt.schema is not None and dialect.form == 2:
            schema = {"name": prompt.kind, "strict": True, "schema": prompt.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif prompt.schema is not None and dialect.form == 1:
            body["response_format"] = {"type": "json_object"}
        return body

    # --- one request ---

    def _send(self, path: str, body: Any, reserved: Cost, work: _Work) -> dict[str, Any]:
        """The JSON of an answer, after as many tries as are necessary."""
        end, failures = self.endpoint, 0
        while True:
            tokens = reserved.prompt_tokens + reserved.completion_tokens
            self.meter.wait(tokens, work.stop)
            work.stop.check()
            try:
                with self._slots:
                    answer = self._http.post(path, body)
            except RetryError as error:
                failures += 1
                if failures > min(end.retries, end.retries if error.most is None else error.most):
                    raise FailedError(f"{error} ({failures} tries)") from None
                if error.wait > end.longest_wait:
                    raise StoppedError(
                        f"{error}, and asks to wait {error.wait:.0f} seconds. What was answered is kept; "
                        "give the same command again then."
                    ) from None
                if error.wait:
                    self.meter.pause(error.wait)
                else:
                    work.stop.wait(_backoff(end.backoff, failures))
            except UnreachableError as error:
                failures += 1
                # A server that answered before may be on its way up again.
                if not self._answered or failures > end.retries:
                    raise StoppedError(str(error)) from None
                work.stop.wait(_backoff(end.backoff, failures))
            else:
                self._answered = True
                return answer

    # --- embeddings ---

    def embed(self, texts: Sequence[str], at_once: int = 32) -> Floats:
        """The endpoint's embeddings of texts, ``[t, d]`` float32, by ``/embeddings``.

        Args:
            texts: each is asked once; those that are known are not sent.
            at_once: texts of a request.
        """
        keys = [digest([self._http.base, self.endpoint.model, "embedding", text]) for text in texts]
        wanted = {
            key: text for key, text in zip(keys, texts, strict=True) if key not in self.transcript
        }
        with self._call() as stop, ThreadPoolExecutor(self.endpoint.concurrency, "judge") as pool:
            items = [*wanted.items()]
            parts = [items[i : i + at_once] for i in range(0, len(items), at_once)]
            futures = [pool.submit(self._embed, dict(part), stop) for part in parts]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                stop.because(error)
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        found = [_vector(self.transcript.get(key)) for key in keys]
        if len({len(vector) for vector in found}) > 1:
            raise SourceError(
                f"{self._http.base}: expected embeddings of one length, found several."
            )
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def _embed(self, part: Mapping[str, str], stop: _Stop) -> None:
        texts = [*part.values()]
        most = self.meter.cost(sum(map(estimated_tokens, texts)), 0)
        self.meter.reserve(most)
        body = {"model": self.endpoint.model, "input": texts, "encoding_format": "float"}
        actual = Cost()
        try:
            answer = self._send("embeddings", body, most, _Work(stop))
            actual = most
        except (FailedError, NotUnderstoodError) as error:
            raise StoppedError(f"no embeddings: {error}") from None
        finally:
            self.meter.settle(most, actual)
        for key, text, vector in zip(part, texts, embeddings_of(answer, len(texts)), strict=True):
            packed = base64.b64encode(vector.tobytes()).decode()
            record = {"url": self._http.base, "model": self.endpoint.model, "kind": "embedding"}
            self.transcript.append(
                key, self._http.scrubbed(record | {"text": text, "vector": packed})
            )

    # --- records ---

    def _record(self, prompt: Prompt, reply: Reply, work: _Work) -> dict[str, Any]:
        failure = reply.failure
        found: dict[str, Any] = self._http.scrubbed(
            {
                "version": 1,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "url": self._http.base,
                "model": self.endpoint.model,
                "kind": prompt.kind,
                "reply": {
                    "text": reply.text,
                    "value": reply.value,
                    "failure": None if failure is None else [failure.kind, failure.reason],
                    "tokens": [[token.text, dict(token.alternatives)] for token in reply.tokens],
                    "requests": reply.cost.requests,
                    "prompt_tokens": reply.cost.prompt_tokens,
                    "completion_tokens": reply.cost.completion_tokens,
                },
                "exchanges": work.exchanges,
            }
        )
        return found

    def _reply_from(self, record: Mapping[str, Any]) -> Reply:
        """The reply that a line of the transcript holds."""
        try:
            kept = record["reply"]
            failure = kept["failure"]
            counts = kept["prompt_tokens"], kept["completion_tokens"], kept["requests"]
            return Reply(
                kept["text"],
                kept["value"],
                None if failure is None else Failure(*failure),
                tuple(ReplyToken(text, alternatives) for text, alternatives in kept["tokens"]),
                self.meter.cost(*counts),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.transcript.path}: expected a reply as this package writes it, found something else "
                f"({type(error).__name__}: {error}). Move the file away to ask again."
            ) from None


def _simplest(one: _Dialect, other: _Dialect) -> _Dialect:
    """What both have found out: threads learn at the same time."""
    return _Dialect(
        min(one.form, other.form),
        one.logprobs and other.logprobs,
        max(one.length, other.length, key=len),
        one.temperature and other.temperature,
        one.seed and other.seed,
    )


def _backoff(first: float, failures: int) -> float:
    # Of the waiting only: no result depends on it.
    return min(30.0, first * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)


def _vector(record: Mapping[str, Any] | None) -> Floats:
    assert record is not None  # it was appended a moment ago, or found before
    return np.frombuffer(base64.b64decode(record["vector"]), np.float32)
