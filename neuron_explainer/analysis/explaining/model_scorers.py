"""Scorers that run the unit's own model: surprisal, generation and intervention.

    surprisal      is an active text less surprising after the explanation than after a sentence that says
                   nothing, more so than an inactive one? The area under the curve of the loss reduction
    generation     in how many texts that were written after the explanation is the unit active?
    intervention   the output side: steering with the unit, does the explanation tell which tokens become
                   likelier, better than explanations of other units do?

A model as small as the embedded one does not follow what a sentence says; its surprisal scores show that the
arithmetic is right, not what an explanation is worth.

Shape legend: ``n`` texts, ``s`` tokens, ``v`` vocabulary, ``d`` model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.activations.corpus import start_token
from neuron_explainer.analysis.explaining import metrics, scorers
from neuron_explainer.analysis.explaining.examples import ExampleSet
from neuron_explainer.analysis.explaining.explanation import Explanation, Floor, Score
from neuron_explainer.analysis.explaining.scorers import RULE, JudgedBy
from neuron_explainer.errors import InputError
from neuron_explainer.models.interventions import steer
from neuron_explainer.models.locations import LocationLike

if TYPE_CHECKING:
    from neuron_explainer.analysis.store import ExampleStore
    from neuron_explainer.analysis.token_store import TokenStore
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.model_context import ModelContext

Doubles = npt.NDArray[np.float64]
PREFIX = "{}:\n"
GENERIC = "a text"
"""What stands in the place of the explanation in the sentence that says nothing."""
KL = 0.25
"""Nats by which steering changes the next token's distribution, on average: all units steer equally hard."""
_BISECTIONS = 11
_STRENGTHS = (2.0**-8, 2.0**6)  # norms of the activation
_N_TEXTS, _WINDOW = 16, 32


# --- surprisal ---


def surprisal(
    explanation: Explanation,
    examples: ExampleSet,
    context: "ModelContext",
    *,
    generic: str = GENERIC,
    batch_size: int = 32,
) -> Score:
    """The area under the curve of how much the explanation reduces the loss of each text.

    Args:
        explanation: its text is put before each text.
        examples: texts of this model's tokens.
        context: the model of the unit, or another one with the same tokenizer.
        generic: what the explanation is compared with.
        batch_size: texts at a time; it changes nothing.
    """
    trials = scorers.detection_trials(examples)
    texts = [trial.text.tokens.tolist() for trial in trials]
    before, after = (
        mean_losses(context, PREFIX.format(words), texts, batch_size)
        for words in (generic, explanation.text)
    )
    return scorers.ranked("surprisal", examples, trials, (before - after).tolist())


@torch.no_grad()
def mean_losses(
    context: "ModelContext", prefix: str, texts: Sequence[Sequence[int]], batch_size: int = 32
) -> Doubles:
    """``[n]``: the mean loss of the tokens of each text, in nats, after the start token and a prefix.

    A prefix that leaves no room for the texts is cut at its end.
    """
    if not texts:
        return np.zeros(0)
    model = context.get_or_create_model()
    first = [start_token(context), *context.encode(prefix)]
    first = first[: _room(context, max(map(len, texts)))]
    found = []
    for begin in range(0, len(texts), batch_size):
        some = texts[begin : begin + batch_size]
        tokens, pad = model.to_batch([[*first, *text] for text in some])
        logits = model(tokens, pad=pad)[0][:, len(first) - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, len(first) :], reduction="none"
        )
        lengths = torch.tensor([len(text) for text in some], device=loss.device)
        inside = torch.arange(loss.shape[1], device=loss.device) < lengths[:, None]
        found.append(((loss * inside).sum(1) / lengths).double().cpu().numpy())
    return np.concatenate(found)


def _room(context: "ModelContext", longest: int) -> int:
    """How many tokens may stand before a text."""
    room = context.n_context - longest
    if room < 1:
        raise InputError(
            f"{context.model_name} reads {context.n_context} tokens, which leaves no room before a text of "
            f"{longest}."
        )
    return room


# --- generation ---


class UnitReader:
    """How active a unit is in any text.

    Args:
        context: the model.
        autoencoder: that of the unit; None for a unit of the model.
        location: where the autoencoder reads, or the unit is.
    """

    def __init__(
        self, context: "ModelContext", autoencoder: "Autoencoder | None", location: LocationLike
    ) -> None:
        self.context, self.autoencoder, self.location = context, autoencoder, location

    @torch.no_grad()
    def largest(self, unit: int, texts: Sequence[str]) -> Doubles:
        """``[n]``: the largest activation in each text, and 0 for an empty one."""
        model = self.context.get_or_create_model()
        found = np.zeros(len(texts))
        for number, text in enumerate(texts):
            if not text:
                continue
            x = model.capture([text], self.location, bos=True)[self.location][0, 1:].flatten(1)
            if self.autoencoder is not None:
                autoencoder = self.autoencoder
                x = autoencoder.encode(x.to(autoencoder.device, autoencoder.dtype))
            found[number] = float(x[:, unit].max())
        return found


