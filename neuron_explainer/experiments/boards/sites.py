"""Where board models can be seen and edited: one table, in the library's own hook vocabulary.

Hooks are a value here as everywhere (:mod:`neuron_explainer.models.hooks`). ``BoardGPT`` takes the same
:class:`~neuron_explainer.models.hooks.TransformerHooks` as every transformer of this library. ``LEA`` takes
:class:`LEAHooks`, which has such a tree for each of its three passes, each with sites of cross-attention::

    hooks = TransformerHooks().append_at("2/resid.torso.post_mlp", edit)
    hooks = LEAHooks()
    hooks.from_words.append_at("0/cross.probs", look)
    hooks.words.append_fwd(change_a_word)

The names of the paper's program are accepted wherever a site is named (:func:`location`), and never written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

from torch import Tensor

from neuron_explainer.errors import HookError, LocationError, did_you_mean
from neuron_explainer.models.hooks import (
    AtLayers,
    FwdBwdHooks,
    Hook,
    HookCollection,
    Hooks,
    Kind,
    TransformerHooks,
)
from neuron_explainer.models.locations import SITES, ActivationLocation, LocationLike


class BoardSite(NamedTuple):
    """A place in a board model."""

    path: str
    """Its name in the tree of hooks."""
    shape: str
    """Axes: b boards, s cells (or words), q and k cells or words that attend and are attended to, h heads,
    d width of the stream, p width of the position code, f width of the MLP, v tokens."""
    theirs: str
    """What the paper's program calls it, after ``b{layer}_`` in a block; empty if it has no name for it."""
    what: str


BOARD_SITES: tuple[BoardSite, ...] = (
    BoardSite(
        "resid.post_emb", "b s d", "tok_emb", "token embedding; without positions in factor models"
    ),
    BoardSite("resid.torso.ln_attn.post_mean_subtraction", "b s d", "", "inside the first norm"),
    BoardSite("resid.torso.ln_attn.scale", "b s 1", "", "inside the first norm"),
    BoardSite("resid.torso.ln_attn.post_scale", "b s d", "", "inside the first norm"),
    BoardSite(
        "resid.torso.post_ln_attn", "b s d", "z", "what attention reads, beside the position code"
    ),
    BoardSite("attn.q", "b q h d/h", "q", "queries, scaled by d_head^-1/4"),
    BoardSite("attn.k", "b k h d/h", "k", "keys, scaled by d_head^-1/4"),
    BoardSite("attn.v", "b k h d/h", "v", "values"),
    BoardSite("attn.qk_logits", "b q k h", "", "scores before the softmax"),
    BoardSite("attn.qk_softmax_denominator", "b q 1 h", "", "the sum that the softmax divides by"),
    BoardSite("attn.qk_probs", "b q k h", "a", "attention pattern; every cell sees every cell"),
    BoardSite("attn.v_out", "b q h d/h", "attn_v", "what each head read"),
    BoardSite(
        "resid.torso.delta_attn", "b s d", "attn_update", "what attention adds to the stream"
    ),
    BoardSite("resid.torso.post_attn", "b s d", "z_attn", "the stream after attention"),
    BoardSite("resid.torso.ln_mlp.post_mean_subtraction", "b s d", "", "inside the second norm"),
    BoardSite("resid.torso.ln_mlp.scale", "b s 1", "", "inside the second norm"),
    BoardSite("resid.torso.ln_mlp.post_scale", "b s d", "", "inside the second norm"),
    BoardSite(
        "resid.torso.post_ln_mlp", "b s d", "mlp_in", "what the MLP reads, beside the position code"
    ),
    BoardSite("mlp.pre_act", "b s f", "", "before the MLP's GELU"),
    BoardSite("mlp.post_act", "b s f", "", "after the MLP's GELU"),
    BoardSite("resid.torso.delta_mlp", "b s d", "mlp_update", "what the MLP adds to the stream"),
    BoardSite("resid.torso.post_mlp", "b s d", "z_attn_mlp", "the stream after the block"),
    BoardSite("resid.ln_f.post_mean_subtraction", "b s d", "", "inside the last norm"),
    BoardSite("resid.ln_f.scale", "b s 1", "", "inside the last norm"),
    BoardSite("resid.ln_f.post_scale", "b s d", "", "inside the last norm"),
    BoardSite("resid.post_ln_f", "b s d", "z_out", "the stream after the last norm"),
    BoardSite(
        "logits", "b s v", "logit", "scores of the tokens; of the speech stream there are none"
    ),
    BoardSite(
        "cross.post_ln", "b q d+p", "", "LEA: normed stream that asks (without p in vanilla)"
    ),
    BoardSite("cross.post_ln_source", "b k d+p", "", "LEA: normed other stream that answers"),
    BoardSite("cross.v", "b k h d/h", "", "LEA: values from the other stream"),
    BoardSite("cross.probs", "b q k h", "", "LEA: pattern of cross-attention"),
    BoardSite("cross.delta", "b s d", "crossAttn", "LEA: what cross-attention adds to the stream"),
    BoardSite("cross.post", "b s d", "", "LEA: the stream after cross-attention"),
    BoardSite(
        "words", "b k d", "", "LEA: the sentence as vectors of the codebook, between the passes"
    ),
)
"""Every place that hooks can reach. In factor LEA, norms read stream and position code together, so that
``post_ln_attn`` and ``post_ln_mlp`` are ``d+p`` wide there."""

