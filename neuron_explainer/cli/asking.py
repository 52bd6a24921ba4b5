"""The options of verbs that may ask a language model behind an endpoint, and what is made of them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.examples import ExampleSet
from neuron_explainer.analysis.explaining.explanation import Explanation, Score
from neuron_explainer.analysis.explaining.http_client import KEY_VARIABLE
from neuron_explainer.analysis.explaining.judge import Judge
from neuron_explainer.analysis.explaining.judged import (
    SCORERS,
    Asking,
    explain_with,
    generation_plan,
    generation_score,
    score_with,
)
from neuron_explainer.analysis.explaining.local_judges import PreviewJudge
from neuron_explainer.analysis.explaining.prompts import HASHES
from neuron_explainer.analysis.explaining.scorers import JudgedBy, embedding
from neuron_explainer.analysis.explaining.spending import Limits, Price
from neuron_explainer.analysis.explaining.transcript import TRANSCRIPT_FILE, Transcript
from neuron_explainer.cli.common import Result, say
from neuron_explainer.errors import InputError
from neuron_explainer.settings.flags import add_flags, from_flags

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

Scorer = Callable[[Explanation, ExampleSet], Score | None]
_RAISED = 10  # tokens that a latent promotes


_GENERATED, _USUAL = 10, 50  # texts that are written for a latent, and for none


@dataclass(frozen=True)
class JudgeOptions:
    """A language model behind an endpoint."""

    endpoint: str | None = None
    """address of an OpenAI-compatible server that explains and judges, such as http://127.0.0.1:8000/v1;
    without it nothing leaves this machine. Plain http goes to this machine only."""
    judge: str | None = None
    """the model's name at the endpoint"""
    embedding_model: str | None = None
    """the endpoint's model for the scorer embedding; without it, hashed words"""
    key_variable: str = KEY_VARIABLE
    """the environment variable that holds the key, if the endpoint wants one; it is never written"""
    temperature: float = 0.0
    """of the model"""
    judge_seed: int = 0
    """sent to the model; another seed asks everything anew"""
    concurrency: int = 8
    """requests at a time; the results do not depend on it"""
    timeout: float = 120.0
    """seconds to wait for a reply"""
    use_reasoning: bool = False
    """take a model's reasoning as its reply where the reply has no content"""
    thinking_tokens: int = 0
    """tokens that a reasoning model may think, in addition to each reply, such as 2000"""
    texts_per_prompt: int = 5
    """texts in a prompt of detection, fuzzing and max-token; more cost less and are judged less well"""
    logprobs: bool = True
    """ask for log-probabilities, which some endpoints give"""
    competitors: int = 0
    """explanations of other units, and of random latents, that are judged too, as floors; each costs as
    much as the score"""
    max_requests: int | None = None
    """stop before more requests than this; what was answered is kept"""
    max_tokens: int | None = None
    """stop before more tokens than this"""
    max_price: float | None = None
    """stop before a higher price than this"""
    prompt_price: float = 0.0
    """price of a million tokens that are sent"""
    completion_price: float = 0.0
    """price of a million tokens that are received"""
    requests_per_minute: float | None = None
    """the endpoint's limit"""
    tokens_per_minute: float | None = None
    """the endpoint's limit"""
    transcript: str | None = None
    """file of what is asked and answered, which is not asked again (default: endpoint.jsonl beside the
    workspace)"""


def judge_options(verb: argparse.ArgumentParser) -> None:
    """Declare the flags of :class:`JudgeOptions`."""
    add_flags(verb, JudgeOptions)