def generation(
    texts: Sequence[str],
    examples: ExampleSet,
    reader: UnitReader,
    usual: Sequence[str],
    judge: JudgedBy = RULE,
    *,
    threshold: float = 0.0,
) -> Score:
    """In what share of some texts the unit is active, beside the share among usual texts.

    Args:
        texts: written so that the unit should be active.
        examples: those of the unit, for its scale.
        reader: the model.
        usual: texts that were written or drawn for no unit, see :func:`usual_texts`: the floor.
        judge: who wrote the texts.
        threshold: "active" is more than this share of the unit's largest activation.
    """
    shares = []
    for some in (texts, usual):
        active = reader.largest(examples.unit, some) > threshold * examples.scale
        shares.append(active.astype(np.float64))
    found = metrics.of_mean(shares[0], examples.seed)
    floors = [] if not len(usual) else [Floor("usual texts", float(shares[1].mean()), len(usual))]
    return Score(
        "generation",
        "share of texts",
        None if found is None else found.value,
        None if found is None else (found.low, found.high),
        tuple(floors),
        None if found is None else metrics.smallest_difference(math.sqrt(2) * found.error),
        judge=judge.model,
        prompt_hash=judge.prompt_hash,
        seed=examples.seed,
        details={"texts": len(texts)},
        cost=judge.cost,
    )


def usual_texts(tokens: "TokenStore", n: int, seed: int = 0, window: int = _WINDOW) -> list[str]:
    """Random pieces of a text."""
    return [_decoded(tokens, ids) for ids in _usual_ids(tokens, n, seed, window)]


def _usual_ids(tokens: "TokenStore", n: int, seed: int, window: int) -> list[list[int]]:
    corpus = tokens.corpus
    random = np.random.RandomState([seed & 0xFFFFFFFF, 5])
    start = (random.random_sample(n) * len(corpus.tokens)).astype(np.int64)
    document = np.searchsorted(corpus.starts, start, side="right") - 1
    begin, end = corpus.starts[document], corpus.starts[document + 1]
    start = np.maximum(np.minimum(start, end - window), begin)
    return [ids.tolist() for ids in tokens.windows(start, np.minimum(end - start, window))[0]]


def _decoded(tokens: "TokenStore", ids: Sequence[int]) -> str:
    return b"".join(tokens.pieces(ids)).decode(errors="replace")


# --- intervention ---


class Steering:
    """What steering with units does to the next token, on some usual texts.

    Args:
        context: the model.
        location: where units write.
        direction: of a unit, ``[d]``: what it adds there for each unit of activation.
        tokens: where the texts are drawn from.
        seed: of the draw.
        kl: how hard to steer, see :data:`KL`.
    """

    def __init__(
        self,
        context: "ModelContext",
        location: LocationLike,
        direction: Callable[[int], Tensor],
        tokens: "TokenStore",
        *,
        seed: int = 0,
        kl: float = KL,
    ) -> None:
        self.context, self.location, self.direction, self.kl = context, location, direction, kl
        texts = _usual_ids(tokens, _N_TEXTS, seed, _WINDOW)
        size = min(map(len, texts))
        start = start_token(context)
        self.batch = torch.tensor([[start, *text[:size]] for text in texts])
        self._plain: Tensor | None = None
        self._changes: dict[int, tuple[Tensor, float, float]] = {}

    @property
    def plain(self) -> Tensor:
        """``[n, v]``: log-probabilities of the next token, without steering."""
        if self._plain is None:
            self._plain = self._next(None)
        return self._plain

    def change(self, unit: int) -> tuple[Tensor, float, float]:
        """``[n, v]``: how steering with a unit changes the log-probabilities; the strength and the KL."""
        if unit not in self._changes:
            self._changes.clear()  # one unit is asked for again and again, and then the next one
            self._changes[unit] = self._change(unit)
        return self._changes[unit]

    @torch.no_grad()
    def _change(self, unit: int) -> tuple[Tensor, float, float]:
        direction = self.direction(unit).detach().float()
        norm = float(direction.norm())
        if not norm > 0:
            raise InputError(f"unit {unit} writes nothing: its direction is zero.")
        low, high = _STRENGTHS
        for _ in range(_BISECTIONS):
            strength = math.sqrt(low * high)
            steered = self._next((direction / norm, strength))
            found = self._kl(steered)
            low, high = (strength, high) if found < self.kl else (low, strength)
        return steered - self.plain, strength, found

    def _kl(self, steered: Tensor) -> float:
        """The mean over texts of KL(without steering, with it)."""
        return float((self.plain.exp() * (self.plain - steered)).sum(1).mean())

    @torch.no_grad()
    def _next(self, how: tuple[Tensor, float] | None) -> Tensor:
        model = self.context.get_or_create_model()
        hooks = None if how is None else steer(self.location, how[0], how[1], unit="norm")
        logits = model(self.batch.to(model.device), hooks=hooks)[0][:, -1]
        return torch.log_softmax(logits.float(), dim=1).cpu()


