"""An autoencoder's side of state dicts and folders: what it writes, what it is made of.

Judging what a state dict or a folder holds is the business of
:mod:`neuron_explainer.models.checkpoints.autoencoders.state`.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import safetensors.torch
import torch
from torch import Tensor, nn

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.files.origins import metadata_for_folder
from neuron_explainer.models.autoencoders.facts import Facts, check_names
from neuron_explainer.models.autoencoders.nonlinearities import (
    ACTIVATIONS_CLASSES,
    Nonlinearity,
    activation_name,
    as_nonlinearity,
    make_activation,
)
from neuron_explainer.models.checkpoints.autoencoders import Stated, read_autoencoder
from neuron_explainer.models.checkpoints.autoencoders.native import FORMAT_VERSION, WEIGHTS_FILE
from neuron_explainer.models.checkpoints.autoencoders.state import (
    NORMALIZATIONS,
    OPTIONAL_PARAMETERS,
    PARAMETERS,
    STATISTICS,
    Entries,
    InputNormalization,
    parse_state_dict,
    unknown_normalization,
)
from neuron_explainer.models.checks import check_dtype
from neuron_explainer.models.locations import ActivationLocation

logger = logging.getLogger("neuron_explainer.models.autoencoder")


class UnstatedNormalizationWarning(UserWarning):
    """An autoencoder was read from a file that does not say how its inputs were normalised."""


class StoredAutoencoder(nn.Module):
    """What an ``Autoencoder`` consists of, what it says about itself, how it is saved and loaded."""

    n_latents: int
    n_inputs: int
    n_outputs: int
    is_transcoder: bool
    tied: bool
    activation: nn.Module
    group_sizes: tuple[int, ...] | None
    input_normalization: InputNormalization
    location: ActivationLocation | None
    output_location: ActivationLocation | None
    model_name: str | None
    metadata: dict[str, Any]

    pre_bias: nn.Parameter
    latent_bias: nn.Parameter
    post_bias: nn.Parameter | None
    stats_last_nonzero: Tensor
    """``[l]`` int64: training steps since the latent was last active."""
    latents_activation_frequency: Tensor
    """``[l]`` float: share of training tokens on which the latent was active; ones if not known."""
    latents_mean_square: Tensor
    """``[l]`` float: mean square of the latent over training tokens."""

    encoder: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_fold_python_entries)  # type: ignore[no-untyped-call]

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """What is known about it besides its tensors, for another autoencoder that shares it."""
        return {
            "input_normalization": self.input_normalization,
            "location": self.location,
            "output_location": self.output_location,
            "model_name": self.model_name,
            "metadata": dict(self.metadata),
        }

    @property
    def nonlinearity(self) -> Nonlinearity:
        """``activation`` with all that a nonlinearity says about itself."""
        return as_nonlinearity(self.activation)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.encoder.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.weight.device

    def _name(self) -> str:
        return "autoencoder" if self.location is None else f"autoencoder of {self.location}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(description(self))}, dtype={self.dtype})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """torch's hook behind ``.to``, ``.half`` and the like: statistics keep their dtype."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    # ---- state dicts and files -----------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # state_dict is torch's own shallow copy: entries may be taken out of it.
        unfold_python_entries(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        *,
        dtype: torch.dtype | None = None,
        **facts: Unpack[Facts],
    ) -> Self:
        """The autoencoder that a ``state_dict()``, of this class or OpenAI's, describes.

        The caller's dict is left as it is and shares no memory with the result.

        Args:
            state_dict: tensors, and ``activation`` (a name; ReLU if absent, as in the earliest
                files) with ``activation_state_dict``.
            strict: if False, statistics buffers may be missing and unknown entries are left out,
                each with a logged warning. Weights may never be missing.
            dtype: the dtype of the weights; None keeps that of ``encoder.weight``.
            facts: recorded on the result, see
                :class:`~neuron_explainer.models.autoencoders.facts.Facts`. ``input_normalization`` is
                stated by the caller where the file does not say it. OpenAI's layout has no entry for
                it: its v5 files (TopK) need ``"layer_norm"``, and a TopK file without a statement is
                read as ``"none"`` with an :class:`UnstatedNormalizationWarning`.
        """
        check_names(facts)
        entries, problems, notes = parse_state_dict(state_dict, strict)
        if problems:
            raise CheckpointError("not a state dict of an autoencoder: " + "; ".join(problems))
        for note in notes:
            logger.warning("autoencoder state dict: %s", note)
        given = facts.get("input_normalization")
        facts["input_normalization"] = settle_normalization(entries, given)
        dtype = dtype or entries.tensors["encoder.weight"].dtype
        settings: dict[str, Any] = {**arguments(entries, dtype), **facts}
        autoencoder = cls(**settings)
        take_tensors(autoencoder, entries, dtype)
        return autoencoder

    def save(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, overwrite: bool = False
    ) -> None:
        """Write ``config.json`` and ``autoencoder.safetensors`` into ``folder``, whole or not at all.

        ``dtype`` is that of the two matrices on disk (None: as they are); float16 halves the size.
        Biases, thresholds and statistics, a small part, keep their own dtype. An autoencoder that is
        already there is replaced only with ``overwrite``.
        """
        dtype = dtype or self.dtype
        named = [*self.named_parameters(), *self.named_buffers()]
        tensors = tensors_to_save(named, dtype, self._name())
        config = config_to_save(self, dtype, folder)
        with files.atomic_folder(folder, overwrite=overwrite) as temporary:
            files.write_json(temporary / "config.json", config)
            with files.plain_write(temporary / WEIGHTS_FILE) as path:
                safetensors.torch.save_file(tensors, path)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        strict: bool = True,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        **stated: Unpack[Stated],
    ) -> Self:
        """Read a folder that :meth:`save` wrote, or what another library did; path or URL.

        The format is found from the content (:mod:`neuron_explainer.models.checkpoints.autoencoders`
        lists them all). What a file does not say and changes numbers has to be stated here; what it
        does say may be stated, and not contradicted.

        Args:
            source: a folder or a file. A ``.pt`` file is read with torch's ``weights_only`` reader:
                code in it is never run.
            strict: see :meth:`from_state_dict`; concerns files of OpenAI's layout.
            dtype: of the weights in memory; None keeps what is stored.
            device: where to put it.
            stated: such as ``input_normalization``, ``location``, ``norm_factor``: see
                :class:`~neuron_explainer.models.checkpoints.autoencoders.Stated`.
        """
        if dtype is not None:
            check_dtype(dtype)
        loaded = read_autoencoder(source, stated)
        try:
            autoencoder = cls.from_state_dict(
                loaded.state_dict,
                strict or not loaded.lenient,
                dtype=dtype,
                input_normalization=loaded.input_normalization,
                location=loaded.location,
                output_location=loaded.output_location,
                model_name=loaded.model_name,
                metadata=loaded.metadata,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        return autoencoder.to(device)


def _fold_python_entries(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    assert isinstance(module, StoredAutoencoder)
    fold_python_entries(module, state_dict, prefix)


def description(it: StoredAutoencoder) -> list[str]:
    """What ``repr`` says: ``["n_latents=…", …]``."""
    facts = [
        f"n_latents={it.n_latents}",
        f"n_inputs={it.n_inputs}",
        f"activation={it.activation!r}",
        f"tied={it.tied}",
        f"input_normalization={it.input_normalization!r}",
        f"location={None if it.location is None else str(it.location)!r}",
    ]
    if it.model_name is not None:
        facts.append(f"model_name={it.model_name!r}")
    if it.is_transcoder:
        output = None if it.output_location is None else str(it.output_location)
        facts.append(f"n_outputs={it.n_outputs}, output_location={output!r}")
    facts += [
        f"{name}=True" for name in ("post_bias", "skip", "glu") if getattr(it, name) is not None
    ]
    if it.group_sizes is not None:
        facts.append(f"group_sizes={it.group_sizes}")
    return facts


# ---- the entries of a state dict -------------------------------------------------------------------


def fold_python_entries(it: StoredAutoencoder, state_dict: dict[str, Any], prefix: str) -> None:
    """Turn torch's flat entries of the activation and the tied decoder into those of the format.

    ``tied`` and ``input_normalization`` are written only where a reader of OpenAI's layout, which has
    neither, would get another autoencoder without them: all other state dicts have its keys exactly.
    """
    inner = prefix + "activation."
    fields = {key[len(inner) :]: v for key, v in state_dict.items() if key.startswith(inner)}
    for key in fields:
        del state_dict[inner + key]
    state_dict[prefix + "activation"] = activation_name(it.activation)
    state_dict[prefix + "activation_state_dict"] = fields
    if it.tied:
        del state_dict[prefix + "decoder.linear.weight"]
        state_dict[prefix + "tied"] = True
    if it.input_normalization != "none" or it.nonlinearity.needs_normalization:
        state_dict[prefix + "input_normalization"] = it.input_normalization
    if it.is_transcoder:
        state_dict[prefix + "n_outputs"] = it.n_outputs
    if it.group_sizes is not None:
        state_dict[prefix + "group_sizes"] = list(it.group_sizes)


def unfold_python_entries(it: StoredAutoencoder, state_dict: dict[str, Any], prefix: str) -> None:
    """The inverse of :func:`fold_python_entries`, in place, for ``load_state_dict``.

    What a state dict cannot change about an existing autoencoder has to agree with it.
    """
    fields = state_dict.pop(prefix + "activation_state_dict", {})
    state_dict.update({f"{prefix}activation.{key}": value for key, value in fields.items()})
    if it.tied and prefix + "encoder.weight" in state_dict:
        weight = state_dict[prefix + "encoder.weight"]
        state_dict.setdefault(prefix + "decoder.linear.weight", weight)
    for key, expected, default in (
        ("activation", activation_name(it.activation), "ReLU"),
        ("tied", it.tied, False),
        ("input_normalization", it.input_normalization, "none"),
        ("n_outputs", it.n_outputs if it.is_transcoder else None, None),
        ("group_sizes", list(it.group_sizes) if it.group_sizes else None, None),
    ):
        found = state_dict.pop(prefix + key, default)
        if found != expected:
            raise CheckpointError(
                f"{it._name()}: {key} is {expected!r}, the state dict says {found!r}; use "
                "Autoencoder.from_state_dict."
            )


def settle_normalization(entries: Entries, given: InputNormalization | None) -> Any:
    """The normalisation that the state dict or the call states; a warning if neither does and the
    choice changes numbers."""
    stated = entries.input_normalization
    if given is not None and given not in NORMALIZATIONS:
        raise InputError(unknown_normalization(given))
    if stated is not None and given is not None and stated != given:
        raise CheckpointError(
            f"the state dict says input_normalization {stated!r}, the call says {given!r}."
        )
    doubtful = getattr(ACTIVATIONS_CLASSES[entries.activation], "needs_normalization", False)
    if stated is None and given is None and doubtful:
        warnings.warn(
            f"This {entries.activation} autoencoder's state dict does not say how its inputs were "
            "normalised; it is read as input_normalization='none'. OpenAI's v5 autoencoders were "
            "trained on layer-normed inputs and give garbage without: state it, "
            "`Autoencoder.from_state_dict(state_dict, input_normalization='layer_norm')` (or 'none' "
            "to confirm).",
            UnstatedNormalizationWarning,
            stacklevel=3,
        )
    return stated or given or "none"


def arguments(entries: Entries, dtype: torch.dtype) -> dict[str, Any]:
    """The constructor's arguments for an autoencoder of these entries, but for its facts.

    Its weights are on "meta": none are drawn only to be overwritten, which would take seconds and
    gigabytes for 131072 latents.
    """
    encoder = entries.tensors["encoder.weight"]
    activation = make_activation(entries.activation, entries.activation_fields)
    return {
        "n_latents": encoder.shape[0],
        "n_inputs": encoder.shape[1],
        "activation": activation.to(encoder.device, dtype),
        "tied": entries.tied,
        "n_outputs": entries.n_outputs,
        "post_bias": "post_bias" in entries.tensors,
        "skip": "skip.weight" in entries.tensors,
        "glu": "glu.weight" in entries.tensors,
        "group_sizes": entries.group_sizes,
        "device": "meta",
        "dtype": dtype,
    }


def take_tensors(autoencoder: nn.Module, entries: Entries, dtype: torch.dtype) -> None:
    """Give an autoencoder that was made from :func:`arguments` copies of the tensors.

    This settles how weights lie in memory, whatever the file's layout: an encoder's weights latent by
    latent, as ``[l, n]``, and the decoder's as well. Otherwise every later call would pay.
    """
    encoder = entries.tensors["encoder.weight"]
    for name in (*PARAMETERS, *OPTIONAL_PARAMETERS):
        if name in entries.tensors:
            weight = entries.tensors[name].detach()
            copied = (
                by_latent(weight, encoder.device, dtype)
                if name == "decoder.weight"
                else weight.to(
                    encoder.device, dtype, copy=True, memory_format=torch.contiguous_format
                )
            )
            owner, _, leaf = name.rpartition(".")
            setattr(autoencoder.get_submodule(owner), leaf, nn.Parameter(copied))
    for name, (value, statistics_dtype) in STATISTICS.items():
        known = entries.tensors.get(name, torch.full((len(encoder),), value))
        statistic = known.detach().to(encoder.device, statistics_dtype, copy=True)
        setattr(autoencoder, name, statistic)


def by_latent(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a decoder's ``[o, l]`` in which what a latent writes lies together in memory.

    Sparse decoding reads few whole columns; a matrix product takes either layout.
    """
    copied = weight.t().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return copied.t()


# ---- what a folder holds -----------------------------------------------------------------------------


def tensors_to_save(
    named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, name: str
) -> dict[str, Tensor]:
    """Every tensor on the CPU, the two matrices in ``dtype``; refuses what could not be loaded again."""
    tensors = {}
    for key, value in named:
        value = value.detach()
        stored = value.to(dtype) if key in ("encoder.weight", "decoder.weight") else value
        if not torch.isfinite(stored).all():
            largest = float(value.abs().max())
            raise InputError(
                f"{name} is not saved: {key} holds "
                + (
                    f"values up to {largest:.3g}, beyond the range of {dtype}."
                    if math.isfinite(largest)
                    else "NaN or infinity."
                )
            )
        tensors[key] = stored.cpu().contiguous()
    return tensors


def config_to_save(it: StoredAutoencoder, dtype: torch.dtype, folder: str | Path) -> dict[str, Any]:
    """The content of ``config.json`` in ``folder``."""
    fields = it.nonlinearity.plain_fields()
    try:
        stored = metadata_for_folder(it.metadata, folder)
        metadata = json.loads(json.dumps(stored, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{it._name()}: metadata cannot be JSON: {error}.") from None
    config = {
        "format_version": FORMAT_VERSION,
        "kind": "autoencoder",
        "n_latents": it.n_latents,
        "n_inputs": it.n_inputs,
        "activation": {"name": activation_name(it.activation), **fields},
        "tied": it.tied,
        "input_normalization": it.input_normalization,
        "location": None if it.location is None else str(it.location),
        "model_name": it.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "metadata": metadata,
    }
    if it.is_transcoder:
        config["n_outputs"] = it.n_outputs
    if it.output_location is not None:
        config["output_location"] = str(it.output_location)
    if it.group_sizes is not None:
        config["group_sizes"] = list(it.group_sizes)
    return config
