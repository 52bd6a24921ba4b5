"""The language-enhanced architecture: a picture stream that fills in boards, and a speech stream that says in
16 words what is on them.

A pass has three parts. The picture stream reads the masked board, with every word blank; the speech stream
asks its final states and says a sentence, whose words are codes of a small vocabulary; the same picture
stream draws the board again from a board with every cell hidden, and from the words alone.

With ``type="factor"`` position codes are concatenated before each norm (so that a norm reads both), with
``type="vanilla"`` they are added once.

Shape legend: ``b`` boards, ``s`` cells, ``k`` words of a sentence, ``w`` words of the vocabulary,
``d`` width, ``p`` width of the position code, ``v`` tokens.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.experiments.boards.blocks import (
    INITIAL_STD,
    BoardBlock,
    BoardNet,
    Sizes,
    attend,
    check_numbers,
    initialise,
    linear,
)
from neuron_explainer.experiments.boards.quantiser import Quantised, VectorQuantiser
from neuron_explainer.experiments.boards.sites import (
    NO_LEA_HOOKS,
    NO_STREAM_HOOKS,
    LEAHooks,
    StreamHooks,
    check_hooks,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Norm, merge_heads, split_heads


@dataclass(frozen=True)
class LEASizes(Sizes):
    """Sizes of ``LEA``; the defaults are those of the paper's program."""

    width: int = 32
    """Width of both streams."""
    position_width: int = 16
    """Width of the position codes; vanilla models have none."""
    n_words: int = 128
    """Words of the vocabulary of speech; the last one is the blank word."""
    sentence: int = 16
    """Words of a sentence."""
    ema: bool = True
    """Whether moving averages teach the codebook, or the loss does."""
    blank_zero: bool = False
    """Whether the first pass hears zeros, or the code of the blank word."""


