"""What a model's process keeps between requests: the model, autoencoders within a budget, results."""

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from neuron_explainer import files
from neuron_explainer.analysis.directions import Directions
from neuron_explainer.analysis.hardly_trained import TokenTexts, find_hardly_trained
from neuron_explainer.analysis.input_tokens import tokens_along
from neuron_explainer.analysis.token_lists import TokenValues
from neuron_explainer.errors import InputError, NeuronExplainerError, nearest, shown
from neuron_explainer.kernels.graph_memory import storages_of, versions
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.open_model import open_model
from neuron_explainer.models.weight_names import Dimension, WeightLocationType
from neuron_explainer.server.compute.keeping import Changed, Kept, PassMemory, bytes_of
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.setup import DictionarySource, Setup
from neuron_explainer.server.snippets import Names

T = TypeVar("T")
_GROUPS = {"attn": "attention", "mlp": "MLP", "logits": "logits"}


class Session:
    """The model and its dictionaries, for the functions that answer requests.

    Args:
        setup: see :class:`~neuron_explainer.server.compute.setup.Setup`. The model is loaded here,
            autoencoders when they are first used.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        given = setup.model
        is_open = isinstance(given, ModelContext)
        self.context: ModelContext = given if is_open else open_model(given, setup.device)
        self.model = self.context.get_or_create_model()
        self.sources = {source.id: source for source in setup.dictionaries}
        for name in setup.autoencoders:
            self._add(name)
        self.names = Names(self.context.reference, self.sources)
        """How scripts name the model and the dictionaries."""
        self.guard: Callable[[], None] = lambda: None
        """Raises if the request that runs should end."""
        self._encoding = _encoding_of(self.context)
        self._loaded: OrderedDict[str, Autoencoder] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._loads, self._serials = 0, dict[str, int]()
        self._directions: OrderedDict[str, Directions] = OrderedDict()
        self.results = Kept(setup.kept)
        self._versions = versions(self._weights())
        self.keeps_passes = not is_open and bool(self._versions)
        """Whether nobody else can change the model: only then is what it computed kept."""

    def begin(self, guard: Callable[[], None]) -> None:
        """Before each request; ``guard`` raises if it should end."""
        self.guard = guard
        now = versions(self._weights())
        if now != self._versions:
            self._versions = now
            self._directions.clear()
            self.results.clear()

    def _weights(self) -> list[Tensor]:
        parameters = getattr(self.model, "parameters", None)
        return [] if parameters is None else list(parameters())

    def drop_caches(self) -> None:
        """Forget everything but the model."""
        self._loaded.clear()
        self._directions.clear()
        self.results.clear()

    # --- what there is ---

    def facts(self) -> dict[str, Any]:
        """What ``GET /model`` says."""
        model, sizes = self.model, self.model.sizes
        return {
            "name": self.context.short_name,
            "family": getattr(getattr(model, "architecture", None), "name", type(model).__name__),
            "n_layers": model.n_layers,
            "n_heads": sizes.get(Dimension.ATTN_HEADS),
            "d_model": sizes.get(Dimension.RESIDUAL_STREAM_CHANNELS),
            "d_ff": sizes.get(Dimension.MLP_ACTS),
            "n_ctx": sizes.get(Dimension.MAX_CONTEXT_LENGTH),
            "n_vocab": model.n_vocab,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "parameters": sum(weight.numel() for weight in self._weights()) or None,
            "sites": [self._site(path) for path in model.paths],
            "heads": [
                [layer, head]
                for layer in range(model.n_layers)
                for head in range(sizes.get(Dimension.ATTN_HEADS, 0))
            ],
            "max_tokens": self.max_tokens,
            "capabilities": ["compute"],
            "python": self.names.script().result("model").text(),
        }

    def _site(self, path: str) -> dict[str, Any]:
        site = SITES[path]
        group = _GROUPS.get(path.partition(".")[0], "residual stream")
        units = {"f": "neuron", "d": "channel", "d_head": "head"}.get(site.shape[-1])
        return {
            "path": path,
            "shape": list(site.shape),
            "layers": site.per_layer,
            "units": units,
            "group": group,
        }

    @property
    def max_tokens(self) -> int:
        """Most tokens of one prompt."""
        return min(self.setup.max_tokens, self.context_length or self.setup.max_tokens)

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model reads; None if there is no limit."""
        return self.model.sizes.get(Dimension.MAX_CONTEXT_LENGTH)

    @property
    def has_texts(self) -> bool:
        """Whether tokens have texts."""
        return self._encoding is not None

    def source(self, id: str, loc: Iterable[str | int]) -> DictionarySource:
        """What an id stands for; a 404 with the nearest ids if there is none."""
        found = self.sources.get(id)
        if found is None:
            near = nearest(id, self.sources)
            hint = f" Did you mean {' or '.join(map(shown, near))}?" if near else ""
            raise Refusal(
                404,
                "unknown_dictionary",
                f"There is no dictionary {shown(id)}.{hint}",
                loc=loc,
                allowed=near or list(self.sources)[:20],
            )
        return found

    def _add(self, name: str) -> None:
        """Make dictionaries of an autoencoder, or of those of a name of the registry."""
        for path, location in _places_of(name, self.context):
            same = [
                source
                for source in self.sources.values()
                if source.kind == "latent" and source.location == location
            ]
            orphan = next((source for source in same if source.autoencoder is None), None)
            if orphan is not None:
                self.sources[orphan.id] = replace(orphan, autoencoder=path)
            elif not any(source.autoencoder == path for source in same):
                id = re.sub(r"[^A-Za-z0-9._-]", "-", f"{Path(name).name}.{location}")[-128:]
                self.sources[id] = DictionarySource(id, location, "latent", path, None)

    # --- prompts and tokens ---

    def ids(self, prompt: str | list[int], loc: Sequence[str | int]) -> list[int]:
        """The tokens of a prompt; a 413 if there are too many, a 422 if there is none."""
        if not prompt:
            raise Refusal(422, "empty_prompt", "A prompt must hold a token, found none.", loc=loc)
        try:
            (ids,) = self.model.prompt_ids(prompt)
        except NeuronExplainerError as error:
            raise Refusal(422, "invalid_input", str(error), loc=loc) from None
        if len(ids) > self.max_tokens:
            raise Refusal(
                413,
                "too_many_tokens",
                f"A prompt may have {self.max_tokens} tokens, found {len(ids)}.",
                loc=loc,
                allowed=[str(self.max_tokens)],
            )
        return ids

    def vocabulary(self, ids: Iterable[int]) -> dict[str, Any]:
        """``vocab``, the text of each token, and ``vocab_bytes`` of those that are not whole UTF-8."""
        text: dict[str, str] = {}
        raw: dict[str, str] = {}
        for token in sorted(set(ids)):
            piece = self._bytes_of(token)
            text[str(token)] = piece.decode(errors="replace")
            if text[str(token)].encode() != piece:
                raw[str(token)] = piece.hex()
        return {"vocab": text, "vocab_bytes": raw}

    def _bytes_of(self, token: int) -> bytes:
        if self._encoding is None:
            return str(token).encode()
        try:
            found: bytes = self._encoding.decode_single_token_bytes(token)
            return found
        except (AttributeError, KeyError, OverflowError):
            return self.context.decode_token(token).encode()

    # --- dictionaries ---

    def autoencoder(self, id: str, loc: Iterable[str | int] = ("dictionary",)) -> Autoencoder:
        """A dictionary's autoencoder; loaded if it is not in memory."""
        return self.autoencoders([id], loc)[0]

    def autoencoders(
        self, ids: Sequence[str], loc: Iterable[str | int] = ("dictionaries",)
    ) -> list[Autoencoder]:
        """Several autoencoders, which are in memory together."""
        found = []
        for id in ids:
            if id not in self._loaded:
                self.guard()
                source = self._of_autoencoder(id, loc)
                self._make_room(_file_bytes(source), ids)
                self._loaded[id] = self._load(source)
                self._loads += 1
                self._serials[id] = self._loads
                self._sizes[id] = _bytes(self._loaded[id])
            self._loaded.move_to_end(id)
            found.append(self._loaded[id])
            self._make_room(0, ids)
        return found

    def _of_autoencoder(self, id: str, loc: Iterable[str | int]) -> DictionarySource:
        """A dictionary that has an autoencoder; an error for others."""
        source = self.source(id, loc)
        if source.kind == "latent" and source.autoencoder is not None:
            return source
        why = "no autoencoder is at hand; start the server with --autoencoder"
        if source.kind != "latent":
            why = "its units are the model's own, of no autoencoder"
        raise Refusal(422, "no_autoencoder", f"{id}: {why}.", loc=loc)

    def contexts(
        self, ids: Sequence[str], loc: Iterable[str | int] = ("dictionaries",)
    ) -> list[AutoencoderContext]:
        """The autoencoders of some dictionaries, one context for each site."""
        by_site: dict[str, list[Autoencoder]] = {}
        for id, autoencoder in zip(ids, self.autoencoders(ids, loc), strict=True):
            by_site.setdefault(self.sources[id].site, []).append(autoencoder)
        return [AutoencoderContext.of(several) for several in by_site.values()]

    def _load(self, source: DictionarySource) -> Autoencoder:
        place, name = ActivationLocation.parse(source.location), source.autoencoder
        assert name is not None
        model = self.model
        if not source.is_registered:
            found = Autoencoder.load(name, strict=False, location=place, dtype=model.dtype)
            return found.to(model.device).eval().requires_grad_(False)
        registered = make_autoencoder_context(
            source.model or self.context.reference,
            name.partition("/")[0],
            model.device,
            dtype=model.dtype,
        )
        layers = registered.layer_indices
        return registered.get_autoencoder(place.layer if place.layer in layers else None)

    def _make_room(self, wanted: int, keep: Sequence[str]) -> None:
        """Drop autoencoders, those used longest ago first, until ``wanted`` bytes fit into the budget."""
        for id in [id for id in self._loaded if id not in keep]:
            if self._held() + wanted <= self.setup.budget:
                return
            del self._loaded[id]
            self._directions.pop(id, None)
            self.results.forget(id)
        if self._held() + wanted > self.setup.budget:
            raise Refusal(
                507,
                "dictionary_budget",
                f"The dictionaries of this request need {_mib(self._held() + wanted)}, the budget is "
                f"{_mib(self.setup.budget)}: ask for fewer at a time, or start the server with a larger "
                "budget.",
                loc=("dictionaries",),
            )

    def _held(self) -> int:
        return sum(self._sizes[id] for id in self._loaded)

    def directions(self, id: str | None = None) -> Directions:
        """What the units of a dictionary do to the logits; None: of the neurons of layer 0."""
        key = "" if id is None else id
        if key not in self._directions:
            if not self._directions:
                # All share its copy of the unembedding.
                self._directions[""] = Directions(self.context, "0/mlp.post_act")
            if id is not None:
                what = self._owner(id)
                location = None
                if isinstance(what, Autoencoder) and not what.is_transcoder:
                    location = self.sources[id].location
                self._directions[id] = self._directions[""].beside(what, location=location)
        return self._directions[key]

    def _owner(self, id: str) -> Autoencoder | str:
        source = self.source(id, ("d",))
        return source.location if source.kind != "latent" else self.autoencoder(id, ("d",))

    def tokens_along(self, direction: Tensor, k: int) -> TokenValues:
        """:func:`~neuron_explainer.analysis.input_tokens.tokens_along`, with the embedding read once."""

        def look() -> tuple[Tensor, Tensor]:
            embedding = self.model.weight(WeightLocationType.EMBEDDING, None).detach()
            return embedding, ~find_hardly_trained(embedding, TokenTexts(self.context)).marked

        embedding, listed = self.kept("embedding", look)
        return tokens_along(self.context, direction, k, embedding=embedding, listed=listed)

    # --- results ---

    def kept(
        self,
        key: Hashable,
        make: Callable[[], T],
        *,
        dictionary: str | None = None,
        of_model: bool = True,
    ) -> T:
        """A result that is computed once, and kept while there is room.

        Args:
            dictionary: the one that it depends on, if any.
            of_model: whether it depends on the model.
        """
        found: T | None = self.results.get(key)
        if found is None:
            found = make()
            if self.keeps_passes or not of_model:
                used = () if dictionary is None else (dictionary,)
                self.results.put(key, found, bytes_of(found), used)
        return found

    def memory(
        self,
        prompt: Hashable,
        goal: Hashable,
        changes: Sequence[Changed],
        positions: Sequence[int] | None,
        dictionaries: Sequence[str],
        inside: Iterable[str],
    ) -> PassMemory | None:
        """What is kept of a prompt; None if nothing may be. See :class:`PassMemory`.

        Args:
            dictionaries: those whose latents are asked for.
            inside: those that interventions and the goal depend on.
        """
        if not self.keeps_passes:
            return None
        used = frozenset(inside)
        parameters = [p for id in used for p in self.autoencoder(id).parameters()]
        return PassMemory(
            self.results,
            prompt,
            goal,
            tuple(changes),
            None if positions is None else tuple(positions),
            {self.sources[id].location: (id, self.which(id)) for id in dictionaries},
            used,
            storages_of([*self._weights(), *parameters]),
        )

    def which(self, id: str) -> Hashable:
        """What tells a dictionary in memory from others that had its id before."""
        autoencoder = self.autoencoder(id)
        return self._serials[id], versions([*autoencoder.parameters(), *autoencoder.buffers()])

    def watched(self, hooks: TransformerHooks | None = None) -> TransformerHooks:
        """The hooks, and one in each layer that ends a request that nobody waits for."""

        def look(x: Tensor) -> Tensor:
            self.guard()
            return x

        watch = TransformerHooks().append_at("resid.torso.post_mlp", look)
        return watch if hooks is None else hooks + watch


