"""Autoencoders that have learned nothing: what their figures are is the floor of everyone's.

A random autoencoder reaches nine tenths of a trained one's score in several published evaluations
(Korznikov et al. 2026, arXiv:2602.14111), so a figure without its floor says little.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.checks import check_seed


@torch.no_grad()
def random_autoencoder(like: Autoencoder, l0: float, seed: int = 0) -> Autoencoder:
    """An autoencoder of the same shape with random unit directions that it reads and writes.

    It subtracts the same bias and normalises inputs in the same way; its nonlinearity is TopK, so that as
    many latents are active as in the one that it is compared with.

    Args:
        like: its sizes, biases, location and input normalisation are taken over.
        l0: how many latents are active on a token; rounded, and at least 1.
        seed: of the directions.
    """
    check_seed(seed)
    if not 0 < l0 <= like.n_latents:
        raise InputError(f"l0 must be above 0 and at most {like.n_latents} latents, found {l0}.")
    found = Autoencoder(
        like.n_latents,
        like.n_inputs,
        TopK(max(1, round(l0))),
        n_outputs=like.n_outputs if like.is_transcoder else None,
        post_bias=like.post_bias is not None and not like.is_transcoder,
        device=like.device,
        dtype=like.dtype,
        input_normalization=like.input_normalization,
        location=like.location,
        output_location=like.output_location,
        model_name=like.model_name,
    )
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(like.n_latents, like.n_inputs, generator=generator), dim=1)
    found.encoder.weight.copy_(rows)
    if like.is_transcoder:
        rows = torch.randn(like.n_latents, like.n_outputs, generator=generator)
        rows = F.normalize(rows, dim=1)
    found.decoder.weight.copy_(rows.t())
    found.pre_bias.copy_(like.pre_bias)
    if found.post_bias is not None and like.post_bias is not None:
        found.post_bias.copy_(like.post_bias)
    return found.eval().requires_grad_(False)


def permuted_directions(directions: Tensor, seed: int = 0) -> Tensor:
    """Directions that belong to other latents and point elsewhere: ``[l, o] -> [l, o]``.

    Rows and coordinates are put in another order, the same for all rows: lengths and the angles between
    directions stay as they are, but nothing is left of what they stand for.
    """
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(directions), generator=generator)
    columns = torch.randperm(directions.shape[1], generator=generator)
    return directions[rows.to(directions.device)][:, columns.to(directions.device)]