class DecoderBlock(BoardBlock):
    """Self-attention, cross-attention to the other stream, MLP."""

    def __init__(self, sizes: LEASizes, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads = layer, sizes.n_heads
        d = sizes.width
        wide = d + (sizes.position_width if sizes.type == "factor" else 0)
        self.ln_self, self.ln_cross, self.ln_source, self.ln_mlp = (Norm(wide) for _ in range(4))
        self.qkv, self.proj = nn.Linear(wide, 3 * d), nn.Linear(d, d)
        self.cross_q, self.cross_kv = nn.Linear(wide, d), nn.Linear(wide, 2 * d)
        self.cross_proj = nn.Linear(d, d)
        self.fc, self.out = nn.Linear(wide, 4 * d), nn.Linear(4 * d, d)

    def forward(
        self, x: Tensor, code: Tensor | None, source: Tensor, hooks: StreamHooks, at: Any
    ) -> Tensor:
        """``x`` ``[b, s, d]`` after the block.

        Args:
            x: the stream; one board (``b`` = 1) is shared by all boards of ``source``.
            code: position code ``[s, p]`` of the stream, or None.
            source: the other stream with its position code, ``[b, k, d + p]``; or one for all boards.
        """
        at = at | {"layer": self.layer}
        torso = hooks.resid.torso
        normed = self.norm(self.ln_self, _joined(x, code), torso.ln_attn, hooks, at)
        normed = torso.post_ln_attn(normed, **at)
        x = self.attended(x, linear(self.qkv, normed), hooks, at)
        x = self._cross(x, code, source, hooks, at)
        normed = self.norm(self.ln_mlp, _joined(x, code), torso.ln_mlp, hooks, at)
        normed = torso.post_ln_mlp(normed, **at)
        return self.fed(x, linear(self.fc, normed), hooks, at)

    def _cross(
        self, x: Tensor, code: Tensor | None, source: Tensor, hooks: StreamHooks, at: Any
    ) -> Tensor:
        """The stream after it has asked the other stream."""
        cross = hooks.cross
        asking = cross.post_ln(self.ln_cross(_joined(x, code)), **at)
        answering = cross.post_ln_source(self.ln_source(source), **at)
        k, v = linear(self.cross_kv, answering).chunk(2, dim=-1)
        n = max(len(x), len(source))
        q, k, v = (z.expand(n, -1, -1) for z in (linear(self.cross_q, asking), k, v))
        if hooks is NO_STREAM_HOOKS or cross.is_empty():
            found = attend(q, k, v, self.n_heads, None, at)
        else:
            q, k, v = (split_heads(z, self.n_heads) for z in (q, k, v))
            v = cross.v(v.clone(), **at).transpose(1, 2)
            scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
            pattern = cross.probs(scores.softmax(-1).permute(0, 2, 3, 1), **at)
            found = merge_heads((pattern.permute(0, 3, 1, 2) @ v).transpose(1, 2))
        return cross.post(x + cross.delta(linear(self.cross_proj, found), **at), **at)


def _joined(x: Tensor, code: Tensor | None) -> Tensor:
    """The stream ``[b, s, d]`` and its position code ``[s, p]`` as ``[b, s, d + p]``."""
    return x if code is None else torch.cat([x, code.expand(len(x), -1, -1)], dim=-1)


class LEAOutput(NamedTuple):
    """What the three passes gave."""

    from_board: Tensor
    """Logits ``[b, s, v]`` of the board, read from the masked board."""
    from_words: Tensor | None
    """Logits ``[b, s, v]`` of the board, drawn from the sentence; None if nothing was said."""
    speech: Tensor | None
    """``[b, k, d]``: what the speech stream said, before its words were chosen."""
    quantised: Quantised | None
    """The words."""


class LEA(BoardNet):
    """Fills in boards and says what is on them.

    Args:
        sizes: default: the factored model of the paper's program, 145,280 parameters.
        seed: of the initial weights.
    """

    sizes: LEASizes

    def __init__(self, sizes: LEASizes | None = None, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes = LEASizes() if sizes is None else sizes
        d, p = sizes.width, sizes.position_width if sizes.type == "factor" else sizes.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tok_embed = nn.Embedding(sizes.vocab_size, d)
            self.cell_codes = nn.Parameter(torch.empty(sizes.n_cells, p))
            self.picture = nn.ModuleList(DecoderBlock(sizes, i) for i in range(sizes.n_layers))
            self.picture_ln = Norm(d)
            self.unembed = nn.Linear(d, sizes.vocab_size, bias=False)
            self.questions = nn.Parameter(torch.empty(sizes.sentence, d))
            self.word_codes = nn.Parameter(torch.empty(sizes.sentence, p))
            self.speech = nn.ModuleList(DecoderBlock(sizes, i) for i in range(sizes.n_layers))
            self.speech_ln = Norm(d)
            self.apply(initialise)
            for parameter in (self.cell_codes, self.questions, self.word_codes):
                nn.init.normal_(parameter, std=INITIAL_STD)
            # After all others: not among what initialise sets, so that the codes keep their scale.
            self.quantiser = VectorQuantiser(sizes.n_words, d, sizes.ema)

    def forward(
        self, tokens: Tensor, hooks: LEAHooks | None = None, speak: bool = True
    ) -> LEAOutput:
        """All three passes; only the first if not ``speak``.

        Args:
            tokens: ``[b, s]``; hidden cells hold the last token of the vocabulary.
            hooks: what to see or replace on the way (:class:`~.sites.LEAHooks`).
        """
        hooks = self._checked(hooks)
        states, logits = self._read(tokens, hooks)
        if not speak:
            return LEAOutput(logits, None, None, None)
        said = self._say(states, hooks)
        quantised: Quantised = self.quantiser(said)
        return LEAOutput(logits, self._draw(quantised.vectors, hooks), said, quantised)

    def predict_from_board(self, tokens: Tensor, hooks: LEAHooks | None = None) -> Tensor:
        """Logits ``[b, s, v]`` of the board, from the masked board ``[b, s]``."""
        return self._read(tokens, self._checked(hooks))[1]

    @torch.no_grad()
    def capture(
        self, tokens: Tensor, locations: Sequence[LocationLike]
    ) -> dict[ActivationLocation, Tensor]:
        """Activations of the picture stream, by location, while it reads boards ``[b, s]``."""
        hooks = LEAHooks()
        run = functools.partial(self.predict_from_board, tokens, hooks)
        return self.captured(locations, hooks.from_board, run)

    def sentence(self, tokens: Tensor, hooks: LEAHooks | None = None) -> Tensor:
        """The words ``[b, k]`` that the model says about boards ``[b, s]``."""
        hooks = self._checked(hooks)
        return self.quantiser.nearest(self._say(self._read(tokens, hooks)[0], hooks))

    def predict_from_speech(self, words: Tensor, hooks: LEAHooks | None = None) -> Tensor:
        """Logits ``[b, s, v]`` of the board, from words ``[b, k]`` alone."""
        check_numbers(words, "sentences", "words", self.sizes.sentence, self.sizes.n_words)
        return self._draw(self.quantiser.codes(words), self._checked(hooks))

    # ---- the three passes --------------------------------------------------------------------------

    def _checked(self, hooks: LEAHooks | None) -> LEAHooks:
        if hooks is None:
            return NO_LEA_HOOKS
        check_hooks(hooks, LEAHooks, self.sizes.n_layers)
        return hooks

    def _read(self, tokens: Tensor, hooks: LEAHooks) -> tuple[Tensor, Tensor]:
        """The picture stream's final states ``[b, s, d]`` and its logits ``[b, s, v]``."""
        self.check_boards(tokens)
        blank = self.quantiser.codebook[-1].expand(1, self.sizes.sentence, -1)
        if self.sizes.blank_zero:
            blank = torch.zeros_like(blank)
        return self._picture(tokens, self._placed(blank, self.word_codes), hooks.from_board)

    def _draw(self, words: Tensor, hooks: LEAHooks) -> Tensor:
        """Logits ``[b, s, v]`` of the board that vectors ``[b, k, d]`` describe."""
        words = hooks.words(words, layer=None, positions=None)
        hidden = torch.full((1, self.sizes.n_cells), self.sizes.vocab_size - 1, device=self.device)
        return self._picture(hidden, self._placed(words, self.word_codes), hooks.from_words)[1]

    def _picture(self, tokens: Tensor, source: Tensor, hooks: StreamHooks) -> tuple[Tensor, Tensor]:
        """The picture stream's final states ``[b, s, d]`` and its logits ``[b, s, v]``."""
        x = F.embedding(tokens, self.tok_embed.weight)
        x = self._stream(self.picture, self.picture_ln, x, self.cell_codes, source, hooks)
        return x, hooks.logits(linear(self.unembed, x), layer=None, positions=None)

    def _say(self, states: Tensor, hooks: LEAHooks) -> Tensor:
        """What the speech stream makes of the picture stream's states: ``[b, k, d]``."""
        source, x = self._placed(states, self.cell_codes), self.questions[None]
        return self._stream(self.speech, self.speech_ln, x, self.word_codes, source, hooks.speech)

    def _stream(
        self,
        blocks: nn.ModuleList,
        norm: Norm,
        x: Tensor,
        codes: Tensor,
        source: Tensor,
        hooks: StreamHooks,
    ) -> Tensor:
        """The final states ``[b, s, d]`` of a stream, from its embeddings and the other stream."""
        if hooks.is_empty():  # what all boards share is computed once
            hooks = NO_STREAM_HOOKS
        else:  # a hook may treat each board in its own way
            n = max(len(x), len(source))
            x, source = (z.expand(n, -1, -1) for z in (x, source))
        factor = self.sizes.type == "factor"
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        at = {"layer": None, "positions": positions}
        x = hooks.resid.post_emb(x if factor else x + codes, **at)
        for block in blocks:
            x = block(x, codes if factor else None, source, hooks, at)
        at["positions"] = None
        return hooks.resid.post_ln_f(norm(x, hooks.resid.ln_f, **at), **at)

    def _placed(self, x: Tensor, codes: Tensor) -> Tensor:
        """Vectors with their position codes: beside them or added, ``[b, k, d + p]`` or ``[b, k, d]``."""
        return _joined(x, codes) if self.sizes.type == "factor" else x + codes