def _places_of(name: str, context: ModelContext) -> list[tuple[str, str]]:
    """How a source names each autoencoder, and the location of each."""
    if files.is_remote(name) or Path(name).exists():
        path = name if files.is_remote(name) else str(Path(name).absolute())
        location = Autoencoder.load(path, strict=False).location
        if location is None:
            raise InputError(f"{name} does not say where its inputs come from.")
        return [(path, str(location))]
    registered = make_autoencoder_context(context.reference, name.partition("/")[0], "cpu")
    family, _, wanted = name.partition("/")
    return [
        (family if layer is None else f"{family}/{layer}", str(registered.location.at(layer)))
        for layer in sorted(registered.layer_indices, key=str)
        if wanted in ("", str(layer))
    ]


def _encoding_of(context: ModelContext) -> Any:
    try:
        return context.get_encoding()
    except NeuronExplainerError:
        return None  # a model of token ids alone


def _bytes(autoencoder: Autoencoder) -> int:
    tensors = {t.data_ptr(): t for t in (*autoencoder.parameters(), *autoencoder.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _file_bytes(source: DictionarySource) -> int:
    """Bytes of a local autoencoder's files, about what it takes in memory; 0 where that is not known."""
    path = Path(source.autoencoder or "")
    if source.autoencoder is None or source.is_registered or files.is_remote(source.autoencoder):
        return 0
    if not path.exists():
        return 0
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