MODEL_SCORERS = ("surprisal", "intervention")
"""What needs the model of the unit, and no judge."""
_OTHERS = 8  # explanations that an intervention is compared with


def model_scorers(
    names: Sequence[str],
    store: "ExampleStore",
    context: "ModelContext",
    autoencoder: "Autoencoder | None",
    explanations: Sequence[Explanation],
    seed: int = 0,
) -> dict[str, Callable[[Explanation, ExampleSet], Score | None]]:
    """Those of :data:`MODEL_SCORERS` that are named, for :func:`~.work.score_units`.

    Args:
        names: other names are passed over.
        store: the store of the units.
        context: its model.
        autoencoder: its autoencoder; None for units of the model.
        explanations: those that are scored: an intervention compares each with some others.
        seed: decides which.
    """
    found: dict[str, Callable[[Explanation, ExampleSet], Score | None]] = {}
    if "surprisal" in names:
        found["surprisal"] = lambda explanation, examples: surprisal(explanation, examples, context)
    if "intervention" in names:
        steering = Steering(context, *_writing(store, autoencoder), tokens=store.tokens, seed=seed)
        order = np.random.RandomState([seed & 0xFFFFFFFF, 6]).permutation(len(explanations))
        others = [explanations[i] for i in order[: _OTHERS + 1].tolist()]
        found["intervention"] = lambda explanation, examples: intervention(
            explanation, examples, steering, others
        )
    return found


def _writing(
    store: "ExampleStore", autoencoder: "Autoencoder | None"
) -> tuple[LocationLike, Callable[[int], Tensor]]:
    """Where the units write, and what each adds there."""
    if autoencoder is None:
        size = len(store)
        numbers = torch.arange(size)
        return store.location, lambda unit: (numbers == unit).float()
    rows = autoencoder.directions
    place = autoencoder.output_location if autoencoder.is_transcoder else None
    return place or store.location, lambda unit: rows[unit]


def intervention(
    explanation: Explanation,
    examples: ExampleSet,
    steering: Steering,
    others: Sequence[Explanation],
) -> Score | None:
    """How often, steering with the unit, its own explanation names tokens that become likelier by more than
    those that explanations of other units name.

    Args:
        explanation: with tokens that the unit raises; else there is no score.
        examples: those of the unit, for the record.
        steering: the model and its texts.
        others: explanations of the same kind of other units.
    """
    own = explanation.payload.get("raises")
    theirs = [ids for each in others if (ids := each.payload.get("raises")) and ids != own]
    if not own or not theirs:
        return None
    change, strength, kl = steering.change(explanation.unit)
    gains = np.stack([_gain(change, ids) for ids in (own, *theirs)])
    wins = ((gains[:1] > gains[1:]) + 0.5 * (gains[:1] == gains[1:])).mean(axis=0)
    found = metrics.of_mean(wins, examples.seed)
    assert found is not None
    return Score(
        "intervention",
        "share of comparisons won",
        found.value,
        (found.low, found.high),
        (Floor("chance", 0.5),),
        metrics.smallest_difference(math.sqrt(2) * found.error),
        details={
            "gain in nats": float(gains[0].mean()),
            "gain of others": float(gains[1:].mean()),
            "strength, norms of the activation": strength,
            "KL": kl,
            "compared with": len(theirs),
        },
        seed=examples.seed,
    )


def _gain(change: Tensor, ids: Sequence[Any]) -> Doubles:
    """``[n]``: how much likelier some tokens become, as the mean of their log-probabilities."""
    numbers = torch.tensor([int(i) for i in ids])
    if bool(((numbers < 0) | (numbers >= change.shape[1])).any()):
        raise InputError(
            f"an explanation names tokens that the model's {change.shape[1]} do not have."
        )
    found: Doubles = change[:, numbers].mean(1).double().numpy()
    return found
