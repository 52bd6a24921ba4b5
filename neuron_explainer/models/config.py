"""The sizes of a transformer: seven fields of the original, and three that other checkpoints need."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.weight_names import Dimension
from neuron_explainer.settings.fields import check_types, read_fields

Activation = Literal["gelu_tanh", "gelu", "relu"]

# Far beyond any model, so that a damaged file is refused at once and not after minutes.
_LARGEST = {
    "ctx_window": 2**31 - 1,
    "d_model": 2**31 - 1,
    "n_layers": 10_000,
    "n_heads": 2**31 - 1,
    "n_vocab": 2**31 - 1,
}


class SerializableDataclass:
    """A dataclass that is written to and read from JSON."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        this: Any = self  # subclasses are dataclasses
        fields: dict[str, Any] = asdict(this)
        return fields

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. A CheckpointError names unknown or missing fields."""
        return read_fields(cls, d, cls.__name__, error=CheckpointError)

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
            f"{path}: expected a .json file. Pickled configs (.pkl, .pickle) are refused, because "
            "reading one can run any code: open it where it was made and save it as .json."
        )


@dataclass(frozen=True)
class TransformerConfig(SerializableDataclass):
    """Sizes of a GPT-2-family transformer. The first seven fields are those of the original."""

    enc: str = "gpt2"
    """Name of the tokenizer: one of tiktoken's, or the one whose files are beside the weights."""
    ctx_window: int = 1024
    """Largest number of positions in a sequence."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 2
    """Number of layers."""
    m_attn: float = 1
    """Width of queries, keys and values over all heads, as a multiple of ``d_model``."""
    n_heads: int = 8
    """Number of attention heads in each layer."""
    m_mlp: float = 4
    """Width of the MLP as a multiple of ``d_model``."""
    n_vocab: int = 50257
    """Rows of the embedding. There may be more than the tokenizer knows (padded vocabularies)."""
    activation: Activation = "gelu_tanh"
    """The MLP's nonlinearity; GPT-2's is the tanh approximation of GELU."""
    norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, most in _LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(
                    f"TransformerConfig.{name} must be at least 1 and at most {most}, found "
                    f"{getattr(self, name)}."
                )
        for name in ("m_attn", "m_mlp"):
            value = getattr(self, name)
            if not 1 <= self.d_model * value + 1e-6 <= _LARGEST["d_model"]:
                raise InputError(
                    f"TransformerConfig.{name} must leave a width >= 1, found {value!r}."
                )
        if self.norm_eps < 0:
            raise InputError(f"TransformerConfig.norm_eps must be >= 0, found {self.norm_eps}.")
        if self.d_attn_qk % self.n_heads:
            raise InputError(
                f"TransformerConfig: attention width {self.d_attn_qk} (d_model * m_attn) is not "
                f"divisible by n_heads {self.n_heads}."
            )

    # 1e-6: m_mlp may be a quotient (3000 / 1280) whose product is just below the whole number.
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

    @property
    def sizes(self) -> dict[Dimension, int]:
        """The length of each axis."""
        return {
            Dimension.MAX_CONTEXT_LENGTH: self.ctx_window,
            Dimension.RESIDUAL_STREAM_CHANNELS: self.d_model,
            Dimension.VOCAB_SIZE: self.n_vocab,
            Dimension.ATTN_HEADS: self.n_heads,
            Dimension.QUERY_AND_KEY_CHANNELS: self.d_head_qk,
            Dimension.VALUE_CHANNELS: self.d_head_v,
            Dimension.MLP_ACTS: self.d_ff,
            Dimension.LAYERS: self.n_layers,
        }
