"""Many interventions on the same prompts, each measured alone, without re-running what has not changed.

    source = model.capture(corrupt, "resid.torso.post_mlp")
    grid = patching("resid.torso.post_mlp", source, positions=range(15))
    result = sweep(model, prompts, grid, logit_difference(model, " Mary", " John"))

A forward pass is a staircase. An intervention at layer ``l`` and position ``p`` changes neither the layers
below ``l`` nor, because attention looks back only, the positions before ``p``. So one unchanged pass is
kept, and each intervention joins a batch at its layer, with its positions from ``p`` on and the kept keys
and values before them. Interventions that begin at the same position run in one batch, which grows from
layer to layer. Only the last token's logits are computed, unless the metric reads others.

The results equal those of one full pass an intervention up to rounding (a test holds 1e-5 of the largest
logit). Models other than our own run in full, batched.

Shape legend: ``p`` prompts, ``c`` interventions of a batch, ``n`` its rows (``c * p``), ``s`` positions that
are recomputed, ``d`` model width, ``v`` vocabulary.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.targets import Metric, Reading, Target, as_target
from neuron_explainer.errors import InputError, optional_module, shown
from neuron_explainer.kernels.products import linear
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.hooks import AtLayers, AutoencoderHooks, Hooks, TransformerHooks
from neuron_explainer.models.interventions import Edit, ablate, add, patch_from
from neuron_explainer.models.kv_cache import KeyValueCache
from neuron_explainer.models.language_model import Activations, LanguageModel, Prompts, longest_row
from neuron_explainer.models.locations import SITES, ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import LayerIndex
from neuron_explainer.progress import progress_bar

__all__ = ["Grid", "Sweep", "active_latents", "heads", "neurons", "pairs", "patching", "sweep"]

FEWEST_TOKENS = 256
"""Below this many tokens, reading the weights takes longer than multiplying with them, so interventions
that begin at neighbouring positions share a batch and recompute a few positions more."""
LOGITS_AT_ONCE = 2**26
"""Logits held at a time where a metric reads every position: 256 MiB in float32."""

Label = int | str | tuple[Any, ...]


# --- what to try ---


@dataclass(frozen=True)
class Grid:
    """Interventions by the labels of some dimensions."""

    dims: Mapping[str, Sequence[Label]]
    """Name of each dimension, and its labels."""
    build: Callable[..., TransformerHooks] = field(repr=False)
    """From one label of each dimension, in order, to the intervention."""

    def __post_init__(self) -> None:
        if not self.dims or not all(self.dims.values()):
            raise InputError("a grid needs at least one label in each dimension.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of labels in each dimension."""
        return tuple(len(labels) for labels in self.dims.values())

    def __len__(self) -> int:
        return int(np.prod(self.shape))

    def __iter__(self) -> Iterator[TransformerHooks]:
        return itertools.starmap(self.build, itertools.product(*self.dims.values()))


def patching(
    location: LocationLike,
    source: Activations,
    *,
    positions: Sequence[int],
    layers: Sequence[int] | None = None,
    index_map: Tensor | None = None,
) -> Grid:
    """Each layer and position of a location set to its value in another run.

    Args:
        location: without a layer: every captured layer is a row of the grid.
        source: ``model.capture(other_prompts, location)``.
        positions: of the tokens to patch, one a column.
        layers: which of the captured layers; None for all.
        index_map: see :func:`~neuron_explainer.models.interventions.patch_from`.
    """
    place = ActivationLocation.parse(location)
    if not isinstance(source, Activations):
        raise InputError(
            f"source is what model.capture(prompts, location) returns, found {shown(source)}."
        )
    captured = [p.layer for p in source if p.path == place.path and p.layer is not None]
    found = captured if layers is None else list(layers)
    if place.layer is not None or not place.site.per_layer:
        found = [place.layer] if place.layer is not None else []
    if place.site.per_layer and (not found or not set(found) <= set(captured)):
        asked = found or "any"
        raise InputError(f"the source holds {place} in layers {captured}; asked for {asked}.")
    _check_counterparts(source, positions, index_map)

    def build(layer: Any, position: Any) -> TransformerHooks:
        at = place.at(layer) if place.site.per_layer else place
        return patch_from(at, source, positions=position, index_map=index_map)

    return Grid({"layer": found or [place.path], "position": list(positions)}, build)


