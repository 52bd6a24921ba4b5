"""The shapes of requests and replies; FastAPI makes the OpenAPI of them.

Replies are made as plain values and are not checked against these at run time; tests do that.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from neuron_explainer.server.problems import ProblemReply

Kind = Literal["latent", "neuron", "channel", "head"]
Vocabulary = dict[str, str]


class Body(BaseModel):
    """The base of request bodies: unknown fields and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Health(BaseModel):
    """Whether the server is there."""

    version: str
    model_state: Literal["none", "loading", "ready", "failed"]
    queue_depth: int
    uptime: float


class DictionaryRow(BaseModel):
    """A dictionary in the list of all."""

    id: str
    name: str
    kind: Kind
    location: str
    layer: int | None
    site: str
    n: int
    n_alive: int
    n_dead: int
    n_dense: int
    signed: bool
    has_autoencoder: bool
    metrics: dict[str, Any] | None


class Model(BaseModel):
    """What runs here, and what may be asked of it."""

    model_config = ConfigDict(extra="allow")
    name: str | None
    state: Literal["none", "loading", "ready", "failed"]
    error: str | None
    family: str | None
    n_layers: int | None
    n_heads: int | None
    d_model: int | None
    d_ff: int | None
    n_ctx: int | None
    n_vocab: int | None
    dtype: str | None
    device: str | None
    parameters: int | None
    dictionaries: list[DictionaryRow]
    sites: list[dict[str, Any]]
    heads: list[Any]
    limits: dict[str, float]
    capabilities: list[str]
    read_only: bool
    python: str
    stores_python: str


class Bars(BaseModel):
    """A histogram: one more edge than counts."""

    edges: list[float]
    counts: list[int]


class Dictionary(DictionaryRow):
    """A dictionary by itself."""

    n_tokens: int
    density_hist: Bars
    """Over the units that are alive; edges are log10 of the density."""
    provenance: dict[str, Any]
    settings: dict[str, Any]
    map: bool
    prev_layer: str | None
    next_layer: str | None
    python: str


class Peek(BaseModel):
    """The beginning of an example: enough to recognise a unit."""

    ids: list[int]
    acts: list[tuple[int, float]]
    peak: int


class FeatureRow(BaseModel):
    """A unit in a table."""

    unit: int
    density: float
    max: float
    mean: float
    label: str | None
    score: float | None
    peek: Peek | None


class FeatureRows(BaseModel):
    """A page of a table of units."""

    items: list[FeatureRow]
    next_cursor: str | None
    total: int
    vocab: Vocabulary
    vocab_bytes: Vocabulary
    python: str


class Hit(BaseModel):
    """A unit that was found."""

    dictionary: str
    unit: int
    label: str | None
    why: str
    score: float | None


class Hits(BaseModel):
    """What a search found."""

    items: list[Hit]
    complete: bool


class ExampleReply(BaseModel):
    """A piece of text and the activations there; of heads, of pairs of tokens."""

    group: str
    interval: int
    low: float | None
    high: float | None
    rank: int
    value: float
    peak: int
    document: int
    start: int
    position: int
    ids: list[int]
    acts: list[tuple[int, float]]
    pairs: bool


class PartnerReply(BaseModel):
    """A unit that is active together with another."""

    unit: int
    both: int
    jaccard: float
    pmi: float
    phi: float
    label: str | None


class LabelReply(BaseModel):
    """What somebody says that a unit means."""

    id: str
    source: str
    text: str
    score: float | None
    editable: bool


class Feature(BaseModel):
    """All that a store knows of a unit."""

    dictionary: str
    unit: int
    kind: Kind
    location: str
    signed: bool
    stats: dict[str, float | int]
    hist: Bars
    badges: list[Literal["dead", "dense", "single_token", "start_only"]]
    examples: list[ExampleReply]
    partners: list[PartnerReply]
    labels: list[LabelReply]
    prev_alive: int | None
    next_alive: int | None
    prev_layer: str | None
    next_layer: str | None
    bookmarked: bool
    vocab: Vocabulary
    vocab_bytes: Vocabulary
    python: str


class Examples(BaseModel):
    """Some of a unit's examples."""

    items: list[ExampleReply]
    total: int
    next_offset: int | None
    vocab: Vocabulary
    vocab_bytes: Vocabulary


class Labels(BaseModel):
    """The labels of a unit."""

    items: list[LabelReply]


class NewLabel(Body):
    """What somebody says that a unit means."""

    text: Annotated[str, Field(min_length=1, max_length=2000)]
    source: Annotated[str, Field(max_length=80)] = "user"
    score: float | None = None


class BookmarkReply(BaseModel):
    """A unit to come back to."""

    dictionary: str
    unit: int
    note: str
    label: str | None


class Bookmarks(BaseModel):
    """All bookmarks."""

    items: list[BookmarkReply]


class NewBookmark(Body):
    """A unit to come back to."""

    dictionary: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    unit: Annotated[int, Field(ge=0, le=2**31 - 1)]
    note: Annotated[str, Field(max_length=2000)] = ""


class LineError(BaseModel):
    """A line that could not be used, and why."""

    line: int
    detail: str


class Imported(BaseModel):
    """How many labels were taken over."""

    imported: int
    skipped: int
    errors: list[LineError]
    """Of the first lines that were skipped."""


class NewSession(Body):
    """The state of a page, where it is too long for an address."""

    state: dict[str, Any]


class SessionId(BaseModel):
    """What a state is called."""

    id: str


class Session(BaseModel):
    """A state that was kept."""

    id: str
    state: dict[str, Any]


class FactorRow(BaseModel):
    """A transformer factor in a table."""

    factor: int
    level: Literal["low", "mid", "high", "silent"]
    importance: list[float]
    """In each layer."""
    words: list[int]
    """The tokens on which it is strongest."""


class FactorRun(BaseModel):
    """A folder of factors' examples."""

    id: str
    name: str
    model: str
    text: str
    n_factors: int
    n_tokens: int
    locations: list[str]
    levels: dict[str, int]
    factors: list[FactorRow]
    python: str


class FactorRunList(BaseModel):
    """All folders of factors."""

    runs: list[FactorRun]
    vocab: Vocabulary
    vocab_bytes: Vocabulary


class FactorSentence(BaseModel):
    """A sentence in which a factor is strong at a token, ``index``."""

    score: float
    ids: list[int]
    index: int
    position: int
    saliency: list[float] | None
    """What keeping each token up to ``index`` adds to the factor."""
    r2: float | None


class FactorLayer(BaseModel):
    """A factor in one layer."""

    location: str
    examples: list[FactorSentence]


class Factor(BaseModel):
    """A transformer factor."""

    run: str
    factor: int
    level: Literal["low", "mid", "high", "silent"]
    locations: list[str]
    importance: list[float]
    layers: list[FactorLayer]
    previous: int | None
    next: int | None
    vocab: Vocabulary
    vocab_bytes: Vocabulary
    python: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemReply, "description": text}
    for status, text in {
        401: "the token is missing",
        403: "not allowed here",
        404: "there is no such thing",
        422: "the request is wrong",
        429: "too many requests",
        503: "not available now",
    }.items()
}
"""Errors that every route may answer with."""
