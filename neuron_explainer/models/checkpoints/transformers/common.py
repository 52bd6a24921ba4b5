"""What the formats of a model's folder share: the config, the state dict that it asks for, checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.models.checkpoints.problems import Report, Shape, TensorInfo, compare
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.tokenizer_files import TokenizerSpec
from neuron_explainer.settings.fields import read_fields

Format = Literal["native", "pieces", "huggingface"]
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """The content of a saved model's folder."""

    config: TransformerConfig
    state_dict: StateDict
    """Tensors that share no memory with each other. Those that are loaded as they are stored are views of
    privately mapped files: changing one changes neither its file nor another tensor."""
    tokenizer: TokenizerSpec | None
    """The folder's own tokenizer; None if it has none and ``config.enc`` names a known one."""
    metadata: dict[str, Any]
    """What the saver added (native), or the fields of a foreign config that are not sizes."""
    format: Format


def expected_shapes(cfg: TransformerConfig) -> dict[str, Shape]:
    """Every key of a transformer's state dict with its shape, in the order of a forward pass."""
    d, qk, v, ff = cfg.d_model, cfg.d_attn_qk, cfg.d_attn_v, cfg.d_ff
    shapes: dict[str, Shape] = {
        "tok_embed.weight": (cfg.n_vocab, d),
        "pos_embed.weight": (cfg.ctx_window, d),
    }
    linears = {
        "attn.q_proj": (qk, d),
        "attn.k_proj": (qk, d),
        "attn.v_proj": (v, d),
        "attn.out_proj": (d, v),
        "mlp.in_layer": (ff, d),
        "mlp.out_layer": (d, ff),
    }
    for layer in range(cfg.n_layers):
        block = f"xf_layers.{layer}"
        for name, (n_out, n_in) in linears.items():
            shapes[f"{block}.{name}.weight"] = (n_out, n_in)
            shapes[f"{block}.{name}.bias"] = (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"{block}.{name}.weight"] = (d,)
            shapes[f"{block}.{name}.bias"] = (d,)
    shapes["final_ln.weight"] = (d,)
    shapes["final_ln.bias"] = (d,)
    shapes["unembed.weight"] = (cfg.n_vocab, d)
    return shapes


FITS_CONFIG = "Expected is what the sizes in config.json ask for: one of the two is wrong."


def wanted_keys(known: Iterable[str], keys: Iterable[str] | None) -> list[str]:
    """The keys of a state dict to read: ``keys``, or all known keys if that is None."""
    known = list(known)
    if keys is None:
        return known
    keys = list(dict.fromkeys(keys))
    for key in keys:
        if key not in known:
            raise InputError(f"this model has no tensor {key!r}.{did_you_mean(key, known)}")
    return keys


def check_for_saving(cfg: TransformerConfig, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to write a state dict that could not be loaded again."""
    report = Report("this state dict does not fit its config, nothing was saved")
    compare(
        report,
        expected_shapes(cfg),
        {name: TensorInfo.of(tensor) for name, tensor in state_dict.items()},
    )
    report.raise_if_any()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits. Unlike with ``==``, NaN equals itself and -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device:
        return True
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def make_config(
    fields: Mapping[str, Any], where: str, only: Sequence[str] | None = None
) -> TransformerConfig:
    """A config; its problems are reported as problems of the file ``where``.

    ``only``: the fields that must all be there, with no others.
    """
    return read_fields(TransformerConfig, fields, where, only=only, error=CheckpointError)
