"""Ablate every neuron of one layer in turn, and see which ones a prediction hangs on."""

import torch

from neuron_explainer.models.hooks import AtLayers, TransformerHooks
from neuron_explainer.models.transformer import Transformer

PROMPT = "Once upon a time there lived in the forest a great grey"
LAYER = 1

model = Transformer.load("tiny-tales", dtype=torch.float32)
tokens = torch.tensor([model.enc.encode(PROMPT)], device=model.device)


def ablate(neurons: torch.Tensor):
    """A hook that switches off one neuron in each row of the batch."""

    def hook(x):
        x[torch.arange(len(neurons)), :, neurons] = 0
        return x

    return hook


with torch.no_grad():
    plain = model(tokens)[0][0, -1].log_softmax(-1)
    favourite = int(plain.argmax())
    drops = []
    for neurons in torch.arange(model.cfg.d_ff, device=model.device).split(64):
        hooks = TransformerHooks()
        hooks.mlp.post_act.append_fwd(AtLayers(LAYER).append(ablate(neurons)))
        logits, _ = model(tokens.expand(len(neurons), -1), hooks=hooks)
        drops.append(plain[favourite] - logits[:, -1].log_softmax(-1)[:, favourite])
drop = torch.cat(drops)

print(f"{PROMPT!r} -> {model.enc.decode([favourite])!r} (p = {plain[favourite].exp():.3f})")
for neuron in drop.topk(5).indices.tolist():
    print(f"  without neuron {LAYER}/{neuron}: log-probability falls by {drop[neuron]:.3f}")