_THEIRS = {site.theirs: site.path for site in BOARD_SITES if site.theirs}
_CROSS = tuple(site.path for site in BOARD_SITES if site.path.startswith("cross."))


def location(name: LocationLike) -> ActivationLocation:
    """A place of ``BoardGPT`` by our name (``"2/resid.torso.post_mlp"``) or theirs (``"b2_z_attn_mlp"``)."""
    if isinstance(name, ActivationLocation):
        return name
    if name in _THEIRS and not SITES[_THEIRS[name]].per_layer:
        return ActivationLocation(_THEIRS[name])
    head, _, rest = name.partition("_")
    if head[:1] == "b" and head[1:].isdecimal():
        if rest not in _THEIRS:
            hint = did_you_mean(rest, _THEIRS)
            raise LocationError(
                f"unknown record point {name!r}.{hint} Known: {', '.join(_THEIRS)}."
            )
        return ActivationLocation(_THEIRS[rest], int(head[1:]))
    return ActivationLocation.parse(name)


class CrossHooks(HookCollection):
    """The sites of cross-attention."""

    post_ln: FwdBwdHooks
    post_ln_source: FwdBwdHooks
    v: FwdBwdHooks
    probs: FwdBwdHooks
    delta: FwdBwdHooks
    post: FwdBwdHooks

    def __init__(self) -> None:
        super().__init__()
        for path in _CROSS:
            self.add_subhooks(path.partition(".")[2], FwdBwdHooks())
        self._place("cross")


class StreamHooks(TransformerHooks):
    """A whole tree with the sites of cross-attention besides, for one pass of LEA."""

    cross: CrossHooks

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("cross", CrossHooks())

    def append_at(self, location: LocationLike, hook: Hook, kind: Kind = "fwd") -> Self:
        """Append a hook at a location, such as ``"1/resid.torso.post_mlp"`` or ``"1/cross.delta"``."""
        layer, slash, path = str(location).rpartition("/")
        if path not in _CROSS:
            return super().append_at(location, hook, kind)
        if slash and not layer.isdecimal():
            raise LocationError(f"expected a location such as '1/{path}', found {location!r}.")
        return self.append_to_path(
            f"{path}.{kind}", AtLayers(int(layer)).append(hook) if slash else hook
        )


class LEAHooks(HookCollection):
    """The whole tree of LEA: three passes, and the sentence between them.

    ``from_board``: the picture stream reads the masked board. ``speech``: the speech stream asks it.
    ``words``: the sentence. ``from_words``: the picture stream draws the board from the sentence alone.
    """

    from_board: StreamHooks
    speech: StreamHooks
    words: FwdBwdHooks
    from_words: StreamHooks

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("from_board", StreamHooks())
        self.add_subhooks("speech", StreamHooks())
        self.add_subhooks("words", FwdBwdHooks())
        self.add_subhooks("from_words", StreamHooks())

    def check_layers(self, n_layers: int) -> None:
        """Refuse hooks for layers that the model lacks."""
        for child in (self.from_board, self.speech, self.from_words):
            child.check_layers(n_layers)


NO_STREAM_HOOKS = StreamHooks()
NO_LEA_HOOKS = LEAHooks()
"""The empty tree used for ``hooks=None`` inside a pass. Users never get it."""


def check_hooks(hooks: Any, kind: type[HookCollection], n_layers: int) -> None:
    """Refuse anything but a tree of this kind, and hooks for layers that the model lacks."""
    if not isinstance(hooks, kind):
        found = repr(hooks) if isinstance(hooks, HookCollection | Hooks) else type(hooks).__name__
        raise HookError(f"hooks must be a {kind.__name__} tree, found {found}.")
    if isinstance(hooks, TransformerHooks | LEAHooks):
        hooks.check_layers(n_layers)


def recorder(found: dict[Any, Tensor], key: Any) -> Callable[[Tensor], Tensor]:
    """A hook that keeps what passes, under ``key``."""

    def keep(x: Tensor) -> Tensor:
        found[key] = x
        return x

    return keep