@dataclass
class Asked:
    """An endpoint that a command asks, or only previews."""

    options: JudgeOptions
    endpoint: EndpointJudge
    preview: PreviewJudge | None
    """Counts in the endpoint's place, with ``--dry-run``."""
    embeds: EndpointJudge | None = None
    embedded: set[str] = field(default_factory=set)

    @property
    def judge(self) -> Judge:
        """Who is asked."""
        return self.endpoint if self.preview is None else self.preview

    @property
    def asking(self) -> Asking:
        """How scorers ask."""
        return Asking(self.options.texts_per_prompt, self.options.logprobs)

    @property
    def workers(self) -> int:
        """Units that are worked on at a time."""
        return self.options.concurrency if self.preview is None else 1

    def stop(self) -> None:
        """Send nothing more for what is asked now."""
        for judge in (self.endpoint, self.embeds):
            if judge is not None:
                judge.stop()

    @property
    def _model(self) -> dict[str, Any]:
        """What decides a reply, apart from the prompt."""
        end = self.endpoint.endpoint
        return {
            "url": self.endpoint.url,
            "model": end.model,
            "temperature": end.temperature,
            "seed": end.seed,
            "use_reasoning": end.use_reasoning,
            "thinking_tokens": end.thinking_tokens,
        }

    def explaining(self, kind: str) -> dict[str, Any]:
        """What decides an explanation, apart from the texts."""
        return {**self._model, "prompt": HASHES[kind]}

    def scoring(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides scores, apart from the texts and the explanation."""
        return {
            **self._model,
            "prompts": {name: HASHES[name] for name in names if name in HASHES},
            "asking": asdict(self.asking),
            "embedding_model": self.options.embedding_model,
        }

    def explain(
        self, kind: str, directions: "Directions | None"
    ) -> Callable[[ExampleSet], Explanation]:
        """The function that explains a unit."""

        def raised(unit: int) -> list[str]:
            assert directions is not None
            return [each.text for each in directions.top_logits(unit, _RAISED).top]

        return explain_with(self.judge, kind, raised)

    def scorers(
        self, names: Sequence[str], by_rule: Callable[[str], Scorer]
    ) -> Mapping[str, Scorer]:
        """The functions that score.

        Args:
            names: of the scorers.
            by_rule: the scorer of a name that no judge is asked for.
        """
        judged = score_with(self.judge, [name for name in names if name in SCORERS], self.asking)
        return {
            name: judged[name]
            if name in judged
            else (self._embedding if self.embeds is not None else by_rule(name))
            for name in names
        }

    def generation(
        self, store: "ExampleStore", context: "ModelContext", autoencoder: "Autoencoder | None"
    ) -> Scorer:
        """The scorer for which the judge writes texts and the latent's own model reads them."""
        from neuron_explainer.analysis.explaining.model_scorers import (
            UnitReader,
            generation,
            usual_texts,
        )

        place = store.location if autoencoder is None else autoencoder.location or store.location
        reader = UnitReader(context, autoencoder, place)
        usual = usual_texts(store.tokens, _USUAL)

        def score(explanation: Explanation, examples: ExampleSet) -> Score | None:
            generated = generation_plan(explanation, self.judge, _GENERATED).ask(self.judge)
            if self.preview is not None:
                return None
            return generation_score(
                generated,
                examples,
                lambda texts: generation(
                    [_cut(context, text) for text in texts], examples, reader, usual, generated.by
                ),
            )

        return score

    def _embedding(self, explanation: Explanation, examples: ExampleSet) -> Score | None:
        assert self.embeds is not None
        if self.preview is not None:
            self.embedded |= {explanation.text, *(each.text for each in examples.test)}
            return None
        return embedding(
            explanation.text, examples, self.embeds.embed, JudgedBy(self.embeds.endpoint.model)
        )

    def result(self) -> Result:
        """What was asked, or would be."""
        price = self.endpoint.meter.price
        found: Result = {"url": self.endpoint.url, "model": self.endpoint.name}
        found["transcript"] = str(self.endpoint.transcript.path)
        if self.preview is not None:
            preview = self.preview.preview
            return found | {
                "calls": preview.calls,
                "known": preview.known,
                "prompt_tokens": preview.prompt_tokens,
                "completion_tokens": preview.completion_tokens,
                "most_completion_tokens": preview.most_completion_tokens,
                "price": preview.cost(price),
                "most_price": preview.most(price),
                "texts_to_embed": len(self.embedded),
            }
        return found | {"spent": asdict(self.endpoint.spent)}


def asked_of(args: argparse.Namespace, store: "ExampleStore") -> Asked | None:
    """The endpoint that the flags name; None if they name none."""
    options = from_flags(args, JudgeOptions)
    if options.endpoint is None:
        for flag in ("judge", "embedding_model", "transcript"):
            if getattr(options, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} is for an endpoint: give --endpoint.")
        return None
    if options.judge is None:
        raise InputError("give --judge, the name of the endpoint's model.")
    Asking(options.texts_per_prompt)  # before anything is paid for
    if options.competitors < 0:
        raise InputError(f"--competitors must be at least 0, found {options.competitors}.")
    path = options.transcript or Path(store.workspace.path).with_name(TRANSCRIPT_FILE)
    transcript = Transcript(path)
    limits = Limits(
        options.max_requests,
        options.max_tokens,
        options.max_price,
        options.requests_per_minute,
        options.tokens_per_minute,
    )
    price = Price(options.prompt_price, options.completion_price)

    def judge(model: str) -> EndpointJudge:
        endpoint = Endpoint(
            str(options.endpoint),
            model,
            options.key_variable,
            options.temperature,
            options.judge_seed,
            options.concurrency,
            options.timeout,
            options.use_reasoning,
            options.thinking_tokens,
        )
        return EndpointJudge(endpoint, transcript, limits=limits, price=price)

    asked = judge(options.judge)
    preview = (
        PreviewJudge(options.judge, asked.known, options.thinking_tokens) if args.dry_run else None
    )
    embeds = None if options.embedding_model is None else judge(options.embedding_model)
    if embeds is not None:
        embeds.meter = asked.meter  # one budget for both
    return Asked(options, asked, preview, embeds)


def _cut(context: "ModelContext", text: str) -> str:
    """As much of a text as the model can read."""
    return context.decode(context.encode(text)[: context.n_context - 1])


def show_asked(asked: Result) -> None:
    """What was sent, and what it cost; or what would be sent."""
    where = f"{asked['model']} at {asked['url']}"
    if "calls" in asked:
        known = f", {asked['known']:,} more are known" if asked["known"] else ""
        say(f"{asked['calls']:,} requests to {where}{known}")
        say(
            f"about {asked['prompt_tokens']:,} tokens sent and {asked['completion_tokens']:,} received "
            f"(at most {asked['most_completion_tokens']:,})"
        )
        if asked["texts_to_embed"]:
            say(f"{asked['texts_to_embed']:,} texts to embed")
        if asked["most_price"]:
            say(f"price about {asked['price']:.4g}, at most {asked['most_price']:.4g}")
        say(
            "sent are the explanations, texts of the store and tokens that latents promote; no key is kept"
        )
        return
    spent = asked["spent"]
    price = f", price {spent['price']:.4g}" if spent["price"] else ""
    say(
        f"\n{spent['requests']:,} requests to {where}: {spent['prompt_tokens']:,} tokens sent, "
        f"{spent['completion_tokens']:,} received{price}; kept in {asked['transcript']}"
    )
