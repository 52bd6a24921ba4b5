"""Is the gradient's estimate right? Attribution beside measured ablation, for units and for latents."""

from neuron_explainer.analysis.attribution import attribution_patching, integrated_gradients
from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.open_model import open_model

model = open_model("tiny-tales").get_or_create_model()
prompt, target = "The king gave his daughter a golden", logit_difference(model, " ring", " apple")

for names in ([], ["ae-resid-delta-mlp"], ["ae-mlp-post-act", "ae-resid-delta-attn"]):
    contexts = [make_autoencoder_context("tiny-tales", name, device=model.device) for name in names]
    table = nodes(
        model,
        prompt,
        target,
        ["act_grad", "ablation"],
        30,
        autoencoders=contexts,
        freeze=(),
        bos=True,
    )
    print(f"{' and '.join(names) or 'neurons and heads'}: {len(table.nodes)} nodes,")
    print(
        f"  rank correlation of act_grad with what removing the node does: {table.rank_correlation:.2f}"
    )

# The error of integrated gradients is known: the attributions should sum to the change of the target.
for steps in (2, 8, 32):
    print(
        steps, "steps:", integrated_gradients(model, prompt, target, "2/mlp.post_act", steps=steps)
    )

# Patching every head's query, key, value and output from another prompt, estimated by one pass.
other = "The king gave his daughter a silver"
print(attribution_patching(model, prompt, other, target, bos=True))