def _check_counterparts(
    source: Activations, positions: Sequence[int], index_map: Tensor | None
) -> None:
    """Refuse positions that no row of the source has: nothing would be patched there."""
    if index_map is None:
        longest = longest_row(source.tokens, source.pad)
        missing = [position for position in positions if position >= longest]
        why = f"the source's longest prompt has {longest} tokens"
    else:
        known = (index_map if index_map.dim() == 2 else index_map[None]).ge(0).any(dim=0).tolist()
        missing = [p for p in positions if p >= len(known) or not known[p]]
        why = "index_map has none for it"
    if missing:
        raise InputError(
            f"position {missing[0]} has no counterpart in the source: {why}. Leave it out, or align the "
            "prompts: index_map=align(here, there)."
        )


Intervene = Callable[..., TransformerHooks]
"""Takes a location, ``units=`` and ``positions=``, as ``ablate`` does."""


def heads(
    model: LanguageModel,
    intervene: Intervene = ablate,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Grid:
    """Each attention head (at ``attn.v_out``): at every position, or at each of ``positions`` apart."""
    n_heads = ActivationLocation.parse("attn.qk_probs").site.width(model.sizes.__getitem__)
    dims: dict[str, Sequence[Label]] = {
        "layer": list(range(model.n_layers) if layers is None else layers),
        "head": list(range(n_heads)),
    }
    if positions is not None:
        dims["position"] = list(positions)

    def build(layer: int, head: int, position: int | None = None) -> TransformerHooks:
        return intervene(f"{layer}/attn.v_out", units=head, positions=position)

    return Grid(dims, build)


def neurons(
    location: LocationLike,
    groups: Sequence[int | Sequence[int]],
    intervene: Intervene = ablate,
    *,
    positions: Sequence[int] | None = None,
) -> Grid:
    """Each neuron, or each group of neurons, of one location."""
    labels: list[Label] = [g if isinstance(g, int) else tuple(g) for g in groups]
    dims: dict[str, Sequence[Label]] = {"units": labels}
    if positions is not None:
        dims["position"] = list(positions)

    def build(units: Any, position: int | None = None) -> TransformerHooks:
        return intervene(
            location, units=units if isinstance(units, int) else list(units), positions=position
        )

    return Grid(dims, build)


@torch.no_grad()
def active_latents(
    model: LanguageModel,
    prompts: Prompts,
    autoencoders: AutoencoderContext,
    layer: int,
    *,
    value: float = 0.0,
    bos: bool | int = False,
) -> Grid:
    """Each latent that fires anywhere in the prompts set to ``value`` wherever it fires, the error kept.

    The code of the unchanged activation is known, so an edit adds ``(value - latent)`` times the
    decoder's row, and nothing is encoded again: the cost grows with the number of active latents, not
    with the size of the dictionary.
    """
    autoencoders.check_model(model, layer)
    place, autoencoder = autoencoders.location.at(layer), autoencoders.get_autoencoder(layer)
    found = model.capture(prompts, place, bos=bos)
    x = found[place].flatten(2)
    code = autoencoder.code(x.to(autoencoder.dtype))
    latents = code.latents if found.pad is None else code.latents * ~found.pad[..., None]
    active = latents.flatten(0, 1).any(dim=0).nonzero()[:, 0].tolist()
    if not active:
        raise InputError(f"no latent of {place} is active in these prompts.")

    def build(latent: int) -> TransformerHooks:
        now = latents[..., latent, None]
        index = torch.full_like(now, latent, dtype=torch.long)
        zero = Latents(torch.zeros_like(now), index, autoencoder.n_latents)
        change = torch.where(now != 0, value - now, 0.0)
        # Decoding is affine: the difference is that of one row, on the scale of the input.
        difference = code.decode(zero._replace(values=change)) - code.decode(zero)
        shape = found[place].shape  # heads apart
        return add(place, difference.to(x.dtype).view(shape), positions=now[..., 0] != 0)

    return Grid({"latent": active}, build)


def pairs(grid: Grid) -> Grid:
    """Each unordered pair of different interventions of a grid of one dimension, made together."""
    if len(grid.dims) != 1:
        raise InputError(f"pairs are of a grid of one dimension, found {list(grid.dims)}.")
    ((name, labels),) = grid.dims.items()
    both = list(itertools.combinations(labels, 2))
    if not both:
        raise InputError("pairs need at least two interventions.")
    return Grid({f"{name} pair": both}, lambda two: grid.build(two[0]) + grid.build(two[1]))


# --- what came out ---


@dataclass(frozen=True, repr=False)
class Sweep:
    """What each intervention did to the metric, by labels and prompt."""

    values: npt.NDArray[np.float64]
    """``[*grid, p]``: the metric under each intervention, for each prompt."""
    baseline: npt.NDArray[np.float64]
    """``[p]``: the metric of the unchanged run."""
    dims: Mapping[str, Sequence[Label]]
    """Name and labels of each axis of ``values`` but the last."""
    metric: str

    @property
    def effect(self) -> npt.NDArray[np.float64]:
        """``values - baseline``."""
        return self.values - self.baseline

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """``[*grid]``: the effect, mean over the prompts."""
        found: npt.NDArray[np.float64] = self.effect.mean(axis=-1)
        return found

    def normalised(self, other: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """``(value - baseline) / (other - baseline)``: 0 as the unchanged run, 1 as a run whose metric is
        ``other`` (``[p]`` or one number)."""
        whole = np.asarray(other, dtype=np.float64)
        if whole.shape not in ((), (1,), self.baseline.shape):
            raise InputError(
                f"other must be one number, or one for each of {len(self.baseline)} prompts, found "
                f"{list(whole.shape)}."
            )
        span = whole - self.baseline
        if not span.all():
            raise InputError(
                "the two runs have the same metric, so that there is no scale between them."
            )
        found: npt.NDArray[np.float64] = self.effect / span
        return found

    def top(self, k: int = 10) -> list[tuple[tuple[Label, ...], float]]:
        """The ``k`` labels with the largest mean effect, either way, and these effects."""
        mean = self.mean
        order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:k]
        labels = list(self.dims.values())
        places = [np.unravel_index(i, mean.shape) for i in order]
        return [
            (tuple(names[i] for names, i in zip(labels, at, strict=True)), float(mean[at]))
            for at in places
        ]

    def to_dataframe(self) -> Any:
        """One row an intervention and prompt (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
        cells = list(itertools.product(*self.dims.values()))
        n_prompts = len(self.baseline)
        table: dict[str, list[Any]] = {
            name: [cell[axis] for cell in cells for _ in range(n_prompts)]
            for axis, name in enumerate(self.dims)
        }
        table["prompt"] = list(range(n_prompts)) * len(cells)
        table["value"] = self.values.reshape(-1).tolist()
        table["effect"] = self.effect.reshape(-1).tolist()
        return pandas.DataFrame(table)

    def plot(self, labels: Sequence[str] | None = None) -> Any:
        """A heat map of the mean effect of a grid of two dimensions; bars of one of one.

        Args:
            labels: text for the second dimension, such as the prompt's tokens.

        Returns:
            matplotlib's figure (needs the extra ``plots``).
        """
        pyplot = optional_module("matplotlib.pyplot", "a plot")
        mean, names = self.mean, list(self.dims)
        if mean.ndim > 2:
            raise InputError(f"a plot shows one or two dimensions, found {names}.")
        if labels is not None and (mean.ndim < 2 or len(labels) != mean.shape[1]):
            raise InputError(
                f"labels are for the second dimension, found {len(labels)} for a grid of "
                f"{list(mean.shape)}."
            )
        figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
        if mean.ndim == 1:
            axes.bar(range(len(mean)), mean, color="#3b6ea8")
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlabel(names[0])
            axes.set_ylabel(f"change of {self.metric}")
            return figure
        limit = float(np.abs(mean).max()) or 1.0
        image = axes.imshow(mean, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        figure.colorbar(image, ax=axes, label=f"change of {self.metric}")
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])
        axes.set_yticks(range(len(mean)), [str(label) for label in self.dims[names[0]]])
        columns = [str(label) for label in self.dims[names[1]]] if labels is None else list(labels)
        axes.set_xticks(
            range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 2 else 0
        )
        return figure

    def __repr__(self) -> str:
        shape = ", ".join(_counted(len(labels), name) for name, labels in self.dims.items())
        n_prompts = len(self.baseline)
        lines = [
            f"Sweep({shape}, {_counted(n_prompts, 'prompt')}; {self.metric}, "
            f"unchanged {self.baseline.mean():.4g}; largest changes, mean over prompts:"
        ]
        for cell, effect in self.top(5):
            at = ", ".join(f"{name} {label}" for name, label in zip(self.dims, cell, strict=True))
            lines.append(f"  {at}: {effect:+.4g}")
        return "\n".join(lines) + ")"


def _counted(number: int, name: str) -> str:
    """``3 layers``, ``1 layer``; a name such as ``units`` stays as it is."""
    return f"{number} {name}{'' if number == 1 or name.endswith('s') else 's'}"


# --- running ---


@torch.no_grad()
def sweep(
    model: LanguageModel,
    prompts: Prompts | Tensor,
    interventions: Grid | Mapping[str, TransformerHooks] | Sequence[TransformerHooks],
    metric: Metric,
    *,
    bos: bool | int = False,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Sweep:
    """Measure each intervention alone on each prompt.

    Args:
        prompts: as ``sample`` takes them, of any lengths.
        interventions: a grid, or hooks by name or number.
        metric: a :class:`~neuron_explainer.analysis.targets.Target`, or a function from the last
            token's logits ``[n, v]`` to ``[n]``.
        bos: prepend the start token.
        batch_tokens: most tokens in a batch: memory grows with it.
        progress: show a bar on stderr.
    """
    check_count(batch_tokens, "batch_tokens")
    tokens, pad = model.to_batch(prompts, None, bos)
    grid = _as_grid(interventions)
    runner = _Staircase if isinstance(model, Transformer) else _FullPasses
    run = runner(model, tokens, pad, as_target(metric), batch_tokens)
    plans = [_plan(number, hooks, run) for number, hooks in enumerate(grid)]
    values = np.full((len(plans), len(tokens)), np.nan)
    bar = progress_bar(total=len(plans), desc="sweep", unit=" interventions", disable=not progress)
    with bar:
        for batch in run.batches(plans):
            found = run.measure(batch)
            values[[plan.number for plan in batch]] = (
                found.double().reshape(len(batch), -1).cpu().numpy()
            )
            bar.update(len(batch))
    baseline = run.baseline.double().cpu().numpy()
    return Sweep(values.reshape(*grid.shape, -1), baseline, dict(grid.dims), run.target.name)


def _as_grid(given: Grid | Mapping[str, TransformerHooks] | Sequence[TransformerHooks]) -> Grid:
    if isinstance(given, Grid):
        return given
    if isinstance(given, TransformerHooks):
        raise InputError("a sweep takes a grid or several interventions; put the one in a list.")
    named = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    return Grid({"intervention": list(named)}, named.__getitem__)


@dataclass(frozen=True)
class _Plan:
    """An intervention, and where it begins to matter."""

    number: int
    hooks: TransformerHooks
    point: int
    """Where it joins the staircase: ``2 l`` is the stream before layer ``l``, ``2 l + 1`` between its
    attention and its MLP, ``2 L`` the stream after all ``L`` layers."""
    position: int
    """The first position that it changes."""
    late: bool
    """Whether it acts behind the last layer's attention. Only then that layer's MLP has to run for every
    position, if the metric reads the last token's logits."""


def _plan(number: int, hooks: TransformerHooks, run: "_FullPasses") -> _Plan:
    model = run.model
    model._check_hooks(hooks, max(run.lengths))
    n_layers = model.n_layers
    point, position, late = 2 * n_layers, max(run.lengths), False
    for path, leaf in hooks.leaves():
        place = ActivationLocation(path.rpartition(".")[0])
        behind = list(SITES).index(place.path) > _MIDDLE
        late |= behind and not leaf.is_empty_at(n_layers - 1)
        for hook in leaf._hooks:
            layer, first = _begins(hook, run.lengths)
            at = place.at(layer) if place.site.per_layer else place
            point, position = min(point, _point_of(at, n_layers)), min(position, first)
    late |= point == 2 * n_layers
    return _Plan(number, hooks, point, min(position, max(run.lengths) - 1), late)


def _begins(hook: object, lengths: Sequence[int]) -> tuple[int, int]:
    """The first layer and the first position that a hook changes; 0 where it does not say."""
    if isinstance(hook, AtLayers):
        inside = [_begins(inner, lengths)[1] for inner in hook._hooks]
        return min(hook.at_layers), min(inside, default=max(lengths))
    if isinstance(hook, AutoencoderHooks) and hook.add_error:
        # With the error kept, only edits change anything.
        edits = [inner for _, leaf in hook.leaves() for inner in leaf._hooks]
        return 0, min((_begins(edit, lengths)[1] for edit in edits), default=max(lengths))
    return 0, hook.positions.first(lengths) if isinstance(hook, Edit) else 0


_MIDDLE = list(SITES).index("resid.torso.post_attn")


def _point_of(place: ActivationLocation, n_layers: int) -> int:
    """The point of the staircase at or before a place."""
    depth = 2 * place.depth(n_layers)
    if not place.site.per_layer:
        return depth
    if place.path == "resid.torso.post_mlp":
        return depth + 2
    return depth + (list(SITES).index(place.path) >= _MIDDLE)


class _OnRows:
    """A hook for a batch of interventions: each one's hooks run on its own rows."""

    def __init__(self, n_prompts: int) -> None:
        self.n_prompts = n_prompts
        self.lists: list[tuple[int, Hooks]] = []
        """The number of each intervention in the batch, and its hooks at this place."""

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        result = x.clone()
        for number, hooks in self.lists:
            rows = slice(number * self.n_prompts, (number + 1) * self.n_prompts)
            if rows.start >= len(x):  # it has not joined yet
                continue
            its = {
                key: value[rows] if key == "positions" and value is not None else value
                for key, value in kwargs.items()
            }
            result[rows] = hooks(x[rows].clone(), **its)
        return result


def _on_rows(batch: Sequence[_Plan], n_prompts: int, n_layers: int) -> TransformerHooks:
    """One tree for a batch of interventions."""
    found: dict[tuple[str, LayerIndex], _OnRows] = {}
    tree = TransformerHooks()
    for number, plan in enumerate(batch):
        for path, leaf in plan.hooks.leaves():
            if leaf.is_empty():
                continue
            site, _, kind = path.rpartition(".")
            layers = range(n_layers) if SITES[site].per_layer else [None]
            for layer in layers:
                if leaf.is_empty_at(layer):
                    continue
                if (path, layer) not in found:
                    found[path, layer] = _OnRows(n_prompts)
                    tree.append_at(ActivationLocation(site, layer), found[path, layer], kind)  # type: ignore[arg-type]  # fwd, bwd or fwd2
                found[path, layer].lists.append((number, leaf))
    return tree


class _FullPasses:
    """Runs whole passes, for models whose layers cannot be run one at a time."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        pad: Tensor | None,
        target: Target,
        batch_tokens: int,
    ) -> None:
        self.model, self.tokens, self.target = model, tokens, target
        self.pad = torch.zeros_like(tokens, dtype=torch.bool) if pad is None else pad
        self.lengths: list[int] = (~self.pad).sum(dim=1).tolist()
        self.batch_tokens = batch_tokens
        if tokens.numel() > batch_tokens:
            raise InputError(
                f"the prompts hold {tokens.numel()} tokens, more than batch_tokens {batch_tokens}: give "
                "fewer prompts, or raise batch_tokens."
            )
        self.clean = self._clean_pass()
        self.baseline = target.unchanged(self._reading(self.clean, len(tokens)))

    def _clean_pass(self) -> Tensor:
        """Logits of the unchanged run: ``[p, v]`` of the last tokens, or ``[p, s, v]``."""
        return self._wanted(self.model(self.tokens, pad=self.pad)[0])

    def _wanted(self, logits: Tensor) -> Tensor:
        return logits if self.target.every_position else self._last(logits, 0)

    def _last(self, x: Tensor, begin: int) -> Tensor:
        """``[n, d]`` of each row's last token, from ``[n, s, d]`` that begins at position ``begin``."""
        last = torch.tensor(self.lengths, device=x.device) - 1 - begin
        last = last.clamp(min=0).repeat(len(x) // len(last))
        return x[torch.arange(len(x), device=x.device), last]

    def _reading(self, logits: Tensor, n_rows: int) -> Reading:
        n_prompts = len(self.tokens)
        prompt = torch.arange(n_prompts, device=logits.device).repeat(n_rows // n_prompts)
        return Reading(logits, prompt, self.clean[prompt], self.tokens[prompt], self.pad[prompt])

    def batches(self, plans: Sequence[_Plan]) -> Iterator[Sequence[_Plan]]:
        """The interventions in batches that run together."""
        return self._cut(plans, self.tokens.numel())

    def _cut(self, plans: Sequence[_Plan], tokens_each: int) -> Iterator[Sequence[_Plan]]:
        most = max(1, self.batch_tokens // tokens_each)
        if self.target.every_position:
            most = max(1, min(most, LOGITS_AT_ONCE // (self.tokens.numel() * self.model.n_vocab)))
        return (plans[i : i + most] for i in range(0, len(plans), most))

    def measure(self, batch: Sequence[_Plan]) -> Tensor:
        """``[n]``: the metric of each intervention and prompt."""
        hooks = _on_rows(batch, len(self.tokens), self.model.n_layers)
        c = len(batch)
        logits, _ = self.model(self.tokens.repeat(c, 1), pad=self.pad.repeat(c, 1), hooks=hooks)
        return self.target(self._reading(self._wanted(logits), len(logits)))


class _Staircase(_FullPasses):
    """Runs each intervention from its first layer and position on; see the module's docstring."""

    model: Transformer

    def _clean_pass(self) -> Tensor:
        model = self.model
        x, state, pad, _ = model.run_embed(self.tokens, None, self.pad)
        self._state, self._positions = state, state.positions
        self._points = [x]
        for layer in model.layers:
            delta, _ = layer.attn_block(x, state[layer.layer_idx], pad, None, state.positions)
            middle = x + delta
            x = middle + layer.mlp_block(middle, None, state.positions)
            self._points += [middle, x]
        x = x if self.target.every_position else self._last(x, 0)[:, None]
        return self._logits(x, 0, TransformerHooks(), None)

    def _logits(
        self, x: Tensor, begin: int, hooks: TransformerHooks, clean: Tensor | None
    ) -> Tensor:
        """Logits from the last stream ``[n, s, d]``, whose first position is ``begin``, or from the last
        token's ``[n, 1, d]`` where the metric reads no other."""
        model, n_rows = self.model, len(x)
        positions = self._at(n_rows, begin)
        if not self.target.every_position:
            positions = self._last(positions[..., None], begin)
        at: dict[str, Any] = {"layer": None, "positions": positions}
        x = hooks.resid.post_ln_f(model.final_ln(x, hooks.resid.ln_f, **at), **at)
        logits = hooks.logits(linear(x, model.unembed), **at)
        if clean is None:
            return logits if self.target.every_position else logits[:, 0]
        repeated = clean.repeat(n_rows // len(clean), *[1] * (clean.dim() - 1))
        if self.target.every_position:
            return torch.cat([repeated[:, :begin], logits], dim=1)
        # A row that ends before the first changed position is as it was.
        ended = torch.tensor(self.lengths, device=x.device).repeat(n_rows // len(clean)) <= begin
        return torch.where(ended[:, None], repeated, logits[:, 0])

    def _at(self, n_rows: int, begin: int) -> Tensor:
        """Positions ``[n, s]`` from ``begin`` on."""
        assert self._positions is not None
        return self._positions[:, begin:].repeat(n_rows // len(self.tokens), 1)

    def batches(self, plans: Sequence[_Plan]) -> Iterator[Sequence[_Plan]]:
        ordered = sorted(plans, key=lambda plan: (plan.late, plan.position, plan.point))
        for _, alike in itertools.groupby(ordered, key=lambda plan: plan.late):
            yield from self._of_neighbours(alike)

    def _of_neighbours(self, ordered: Iterable[_Plan]) -> Iterator[Sequence[_Plan]]:
        """Interventions that begin at the same position together, or at a few neighbouring ones."""
        group: list[_Plan] = []
        for position, same in itertools.groupby(ordered, key=lambda plan: plan.position):
            if group and self._n_tokens(group) >= FEWEST_TOKENS and position > group[0].position:
                yield from self._cut(self._by_point(group), self._n_tokens(group[:1]))
                group = []
            group += same
        yield from self._cut(self._by_point(group), self._n_tokens(group[:1]))

    def _n_tokens(self, group: Sequence[_Plan]) -> int:
        return len(group) * len(self.tokens) * (self.tokens.shape[1] - group[0].position)

    @staticmethod
    def _by_point(group: Iterable[_Plan]) -> list[_Plan]:
        return sorted(group, key=lambda plan: plan.point)

    def measure(self, batch: Sequence[_Plan]) -> Tensor:
        begin = min(plan.position for plan in batch)
        n_prompts, n_layers = len(self.tokens), self.model.n_layers
        hooks = _on_rows(batch, n_prompts, n_layers)
        x = self._points[0][:0, begin:]
        end, last = 2 * n_layers, not self.target.every_position
        early = last and not any(plan.late for plan in batch)
        for point in range(batch[0].point, end + 1):
            if early and point == end:  # the metric alone reads what follows
                x = self._last(x, begin)[:, None]
            if len(x):
                x = self._half(x, point, begin, hooks)
            joining = sum(plan.point == point for plan in batch)
            if joining:
                x = torch.cat([x, self._points[point][:, begin:].repeat(joining, 1, 1)])
            x = self._at_point(x, point, begin, hooks)
        if last and not early:
            x = self._last(x, begin)[:, None]
        return self.target(self._reading(self._logits(x, begin, hooks, self.clean), len(x)))

    def _half(self, x: Tensor, point: int, begin: int, hooks: TransformerHooks) -> Tensor:
        """The stream at ``point`` from that at the point before: attention or MLP of a layer."""
        layer = list(self.model.layers)[(point - 1) // 2]
        positions = self._at(len(x), begin)
        if point % 2 == 0:
            return x + layer.mlp_block(x, hooks, positions)
        pad = self.pad[:, begin:].repeat(len(x) // len(self.tokens), 1) if self.pad.any() else None
        cache = self._cache(layer.layer_idx, len(x) // len(self.tokens), begin)
        return x + layer.attn_block(x, cache, pad, hooks, positions)[0]

    def _at_point(self, x: Tensor, point: int, begin: int, hooks: TransformerHooks) -> Tensor:
        """Run the hooks on the stream at a point."""
        torso = hooks.resid.torso
        layer, is_middle = (point - 1) // 2, point % 2 == 1
        site = (
            hooks.resid.post_emb if point == 0 else torso.post_attn if is_middle else torso.post_mlp
        )
        return site(x, layer=layer if point else None, positions=self._at(len(x), begin))

    def _cache(self, layer: int, n_times: int, begin: int) -> KeyValueCache:
        """Keys and values of the unchanged run before ``begin``, for each row of a batch."""
        cache = self._state[layer]
        if begin == 0:
            return KeyValueCache()

        keys, values, pad = (
            None if x is None else _tiled(x[:, :begin], n_times)
            for x in (cache.K_cache, cache.V_cache, cache.pad_cache)
        )
        return KeyValueCache(keys, values, pad, capacity=self.tokens.shape[1])


def _tiled(x: Tensor, n_times: int) -> Tensor:
    """``[p, …] -> [n_times * p, …]``, without a copy for one prompt."""
    return (
        x.expand(n_times, *x.shape[1:]) if len(x) == 1 else x.repeat(n_times, *[1] * (x.dim() - 1))
    )
