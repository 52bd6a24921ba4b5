"""k-sparse probing and absorption of an autoencoder, on tokens that rules label.

    print(probe(context, autoencoder, batches).table())

Shape legend: ``t`` tokens, ``n`` width, ``l`` latents.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.absorption import Absorption, absorption, absorption_table
from neuron_explainer.evaluation.floors import random_autoencoder
from neuron_explainer.evaluation.linear_probes import Method
from neuron_explainer.evaluation.placed import Placed, placed
from neuron_explainer.evaluation.probing import SparseProbing, probing_table, sparse_probing
from neuron_explainer.evaluation.spliced_passes import SplicedPasses
from neuron_explainer.evaluation.token_rules import label_tokens
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension

ROWS_AT_ONCE = 4096
FEWEST_DOCUMENTS = 20
"""With fewer documents than this, windows take their place: of one document none can be set apart."""


@dataclass(frozen=True)
class Probed:
    """What a few latents tell of a token's labels, and whether first letters are absorbed."""

    location: str
    n_tokens: int
    n_documents: int
    split_by: str
    """``"documents"`` or, of a text with few, ``"windows"``: none of these is on both sides of a split."""
    n_latents: int
    l0: float
    probing: Mapping[str, SparseProbing] = field(repr=False)
    """By label; its floor is a random autoencoder of the same shape and L0."""
    absorption: Mapping[str, Absorption] = field(repr=False)
    """By first letter; empty for a transcoder, and for letters that no dense probe finds."""
    absorption_floor: Mapping[str, Absorption] = field(repr=False)
    """The same of the random autoencoder."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        result: dict[str, Any] = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int | float | str)
        }
        for name in ("probing", "absorption", "absorption_floor"):
            result[name] = {label: each.to_dict() for label, each in getattr(self, name).items()}
        return result

    def table(self) -> str:
        """Both tables, with what their columns are."""
        return "\n".join(
            [
                f"{self.location}: {self.n_tokens:,} tokens of {self.n_documents:,} documents, "
                f"{self.n_latents:,} latents, L0 {self.l0:.1f}",
                "",
                f"k-sparse probing: accuracy on other {self.split_by}, ± standard deviation; 0.5 is chance",
                probing_table(self.probing),
                "",
                "absorption of first letters: share of tokens on which a letter's latents are silent and "
                "others do their work",
                absorption_table(self.absorption, self.absorption_floor),
            ]
        )


@torch.no_grad()
def probe(
    context: ModelContext,
    autoencoder: Autoencoder,
    batches: Iterable[TokenBatch],
    *,
    location: LocationLike | None = None,
    ks: Sequence[int] = (1, 2, 5),
    seeds: Sequence[int] = (0, 1, 2),
    method: Method = "closed_form",
) -> Probed:
    """Probe an autoencoder's latents on token batches, labelled by rules.

    Args:
        context: the model that it was trained on.
        autoencoder: is not changed.
        batches: token batches; of at least two windows.
        location: where its inputs come from, if the autoencoder does not say.
        ks: how many latents a probe may use.
        seeds: each draws other documents to test on.
        method: ``"closed_form"``, or ``"logistic"``, which needs scikit-learn and takes longer.
    """
    place = autoencoder.location if location is None else ActivationLocation.parse(location)
    name = "autoencoder" if place is None else str(place)
    subject = placed({name: autoencoder}, context.get_dim_size(Dimension.LAYERS))[name]
    tokens = labelled(context, subject, batches)
    latents = encoded(autoencoder, tokens.x)
    l0 = float((latents.values != 0).sum()) / len(tokens.x)
    if not l0:
        raise InputError(f"{name}: no latent fires on any of {len(tokens.x):,} tokens.")
    nothing = random_autoencoder(autoencoder, l0)
    floor = encoded(nothing, tokens.x)
    n_documents = len(torch.unique(tokens.document))
    by_document = n_documents >= FEWEST_DOCUMENTS
    tokens = tokens if by_document else tokens._replace(document=tokens.window)
    probing = sparse_probing(
        latents,
        tokens.labels,
        tokens.x,
        ks=ks,
        groups=tokens.document,
        seeds=seeds,
        floor=floor,
        method=method,
    )
    return Probed(
        location=str(subject.source),
        n_tokens=len(tokens.x),
        n_documents=n_documents,
        split_by="documents" if by_document else "windows",
        n_latents=autoencoder.n_latents,
        l0=l0,
        probing=probing,
        absorption=_absorption(autoencoder, latents, tokens, seeds),
        absorption_floor=_absorption(nothing, floor, tokens, seeds),
    )


class LabelledTokens(NamedTuple):
    """Activations of tokens and what rules say about these; all on the CPU."""

    x: Tensor
    """``[t, n]``"""
    labels: dict[str, Tensor]
    """``[t]`` bool each."""
    letters: dict[str, Tensor]
    """``[t]`` bool each."""
    document: Tensor
    """``[t]``: numbers of documents."""
    window: Tensor
    """``[t]``: numbers of windows."""


@torch.no_grad()
def labelled(
    context: ModelContext, subject: Placed, batches: Iterable[TokenBatch]
) -> LabelledTokens:
    """Run the model and label the tokens; only those whose next token is known count."""
    model = context.get_or_create_model()
    x, document, window = list[Tensor](), list[Tensor](), list[Tensor]()
    labels, letters, n_windows = list[dict[str, Tensor]](), list[dict[str, Tensor]](), 0
    for batch in batches:
        found = label_tokens(context, batch)
        passes = SplicedPasses(model, batch.tokens, batch.pad, [subject.source], logits=False)
        x.append(passes.activation(subject.source)[found.known.to(passes.tokens.device)].cpu())
        document.append(batch.document.cpu()[found.known])
        number = torch.arange(n_windows, n_windows + len(batch.tokens))[:, None]
        window.append(number.expand_as(found.known)[found.known])
        n_windows += len(batch.tokens)
        labels.append({name: each[found.known] for name, each in found.labels.items()})
        letters.append({name: each[found.known] for name, each in found.letters.items()})
    if not x:
        raise InputError("no batch of tokens was given.")
    rows, documents, windows = (torch.cat(parts) for parts in (x, document, window))
    return LabelledTokens(rows, _joined(labels), _joined(letters), documents, windows)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def encoded(autoencoder: Autoencoder, x: Tensor) -> Latents:
    """The active latents of ``[t, n]``, on the CPU."""
    found = []
    for rows in torch.split(x, ROWS_AT_ONCE):
        latents = autoencoder.encode_sparse(rows.to(autoencoder.device, autoencoder.dtype))
        found.append(latents._replace(values=latents.values.cpu(), indices=latents.indices.cpu()))
    return Latents.cat(found)


def _absorption(
    autoencoder: Autoencoder, latents: Latents, tokens: LabelledTokens, seeds: Sequence[int]
) -> dict[str, Absorption]:
    """Absorption of first letters; nothing for a transcoder, whose latents do not add up to its input."""
    if autoencoder.is_transcoder:
        return {}
    bias = autoencoder.pre_bias if autoencoder.post_bias is None else autoencoder.post_bias
    return absorption(
        latents,
        tokens.letters,
        normalized(autoencoder, tokens.x),
        autoencoder.directions,
        bias=bias.detach().cpu(),
        groups=tokens.document,
        seeds=seeds,
    )


def normalized(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """Activations as the autoencoder's directions add up to them, ``[t, n] -> [t, n]`` on the CPU."""
    rows = x.to(autoencoder.device, autoencoder.dtype)
    return autoencoder.normalize(rows)[0].cpu()
