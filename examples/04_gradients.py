"""Activation times gradient: which tokens' MLP outputs speak for the model's next word."""

import torch

from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.transformer import Transformer

TEXT = "The king and the queen had a daughter, and the princess loved her father the"

model = Transformer.load("tiny-tales", dtype=torch.float32)
tokens = torch.tensor([model.enc.encode(TEXT)], device=model.device)
activations, gradients = {}, {}


def keep_activation(x, layer):
    activations[layer] = x.detach()
    return x


def keep_gradient(grad, layer):
    gradients[layer] = grad
    return grad


hooks = TransformerHooks()
hooks.resid.torso.delta_mlp.append_fwd(keep_activation)
hooks.resid.torso.delta_mlp.append_bwd(keep_gradient)

logits, _ = model(tokens, hooks=hooks)
best = int(logits[0, -1].argmax())
logits[0, -1, best].backward()

print(
    f"{TEXT!r} -> {model.enc.decode([best])!r}; first-order effect of each MLP output on its logit"
)
effects = torch.stack([(activations[i] * gradients[i]).sum(-1)[0] for i in sorted(activations)])
print(f"{'':>12}" + "".join(f"  layer {i}" for i in range(len(effects))))
for token, row in zip(tokens[0].tolist(), effects.T.tolist()):
    print(f"{model.enc.decode([token])!r:>12}" + "".join(f"{effect:9.3f}" for effect in row))
