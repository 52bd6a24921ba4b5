"""Undo shrinkage: train the decoder of a finished autoencoder while its encoder stays frozen.

A penalty on latents makes them too small, and so the reconstruction too (Wright and Sharkey 2024,
"Addressing feature suppression in SAEs"). Fine-tuning changes nothing about which latents are active. It
trains a scale for each latent, its decoder direction and the bias of the output, on the reconstruction alone.

At the end the scale becomes part of the decoder: latents keep their values, and directions get the length
that reconstruction needs. (A scale in the encoder would have the same effect with ReLU, and with TopK would
change which latents are active.)

Shape legend: ``b`` tokens, ``n`` inputs, ``o`` outputs, ``l`` latents, ``k`` active ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import kept_rows
from neuron_explainer.evaluation.pieces import Activations
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.checks import check_tensor
from neuron_explainer.progress import progress_bar


def finetune_decoder(
    autoencoder: Autoencoder,
    batches: Activations,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    progress: bool = True,
) -> Autoencoder:
    """Train scale, decoder and bias on the reconstruction, with one step of Adam for each batch.

    The loss is the fraction of the batch's variance that is unexplained, in units of normalised inputs.

    Args:
        autoencoder: not changed. In the result, a tied decoder has become a decoder of its own, and the
            output has a bias of its own.
        batches: activations as the model has them ``[…, n]``; for a transcoder, pairs with the activations
            that its output predicts. At least two tokens each.
        lr: learning rate of all three; 1e-5 changes almost nothing in a hundred steps.
        betas: Adam's betas.
        progress: whether to show a progress bar.

    Returns:
        A new autoencoder with the same latents; ``metadata["finetuned"]`` records the number of tokens.
    """
    if autoencoder.nonlinearity.needs_dictionary:
        raise InputError(
            f"{autoencoder._name()}: {autoencoder.nonlinearity.name} finds latents by the decoder's "
            "directions; they cannot be trained while latents stay what they are."
        )
    decoder = _Decoder(autoencoder)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr, betas=betas)
    n_tokens = 0
    for batch in progress_bar(batches, desc="fine-tuning", unit="batch", disable=not progress):
        latents, target = _frozen(autoencoder, batch)
        error = (decoder(latents) - target).square().sum()
        loss = error / (target - target.mean(dim=0)).square().sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"{autoencoder._name()}: the loss after {n_tokens} tokens is {float(loss.detach())}; "
                "expected finite activations, of at least two different tokens in each batch."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        n_tokens += len(target)
    if not n_tokens:
        raise InputError("fine-tuning needs activations; no tokens were given.")
    return decoder.folded(autoencoder, {"n_tokens": n_tokens, "lr": lr})


class _Decoder(nn.Module):
    """The trained part: scale, directions, bias."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        weight = autoencoder.decoder.weight.detach()
        bias = autoencoder.pre_bias if autoencoder.post_bias is None else autoencoder.post_bias
        self.scale = nn.Parameter(weight.new_ones(autoencoder.n_latents))  # [l]
        self.directions = nn.Parameter(weight.t().contiguous().clone())  # [l, o]
        self.bias = nn.Parameter(bias.detach().clone())  # [o]

    def forward(self, latents: Latents) -> Tensor:
        """``[b, o]`` in units of normalised inputs."""
        values = latents.values * self.scale[latents.indices]
        recons = latents._replace(values=values).decode(self.directions)
        return recons + self.bias

    def folded(self, autoencoder: Autoencoder, facts: dict[str, Any]) -> Autoencoder:
        state = dict(autoencoder.state_dict())
        state.pop("tied", None)
        state["decoder.weight"] = (self.scale[:, None] * self.directions).detach().t()
        state["post_bias"] = self.bias.detach()
        known = autoencoder.facts
        known["metadata"] = {**autoencoder.metadata, "finetuned": facts}
        return Autoencoder.from_state_dict(state, **known)


@torch.no_grad()
def _frozen(
    autoencoder: Autoencoder, batch: Tensor | tuple[Tensor, Tensor]
) -> tuple[Latents, Tensor]:
    """The latents of a batch, and what the decoder should return for them: ``[b, o]``."""
    x, target = batch if isinstance(batch, tuple) else (batch, batch)
    check_tensor(x, "a batch")
    if autoencoder.is_transcoder and not isinstance(batch, tuple):
        raise InputError(
            f"{autoencoder._name()}: a transcoder is trained on pairs of its input and what its output "
            f"stands for; found a batch {list(x.shape)} alone."
        )
    x, target = (
        kept_rows(t, None, "a batch").to(autoencoder.device, autoencoder.dtype) for t in (x, target)
    )
    latents, stats, _ = autoencoder.code_sparse(x)
    if stats is not None:  # the inverse of what decode does after the decoder
        target = target if stats.skip is None else target - stats.skip
        target = target if autoencoder.is_transcoder else stats.redo(target)
    return latents, target
