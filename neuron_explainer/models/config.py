"""The shape of a transformer, as seven numbers of the original and four that other files need."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, did_you_mean

Activation = Literal["gelu_tanh", "gelu", "relu"]


class SerializableDataclass:
    """A dataclass that is written to and read from JSON."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # subclasses are dataclasses

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; an unknown or missing field is an error that names it."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # as above
        if unknown := sorted(set(d) - set(names)):
            raise CheckpointError(
                f"{cls.__name__}: unknown field {unknown[0]!r}.{did_you_mean(unknown[0], names)} "
                f"Known: {', '.join(names)}."
            )
        try:
            return cls(**d)
        except TypeError as error:
            raise CheckpointError(f"{cls.__name__}: {error}.") from None

    def save(self, path: str | Path) -> None:
        """Write the fields to a ``.json`` file."""
        _require_json(path)
        files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote."""
        _require_json(path)
        return cls.from_dict(files.read_json(files.fetch(path)))


def _require_json(path: str | Path) -> None:
    if Path(path).suffix != ".json":
        raise CheckpointError(
            f"{path}: configs are .json files; pickled configs (.pkl, .pickle) are refused because "
            "reading one can run any code. Open it where it was made and save it as .json."
        )


@dataclass(frozen=True)
class TransformerConfig(SerializableDataclass):
    """Sizes of a GPT-2-family transformer. The first seven fields are those of the original."""

    enc: str = "gpt2"
    """Name of the tokenizer: one of tiktoken's, or the one whose files lie beside the weights."""
    ctx_window: int = 1024
    """Most positions a sequence may have."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 2
    """Number of layers."""
    m_attn: float = 1
    """Width of queries, keys and values over all heads, as a multiple of ``d_model``."""
    n_heads: int = 8
    """Attention heads a layer."""
    m_mlp: float = 4
    """Width of the MLP as a multiple of ``d_model``."""
    n_vocab: int = 50257
    """Rows of the embedding; may be more than the tokenizer knows (padded vocabularies)."""
    activation: Activation = "gelu_tanh"
    """The MLP's nonlinearity; GPT-2's is the tanh approximation of GELU."""
    norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        for name in ("ctx_window", "d_model", "n_layers", "n_heads", "n_vocab"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    f"TransformerConfig.{name} must be a whole number >= 1, found {value!r}."
                )
        for name in ("m_attn", "m_mlp"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or int(self.d_model * value + 1e-6) < 1:
                raise InputError(
                    f"TransformerConfig.{name} must leave a width >= 1, found {value!r}."
                )
        if self.activation not in get_args(Activation):
            raise InputError(
                f"TransformerConfig.activation must be one of {', '.join(get_args(Activation))}, "
                f"found {self.activation!r}."
            )
        if self.d_attn_qk % self.n_heads:
            raise InputError(
                f"TransformerConfig: attention width {self.d_attn_qk} (d_model * m_attn) is not "
                f"divisible by n_heads {self.n_heads}."
            )

    # 1e-6: m_mlp may be a quotient (3000 / 1280) whose product falls just short of the whole number.
    @property
    def d_ff(self) -> int:
        """Width of the MLP."""
        return int(self.d_model * self.m_mlp + 1e-6)

    @property
    def d_attn_qk(self) -> int:
        """Width of queries and keys over all heads."""
        return int(self.d_model * self.m_attn + 1e-6)

    @property
    def d_attn_v(self) -> int:
        """Width of values over all heads."""
        return self.d_attn_qk

    @property
    def d_head_qk(self) -> int:
        """Width of one head's queries and keys."""
        return self.d_attn_qk // self.n_heads

    @property
    def d_head_v(self) -> int:
        """Width of one head's values."""
        return self.d_attn_v // self.n_heads
